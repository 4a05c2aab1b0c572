"""Rows in which neither response is better: left out by default, else judged under a prompt that allows ties."""

import json
from pathlib import Path
from typing import Any

import pytest

from cepo.eval.best_of_n.candidates import read_questions
from cepo.eval.judges.journal import judgement_record
from cepo.eval.judges.reward import RewardSettings
from cepo.eval.judges.settings import Judgement, JudgeSettings
from cepo.eval.rewardbench.command import RewardBenchJob, run_rewardbench
from cepo.eval.rewardbench.items import judge_tasks, load_items, read_item
from cepo.eval.rewardbench.metrics import measure_preferences, outcome
from cepo.files import read_jsonl
from cepo.train.prompts import TIES_LITERALS, judge_prompt
from tests.eval.judges.fake_judge import run_cepo
from tests.eval.judges.fake_reward_model import RuleModel, write_reward_model

PAIRS: list[dict[str, Any]] = [
    {"id": "preference", "prompt": "Capital of Australia?", "chosen": "Canberra.", "rejected": "Sydney."},
    {"id": "tie", "prompt": "Capital of France?", "chosen": "Paris.", "rejected": "It is Paris.", "tie": True},
]


def scored(first: int, second: int) -> str:
    """Write a verdict."""
    return f"<scores>\n\\boxed{{{first}, {second}}}\n</scores>"


def test_ties_are_left_out_unless_they_are_asked_for(tmp_path: Path) -> None:
    """A tie that is judged as a preference makes every judge look worse; prompts and keys of preferences stay."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    items, broken = load_items(path, ties=False)
    assert ([item.name for item in items], [number for number, _ in broken]) == (["preference"], [2])
    assert broken[0][1] == "is a tie; pass --ties to include ties"
    questions, not_read = read_questions(path)
    without_option = [(2, "is a tie; only preferences are read here")]
    assert ([one.text for one in questions], not_read) == (["Capital of Australia?"], without_option)
    assert load_items(path) == (items, without_option)
    allowed, none_broken = load_items(path, ties=True)
    assert ([item.tie for item in allowed], none_broken) == ([False, True], [])
    assert allowed[0] == items[0]
    for ties, asked in ((False, items), (True, allowed)):
        assert judge_tasks(asked, ties=ties)[0].messages == judge_prompt(
            "Capital of Australia?", "Canberra.", "Sydney.", ties=ties
        )


def test_pairs_that_augment_did_not_keep_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pair that a check refused is not a preference; its label would count against every judge. Not an error."""
    refused = {**PAIRS[0], "id": "refused", "chosen": "Perth.", "kept": False, "reason": "wrong direction: neither"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (PAIRS[0], refused)))
    model = write_reward_model(tmp_path / "model")
    RuleModel(len).replace(monkeypatch)
    for command in ("rewardbench", "robustness"):
        options = ["--reward-model", str(model), "--data", str(path), "--output", str(tmp_path / command)]
        assert run_cepo(monkeypatch, "eval", command, *options) == 0
        assert "left out: 1 row with kept: false" in capsys.readouterr().out
        records, _ = read_jsonl(tmp_path / command / "judgements.jsonl")
        assert {record["id"] for _, record in records} == {"preference"}


@pytest.mark.parametrize(
    ("said", "right", "ties", "ties_on_ties", "average"),
    [
        ({"preference": [scored(8, 2), scored(2, 8)], "tie": [scored(5, 5), scored(7, 7)]}, (True, True), 0.0, 1.0, 1),
        ({"preference": [scored(5, 5), scored(5, 5)], "tie": [scored(5, 5), scored(5, 5)]}, (True, True), 1.0, 1.0, 0),
        ({"preference": [scored(8, 2), "nothing"], "tie": [scored(5, 5), scored(6, 5)]}, (True, False), 0.0, 0.5, 0.5),
    ],
)
def test_equal_scores_are_right_on_ties_and_counted_apart(
    said: dict[str, list[str]], right: tuple[bool, bool], ties: float, ties_on_ties: float, average: float
) -> None:
    """A judge that never decides has every tie, and its share of ties on preferences shows it."""
    items = [read_item(row, "line 1", ties=True) for row in PAIRS]
    records = {
        task.key: judgement_record(task, Judgement(said[item.name]["AB".index(str(task.facts["chosen_at"]))]))
        for item in items
        for task in judge_tasks([item], ties=True)
    }
    assert outcome(items[1], records).right == right
    found = {one.metric: one.estimate for one in measure_preferences(items, records) if one.scope == "all"}
    assert (found["ties"].value, found["ties_on_ties"].value, found["average"].value) == (ties, ties_on_ties, average)
    assert (found["average"].count, found["ties"].count, found["parse_failures"].count) == (1, 2, 4)


def test_the_command_shows_the_shares_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the page from calling a tie wrong, and the reliability figure from pairs without a better response."""

    class AlwaysEqual:
        def judge(self, prompts: Any) -> Any:
            assert all(messages[0]["content"].startswith(TIES_LITERALS[0]) for messages in prompts)
            yield from enumerate(Judgement(scored(5, 5)) for _ in prompts)

    monkeypatch.setattr("cepo.eval.rewardbench.command.open_judge", lambda settings: AlwaysEqual())
    judge = JudgeSettings("name", backend="server", base_url="http://127.0.0.1:9/v1")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    summary = run_rewardbench(RewardBenchJob(judge, str(path), tmp_path / "out", ties=True))
    shown = {name: value for name, value, *_ in summary.all_table()[1]}
    assert (shown["ties"], shown["ties, of rows without a better response"]) == ("1.000", "1.000")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "tie, a tie" in page
    with pytest.raises(ValueError, match="a reward model gives no verdict that could be a tie"):
        run_rewardbench(RewardBenchJob(RewardSettings("nowhere"), str(path), tmp_path / "other", ties=True))
