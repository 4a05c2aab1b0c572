"""Protects the run on a GPU, which is rare: a part that fails, hangs or shouts costs neither the others nor the log."""

from pathlib import Path

import pytest

from cepo.benchmarks.device import Part, gpu_parts, run_parts
from cepo.benchmarks.engine.sizes import SIZES
from tests.paths import ROOT


def test_every_part_runs_whatever_the_others_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sleeping = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = {
        "failing": Part(("-c", "print('before'); raise SystemExit(3)"), 30.0),
        "hanging": Part(("-c", f"print('begun'); {sleeping}"), 0.5),
        "odd": Part(
            ("-c", "import sys; sys.stdout.buffer.write(bytes([255, 10])); print('error', file=sys.stderr)"), 30.0
        ),
        "sound": Part(("-c", "import os, cepo; print(os.getcwd(), cepo.__file__)"), 30.0),
    }
    found = run_parts(parts, tmp_path)
    assert found == {"failing": "exit code 3", "hanging": "killed after 0.5 s", "odd": "ok", "sound": "ok"}
    log = (tmp_path / "log.txt").read_text()
    assert log == capfd.readouterr().out
    for words in ("before", "begun", "error", f"{ROOT} {ROOT / 'cepo' / '__init__.py'}", "== hanging: killed"):
        assert words in log
    assert (tmp_path / "summary.txt").read_text().splitlines()[0] == "failing: exit code 3"


def test_the_parts_name_what_exists(tmp_path: Path) -> None:
    """Sizes, the tests' folder, and the commit in every benchmark."""
    parts = gpu_parts(tmp_path, commit="abc")
    assert list(parts) == ["tests", "kernels", "gpu-135m", "gpu-7b"]
    assert set(parts) & set(SIZES) == {"gpu-135m", "gpu-7b"}
    assert (ROOT / parts["tests"].arguments[2]).is_dir()
    assert all("abc" in part.arguments for name, part in parts.items() if name != "tests")
    assert not any("--commit" in part.arguments for part in gpu_parts(tmp_path, device="cpu").values())
