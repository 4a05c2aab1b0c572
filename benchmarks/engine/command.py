"""`cepo bench`: time the group engine and its peers in one process, if their values agree with the oracle."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cepo.benchmarks.engine.cases import (
    EXACT,
    ONLY,
    PADDED,
    PEERS,
    REFERENCE_SCHEDULE,
    Case,
    Subject,
    base_keys,
    contenders,
    new_subject,
    on_kernels,
    worst_error,
)
from cepo.benchmarks.engine.effects import DONORS, QUESTIONS, effect_contenders, effect_subject
from cepo.benchmarks.engine.figures import draw_scaling
from cepo.benchmarks.engine.loss import SETTINGS, loss_contenders, loss_subject
from cepo.benchmarks.engine.peers import Jacobians, Workload
from cepo.benchmarks.engine.sizes import SIZES, Shapes, Size, random_workload
from cepo.benchmarks.engine.tables import RATIOS, results_tables, results_text
from cepo.benchmarks.measure import environment, measure
from cepo.eval.report.tables import ConsoleTable
from cepo.files import append_jsonl, make_folder, write_text

_SCALED = (PADDED, ONLY, EXACT)
Row = dict[str, Any]


def run_benchmark(
    size: str,
    output: Path,
    *,
    seed: int = 0,
    peers: Sequence[str] | None = None,
    scaling: bool = True,
    device: str | None = None,
    commit: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[ConsoleTable]:
    """Compare values, then time the group engine and its peers on the same rollouts, and record the results.

    Every case first runs on a small workload whose Jacobians the oracle has computed (in half precision, on a float32
    copy of the model), which also warms it up. Then it is timed, and its answers are compared again as far as the
    oracle's are known. A case whose values differ gets no time.

    Appends a line per case to results.jsonl, and writes the tables to bench.txt and a PNG per scaling axis.

    Args:
        size: a name in `SIZES`.
        output: folder of the results.
        seed: seed of weights, token ids and permutations.
        peers: some of "reference", "padded", "functional", "captum" and "inseq"; None for all. The group engine always
            runs, and on CUDA a second time on the kernels.
        scaling: whether to measure how cost grows with G, Lz, Lx and K, and what a static opening of the prompt saves.
        device: "cpu" or "cuda"; None for "cuda" if the size needs it, else "cpu".
        commit: commit of this code; None to ask git.
        progress: called with a description of what runs next.

    Returns:
        The tables with their main columns; bench.txt has all columns.

    Raises:
        ValueError: for an unknown size, peer or device, or if a GPU is needed and there is none.
    """
    chosen, place, named_peers = _checked(size, peers, device)
    make_folder(output)
    facts = {"size": size, "seed": seed, **environment(place, commit)}
    log = _Log(output / "results.jsonl", facts, [], progress or (lambda text: None))
    for index, (name, config) in enumerate(chosen.models.items()):
        log.progress(f"{name}: the oracle")
        check = random_workload(config.vocab_size, chosen.check, seed)
        subject = new_subject(name, config, chosen.dtype, place, check, seed)
        cases = [*contenders(subject, named_peers), *on_kernels(subject, contenders)]
        agreed = _run_shapes("peers", subject, cases, chosen, config.vocab_size, log)
        for question in QUESTIONS:
            of_effects, contenders_of = effect_subject(subject, question), partial(effect_contenders, question=question)
            cases = [*contenders_of(of_effects, named_peers), *on_kernels(of_effects, contenders_of)]
            _run_shapes("effects", of_effects, cases, _with_donors(chosen, DONORS), config.vocab_size, log)
        of_loss = loss_subject(subject)
        cases = loss_contenders(of_loss, named_peers)
        _run_shapes("loss", of_loss, cases, _with_donors(chosen, SETTINGS.donors), config.vocab_size, log)
        if scaling and index == 0:
            _run_static(subject, agreed, chosen, config.vocab_size, log)
            _run_scaling(subject, agreed, chosen, config.vocab_size, log)
            for axis in chosen.scaling:
                points = [row for row in log.rows if row["section"] == "scaling" and axis in row["axes"]]
                draw_scaling(points, axis, f"{name}, {facts['device']}", output / f"scaling_{axis}.png")
        del subject, of_effects, of_loss, cases, agreed
        write_text(output / "bench.txt", results_text(size, log.rows))
    return results_tables(log.rows)


def _checked(size: str, peers: Sequence[str] | None, device: str | None) -> tuple[Size, torch.device, tuple[str, ...]]:
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    named = PEERS if peers is None else tuple(peers)
    if unknown := [peer for peer in named if peer not in PEERS]:
        raise ValueError(f"peers holds {unknown[0]!r}; expected some of {', '.join(PEERS)}")
    chosen = SIZES[size]
    wanted = device or ("cuda" if chosen.cuda else "cpu")
    if wanted not in ("cpu", "cuda"):
        raise ValueError(f"device is {wanted!r}; expected cpu or cuda")
    if chosen.cuda and (wanted != "cuda" or not torch.cuda.is_available()):
        raise ValueError(f"size is {size!r}, which needs a CUDA device, and there is none; expected tiny or small here")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but there is no CUDA device; expected cpu")
    return chosen, torch.device(wanted), named


@dataclass(frozen=True)
class _Log:
    """The rows; each is appended to the file immediately, so that a killed run keeps it."""

    path: Path
    facts: Row
    rows: list[Row]
    progress: Callable[[str], None]

    def add(self, row: Row) -> None:
        self.rows.append({**self.facts, **row})
        append_jsonl(self.path, self.rows[-1:])


def _run_shapes(
    section: str, subject: Subject, cases: Sequence[Case], size: Size, vocabulary: int, log: _Log
) -> list[Case]:
    """Measure every case on every workload of the size; return those with right values on all of them."""
    wrong: set[str] = set()
    for shapes in size.shapes:
        workload = random_workload(vocabulary, shapes, subject.check.seed)
        by_case: dict[str, Row] = {}
        for number, case in enumerate(cases):
            log.progress(f"{subject.name}, G {shapes.G}: {case.name} ({number + 1} of {len(cases)})")
            row = _measured(subject, case, workload, subject.wanted, checked=True, alone=size.alone)[0]
            by_case[case.name] = row
            ratios = _ratios(row, by_case.get(case.baseline))
            log.add({"section": section, **_shapes_of(subject, shapes), **row, **ratios})
            if row["status"] not in ("ok", "out of memory"):
                wrong.add(case.name)
    return [case for case in cases if case.name not in wrong]


def _with_donors(size: Size, count: int) -> Size:
    """Return the size with `count` counterfactuals."""
    return replace(size, shapes=tuple(replace(shapes, K=count) for shapes in size.shapes))


def _run_static(subject: Subject, cases: Sequence[Case], size: Size, vocabulary: int, log: _Log) -> None:
    """Measure several prompts with a shared opening that no link differentiates, and the same prompts without it."""
    shapes, whole = size.static, replace(size.static, opening=0)
    seed = subject.check.seed
    workload = random_workload(vocabulary, shapes, seed)
    spans = random_workload(vocabulary, whole, seed).rollouts[0].spans
    differentiated = replace(workload, rollouts=tuple(replace(rollout, spans=spans) for rollout in workload.rollouts))
    wanted: Jacobians = {}
    baseline: Row | None = None
    by_name = {case.name: case for case in cases}
    plan = [(REFERENCE_SCHEDULE, shapes, workload), (EXACT, shapes, workload), (ONLY, shapes, workload)]
    plan.append((EXACT, whole, differentiated))
    for name, of, given in plan:
        if name not in by_name:
            continue
        log.progress(f"{subject.name}, static opening of {of.opening} of {of.Lz} tokens: {name}")
        # The prompt's Jacobian has other rows if its span begins elsewhere, so it is not compared.
        known = wanted if of is shapes else {key: jac_SD for key, jac_SD in wanted.items() if key[0] == "X->Y"}
        # A schedule that runs rollouts one at a time needs only one.
        row, found = _measured(subject, by_name[name], given, known, checked=False, alone=1)
        if name == REFERENCE_SCHEDULE:
            baseline, wanted = row, found
        log.add({"section": "static", **_shapes_of(subject, of), **row, **_ratios(row, baseline)})


def _run_scaling(subject: Subject, cases: Sequence[Case], size: Size, vocabulary: int, log: _Log) -> None:
    """Measure how the cost of some cases grows along each axis."""
    points: dict[Shapes, list[str]] = {}
    for axis, values in size.scaling.items():
        for value in values:
            points.setdefault(replace(size.scaling_base, **{axis: value}), []).append(axis)
    chosen = sorted((case for case in cases if case.name in _SCALED), key=lambda case: _SCALED.index(case.name))
    for number, (shapes, axes) in enumerate(points.items()):
        workload = random_workload(vocabulary, shapes, subject.check.seed)
        wanted: Jacobians = {}  # those of the first case; all cases agreed with the oracle before
        for case in chosen:
            log.progress(f"{subject.name}, scaling: {case.name} (point {number + 1} of {len(points)})")
            row, found = _measured(subject, case, workload, wanted, checked=False, alone=None)
            wanted = wanted or found
            log.add({"section": "scaling", "axes": axes, **_shapes_of(subject, shapes), **row})


def _measured(
    subject: Subject, case: Case, workload: Workload, wanted: Jacobians, *, checked: bool, alone: int | None
) -> tuple[Row, Jacobians]:
    """Return the row of a case, with a time only if its values agree, and its Jacobians.

    Args:
        subject: the model.
        case: the case.
        workload: the workload to time it on.
        wanted: Jacobians to compare with; keys of other workloads are ignored.
        checked: whether to run the small workload first.
        alone: number of rollouts to time if the case runs one at a time; None for all.
    """
    # Unchecked cases are compared with each other, and each may err by the tolerance.
    tolerance = subject.tolerance if checked else 2 * subject.tolerance
    row: Row = {"case": case.name, "status": "ok", "error": None, "tolerance": tolerance, "seconds": None}
    # Measured again with each case, since the load of the machine changes.
    rate = max(subject.matmul, subject.matmul_rate(seconds=0.05))
    row |= {"oracle_error": subject.oracle_error, "matmul_flops_per_s": rate}
    if case.peer in ("captum", "inseq") and importlib.util.find_spec(case.peer) is None:
        return {**row, "status": "not installed"}, {}
    measured_on = replace(workload, rollouts=workload.rollouts[: alone if case.alone else None])
    check = replace(subject.check, rollouts=subject.check.rollouts[: alone if case.alone else None])
    batch = len(measured_on.rollouts)
    error = 0.0
    while True:
        try:
            if checked and case.exact is not None and subject.exact is not None:
                row["error_in_float32"] = error = _error(case.exact, check, batch, subject.exact, subject.exact.wanted)
                if not error <= subject.exact.tolerance:
                    return {**row, **_disagreement(error, " in float32")}, {}
            if checked:
                error = _error(case, check, batch, subject, wanted)
            if not error <= tolerance:
                return {**row, **_disagreement(error)}, {}
            found, took = measure(lambda batch=batch: case.run(measured_on, batch), subject.device)  # type: ignore[misc]
            break
        except torch.OutOfMemoryError:
            if not case.batched or batch == 1:
                return {**row, "status": "out of memory"}, {}
        except Exception as failure:
            if case.peer is None:  # a failure of this package ends the run; one of a peer becomes a row
                raise
            return {**row, "status": f"failed with {type(failure).__name__}: {failure}"[:200]}, {}
        batch = (batch + 1) // 2
    later = worst_error(found, wanted, base_keys(case, measured_on), by_link=subject.by_link)
    if not later <= tolerance:
        return {**row, **_disagreement(later)}, {}
    counts = case.count(workload)
    seconds = took.seconds * len(workload.rollouts) / len(measured_on.rollouts)
    return row | {
        "error": max(error, later) if wanted else None,
        "seconds": seconds,
        "runs": took.runs,
        "measured_rollouts": len(measured_on.rollouts),
        "batch": batch if case.batched else None,
        "peak_bytes": took.peak_bytes,
        "planned_peak_bytes": counts.peak_bytes,
        "forward_rows": counts.forward,
        "backward_rows": counts.backward,
        "head_rows": counts.head,
        "rows_per_s": counts.rows / seconds,
        "rollouts_per_s": len(workload.rollouts) / seconds,
        "vjps": counts.vjps,
        "vjps_per_s": None if counts.vjps is None else counts.vjps / seconds,
        "flops": counts.flops,
        "matmul_fraction": counts.flops / seconds / rate,
    }, found


def _error(case: Case, workload: Workload, batch: int, subject: Subject, wanted: Jacobians) -> float:
    """Run a case, and return its error."""
    return worst_error(case.run(workload, batch), wanted, base_keys(case, workload), by_link=subject.by_link)


def _disagreement(error: float, where: str = "") -> Row:
    return {"status": f"disagrees by {error:.1e}{where}", "error": error if math.isfinite(error) else None}


def _ratios(row: Row, baseline: Row | None) -> Row:
    """Return the speedup over the baseline, as measured and as the rows and operations predict."""
    if baseline is None or baseline["seconds"] is None or row["seconds"] is None:
        return dict.fromkeys(RATIOS)
    rows, baseline_rows = (each["forward_rows"] + each["backward_rows"] for each in (row, baseline))
    ratios = (baseline["seconds"] / row["seconds"], baseline_rows / rows, baseline["flops"] / row["flops"])
    return dict(zip(RATIOS, ratios, strict=True))


def _shapes_of(subject: Subject, shapes: Shapes) -> Row:
    return {"model": subject.name, "dtype": str(subject.model.dtype).removeprefix("torch."), "shapes": asdict(shapes)}
