"""Time, peak memory and matmul rate of one process, and the machine and versions to record with them."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

_SHORT = 2.0  # seconds below which a case is run three times
T = TypeVar("T")


@dataclass(frozen=True)
class Measurement:
    """The time and memory of one case.

    Attributes:
        seconds: time of one run, or the median of three if the first took less than two seconds.
        peak_bytes: peak memory of the first run, its results included, minus the memory in use before it; None if the
            system does not report it.
        runs: number of timed runs.
    """

    seconds: float
    peak_bytes: float | None
    runs: int


def measure(run: Callable[[], T], device: torch.device) -> tuple[T, Measurement]:
    """Run a case and return its result with its time and memory.

    Args:
        run: the case. Run it once before, at any size, so that nothing is compiled or loaded while it is timed.
        device: device that it runs on.
    """
    before = _reset_peak(device)
    answer, seconds = _timed(run, device)
    peak = _peak(device)
    times = [seconds]
    while times[0] < _SHORT and len(times) < 3:
        times.append(_timed(run, device)[1])
    added = None if before is None or peak is None else max(0.0, peak - before)
    return answer, Measurement(statistics.median(times), added, len(times))


def matmul_rate(dtype: torch.dtype, device: torch.device, width: int, inner: int, seconds: float) -> float:
    """Return the best rate of a large matrix product of the shape of the model's MLP, in operations per second.

    Args:
        dtype: dtype of the model.
        device: device to measure.
        width: hidden size D.
        inner: width of the MLP.
        seconds: least time to spend.
    """
    rows = 8192 if device.type == "cuda" else 1024
    left = torch.randn(rows, width, device=device).to(dtype)
    right = torch.randn(inner, width, device=device).to(dtype)
    product = torch.empty(rows, inner, device=device, dtype=dtype)  # once, so that no allocation is timed
    repeats = 10
    best, spent = 0.0, 0.0
    while spent < seconds:
        _, took = _timed(lambda: [torch.mm(left, right.T, out=product) for _ in range(repeats)], device)
        spent += took
        best = max(best, repeats * 2.0 * rows * width * inner / took)
    return best


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return device, versions and commit, for a row of results.

    Args:
        device: the measured device.
        commit: commit of this code; None to ask git.
    """
    return {
        "device": _device_name(device),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.type == "cuda"
        else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": commit or _commit(),
    }


def _timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    _synchronise(device)
    started = time.perf_counter()
    answer = run()
    _synchronise(device)
    return answer, time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> float | None:
    """Free unused memory, reset the high-water mark and return the bytes in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps would hide part of the next peak
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> float | None:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this code; None if git does not track it: installed, it may lie in another repository."""
    if _output_of("git", "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _output_of("git", "rev-parse", "--short", "HEAD")


def _output_of(*command: str) -> str | None:
    """Return the first line that a command prints in the folder of this file, or None if it fails."""
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    lines = result.stdout.split("\n")
    return lines[0].strip() or None if result.returncode == 0 else None
