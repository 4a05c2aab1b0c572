"""Protects `cepo eval rewardbench`: the whole job, resuming, complaints and exit codes."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cepo.cli.app import main
from cepo.eval.judges.settings import JudgeSettings
from cepo.eval.rewardbench import command as rewardbench_module
from cepo.eval.rewardbench.command import RewardBenchJob, run_rewardbench
from cepo.train import testbed, testbed_model
from tests.eval.rewardbench.rule import SCORES, Rule, longer, row
from tests.jsonl import read_jsonl, write_jsonl


def job(tmp_path: Path, data: Path, **settings: Any) -> RewardBenchJob:
    judge = JudgeSettings("name", backend="server", base_url="http://127.0.0.1:9/v1")
    return RewardBenchJob(judge, str(data), tmp_path / "out", **settings)


def test_the_whole_job_agrees_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that prefers the longer response, on data where that is right for two items of three."""
    rows = [
        row(0, "long answer", "short", subset="x"),
        row(1, "a longer one", "no", subset="x"),
        row(2, "no", "wordy", subset="y"),
        "broken",
    ]
    judge = Rule(longer)
    monkeypatch.setattr(rewardbench_module, "open_judge", lambda settings: judge)
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    heard: list[tuple[int, int, str]] = []
    summary = run_rewardbench(job(tmp_path, path), progress=lambda *what: heard.append(what))
    right = [len(a) % 10 > len(b) % 10 for a, b in (("long answer", "short"), ("a longer one", "no"), ("no", "wordy"))]
    assert len(judge.asked) == 6
    assert heard[-1][:2] == (6, 6)
    assert "judgements/s" in heard[-1][2]
    assert summary.broken[0][0] == 4
    lines = read_jsonl(tmp_path / "out" / "summary.jsonl")
    told = {(line["metric"], line["subset"]): line for line in lines}
    assert told["consistent", "all"]["value"] == pytest.approx(np.mean(right))
    assert told["consistent", "all"]["low"] <= told["consistent", "all"]["value"] <= told["consistent", "all"]["high"]
    assert told["consistent", "y"]["value"] == float(right[2])
    assert set(lines[0]) == {"metric", "subset", "value", "low", "high", "count"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "wordy" in page
    assert "Rows that were left out" in page
    assert "http-equiv" in page
    assert "<script" not in page
    again = run_rewardbench(job(tmp_path, path))
    assert len(judge.asked) == 6
    assert again.collected.resumed == 6
    assert [(m.metric, m.scope, m.estimate) for m in again.measures] == [
        (m.metric, m.scope, m.estimate) for m in summary.measures
    ]


def test_intervals_that_nothing_determines_are_null_not_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One item that is right in one order: its mean of both orders is 0.5, without an interval."""
    monkeypatch.setattr(rewardbench_module, "open_judge", lambda settings: Rule(lambda *_: SCORES.format(9, 1)))
    run_rewardbench(job(tmp_path, write_jsonl(tmp_path / "in.jsonl", [row(0, subset="x")])))
    rows = read_jsonl(tmp_path / "out" / "summary.jsonl")
    unknown = {"low": None, "high": None, "count": 1, "why": "1 prompt"}
    assert {"metric": "average", "subset": "x", "value": 0.5, **unknown} in rows


class Cepo:
    """Runs `cepo eval rewardbench` as a user would and returns its exit code, stdout and stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["cepo", "eval", "rewardbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = self.capsys.readouterr()
        return int(exit_.value.code or 0), said.out, said.err


@pytest.fixture
def cepo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cepo:
    return Cepo(monkeypatch, capsys)


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed's model, untrained, with a context that a judge prompt fits into."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = testbed.build_tokenizer()
    model = testbed_model.build_model(tokenizer, seed=0)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_files_of_another_program_are_refused_and_left_alone(judge_folder: Path, tmp_path: Path, cepo: Cepo) -> None:
    data, output = write_jsonl(tmp_path / "in.jsonl", [row(0)]), tmp_path / "out"
    for name, content in {"judgements.jsonl": "hi\n", "settings.json": '{"a": 1}', "report.html": "mine"}.items():
        output.mkdir()
        (output / name).write_text(content)
        code, _, err = cepo("--model", judge_folder, "--data", data, "--output", output)
        assert code == 2
        assert f"no earlier run of this command wrote {name}" in " ".join(err.split())
        assert [(file.name, file.read_text()) for file in output.iterdir()] == [(name, content)]
        (output / name).unlink()
        output.rmdir()


def test_a_verdict_that_is_seldom_read_is_told_with_a_way_out(judge_folder: Path, tmp_path: Path, cepo: Cepo) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [row(0)])
    arguments = ["--model", judge_folder, "--data", data, "--output", tmp_path / "out", "--max-new-tokens", 2]
    code, out, _ = cepo(*arguments, "--threads", 1)
    assert code == 0
    assert "100% of the judgements have no verdict: try a larger --max-new-tokens" in " ".join(out.split())


def test_the_command_judges_resumes_and_complains_of_broken_lines(
    judge_folder: Path, tmp_path: Path, cepo: Cepo
) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [row(0), row(1), "broken", row(2, subset="llmbar-natural")])
    arguments = ["--model", judge_folder, "--data", data, "--output", tmp_path / "out", "--max-new-tokens", 4]
    arguments += ["--threads", 1, "--batch-size", 4]
    code, out, err = cepo(*arguments, "--force-format")
    assert code == 2
    assert "row 3: not JSON" in " ".join(err.split())
    assert "right in both orders" in out
    records = read_jsonl(tmp_path / "out" / "judgements.jsonl")
    assert len(records) == 6
    assert all(record["forced"] and record["soft"] and record["scores"] for record in records)
    assert all(record["token_ids"] for record in records)
    before = (tmp_path / "out" / "judgements.jsonl").read_bytes()
    code, out, _ = cepo(*arguments, "--force-format")
    assert code == 2
    assert (tmp_path / "out" / "judgements.jsonl").read_bytes() == before
    code, _, err = cepo(*arguments)
    assert code == 2
    assert "--force-format was true and is false" in " ".join(err.split())


