"""One row per contender of the kernel benchmark: its error, then its time, also relative to the device's floor."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cepo.benchmarks.engine.cases import Case, Subject, base_keys, worst_error
from cepo.benchmarks.engine.peers import Workload
from cepo.benchmarks.kernels.cases import Contender, Operation, Output, Widths
from cepo.benchmarks.measure import matmul_rate, measure
from cepo.files import append_jsonl

Row = dict[str, Any]
# Largest error over the largest true value. In bfloat16, contenders round different intermediate values.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_LENGTHS = {"Lz": "prompt", "Lx": "rationale", "Ly": "answer"}


class WrongValueError(Exception):
    """A contender of this package has a wrong value, after which nothing is timed."""


@dataclass(frozen=True)
class Recorder:
    """The rows, each appended to the file immediately so that a killed run keeps it; device; deadline of each part."""

    path: Path
    facts: Row
    device: torch.device
    deadlines: Mapping[str, float]
    rows: list[Row]
    progress: Callable[[str], None]

    def add(self, row: Row) -> None:
        """Record a row.

        Raises:
            WrongValueError: after recording a row of this package with wrong values.
        """
        self.rows.append({**self.facts, **row})
        append_jsonl(self.path, self.rows[-1:])
        if row["contender"].startswith("cepo") and row["status"].startswith("disagrees"):
            raise WrongValueError

    def left(self, part: str) -> float:
        """Return the seconds until the part's deadline."""
        return self.deadlines[part] - time.perf_counter()


def operation_row(run: Recorder, part: str, operation: Operation, contender: Contender, truth: Output | None) -> Row:
    """Compare a contender with the true values, which are None when the part's time is over, and time it."""
    row: Row = {
        "section": "kernel",
        "operation": operation.name,
        "shapes": operation.shapes,
        "contender": contender.name,
        "computes": contender.computes,
        "dtype": str(operation.dtype).removeprefix("torch."),
        "tolerance": _TOLERANCES[operation.dtype],
        "error": None,
        "seconds": None,
        **_floor_of(run, operation),
    }

    def timed() -> Row:
        seconds = _seconds(contender.run)
        return {"seconds": seconds, "of_floor": row["floor_seconds"] / seconds if row["floor_seconds"] else None}

    missing = missing_reason(contender.needs, run.device) or ("out of time" if truth is None else None)
    return _filled(run, part, row, missing, lambda: _error(contender.run(), truth or ()), timed)


def case_row(
    run: Recorder,
    part: str,
    subject: Subject,
    case: Case,
    workload: Workload,
    computes: str,
    missing: str | None = None,
) -> Row:
    """Compare a schedule on the small workload, and time it on the whole one if enough time is left for that."""
    row: Row = {
        "section": "engine",
        "operation": f"the Jacobians of {len(workload.rollouts)} rollouts",
        "shapes": _shapes_of(workload),
        "contender": case.name,
        "computes": computes,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "tolerance": subject.tolerance,
        "error": None,
        "seconds": None,
        "flops": case.count(workload).flops,
    }
    batch = len(subject.check.rollouts)

    def error() -> float:
        return worst_error(case.run(subject.check, batch), subject.wanted, base_keys(case, subject.check))

    def timed() -> Row:
        _, small = measure(lambda: case.run(subject.check, batch), run.device)
        measured_on = replace(workload, rollouts=workload.rollouts[: 2 if case.alone else None])
        expected = small.seconds * case.count(measured_on).flops / case.count(subject.check).flops
        if expected > run.left(part):
            return {"status": f"out of time: about {expected:.0f} s"}
        _, took = measure(lambda: case.run(measured_on, len(measured_on.rollouts)), run.device)
        seconds = took.seconds * len(workload.rollouts) / len(measured_on.rollouts)
        return {
            "seconds": seconds,
            "measured_rollouts": len(measured_on.rollouts),
            "runs": took.runs,
            "peak_bytes": took.peak_bytes,
            "of_floor": row["flops"] / seconds / run.facts["matmul_flops_per_s"],
            "bound": "operations",
        }

    return _filled(run, part, row, missing, error, timed)


