"""The checks and benchmarks that need a GPU, one process per part: a part that fails or hangs costs only itself.

`python -m cepo.benchmarks.device --output runs/gpu` in a checkout. Everything is streamed, and a killed run keeps what
its parts had written. `--device cpu` shows in a minute that the benchmarks start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TextIO

import typer

from cepo.files import make_folder, write_text

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        arguments: of python.
        seconds: after which it is killed.
    """

    arguments: tuple[str, ...]
    seconds: float


def gpu_parts(output: Path, *, device: str = "cuda", commit: str | None = None, workers: int = 8) -> dict[str, Part]:
    """Return the parts by name, in the order in which they run.

    Args:
        output: folder of the results.
        device: "cuda", or "cpu" for tiny sizes.
        commit: to record with every row; None leaves it to git.
        workers: test processes that compile at once.
    """
    bench = ("-m", "cepo", "bench", *(("--commit", commit) if commit else ()))
    parts = {}
    if device == "cuda":
        tests = (
            f"-m pytest tests/gpu -n {workers} --dist worksteal -v -rfE --tb=short --durations=8 -p no:cacheprovider"
        )
        parts["tests"] = Part(tuple(tests.split()), 130.0)
    kernels = ("--kernels", "--device", device, "--minutes", "1.6", "--output", str(output / "kernels"))
    parts["kernels"] = Part((*bench, *kernels), 125.0)
    for size in ("gpu-135m", "gpu-7b") if device == "cuda" else ("tiny",):
        # Two peers are enough for a figure; `cepo bench --size` without --peer runs all of them.
        options = ("--size", size, "--no-scaling", "--peer", "reference", "--peer", "padded")
        parts[size] = Part((*bench, *options, "--output", str(output / "engine")), 100.0)
    return parts


def run_parts(parts: Mapping[str, Part], output: Path) -> dict[str, str]:
    """Run every part, stream its output here and into OUTPUT/log.txt, and say in OUTPUT/summary.txt how it ended.

    Returns:
        By name: "ok", "exit code 1", or "killed after 100 s".
    """
    make_folder(output)
    found: dict[str, str] = {}
    with (output / "log.txt").open("a", encoding="utf-8") as log:
        for name, part in parts.items():
            started = time.perf_counter()
            _tell(f"== {name}: python {' '.join(part.arguments)}", log)
            found[name] = _run(part, log)
            _tell(f"== {name}: {found[name]} after {time.perf_counter() - started:.0f} s", log)
            write_text(output / "summary.txt", "".join(f"{each}: {how}\n" for each, how in found.items()))
    return found


def _run(part: Part, log: TextIO) -> str:
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    process = subprocess.Popen(
        [sys.executable, *part.arguments],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its own processes are killed with it
    )
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(part.seconds, kill)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            _tell(line.rstrip("\n"), log)
        code = process.wait()
    finally:
        timer.cancel()
    if killed.is_set():
        return f"killed after {part.seconds:g} s"
    return "ok" if code == 0 else f"exit code {code}"


def _tell(line: str, log: TextIO) -> None:
    print(line, flush=True)
    print(line, file=log, flush=True)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the rows, tables and log.txt.")] = Path("runs/gpu"),
    device: Annotated[str, typer.Option(help="cuda, or cpu for a trial with tiny sizes.")] = "cuda",
    commit: Annotated[str | None, typer.Option(help="Commit to record. Default: git's.")] = None,
    workers: Annotated[int, typer.Option(help="Test processes at once.", min=1)] = 8,
    part: Annotated[list[str] | None, typer.Option(help="Run only this part; repeatable.")] = None,
) -> None:
    """Check the kernels and the engines on a GPU, then time them."""
    parts = gpu_parts(output.resolve(), device=device, commit=commit, workers=workers)
    if unknown := [name for name in part or () if name not in parts]:
        raise typer.BadParameter(f"--part is {unknown[0]!r}; expected one of {', '.join(parts)}")
    found = run_parts({name: each for name, each in parts.items() if not part or name in part}, output)
    print("\n".join(f"{name}: {how}" for name, how in found.items()))
    if any(how != "ok" for how in found.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
