"""`cepo bench --kernels`: every kernel, and the engine on all of them, compared with their peers on one GPU.

Only what agrees with the float32 definition is timed. The device's peak rates, which give the floors, are measured by a
copy for bytes and a large matrix product for operations. Each part has a deadline, so that the whole ends in time.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from transformers import LlamaConfig

from cepo.benchmarks.engine.cases import EXACT, ONLY, Case, Subject, contenders, new_subject
from cepo.benchmarks.engine.peers import Jacobians, Workload, padded_jacobians
from cepo.benchmarks.engine.sizes import SIZES, Shapes, random_workload
from cepo.benchmarks.kernels.cases import EAGER, Operation, Widths, operations
from cepo.benchmarks.kernels.rows import (
    Recorder,
    Row,
    WrongValueError,
    case_row,
    measured_floors,
    missing_reason,
    operation_row,
)
from cepo.benchmarks.measure import environment
from cepo.eval.report.tables import ConsoleTable
from cepo.files import make_folder, write_text
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.swaps import Swaps
from cepo.kernels.launch import Implementation, use_triton

_COMPILATION = 60.0  # seconds that must be left to compile a whole model
# Deadline of each part, as a fraction of the time limit on a GPU; what does not fit is recorded as out of time.
_UNTIL = {"kernels": 0.4, "engine": 0.7, "compiled kernels": 0.88, "compiled engine": 1.0}


@dataclass(frozen=True)
class KernelSize:
    """The operations' shapes, and the engine's model and workloads (see `sizes.Size`)."""

    widths: Widths
    model: str
    config: Any
    shapes: Shapes
    check: Shapes


KERNEL_SIZES = {
    "qwen3": KernelSize(
        Widths(1024, 3072, 16, 8, 128, 151936, G=8, Lz=1024, Lx=256, dtype=torch.bfloat16),
        "Qwen3-0.6B",
        SIZES["h100"].models["Qwen3-0.6B"],
        Shapes(8, 1024, 256, 9, 4),
        Shapes(2, 1024, 256, 9, 1),
    ),
    "tiny": KernelSize(
        Widths(32, 48, 4, 2, 16, 100, G=2, Lz=24, Lx=8, dtype=torch.float32),
        "tiny",
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
        ),
        Shapes(2, 12, 6, 3, 1),
        Shapes(2, 12, 6, 3, 1),
    ),
}


def run_kernel_benchmark(
    output: Path,
    *,
    device: str = "cuda",
    seed: int = 0,
    minutes: float = 9.0,
    commit: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[list[ConsoleTable], bool]:
    """Compare the values of every contender, time those that agree, and record both.

    `output` gets one line per contender in kernels.jsonl (appended) and the tables in kernels.txt (replaced). On a CPU,
    shapes are tiny and nothing is timed: the run shows that the command works and the values agree, of the kernels in
    Triton's interpreter (TRITON_INTERPRET=1) or else of plain PyTorch.

    Args:
        output: folder for the results.
        device: "cuda", with Qwen3-0.6B's shapes in bfloat16, or "cpu".
        seed: seed of inputs, weights and rollouts.
        minutes: time limit on CUDA.
        commit: commit of this code; None to ask git.
        progress: called with the name of each contender before it runs.

    Returns:
        The tables, and whether all of this package's contenders that there was time for succeeded. The run ends at the
        first with wrong values.

    Raises:
        ValueError: for an unknown or a missing device.
    """
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device is {device!r}; expected cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but there is no CUDA device; expected --device cpu here")
    size = "qwen3" if device == "cuda" else "tiny"
    make_folder(output)
    chosen, place, ours = KERNEL_SIZES[size], torch.device(device), _our_implementation(device)
    floors = measured_floors(place, chosen.widths)
    how = "interpreted" if ours == "triton" else "compiled" if place.type == "cuda" else "plain PyTorch"
    facts = {"size": size, "seed": seed, "kernels": how, **floors, **environment(place, commit)}
    started, limit = time.perf_counter(), 60 * minutes if device == "cuda" else float("inf")
    deadlines = {part: started + limit * share for part, share in _UNTIL.items()}
    run = Recorder(output / "kernels.jsonl", facts, place, deadlines, [], progress)
    with contextlib.suppress(WrongValueError):
        _run_operations(run, "kernels", operations(chosen.widths, place, ours, seed), compiled=False)
        subject, workload = _run_engine(run, chosen, ours, seed)
        _run_operations(run, "compiled kernels", operations(chosen.widths, place, ours, seed), compiled=True)
        _write(output / "kernels.txt", _tables(run.rows), facts)  # before compiling, which can outlast the deadline
        _run_compiled_engine(run, subject, workload)
    tables = _tables(run.rows)
    _write(output / "kernels.txt", tables, facts)
    of_ours = [row["status"] for row in run.rows if row["contender"].startswith("cepo")]
    return tables, all(status == "ok" or status.startswith("out of time") for status in of_ours)


def _our_implementation(device: str) -> Implementation:
    """Return "triton" on a CPU with Triton's interpreter, else "auto": kernels on CUDA, plain PyTorch on a CPU."""
    try:
        return "triton" if device == "cpu" and use_triton("triton", torch.empty(0)) else "auto"
    except (ValueError, RuntimeError):
        return "auto"