def _filled(
    run: Recorder, part: str, row: Row, missing: str | None, error: Callable[[], float], timed: Callable[[], Row]
) -> Row:
    """Return the row with its status, its error if it ran, and on a GPU, if its values agree, the result of `timed`."""
    if missing or run.left(part) <= 0:
        return {**row, "status": missing or "out of time"}
    try:
        with _several_backward_passes():
            found = error()
            row["error"] = found if found < float("inf") else None
            if not found <= row["tolerance"]:
                return {**row, "status": f"disagrees by {found:.1e}"}
            return {**row, "status": "ok", **(timed() if run.device.type == "cuda" else {})}
    except Exception as failure:  # a failure is recorded in the row, and the other contenders still run
        return {**row, "status": _failure(failure)}


def _floor_of(run: Recorder, operation: Operation) -> Row:
    """Return the floor: the larger of the times to read the inputs and write the results once, and to compute them."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in operation.inputs}
    moved = operation.written + sum(storages.values())
    copy, product = run.facts["copy_bytes_per_s"], run.facts["matmul_flops_per_s"]
    if operation.dtype == torch.float32:
        product = run.facts["float32_flops_per_s"]
    row: Row = {"bytes": moved, "flops": operation.flops, "floor_seconds": None, "bound": None, "of_floor": None}
    if copy is None or product is None:
        return row
    by_bytes, by_flops = moved / copy, operation.flops / product
    return {
        **row,
        "floor_seconds": max(by_bytes, by_flops),
        "bound": "bytes" if by_bytes > by_flops else "operations",
    }


def _error(found: Output, truth: Output) -> float:
    """Return the largest error over the largest true value among the outputs that the contender computes."""
    errors = [0.0]
    for mine, true in zip(found, truth, strict=True):
        if mine is None or true is None:
            continue
        got, right = (torch.stack(each) if isinstance(each, list) else each for each in (mine, true))
        if got.shape != right.shape:
            return float("inf")
        if got.numel():
            largest = float(right.abs().max())
            errors.append(float((got.to(right.dtype) - right).abs().max()) / max(largest, 1e-30))
    return max(errors) if all(error == error for error in errors) else float("inf")  # max alone may pass over a NaN


def missing_reason(needs: str | None, device: torch.device) -> str | None:
    """Return why a contender cannot run here, or None; `needs` is "cuda", a package that runs on CUDA, or None."""
    if needs == "cuda":
        return None if device.type == "cuda" else "needs CUDA"
    if needs is None:
        return None
    if importlib.util.find_spec(needs) is None:
        return "not installed"
    return None if device.type == "cuda" else "needs CUDA"


def _several_backward_passes() -> Any:
    """Let graphs of torch.compile run backward several times, by the setting that its error message recommends."""
    return importlib.import_module("torch._functorch.config").patch(donated_buffer=False)


def _failure(failure: Exception) -> str:
    if isinstance(failure, torch.OutOfMemoryError):
        return "out of memory"
    return " ".join(f"failed with {type(failure).__name__}: {failure}".split())[:200]


def _shapes_of(workload: Workload) -> str:
    spans = workload.rollouts[0].spans
    lengths = [f"{axis} {len(spans[name].positions)}" for axis, name in _LENGTHS.items()]
    return ", ".join([f"G {len(workload.rollouts)}", *lengths, f"K {workload.counterfactuals}"])


def measured_floors(device: torch.device, widths: Widths) -> Row:
    """Return the device's rates: bytes moved per second by a copy, operations per second of products in both dtypes."""
    if device.type != "cuda":
        return {"copy_bytes_per_s": None, "matmul_flops_per_s": None, "float32_flops_per_s": None}
    source = torch.empty(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = 2.0 * source.nbytes / _seconds(lambda: target.copy_(source))
    rates = [matmul_rate(dtype, device, 4096, 4096, 0.5) for dtype in (widths.dtype, torch.float32)]
    return {"copy_bytes_per_s": copied, "matmul_flops_per_s": rates[0], "float32_flops_per_s": rates[1]}


def _seconds(run: Callable[[], object]) -> float:
    """Return the median time of a run on the GPU in seconds, with a cold L2 cache."""
    do_bench = importlib.import_module("triton.testing").do_bench
    return float(do_bench(run, warmup=10, rep=50, return_mode="median")) / 1e3
