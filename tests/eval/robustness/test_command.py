"""Protects `cepo eval robustness`: effects by hand, resumption, what the command says."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cepo.eval.judges.reward import RewardSettings
from cepo.eval.judges.settings import JudgeSettings
from cepo.eval.robustness.command import RobustnessJob, measure_robustness
from cepo.eval.robustness.effects import ALL, ORIGINAL, compare, worst_case
from tests.eval.judges.fake_judge import SETTINGS, FakeJudge, prefers_word, run_cepo, serving
from tests.eval.judges.fake_reward_model import RuleModel, write_reward_model


def write_pairs(path: Path, count: int) -> Path:
    lines = [
        {"prompt": f"question {number}", "chosen": f"good answer {number}", "rejected": f"weak answer {number}"}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def job(tmp_path: Path, count: int = 6, **options: Any) -> RobustnessJob:
    source = write_pairs(tmp_path / "pairs.jsonl", count)
    names = options.pop("transformations", ("quotes", "ignore-above", "comment-bad"))
    judge = replace(SETTINGS, seed=options.pop("seed", 0))
    return RobustnessJob(judge, str(source), tmp_path / "out", names, **options)


def record(row: int, transformation: str, winner: str | None, label: str = "A", error: str | None = None) -> dict:
    facts = {"row": row, "transformation": transformation, "label": label, "winner": winner, "error": error}
    return {**facts, "question": f"question {row}", "forced": winner == "tie"}


def test_effects_by_hand() -> None:
    """Ties and unreadable verdicts are wrong, pairs are compared with their own originals, errors are left out."""
    records = [
        *(record(0, name, winner) for name, winner in ((ORIGINAL, "A"), ("x", "A"), ("y", "B"))),
        *(record(1, name, winner) for name, winner in ((ORIGINAL, "A"), ("x", None))),
        *(record(2, name, winner, "B") for name, winner in ((ORIGINAL, "tie"), ("x", "B"))),
        *(record(3, name, winner) for name, winner in ((ORIGINAL, "A"), ("x", "tie"))),
        record(4, ORIGINAL, "A"),
        record(4, "x", None, error="refused"),
        record(5, ORIGINAL, None, error="refused"),
        record(5, "x", "A"),
    ]
    effects = compare(records)
    assert list(effects) == ["x", "y", ALL]
    found = effects["x"]
    assert found.pairs == 4
    assert (found.before.value, found.after.value, found.drop.value) == (0.75, 0.5, 0.25)
    assert found.ratio.value == pytest.approx(2 / 3)
    assert found.changed.value == 0.75
    assert (found.unreadable_before, found.unreadable_after) == (0.0, 0.25)
    assert (found.forced_before, found.forced_after) == (0.25, 0.25)
    assert found.drop.low <= found.drop.value <= found.drop.high
    pooled = effects[ALL]
    assert pooled.pairs == 5
    assert pooled.drop.value == pytest.approx(4 / 5 - 2 / 5)
    original, worst = worst_case(records)
    assert (original.value, original.count) == (0.75, 4)
    assert worst.value == 0.0, "row 0 is right under x and wrong under y, row 2 wrong on the original"


def test_a_judge_that_is_never_right_has_no_ratio() -> None:
    effects = compare([record(0, ORIGINAL, "B"), record(0, "x", "B")])
    assert math.isnan(effects["x"].ratio.value)
    assert worst_case([record(0, ORIGINAL, "A", error="refused")])[0].count == 0


def test_pooled_interval_takes_questions_as_units() -> None:
    """Ten transformations of the same four pairs are not forty observations, and two pairs of a question are one."""
    records = []
    for row, right in enumerate("AABB"):
        records += [record(row, ORIGINAL, "A"), *(record(row, f"t{number}", right) for number in range(10))]
    effects = compare(records)
    drop, pooled = effects["t0"].drop, effects[ALL].drop
    assert (pooled.low, pooled.value, pooled.high) == pytest.approx((drop.low, 0.5, drop.high))
    assert pooled.count == 40
    pairs_of_two = compare([{**one, "question": one["row"] % 2} for one in records])[ALL].drop
    assert pairs_of_two.low < pooled.low


def test_a_steady_judge_does_not_drop_and_a_shallow_one_does(tmp_path: Path) -> None:
    """The whole way: a judge that reads the content keeps its verdicts, one put off by quotes loses those pairs."""
    steady = measure_robustness(job(tmp_path), open_=FakeJudge(prefers_word("good")).open)
    assert steady.effects["quotes"].drop.value == 0.0
    assert steady.worst.value == steady.original.value == 1.0
    assert steady.idle == ("comment-bad",)
    assert (len(steady.collected.records), steady.collected.resumed, steady.collected.failed) == (18, 0, {})
    other = tmp_path / "other"
    other.mkdir()
    shallow = FakeJudge(lambda a, b: "no idea" if a.startswith('"') else prefers_word("good")(a, b))
    found = measure_robustness(job(other), open_=shallow.open)
    assert found.effects["quotes"].drop.value == 1.0
    assert found.effects["quotes"].unreadable_after == 1.0
    assert found.effects["ignore-above"].drop.value == 0.0
    assert found.worst.value == 0.0
    assert found.effects[ALL].drop.value == 0.5
    rows = [json.loads(line) for line in (other / "out" / "summary.jsonl").read_text().splitlines()]
    low = pytest.approx(2.0 * 0.025 ** (1 / 6) - 1.0)  # Clopper and Pearson's for six of six, stretched to [-1, 1]
    assert {"transformation": "quotes", "metric": "drop", "value": 1.0, "low": low, "high": 1.0, "count": 6} in rows
    page = (other / "out" / "report.html").read_text()
    assert "Verdicts that a transformation turned from right to wrong" in page
    assert "no idea" in page


def test_responses_keep_their_places(tmp_path: Path) -> None:
    """A verdict that changes because the responses were swapped would be counted against the transformation."""
    judge = FakeJudge(prefers_word("good"))
    measure_robustness(job(tmp_path, count=12), open_=judge.open)
    places: dict[str, set[bool]] = {}
    for first, _ in judge.prompts:
        number = "".join(character for character in first if character.isdigit())
        places.setdefault(number, set()).add("good" in first)
    assert all(len(sides) == 1 for sides in places.values())
    assert {True, False} == {side for sides in places.values() for side in sides}, "both orders occur"


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Without losing or doubling a judgement, and to the same result as a run that was never killed."""
    whole = tmp_path / "whole"
    whole.mkdir()
    expected = measure_robustness(job(whole), open_=FakeJudge(prefers_word("good")).open)
    killed = FakeJudge(prefers_word("good"), kill_after=7)
    with pytest.raises(KeyboardInterrupt):
        measure_robustness(job(tmp_path), open_=killed.open)
    with (tmp_path / "out" / "judgements.jsonl").open("a") as file:
        file.write('{"key": "torn')
    judge = FakeJudge(prefers_word("good"))
    resumed = measure_robustness(job(tmp_path), open_=judge.open)
    assert resumed.collected.resumed == 7
    assert len(judge.prompts) == 11
    assert not set(judge.prompts) & set(killed.prompts)
    assert resumed.effects == expected.effects
    lines = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    assert len({(line["row"], line["transformation"]) for line in lines}) == 18


