"""Protects what every command's output rests on: whole files, nothing lost by a kill, and no mixture of two runs."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cepo.files import (
    append_jsonl,
    claim,
    content_hash,
    fingerprint,
    read_jsonl,
    replacing,
    write_jsonl,
    write_text,
)
from tests.paths import ROOT

SETTINGS = {"command": "cepo score", "model": "abc", "config": {"p": 0.2, "links": {"X->Y": 1.0}}, "ranks": (1, 2)}


def claimed(folder: Path, settings: dict, *names: str) -> bool:
    return claim(folder / "settings.json", settings, results=[folder / name for name in names or ("rows.jsonl",)])


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail_half_way() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        fail_half_way()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_replaces_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with replacing(tmp_path / "final") as unfinished:
            unfinished.mkdir()
            (unfinished / f"{text}.txt").write_text(text)
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["two.txt"]
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "final"):
        pass  # a block that writes nothing
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["two.txt"]
    assert os.listdir(tmp_path) == ["final"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from cepo.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as unfinished:\n"
        "    unfinished.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    path.unlink()
    claim(tmp_path / "settings.json", SETTINGS, results=[path])
    left = {"settings.json", ".settings.json.lock"}  # the lock stays until this process ends
    assert set(os.listdir(tmp_path)) == left, "the half-written file of the killed run is cleared"


def test_records_come_back_as_strict_json(tmp_path: Path) -> None:
    """NaN and infinities, which JSON does not have, would make the file unreadable to other tools."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"value": math.nan, "inner": [{"p": math.inf}, (1, -math.inf)]}])
    append_jsonl(path, [{"row": 1}, {"row": 2}])

    def refuse(word: str) -> None:
        raise AssertionError(word)

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert rows == [{"value": None, "inner": [{"p": "inf"}, [1, "-inf"]]}, {"row": 1}, {"row": 2}]


def test_a_torn_last_line_is_told_and_the_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"row": 0}, {"row": 1}])
    with path.open("a") as file:
        file.write('{"row": 2, "te')
    rows, broken = read_jsonl(path)
    assert rows == [(1, {"row": 0}), (2, {"row": 1})]
    assert [number for number, _ in broken] == [3]
    with pytest.raises(ValueError, match="not a file"):
        read_jsonl(tmp_path / "absent.jsonl")


def test_the_same_settings_go_on(tmp_path: Path) -> None:
    assert not claimed(tmp_path, SETTINGS)
    (tmp_path / "rows.jsonl").touch()
    assert claimed(tmp_path, json.loads(json.dumps(SETTINGS))), "tuples and lists are the same settings"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "xyz"}, "model was abc and is xyz"),
        ({"config": {"p": 1.0, "links": {"X->Y": 1.0}}}, "config.p was 0.2 and is 1.0"),
        ({"config": {"p": 0.2, "links": {"X->Y": 1.0, "Z->X": 0.5}}}, "config.links.Z->X was not set and is 0.5"),
        ({"config": {"p": math.inf, "links": {"X->Y": 1.0}}}, "config.p was 0.2 and is inf"),
        ({"model": "0123456789abcdef"}, "model was abc and is 0123456789abcdef"),
        ({"ranks": [2, 1]}, "ranks was 1, 2 and is 2, 1"),
        ({"also": ["path"], "ranks": []}, "ranks was 1, 2 and is none; also was not set and is path"),
        ({"raw": True, "task": ""}, "raw was not set and is true; task was not set and is empty"),
        ({"rewards": [{"name": "causal", "weight": 2}]}, "rewards.1.weight was 1 and is 2"),
        (
            {"rewards": [{"name": "causal", "weight": 1}, {"name": "format"}]},
            "rewards.2.name was not set and is format",
        ),
        ({"prompt": f"{'word ' * 20}new"}, r"prompt was \.\.\.(word )+old and is \.\.\.(word )+new"),
    ],
)
def test_other_settings_are_refused_by_name_where_there_are_results(changes: dict, told: str, tmp_path: Path) -> None:
    settings = {**SETTINGS, "rewards": [{"name": "causal", "weight": 1}], "prompt": f"{'word ' * 20}old"}
    claimed(tmp_path, settings)
    claimed(tmp_path, {**settings, **changes})  # nothing was made with the first settings
    claimed(tmp_path, settings)
    (tmp_path / "rows.jsonl").touch()
    way_out = "name another output, move this one away, or repeat the earlier settings"
    with pytest.raises(ValueError, match=f"^output {tmp_path} holds results made with .*: {told}; {way_out}$"):
        claimed(tmp_path, {**settings, **changes})
    assert claimed(tmp_path, settings), "a refusal leaves the settings as they were"


