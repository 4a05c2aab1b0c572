"""Protects the first hour on a GPU, which is rare: nothing is timed after a wrong value, and nothing done is repeated.

A part that fails, hangs or shouts costs neither the others nor the log, and every row says where it was measured.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from cepo.benchmarks.first_hour import DONE, FAILED, GOES_ON, VALUES, Part, default_verdict, gpu_parts, main, run_parts
from cepo.files import write_jsonl
from tests.paths import ROOT

FACTS = {"device": "a card", "driver": "1", "torch": "2", "triton": "3", "commit": "abc"}


def code(text: str, **options: Any) -> Part:
    return Part(("-c", text), **{"seconds": 30.0, **options})


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]


def heads_of(output: Path) -> dict[str, dict[str, Any]]:
    return {row["part"]: row for row in rows_of(output) if "ended" in row}


def test_the_cpu_form_of_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kernels in the interpreter, then the engine in a tiny size; the second call repeats nothing; refusals."""
    asked = [VALUES, "engine"]
    command = ["sh", str(ROOT / "benchmarks" / "first_hour.sh"), *asked, "--device", "cpu", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == DONE, found.stdout[-3000:] + found.stderr[-1000:]
    assert "the kernels have not been timed" in found.stdout
    rows, heads = rows_of(tmp_path), heads_of(tmp_path)
    assert list(heads) == asked
    assert {"device", "driver", "torch", "triton", "commit"} <= set.intersection(*(set(row) for row in rows))
    assert heads[VALUES]["ended"] == heads["engine"]["ended"] == "ok"
    assert "scaling" in heads["engine"]["left_out"]
    assert {row["status"] for row in rows if "case" in row} == {"ok"}
    assert " passed" in (tmp_path / "log.txt").read_text()

    def call(*parts: str, **options: Any) -> int:
        with pytest.raises(typer.Exit) as ended:
            main(list(parts), **{"output": tmp_path, "device": "cpu", "minutes": 1.0, "commit": None, **options})
        return ended.value.exit_code

    assert call(*asked) == DONE
    assert "== values: ok in an earlier call" in capsys.readouterr().out
    assert rows_of(tmp_path) == rows
    for refused, told in (
        (lambda: call(commit="another"), "commit was"),
        (lambda: call("valeus"), "part is 'valeus'; expected one of values,"),
        (lambda: call(device="tpu"), "device is 'tpu'; expected cuda or cpu"),
    ):
        assert refused() == 2
        assert told in capsys.readouterr().err


def test_a_wrong_value_ends_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A test of values that fails, by its name; and a benchmark's row of ours that disagrees."""
    test = tmp_path / "test_values.py"
    test.write_text("def test_right():\n    pass\n\n\ndef test_of_a_kernel():\n    assert 1.0 == 1.1\n")
    values = Part(("-m", "pytest", "-x", "-p", "no:cacheprovider", str(test)), 60.0)
    timing = code("print('timed')")
    assert run_parts({VALUES: values, "kernels": timing}, tmp_path, FACTS) == FAILED
    assert list(heads_of(tmp_path)) == [VALUES]
    told = capfd.readouterr().out
    assert "test_of_a_kernel" in told
    assert "timed" not in told
    assert default_verdict(rows_of(tmp_path)).startswith("no, the values")
    assert run_parts({"kernels": timing}, tmp_path, FACTS) == FAILED  # a part by name does not get round it
    assert "timed" not in capfd.readouterr().out
    test.write_text("def test_right():\n    pass\n")
    row = {"case": "group: X->Y", "model": "tiny", "status": "disagrees by 2.0e-01", "seconds": None}
    peer = {**row, "case": "captum: X->Y"}
    text = (
        "import json, pathlib; pathlib.Path({0!r}).mkdir(); pathlib.Path({0!r}, 'rows').write_text(json.dumps({1!r}))"
    )

    def engine(row: Mapping[str, Any]) -> Part:
        return code(text.format(str(tmp_path / "engine"), row), rows="rows")

    parts = {VALUES: values, "engine": engine(row), "kernels": timing}
    assert run_parts(parts, tmp_path, FACTS) == FAILED
    assert "engine has a wrong value: group: X->Y, tiny, disagrees by 2.0e-01" in capfd.readouterr().out
    assert run_parts({**parts, "engine": engine(peer)}, tmp_path, FACTS) == DONE
    assert "timed" in capfd.readouterr().out


def test_a_part_that_fails_costs_only_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sleeping = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parts = {
        "failing": code("print('before'); raise SystemExit(3)"),
        "lacking": code("print('run')", needs=("json", "no_such_package")),
        "hanging": code(f"print('begun'); {sleeping}", seconds=0.5),
        "odd": code("import sys; sys.stdout.buffer.write(bytes([255, 10])); print('error', file=sys.stderr)"),
        "sound": code("import os, cepo; print(os.getcwd(), cepo.__file__)"),
    }
    assert run_parts(parts, tmp_path, FACTS) == FAILED
    assert {name: head["ended"] for name, head in heads_of(tmp_path).items()} == {
        "failing": "exit code 3",
        "lacking": "not begun: no_such_package not installed",
        "hanging": "killed after 0.5 s",
        "odd": "ok",
        "sound": "ok",
    }
    log = (tmp_path / "log.txt").read_text()
    assert log == capfd.readouterr().out
    for words in ("before", "begun", "error", f"{ROOT} {ROOT / 'cepo' / '__init__.py'}", "== hanging: killed"):
        assert words in log
    assert heads_of(tmp_path)["hanging"]["left_out"] == "all after row 0 of hanging"
    mended = {**parts, "failing": code("print('mended')")}
    assert run_parts(mended, tmp_path, FACTS) == FAILED  # a package is still missing
    again = capfd.readouterr().out
    assert "mended" in again
    assert "begun\n" not in again


def test_a_call_ends_in_time_and_the_next_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A part that cannot end is not begun; one that resumes is killed with the call, and begun again."""
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    slow = code(f"{count}; import time; time.sleep(60)", seconds=60.0, least=0.1, resumes=True)
    parts = {"first": code(""), "slow": slow, "last": code("print('last')")}
    assert run_parts({"first": parts["first"]}, tmp_path, FACTS, seconds=1.0) == GOES_ON
    assert not (tmp_path / "rows.jsonl").exists()
    parts["first"] = replace(parts["first"], least=0.0)
    assert run_parts(parts, tmp_path, FACTS, seconds=1.0) == GOES_ON
    assert not heads_of(tmp_path)["slow"]["done"]
    assert "== last: not begun" in capfd.readouterr().out
    parts["slow"] = replace(slow, arguments=("-c", count))
    assert run_parts(parts, tmp_path, FACTS) == DONE
    assert (tmp_path / "count").read_text() == "xx"


def test_the_verdict_on_the_default(tmp_path: Path) -> None:
    """By hand: no slower in any schedule, the engine's benchmark included, and only with right values and times."""

    def rows(kernels: float | None, effect: float) -> list[dict[str, Any]]:
        shared = {"part": "kernels", "operation": "Jacobians", "shapes": "G 8"}
        of_engine = {"part": "engine", "model": "a model", "shapes": {"G": 8}}
        return [
            *({"part": name, "ended": "ok", "done": True} for name in (VALUES, "kernels")),
            {**shared, "contender": "cepo, kernels, X->Y", "seconds": kernels},
            {**shared, "contender": "cepo, plain, X->Y", "seconds": 2.0},
            {**shared, "contender": "padded", "seconds": 0.1},
            {**of_engine, "case": "group: effect", "seconds": 3.0},
            {**of_engine, "case": "group: effect, kernels", "seconds": effect},
        ]

    assert default_verdict(rows(2.0, 1.0)) == "yes, none of 2 schedules is slower on the kernels"
    assert default_verdict(rows(2.5, 1.0)).startswith("no, cepo, kernels, X->Y takes 2.5 s, and 2 s without")
    assert default_verdict(rows(1.0, 3.5)).startswith("no, group: effect, kernels takes 3.5 s")
    assert default_verdict(rows(None, 1.0)).startswith("not known, cepo, kernels, X->Y was not timed")
    assert default_verdict(rows(1.0, 1.0)[1:]).startswith("no, the values")
    assert default_verdict(rows(1.0, 1.0)[:2]).startswith("not known, the engine")
    write_jsonl(tmp_path / "rows.jsonl", rows(1.0, 1.0))  # what the verdict reads are these files


def test_the_parts_of_a_gpu(tmp_path: Path) -> None:
    """By the card: sizes that exist, training runs that fit its memory; the tests' folder; the commit in every row."""
    parts = gpu_parts(tmp_path, "NVIDIA H100 80GB HBM3", 79.0, "abc")
    assert list(parts) == [VALUES, "kernels", "engine", "judge", "experiment", "causal"]
    assert (ROOT / parts[VALUES].arguments[2]).is_dir()
    for name in ("kernels", "engine", "experiment"):
        assert parts[name].arguments[-1] == "abc"
    assert parts[VALUES].seconds + parts["kernels"].seconds < 570  # one call finds a wrong value or times the kernels
    assert parts["engine"].seconds < 570
    for card, size in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"), ("L4", "gpu-135m")):
        assert f" --size {size} " in " ".join(gpu_parts(tmp_path, card, 22.0)["engine"].arguments)
    assert " --jobs 1 " in " ".join(gpu_parts(tmp_path, "T4", 8.0)["experiment"].arguments)
