"""Protects `make experiments-smollm2`: rows of one set of weights are never taken for those of another."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

# Stands for the command line: it writes the weights that it is told to, and notes where an evaluation goes.
CEPO = """#!/bin/sh
for last; do :; done
case $1 in
warm-start) mkdir -p "$last" && echo warm > "$last/config.json";;
train) mkdir -p "$last/final" && echo "$WEIGHTS" > "$last/final/adapter.safetensors";;
eval) echo "$last" >> "$CALLS";;
esac
"""


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_a_model_that_is_trained_again_is_judged_again(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "cepo").write_text(CEPO)
    (binaries / "cepo").chmod(0o755)
    (binaries / "python").symlink_to(sys.executable)

    def evaluated(weights: str) -> list[str]:
        calls = tmp_path / "calls"
        calls.write_text("")
        subprocess.run(
            ["make", "-o", ".venv/installed", "experiments-smollm2", f"BIN={binaries}", f"RUNS={tmp_path}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "WEIGHTS": weights, "CALLS": str(calls)},
            check=True,
            capture_output=True,
        )
        return [Path(line).name for line in calls.read_text().splitlines()]

    first, again, other = evaluated("one"), evaluated("one"), evaluated("two")
    assert [name.rpartition("-")[0] for name in first] == [
        "before-llmbar",
        "before-rmb_helpful_dev",
        "after-llmbar",
        "after-rmb_helpful_dev",
    ]
    assert again == first
    assert other[:2] == first[:2]
    assert not set(other[2:]) & set(first)
