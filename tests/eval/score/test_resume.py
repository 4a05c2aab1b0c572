"""Protects the output of `cepo score`: a killed run goes on, and never with other settings, weights or rows."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cepo.eval.score import command as score_module
from cepo.eval.score import scorer as scorer_module
from cepo.files import append_jsonl
from tests.eval.score.records import check_alike
from tests.eval.score.rollouts import ALONE, WIDE, Cepo, gold_rows
from tests.jsonl import read_jsonl, write_jsonl


def test_a_killed_run_goes_on_where_it_stopped(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows())
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    arguments = ("--model", judge, "--input", source, *ALONE, "--also", "effect", *WIDE)
    matrices = {name: tmp_path / f"{name}.safetensors" for name in ("whole", "broken")}
    assert cepo(*arguments, "--output", whole, "--save-jacobians", matrices["whole"])[0] == 0
    written: list[int] = []

    def append(path: Path, records: list[dict[str, Any]]) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt  # what a kill leaves: three rows on disk, though all five are scored together
        written.extend(record["row"] for record in records)
        append_jsonl(path, records)

    monkeypatch.setattr(score_module, "append_jsonl", append)
    assert cepo(*arguments, "--output", broken, "--save-jacobians", matrices["broken"])[0] != 0
    assert not broken.exists()
    with (tmp_path / "broken.jsonl.partial").open("a") as file:
        file.write('{"row": 3, "cut')  # a line that the kill cut short
    kept = set(written)
    written.clear()
    assert cepo(*arguments, "--output", broken, "--save-jacobians", matrices["broken"])[0] == 0
    assert sorted(written) == sorted(set(range(5)) - kept)
    check_alike(read_jsonl(broken), read_jsonl(whole), 1e-6)
    first, second = load_file(matrices["whole"]), load_file(matrices["broken"])
    assert first.keys() == second.keys()
    for key in first:
        one, other = first[key].double(), second[key].double()
        assert float((one - other).norm()) <= 1e-6 * float(one.norm())


def test_a_finished_output_is_not_computed_again_nor_mixed_with_other_settings(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows())
    arguments = ("--model", judge, "--input", source, "--output", tmp_path / "out.jsonl")
    assert cepo(*arguments, "--donor-count", 1)[0] == 0
    monkeypatch.setattr(scorer_module, "load_weights", lambda *_, **__: pytest.fail("nothing is left to score"))
    assert cepo(*arguments, "--donor-count", 1)[0] == 0
    assert cepo(*arguments, "--donor-count", 1, "--memory-gib", 2, "--batch-size", 3)[0] == 0  # they change no result
    code, message = cepo(*arguments, "--donor-count", 2)
    assert code == 2
    assert f"--output {tmp_path / 'out.jsonl'} holds results made with other settings: --donor-count was 1" in message
    code, message = cepo(*arguments, *ALONE)
    assert code == 2
    assert "--score was effect and is influence" in message
    assert "each other's donors" not in message  # read no longer, since the score is another
    code, message = cepo(*arguments, "--donor-count", 1, "--guard", "off", "--also", "path")
    assert (code, "settings: --guard was standard and is off; --also was none and is path; name" in message) == (
        2,
        True,
    )


def test_the_tokenizer_is_read_once(judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lies in a GGUF file takes seconds."""
    read: list[str] = []
    load = AutoTokenizer.from_pretrained

    def counted(location: str, **options: Any) -> Any:
        read.append(location)
        return load(location, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows()[:1])
    assert cepo("--model", judge, "--input", source, "--output", tmp_path / "out", *ALONE)[0] == 0
    assert read == [str(judge)]


