"""Protects every kernel with every tile of its tables: it compiles for A100 and H100 and spills nothing.

Ahead of time, so no GPU is needed. In a process of its own: Triton interprets or compiles, as told when imported.
The table that comes out is a build artefact, build/kernels/resources-*.md. Every form that an effect, a path and the
paper's links launch on an H100 is in it, as recorded in the interpreter.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is published for Linux only")


def compiled_table(folder: Path, target: str) -> list[dict[str, str]]:
    """Return the rows of the printed table; with a fresh cache, so that every form is compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "cepo.kernels.compile", target]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    artefact = ROOT / "build" / "kernels" / f"resources-{target}.md"
    artefact.parent.mkdir(parents=True, exist_ok=True)
    unfinished = artefact.with_suffix(f".{os.getpid()}")
    unfinished.write_text(result.stdout)
    unfinished.replace(artefact)
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines())
    return [dict(zip(head, cells, strict=True)) for cells in lines]


@pytest.mark.parametrize("target", ["80", "90"])
def test_every_kernel_compiles_without_spills_within_shared_memory(target: str, tmp_path: Path) -> None:
    rows = compiled_table(tmp_path, target)
    assert {row["target"] for row in rows} == {f"sm_{target}"}
    limit = {"80": 163, "90": 227}[target] * 1024
    for row in rows:
        assert row["falls short"] == "", row
        assert 0 < int(row["registers"]) <= 255
        assert int(row["spilled bytes"]) == 0
        assert int(row["shared bytes"]) <= limit
    assert {row["kernel"] for row in rows} == kernels_in_the_sources()
    if target == "80":  # its tables have the same keys, and recording takes a while
        return
    launched = launched_forms(target)
    for call, forms in launched.items():
        assert forms <= {(row["kernel"], row["form"]) for row in rows}, call
    vjps = {call: {form for form in forms if "vjp" in form[0]} for call, forms in launched.items()}
    assert not vjps["effect"]  # values only
    for call, past in (("path", {"PAST=False"}), ("paper", {"PAST=False", "PAST=True"})):
        assert {word for _, form in vjps[call] for word in form.split() if word.startswith("PAST")} == past


def launched_forms(target: str) -> dict[str, set[tuple[str, str]]]:
    """Return the (kernel, form) pairs that each call launches, see launched_forms.py."""
    command = [sys.executable, "-m", "tests.kernels.launched_forms", target]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, list[list[str]]] = json.loads(result.stdout)
    return {call: {(kernel, form) for kernel, form in forms} for call, forms in found.items()}


def kernels_in_the_sources() -> set[str]:
    """Every launched kernel by its name: a new one that no table names fails the test above."""
    words = {
        word.removeprefix("def ").split("(")[0]
        for path in (ROOT / "kernels").rglob("*.py")
        for word in path.read_text().splitlines()
        if word.startswith("def ") and word.split("(")[0].endswith("_kernel")
    }
    assert words
    return words
