"""Protects the facts that are recorded beside a measurement."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cepo.benchmarks import measure


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_this_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment often lies inside the repository of a user's project, whose commit says nothing of this code."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "the user's own work")
    installed = tmp_path / "env" / "measure.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(measure, "__file__", str(installed))
    assert measure.environment(torch.device("cpu"))["commit"] is None
    assert measure.environment(torch.device("cpu"), "abc")["commit"] == "abc"
    git("add", ".")
    git("commit", "--quiet", "-m", "a checkout of this code")
    assert measure.environment(torch.device("cpu"))["commit"] == git("rev-parse", "--short", "HEAD")