def test_other_weights_under_the_same_name_are_refused(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    """The fingerprint is the weights': a folder that was trained again gives no answers of before, its copy does."""
    model = tmp_path / "model"
    shutil.copytree(judge, model)
    source, out = write_jsonl(tmp_path / "in.jsonl", gold_rows()[:2]), tmp_path / "out.jsonl"
    arguments = ("--input", source, "--output", out)
    assert cepo("--model", model, *arguments)[0] == 0
    records = out.read_bytes()
    assert cepo("--model", judge, *arguments)[0] == 0
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    code, message = cepo("--model", model, *arguments)
    assert code == 2
    assert "made with other settings: --model has other content" in message
    assert out.read_bytes() == records


def test_a_run_that_failed_before_its_first_record_binds_no_settings(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows()[:2])
    arguments = ("--model", judge, "--input", source, "--output", tmp_path / "out.jsonl")

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no room for the weights")

    with monkeypatch.context() as patch:
        patch.setattr(scorer_module, "load_weights", fail)
        assert cepo(*arguments)[0] == 2
    assert cepo(*arguments, "--donor-count", 1)[0] == 0


def test_rows_that_changed_are_scored_again(
    judge: Path, tmp_path: Path, cepo: Cepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out = gold_rows()[:3], tmp_path / "out.jsonl"
    arguments = ("--model", judge, "--input", tmp_path / "in.jsonl", "--output", out, *ALONE)
    write_jsonl(tmp_path / "in.jsonl", rows)
    assert cepo(*arguments)[0] == 0
    before = read_jsonl(out)
    write_jsonl(tmp_path / "in.jsonl", [rows[0], gold_rows()[3], rows[2]])
    scored: list[int] = []
    score_lines = score_module.score_lines
    monkeypatch.setattr(
        score_module,
        "score_lines",
        lambda *given, **options: scored.extend(options["rows"]) or score_lines(*given, **options),
    )
    assert cepo(*arguments)[0] == 0
    after = read_jsonl(out)
    assert scored == [1]
    assert [after[0], after[2]] == [before[0], before[2]]
    assert after[1]["id"] == "3"


def test_files_that_would_be_lost_are_refused(judge: Path, tmp_path: Path, cepo: Cepo) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", gold_rows())
    content = source.read_bytes()
    out, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    (tmp_path / "alias").symlink_to(source)
    for arguments in (
        ("--output", out, "--html", source),
        ("--output", out, "--html", tmp_path / "alias"),
        ("--output", source),
        ("--output", out, "--save-jacobians", out),
        ("--output", out, "--save-jacobians", page, "--html", page),
        ("--output", tmp_path),
        ("--output", out, "--html", tmp_path),
        ("--output", out, *ALONE, "--save-jacobians", write_jsonl(tmp_path / "other.txt", [{}])),
    ):
        code, message = cepo("--model", judge, "--input", source, *arguments)
        assert code == 2, arguments
        assert "name another" in message or "is a folder" in message
    assert source.read_bytes() == content
    assert not out.exists()


def test_matrices_are_taken_over_only_with_the_settings_and_the_row_that_made_them(
    judge: Path, tmp_path: Path, cepo: Cepo
) -> None:
    """They belong to the records beside them: those of other settings are refused, those of other rows made anew."""
    source, out, matrices = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "j.safetensors"
    rows = gold_rows()
    arguments = ("--model", judge, "--input", source, *ALONE)
    save = ("--output", out, "--save-jacobians", matrices)
    write_jsonl(source, rows[:2])
    assert cepo(*arguments, *save)[0] == 0
    kept = matrices.read_bytes()
    code, message = cepo(
        *arguments, "--dtype", "float64", "--output", tmp_path / "other.jsonl", "--save-jacobians", matrices
    )
    assert code == 2
    assert "holds matrices of another model or other settings; name another file" in message
    assert matrices.read_bytes() == kept
    assert not (tmp_path / "other.jsonl.settings.json").exists()
    code, message = cepo(*arguments, "--output", out, "--save-jacobians", judge / "model.safetensors")
    assert code == 2
    assert "was not written by cepo score" in message
    write_jsonl(source, [rows[0], rows[3]])
    assert cepo(*arguments, "--output", out)[0] == 0  # row 1 has a new record now, and matrices of before
    assert cepo(*arguments, *save)[0] == 0
    saved = load_file(matrices)
    for row, record in enumerate(read_jsonl(out)):
        assert record["links"]["X->Y"]["norm"] == pytest.approx(float(saved[f"{row}/X->Y/base"].norm()), rel=1e-6)