def test_failed_judgements_are_left_out_and_judged_anew(tmp_path: Path) -> None:
    failing = FakeJudge(lambda a, b: "error" if '"' in a and "3" in a else prefers_word("good")(a, b))
    first = measure_robustness(job(tmp_path), open_=failing.open)
    assert first.collected.failed == {"refused": 1}
    assert first.effects["quotes"].pairs == 5
    judge = FakeJudge(prefers_word("good"))
    second = measure_robustness(job(tmp_path), open_=judge.open)
    assert len(judge.prompts) == 1
    assert (second.collected.failed, second.effects["quotes"].pairs) == ({}, 6)


def test_limit_draws_pairs_by_the_seed(tmp_path: Path) -> None:
    def taken(seed: int) -> set[str]:
        folder = tmp_path / str(seed)
        folder.mkdir(exist_ok=True)
        judge = FakeJudge(prefers_word("good"))
        measure_robustness(job(folder, count=30, limit=5, seed=seed, transformations=("quotes",)), open_=judge.open)
        return {first.strip('"').split()[-1] for first, _ in judge.prompts}

    assert len(taken(0)) == 5
    assert taken(0) | taken(1) != taken(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0; expected at least 1"),
        ({"transformations": ("rot13",)}, "transformation is 'rot13'"),
        ({"transformations": ("comment-bad",)}, "none of the transformations comment-bad applies"),
    ],
)
def test_what_cannot_work_is_refused_before_the_judge_opens(
    tmp_path: Path, options: Mapping[str, Any], message: str
) -> None:
    def refuse(_: JudgeSettings) -> FakeJudge:
        raise AssertionError("the judge was opened")

    with pytest.raises(ValueError, match=message):
        measure_robustness(job(tmp_path, **options), open_=refuse)