def test_an_output_that_is_a_file_is_named_and_not_its_folder(tmp_path: Path) -> None:
    """Of `cepo score` the folder is often the one people stand in, which a refusal would call "."."""
    output = tmp_path / "scores.jsonl"
    claim(tmp_path / "scores.jsonl.settings.json", SETTINGS, results=[output])
    output.touch()
    with pytest.raises(ValueError, match=f"^output {output} holds results made with other settings: model was abc"):
        claim(tmp_path / "scores.jsonl.settings.json", {**SETTINGS, "model": "xyz"}, results=[output])


def test_fingerprints_that_differ_are_not_spelled_out(tmp_path: Path) -> None:
    claimed(tmp_path, {"command": "train", "data": content_hash(1)})
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(ValueError, match="made with other settings: data has other content; name"):
        claimed(tmp_path, {"command": "train", "data": content_hash(2)})


def test_results_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("mine")
    for foreign in (None, "not JSON", '{"model": "abc"}'):
        if foreign is not None:
            (tmp_path / "settings.json").write_text(foreign)
        with pytest.raises(ValueError, match="no earlier run of this command wrote rows.jsonl; name another output"):
            claimed(tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_text(json.dumps({**SETTINGS, "command": "cepo bench"}))
    with pytest.raises(ValueError, match="holds results of another command, cepo bench; name"):
        claimed(tmp_path, SETTINGS)
    assert (tmp_path / "rows.jsonl").read_text() == "mine"
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="holds results of another command, cepo bench; name"):
        claimed(tmp_path, SETTINGS)  # it may hold what only the other command knows


def test_files_that_a_command_would_replace_are_refused_where_another_program_wrote_them(tmp_path: Path) -> None:
    settings_file, metrics = tmp_path / "settings.json", tmp_path / "metrics.jsonl"
    metrics.write_text("mine")
    with pytest.raises(ValueError, match="no earlier run of this command wrote metrics.jsonl; name another output"):
        claim(settings_file, SETTINGS, results=[], written=[metrics])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    metrics.unlink()
    claim(settings_file, SETTINGS, results=[], written=[metrics])
    metrics.touch()  # a run that made no checkpoint
    claim(settings_file, {**SETTINGS, "model": "xyz"}, results=[], written=[metrics])


CLAIM = """
import os, signal, sys
from pathlib import Path
from cepo.files import claim
claim(Path(sys.argv[1]), {"command": "cepo score"}, results=[])
print("claimed", flush=True)
sys.stdin.readline()
if sys.argv[2:]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_an_output_has_one_process_at_a_time(killed: bool, tmp_path: Path) -> None:
    """Two would write the same checkpoints and each line twice. The lock goes with the process, however it ends."""
    settings_file = tmp_path / "settings.json"
    command = [sys.executable, "-c", CLAIM, str(settings_file), *(["kill"] if killed else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        told = f"^output {tmp_path} is being written to by another process .pid {other.pid} on .*; wait until it ends"
        with pytest.raises(ValueError, match=told):
            claim(settings_file, {"command": "cepo score"}, results=[])
        other.communicate("\n")
    if not killed:
        assert os.listdir(tmp_path) == ["settings.json"], "a lock is left"
    claim(settings_file, {"command": "cepo score"}, results=[])
    command[-1:] = [] if killed else command[-1:]
    child = subprocess.run(command, input="\n", capture_output=True, text=True, cwd=ROOT, check=True)
    assert child.stdout == "claimed\n", "workers of `cepo experiment` claim the runs that it has claimed"


def test_half_written_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "theirs.tmp").touch()
    claimed(tmp_path, SETTINGS)
    assert (tmp_path / "theirs.tmp").is_file()


def test_fingerprints_hold_content_and_not_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "weights").write_bytes(b"\0" * 4096)
        (folder / "config").write_text("{}")
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first / "weights") == fingerprint(second / "weights")
    (second / "weights").write_bytes(b"\0" * 4095 + b"\1")
    assert fingerprint(first) != fingerprint(second)
    (first / "weights").rename(first / "renamed")
    (second / "weights").write_bytes(b"\0" * 4096)
    assert fingerprint(first) != fingerprint(second)
    assert content_hash({"a": 1, "b": (2,)}) == content_hash({"b": [2], "a": 1}) != content_hash({"a": 1, "b": 2})
