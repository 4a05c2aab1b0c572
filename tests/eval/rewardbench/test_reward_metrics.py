"""Protects `cepo eval rewardbench --reward-model`: ties, what length would get, RewardBench 2's Ties, what is lost."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cepo.eval.judges.reward import RewardSettings
from cepo.eval.rewardbench.command import RewardBenchJob, RewardBenchSummary, run_rewardbench
from cepo.eval.rewardbench.reward_metrics import credit, measure_ties
from tests.eval.judges.fake_judge import run_cepo
from tests.eval.judges.fake_reward_model import RuleModel, write_reward_model

# By response, its reward; "lost" has none.
REWARDS = {"a good one": 3.0, "fair": 1.0, "bad": -1.0, "an equal": 1.0, "long and bad": -1.0, "worst of all": -4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reward_model(tmp_path_factory.mktemp("reward"))


def rule(text: str) -> float:
    if text not in REWARDS:
        raise ValueError("too long: 9 tokens, over max_length 8")
    return REWARDS[text]


def run(rows: list[dict[str, Any]], model: Path, tmp_path: Path) -> RewardBenchSummary:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_rewardbench(RewardBenchJob(RewardSettings(str(model)), str(data), tmp_path / "out"))


def values(summary: RewardBenchSummary, scope: str = "all") -> dict[str, float]:
    return {one.metric: one.estimate.value for one in summary.measures if one.scope == scope}


def test_accuracies_by_hand(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right, a tie, wrong, and one of three that ties at the top; a pair with a lost text counts in no accuracy."""
    RuleModel(rule).replace(monkeypatch)
    rows: list[dict[str, Any]] = [
        {"prompt": "p1", "chosen": "a good one", "rejected": "bad"},
        {"prompt": "p2", "chosen": "an equal", "rejected": "fair"},
        {"prompt": "p3", "chosen": "bad", "rejected": "a good one"},
        {"prompt": "p4", "chosen": ["fair"], "rejected": ["an equal", "long and bad"]},
        {"prompt": "p5", "chosen": "lost", "rejected": "bad", "id": "lost one"},
    ]
    summary = run(rows, folder, tmp_path)
    found = values(summary)
    assert found["strict"] == 1 / 4
    assert found["half_credit"] == (1 + 1 / 2 + 0 + 1 / 2) / 4
    assert found["longest"] == (1 + 1 + 0 + 0) / 4
    assert found["shortest"] == (0 + 0 + 1 + 1) / 4
    assert found["longer_right"] == 1 / 2, "right in p1, a tie in p2"
    assert found["shorter_right"] == 1 / 3, "wrong in p3, a tie and a win in p4"
    assert found["ties"] == 2 / 5
    assert found["margin"] == pytest.approx((4 + 0 - 4 + 0 + 2) / 5)
    assert found["not_judged"] == 1 / 6
    assert summary.collected.failed == {"too long: 9 tokens, over max_length 8": 1}
    journal = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    assert [(line["text"], line["reward"], line["error"]) for line in journal if line["id"] == "lost one"] == [
        ("lost", None, "too long: 9 tokens, over max_length 8"),
        ("bad", -1.0, None),
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "longer response wins" in page
    assert "difference of the rewards" in page


def test_ties_share_the_credit_as_rewardbench_2_has_it() -> None:
    assert credit(np.array([[1.0, 0.0, 0.0]])) == 1 / 3
    assert credit(np.array([[1.0, 2.0], [0.0, 3.0]])) == 1 / 2, "each right answer must be at the top"
    assert credit(np.array([[1.0, -0.1]])) == 0.0


def test_the_measure_of_ties_by_hand() -> None:
    """Against numbers worked out by hand from `process_single_model` of the package reward-bench."""
    scores = {
        # Gap 1, spread 1; the reference's gap is 2. Right, right, no margin above the spread, tanh(1 / 1 - 1) = 0.
        "tied:1": ([3.0, 2.0], [1.0, 0.5]),
        "ref:1": ([2.0], [0.0, -1.0]),
        # Gap 4, spread 0; the reference is wrong by 1: tanh(-1 / 0 - 1) = -1.
        "tied:2": ([5.0, 5.0], [1.0]),
        "ref:2": ([1.0], [2.0]),
        # Gap 3, spread 2, reference 5: both margins are above the spread, tanh(3 / 2 - 1).
        "tied:3": ([6.0, 4.0, 5.0], [1.0]),
        "ref:3": ([9.0], [4.0]),
    }
    expected = 0.3 * 3 / 3 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * (0.0 - 1.0 + math.tanh(0.5)) / 3
    found = measure_ties(scores)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert found.low < found.value < found.high
    assert "expected ref:N or tied:N" in measure_ties({"7": ([1.0], [0.0])}).why
    assert "no prompt has both items" in measure_ties({"tied:1": ([1.0, 1.0], [0.0])}).why


def test_the_score_of_rewardbench_2_is_the_mean_of_its_subsets(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RuleModel(rule).replace(monkeypatch)
    rows: list[dict[str, Any]] = [
        {"subset": "Math", "prompt": "m1", "chosen": ["a good one"], "rejected": ["fair", "bad"]},
        {"subset": "Math", "prompt": "m2", "chosen": ["fair"], "rejected": ["an equal", "bad"]},
        {"subset": "Focus", "prompt": "f1", "chosen": ["bad"], "rejected": ["fair"]},
        {"subset": "Ties", "id": "tied:0", "prompt": "t", "chosen": ["fair", "an equal"], "rejected": ["worst of all"]},
        {"subset": "Ties", "id": "ref:0", "prompt": "r", "chosen": ["a good one"], "rejected": ["fair"]},
    ]
    summary = run(rows, folder, tmp_path)
    ties = values(summary, "Ties")["ties_measure"]
    assert ties == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01), "gap 5, spread 0, reference gap 2"
    assert values(summary, "RewardBench 2")["half_credit"] == pytest.approx((0.75 + 0.0 + ties) / 3)
    assert values(summary, "mean of subsets without Ties")["half_credit"] == (0.75 + 0.0) / 2
    assert any("RewardBench 2" in row for row in summary.scope_table()[1])


def test_a_killed_run_goes_on_and_other_weights_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"p{place}", "chosen": "a good one", "rejected": "bad"} for place in range(80)]
    killed = RuleModel(rule, kill_after=140)
    killed.replace(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(rows, folder, tmp_path)
    resumed = RuleModel(rule)
    resumed.replace(monkeypatch)
    assert values(run(rows, folder, tmp_path))["strict"] == 1.0
    assert len(resumed.read) == 32
    assert len((tmp_path / "out" / "judgements.jsonl").read_text().splitlines()) == 160
    other = write_reward_model(tmp_path / "other", "pairwise")
    with pytest.raises(ValueError, match="made with other settings"):
        run(rows, other, tmp_path)


def test_a_pairwise_model_is_judged_by_both_orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its leaning to the first place cancels; Ties have no measure, since no answer alone has a reward."""
    RuleModel(lambda text: 5.0 + 2.0 * (text.index("good") < text.index("bad")) - 1.0).replace(monkeypatch)
    rows = [
        {"subset": "Ties", "id": "tied:0", "prompt": "p", "chosen": ["good", "good too"], "rejected": ["bad"]},
        {"subset": "Math", "prompt": "q", "chosen": "good", "rejected": "bad"},
    ]
    found = run(rows, write_reward_model(tmp_path / "model", "pairwise"), tmp_path)
    assert values(found)["strict"] == 1.0
    assert values(found)["margin"] == 1.0
    assert "ties_measure" not in values(found, "Ties")


def test_the_command_judges_and_refuses_what_belongs_to_other_judges(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a real model, and a text that is longer than its context: named, and everything else judged."""
    data = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "Query: help with this exam", "chosen": "Response: correct so", "rejected": "Response: wrong"},
        {"prompt": "Query: help", "chosen": "Response:" + " correct" * 3000, "rejected": "Response: wrong"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("eval", "rewardbench", "--data", str(data), "--output", str(tmp_path / "out"), "--threads", "1")
    assert run_cepo(monkeypatch, *common, "--reward-model", str(folder)) == 2
    said = capsys.readouterr()
    assert "longer response wins" in said.out
    assert "1 prompt could not be judged: too long" in said.err
    for options, complaint in (
        ((), "Give either --model or --reward-model"),
        (("--reward-model", str(folder), "--model", "smollm2"), "Give either --model or --reward-model"),
        (("--reward-model", str(folder), "--temperature", "0", "--raw"), "--raw, --temperature cannot be used with"),
        (("--reward-model", "smollm2"), "a causal language model without reward_model.json"),
        (("--reward-model", str(folder), "--batch-size", "0"), "--batch-size is 0"),
        (("--reward-model", "./nowhere"), "./nowhere"),
    ):
        assert run_cepo(monkeypatch, *common, *options) == 2
        assert complaint in " ".join(capsys.readouterr().err.split())