def test_output_must_be_a_folder_of_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="output is .*out.*; expected a folder"):
        measure_robustness(job(tmp_path), open_=FakeJudge(prefers_word("good")).open)
    (tmp_path / "out").unlink()
    measure_robustness(job(tmp_path), open_=FakeJudge(prefers_word("good")).open)
    with pytest.raises(ValueError, match="other settings: seed was 0 and is 1"):
        measure_robustness(job(tmp_path, seed=1), open_=FakeJudge(prefers_word("good")).open)


# The command


@pytest.fixture
def server() -> Iterator[str]:
    with serving() as address:
        yield address


def test_the_command_judges_with_a_server(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A good run ends in 0, ties or not; a broken line is named and ends in 2 after all others are judged."""
    source = write_pairs(tmp_path / "pairs.jsonl", 4)
    tie = {"prompt": "p", "chosen": "good", "rejected": "fine", "tie": True}
    source.write_text(source.read_text() + json.dumps(tie) + "\n")
    common = ("--model", "any", "--base-url", server, "--data", str(source), "--transformation", "quotes")
    assert run_cepo(monkeypatch, "eval", "robustness", *common, "--output", str(tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert "quotes" in shown
    assert "left out: 1 row, each of which is a tie; only preferences are read here" in shown
    source.write_text(source.read_text() + "{torn\n")
    assert run_cepo(monkeypatch, "eval", "robustness", *common, "--output", str(tmp_path / "second")) == 2
    captured = capsys.readouterr()
    assert "1 row that could not be used: row 6: not JSON" in captured.err
    assert (tmp_path / "second" / "report.html").is_file()


# A reward model in the judge's place


def test_a_reward_model_is_compared_with_itself_and_with_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It follows length: right where the better response is longer, wrong where it is shorter, else a tie."""
    RuleModel(lambda text: float(len(text))).replace(monkeypatch)
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{place}", "chosen": "good answers", "rejected": "weak"} for place in range(4)]
    rows += [
        {"prompt": "short", "chosen": "brief", "rejected": "a long one"},
        {"prompt": "tie", "chosen": "good", "rejected": "weak"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = RewardSettings(str(write_reward_model(tmp_path / "model")))
    found = measure_robustness(RobustnessJob(settings, str(data), tmp_path / "out", ("quotes",)))
    assert found.effects["quotes"].before.value == found.original.value == pytest.approx(4 / 6)
    assert found.effects["quotes"].drop.value == 0.0
    before = {rule: accuracy.value for rule, (accuracy, _) in found.rules.items()}
    assert before == pytest.approx(
        {
            "right, ties as half": 4.5 / 6,
            "the longer response wins": 4.5 / 6,
            "the shorter response wins": 1.5 / 6,
            "right where the better response is longer": 1.0,
            "right where the better response is shorter": 0.0,
        }
    )
    summary = (tmp_path / "out" / "summary.jsonl").read_text()
    assert "the longer response wins" in summary