def test_judgements_of_weights_that_were_overwritten_are_refused(
    judge_folder: Path, tmp_path: Path, cepo: Cepo
) -> None:
    """The folder's name is the same: a name alone would answer for the new weights with the old judgements."""
    data, model = write_jsonl(tmp_path / "in.jsonl", [row(0)]), tmp_path / "model"
    shutil.copytree(judge_folder, model)
    arguments = ["--model", model, "--data", data, "--output", tmp_path / "out", "--max-new-tokens", 2, "--threads", 1]
    assert cepo(*arguments)[0] == 0
    judged = (tmp_path / "out" / "judgements.jsonl").read_bytes()
    untrained = testbed_model.build_model(testbed.build_tokenizer(), seed=1)
    untrained.config.max_position_embeddings = 4096
    untrained.save_pretrained(model)
    code, _, err = cepo(*arguments)
    assert code == 2
    assert "made with other settings: weights has other content" in " ".join(err.split())
    assert (tmp_path / "out" / "judgements.jsonl").read_bytes() == judged


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "./nowhere"], "./nowhere"),
        (["--model", "smollm2", "--backend", "tgi"], "backend is 'tgi'"),
        (["--model", "smollm2", "--base-url", "nowhere"], "--base-url is 'nowhere'"),
        (["--model", "smollm2", "--base-url", "http://127.0.0.1:9", "--api-key-file", "none"], "--api-key-file"),
        (["--model", "smollm2", "--limit", 0], "--limit is 0"),
        (["--model", "smollm2", "--data", "none.jsonl"], "none.jsonl"),
        (["--model", "smollm2", "--subset", "z"], "'z'"),
        (["--model", "smolm2"], "did you mean smollm2?"),
        (["--model", "smollm2", "--data", "rewardbnch"], "did you mean rewardbench?"),
    ],
)
def test_arguments_that_cannot_work_end_in_one_paragraph(
    arguments: list[Any], named: str, tmp_path: Path, cepo: Cepo
) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [row(0)])
    code, _, err = cepo("--data", data, "--output", tmp_path / "out", *arguments)
    assert code == 2
    assert named in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_server_that_answers_nothing_is_an_exit_code_of_2_and_every_row_is_listed(tmp_path: Path, cepo: Cepo) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [row(0), row(1)])
    code, _, err = cepo(
        *("--model", "name", "--data", data, "--output", tmp_path / "out"),
        *("--base-url", "http://127.0.0.1:9/v1", "--retries", 0),
    )
    assert code == 2
    assert "4 prompts could not be judged" in " ".join(err.split())
    records = read_jsonl(tmp_path / "out" / "judgements.jsonl")
    assert len(records) == 4
    assert all("no connection" in record["error"] for record in records)
    assert (tmp_path / "out" / "report.html").is_file()
