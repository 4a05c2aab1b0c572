"""`cepo bench --kernels` times only equal values, keeps its deadlines, and refuses devices that it cannot run on.

No test here depends on how long anything takes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cepo.benchmarks.engine.cases import EXACT, contenders, new_subject
from cepo.benchmarks.engine.sizes import random_workload
from cepo.benchmarks.kernels import command
from cepo.benchmarks.kernels import rows as kernel_rows
from cepo.benchmarks.kernels.cases import Contender, Operation
from cepo.benchmarks.kernels.command import KERNEL_SIZES, run_kernel_benchmark
from cepo.benchmarks.kernels.rows import Recorder, case_row, operation_row
from cepo.benchmarks.measure import Measurement
from tests.paths import ROOT

# Packages that a GPU machine may lack and that the benchmark of kernels does not need.
ABSENT = ("trl", "datasets", "math_verify", "gguf", "liger_kernel", "captum", "tensorboard", "sentencepiece")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is published for Linux only")
def test_every_contender_agrees_in_the_interpreter_and_without_training_packages(tmp_path: Path) -> None:
    """The command in the interpreter: each operation and the engine have a row per contender, values compared."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); "
        "from tests.kernels.checks import stay_patched; stay_patched(); "
        "from cepo.cli.app import main; main()"
    )
    arguments = [sys.executable, "-c", code, "bench", "--kernels", "--device", "cpu", "--output", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert {row["kernels"] for row in rows} == {"interpreted"}
    assert all(row["seconds"] is None for row in rows)  # a CPU's times say nothing of a kernel
    named = {(row["operation"], row["contender"]) for row in rows}
    assert len(named) == len(rows)
    operations = {row["operation"] for row in rows if row["section"] == "kernel"}
    for name in ("RMS norm", "SwiGLU", "attention of the stem", "log-likelihood through the head"):
        assert {f"{name}, forward", f"{name}, forward and VJP"} <= operations
    for operation in operations:
        found = {row["contender"]: row["status"] for row in rows if row["operation"] == operation}
        assert found["cepo"] == found["eager PyTorch"] == "ok", (operation, found)
        assert found.get("torch.compile", "needs CUDA") == "needs CUDA"
        assert found.get("Liger-Kernel", "not installed") == "not installed"
        assert found.get("SDPA", "ok") == "ok"
    engine = {row["contender"]: row for row in rows if row["section"] == "engine"}
    assert engine["cepo, kernels, all links, exact"]["status"] == "ok"
    assert "attention: triton, head: triton, 4 modules" in engine["cepo, kernels, all links, exact"]["computes"]
    assert engine["padded autograd"]["status"] == engine["torch.func vmap of vjp"]["status"] == "ok"
    assert {"device", "driver", "torch", "triton", "transformers", "commit", "dtype", "error"} <= rows[0].keys()
    assert "interpreted" in (tmp_path / "kernels.txt").read_text()
    assert not list(tmp_path.glob("*.tmp"))


def recorder(path: Path, *, left: float = 100.0) -> Recorder:
    """As on a GPU with a copy rate of 10 bytes and a product rate of 100 operations a second."""
    facts = {"copy_bytes_per_s": 10.0, "matmul_flops_per_s": 50.0, "float32_flops_per_s": 100.0}
    deadlines = dict.fromkeys(("kernels", "engine"), time.perf_counter() + left)
    return Recorder(path / "rows.jsonl", facts, torch.device("cuda"), deadlines, [], lambda text: None)


def test_only_values_that_agree_get_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong contender, one that is NaN, one of another shape and one that raises are rows without seconds."""
    monkeypatch.setattr(kernel_rows, "_seconds", lambda run: (run(), 8.0)[1])
    right = torch.arange(6.0).reshape(2, 3)
    truth = (right.double(), [right[0].double(), right[1].double()])

    def fails() -> Any:
        raise RuntimeError("no such\ninstruction")

    contenders_by_name = {
        "right": lambda: (right, right + 1e-5),
        "part": lambda: (None, [right[0], right[1]]),
        "wrong": lambda: (right, right + 1.0),
        "not a number": lambda: (right, right * float("nan")),
        "not a number first": lambda: (right * float("nan"), right),
        "another shape": lambda: (right[:1], right),
        "failing": fails,
    }
    operation = Operation("doubling", "2 x 3", lambda: truth, (), (right, right[0]), 16.0, 120.0, torch.float32)
    run = recorder(tmp_path)
    rows = {
        name: operation_row(run, "kernels", operation, Contender(name, "", run_once), truth)
        for name, run_once in contenders_by_name.items()
    }
    assert {name for name, row in rows.items() if row["seconds"] is not None} == {"right", "part"}
    assert rows["right"]["seconds"] == 8.0
    # 24 bytes read once, though two inputs share them, and 16 written: 4 s; the operations need 1.2 s.
    assert (rows["right"]["bytes"], rows["right"]["floor_seconds"], rows["right"]["bound"]) == (40.0, 4.0, "bytes")
    assert rows["right"]["of_floor"] == 0.5
    assert rows["wrong"]["status"] == "disagrees by 2.0e-01"
    for name in ("not a number", "not a number first", "another shape"):
        assert rows[name]["status"] == "disagrees by inf"
    assert rows["failing"]["status"] == "failed with RuntimeError: no such instruction"
    assert json.loads(json.dumps(rows["wrong"]))["error"] == pytest.approx(0.2)
    late = operation_row(recorder(tmp_path, left=-1.0), "kernels", operation, Contender("late", "", fails), truth)
    assert late["status"] == "out of time"
    absent = Contender("absent", "", fails, needs="no_such_package")
    assert operation_row(run, "kernels", operation, absent, truth)["status"] == "not installed"


def test_nothing_is_timed_after_a_wrong_value_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark ends there, with its table, as a failure; neither a peer nor lack of time does that."""
    cases = {"peer": "disagrees by 1.0e+00", "cepo": "out of time", "cepo, kernels": "disagrees by 2.0e-01"}

    def run_operations(run: Recorder, part: str, found: Any, **_: Any) -> None:
        for contender, status in cases.items():
            run.add({"contender": contender, "operation": "doubling", "shapes": "2 x 3", "status": status} | columns)
        ended.append(part)

    ended: list[str] = []
    columns = {"error": None, "seconds": None, "computes": ""}
    monkeypatch.setattr(command, "_run_operations", run_operations)
    monkeypatch.setattr(command, "_run_engine", lambda *_: (None, None))
    monkeypatch.setattr(command, "_run_compiled_engine", lambda *_: None)
    assert not run_kernel_benchmark(tmp_path, device="cpu")[1]
    assert not ended
    assert "disagrees by 2.0e-01" in (tmp_path / "kernels.txt").read_text()
    del cases["cepo, kernels"]
    assert run_kernel_benchmark(tmp_path, device="cpu")[1]
    assert ended == ["kernels", "compiled kernels"]


def test_a_schedule_that_would_not_end_in_time_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared on the small workload, and timed on the whole one only if the small one's time says that it fits."""
    size = KERNEL_SIZES["tiny"]
    check = random_workload(size.config.vocab_size, size.check, 0)
    whole = random_workload(size.config.vocab_size, replace(size.shapes, G=4), 0)
    subject = new_subject("tiny", size.config, torch.float32, torch.device("cpu"), check, 0)
    case = next(case for case in contenders(subject, ()) if case.name == EXACT)
    measured = []

    def measure(run: Any, device: torch.device) -> Any:
        measured.append(run())
        return measured[-1], Measurement(3.0, 1e6, 1)

    monkeypatch.setattr(kernel_rows, "measure", measure)
    row = case_row(recorder(tmp_path), "engine", subject, case, whole, "")
    assert (row["status"], row["seconds"], len(measured)) == ("ok", 3.0, 2)
    assert row["shapes"] == "G 4, Lz 12, Lx 6, Ly 3, K 1"
    row = case_row(recorder(tmp_path, left=3.5), "engine", subject, case, whole, "")
    assert row["status"].startswith("out of time: about")
    assert (row["seconds"], len(measured)) == (None, 3)
    wrong = replace(
        case, run=lambda workload, batch: {key: 1.1 * jac for key, jac in case.run(workload, batch).items()}
    )
    row = case_row(recorder(tmp_path), "engine", subject, wrong, whole, "")
    assert (row["status"], row["seconds"], len(measured)) == ("disagrees by 1.0e-01", None, 3)


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected cuda or cpu"):
        run_kernel_benchmark(tmp_path, device="tpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run here")
def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CUDA device; expected --device cpu"):
        run_kernel_benchmark(tmp_path)