def _run_operations(
    run: Recorder, part: Literal["kernels", "compiled kernels"], found: Iterator[Operation], *, compiled: bool
) -> None:
    """Run the contenders that go through torch.compile, or those that do not."""
    for operation in found:
        torch.compiler.reset()
        those = [contender for contender in operation.contenders if contender.compiled == compiled]
        truth = operation.truth() if those and run.left(part) > 0 else None
        for contender in those:
            run.progress(f"{operation.name}: {contender.name}")
            run.add(operation_row(run, part, operation, contender, truth))
        del truth
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def _run_engine(run: Recorder, size: KernelSize, ours: Implementation, seed: int) -> tuple[Subject, Workload]:
    """Measure the engine with the kernels and with plain PyTorch, and its peers without torch.compile."""
    run.progress(f"{size.model}: oracle")
    vocabulary = size.config.vocab_size
    check = random_workload(vocabulary, size.check, seed)
    workload = random_workload(vocabulary, size.shapes, seed)
    subject = new_subject(size.model, size.config, size.widths.dtype, run.device, check, seed)
    on_kernels = replace(subject, engine=GroupEngine(subject.model, kernels=ours))
    problem = on_kernels.engine.unserved
    if problem is None and on_kernels.engine.swaps == Swaps() and run.facts["kernels"] != "plain PyTorch":
        problem = "the engine continued without kernels; its log says why"
    cases = [
        replace(case, name=f"cepo, {how}, {case.name.removeprefix('group: ')}")
        for how, own in (("kernels", on_kernels), ("plain", subject))
        for case in contenders(own, ())
        if case.name in (EXACT, ONLY)
    ]
    peers = [case for case in contenders(subject, ("reference", "padded", "functional")) if case.peer is not None]
    for case in (*cases, *peers):
        run.progress(f"{size.model}: {case.name}")
        taken = on_kernels.engine.swaps if case.name.startswith("cepo, kernels") else Swaps()
        computes = f"attention: {taken.attention}, head: {taken.head}, {len(taken.forwards)} modules by kernels"
        refused = problem if case.name.startswith("cepo, kernels") else None
        run.add(case_row(run, "engine", subject, case, workload, computes if case.peer is None else "", refused))
    return subject, workload


def _run_compiled_engine(run: Recorder, subject: Subject, workload: Workload) -> None:
    """Measure padded autograd on the model compiled by torch.compile."""
    model: Any = torch.compile(subject.model)
    for base in contenders(subject, ("padded",)):
        if base.peer is None:
            continue

        def jacobians(given: Workload, batch: int, base: Case = base) -> Jacobians:
            return padded_jacobians(model, given, links=base.links, batch=batch)

        case = replace(base, name=f"{base.name}, torch.compile", run=jacobians)
        run.progress(f"{subject.name}: {case.name}")
        too_late = "out of time" if run.left("compiled engine") < _COMPILATION else None
        missing = missing_reason("cuda", run.device) or too_late
        run.add(case_row(run, "compiled engine", subject, case, workload, "the model compiled", missing))


def _tables(rows: Sequence[Row]) -> list[ConsoleTable]:
    """Return a table per operation and shapes."""
    tables = []
    for operation, shapes in dict.fromkeys((row["operation"], row["shapes"]) for row in rows):
        members = [row for row in rows if (row["operation"], row["shapes"]) == (operation, shapes)]
        bound = next((row["bound"] for row in members if row.get("bound")), None)
        eager = next((row["seconds"] for row in members if row["contender"] == EAGER), None)
        title = f"{operation}, {shapes}" + (f"; {bound}" if bound else "")
        cells = [_cells(row, eager) for row in members]
        tables.append(ConsoleTable(("contender", "error", "ms", "× eager", "of floor", "computes"), cells, title))
    return tables


def _cells(row: Row, eager: float | None) -> list[str]:
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    if row["status"] != "ok":
        return [row["contender"], error, row["status"], "", "", row["computes"]]
    seconds, share = row["seconds"], row.get("of_floor")
    return [
        row["contender"],
        error,
        "" if seconds is None else f"{1e3 * seconds:.4g}",
        f"{eager / seconds:.2f}" if eager and seconds else "",
        "" if share is None else f"{share:.0%}",
        row["computes"],
    ]


def _write(path: Path, tables: Sequence[ConsoleTable], facts: Row) -> None:
    text = io.StringIO()
    console = Console(file=text, width=200)
    console.print("cepo kernels: times only where values agree; × eager and share of the floor", *tables, sep="\n")
    console.print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    write_text(path, text.getvalue())


def main(
    output: Annotated[Path, typer.Option(help="Folder for kernels.jsonl and kernels.txt.")] = Path("runs/kernels"),
    device: Annotated[str, typer.Option(help="cuda, or cpu to compare values without timing.")] = "cuda",
    seed: Annotated[int, typer.Option(help="Seed of inputs, weights and rollouts.")] = 0,
    minutes: Annotated[float, typer.Option(help="Time limit on CUDA.", min=0.0)] = 9.0,
    commit: Annotated[str | None, typer.Option(help="Commit to record. Default: git's.")] = None,
) -> None:
    """Measure every Triton kernel, and the engine on all of them, beside their peers on one GPU."""
    errors = Console(stderr=True)
    try:
        tables, sound = run_kernel_benchmark(
            output, device=device, seed=seed, minutes=minutes, commit=commit, progress=errors.print
        )
    except ValueError as error:
        errors.print(f"error: {error}", markup=False)
        raise typer.Exit(2) from None
    Console().print(*tables, sep="\n")
    if not sound:
        errors.print("error: a kernel failed or disagreed; see the tables", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
