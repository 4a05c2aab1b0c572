"""Protects the closed form of best-of-N: against every draw and every order of ties, and the command around it."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cepo.eval.best_of_n.closed_form import best_of
from cepo.eval.best_of_n.command import BestOfJob, measure_best_of
from cepo.eval.judges.reward import RewardSettings
from tests.eval.judges.fake_judge import run_cepo
from tests.eval.judges.fake_reward_model import RuleModel, write_reward_model


def by_counting(scores: Sequence[float], correct: Sequence[bool], size: int) -> float:
    """The mean over all draws of the share of right ones among those with the highest score."""
    shares = []
    for drawn in itertools.combinations(range(len(scores)), size):
        best = [place for place in drawn if scores[place] == max(scores[other] for other in drawn)]
        shares.append(sum(correct[place] for place in best) / len(best))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(
    "scores",
    [(5.0, 1.0, 4.0, 2.0, 3.0, 0.0), (1.0, 1.0, 0.0, 2.0, 1.0, 2.0), (0.0,) * 6, (-1.0, 0.0, 0.0, 3.0, -1.0, 0.0)],
)
def test_the_closed_form_is_the_mean_over_all_draws(scores: Sequence[float]) -> None:
    correct = [True, False, True, False, False, True]
    for size in range(1, 7):
        assert best_of(scores, correct, size) == pytest.approx(by_counting(scores, correct, size), abs=1e-12)
    assert best_of(scores, correct, 1) == pytest.approx(0.5)


def write_questions(tmp_path: Path) -> Path:
    rows = [
        {"question": "q1", "completions": ["good", "bad but long", "bad"], "correct": [1, 0, 0]},
        {"question": "q2", "completions": ["bad", "good and long", "bad too"], "correct": [0, 1, 0]},
        {"question": "q3", "completions": ["good", "lost", "bad"], "correct": [1, 0, 0]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rule(text: str) -> float:
    if text == "lost":
        raise ValueError("too long: 9 tokens, over max_length 8")
    return float("good" in text)


def test_best_of_n_by_rewards_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside length and chance, each solution scored once; a question with a lost solution is left out and counted."""
    model = RuleModel(rule)
    model.replace(monkeypatch)
    job = BestOfJob(
        RewardSettings(str(write_reward_model(tmp_path / "r"))), write_questions(tmp_path), tmp_path / "out", (1, 3)
    )
    found = measure_best_of(job)
    assert len(model.read) == 9
    at_three = {way: points[1][1].value for way, points in found.lines.items()}
    assert at_three == {
        "judge": 1.0,
        "longest": 0.5,
        "shortest": 0.0,
        "random": pytest.approx(1 / 3),
        "oracle": 1.0,
        "judge - random": pytest.approx(2 / 3),
    }
    assert all(points[0][1].value == pytest.approx(1 / 3) for way, points in found.lines.items() if "-" not in way)
    assert (found.counted, found.failed.total()) == ("9 solutions, 1 without a reward", 1)
    assert "ties broken evenly" in (tmp_path / "out" / "report.html").read_text()
    RuleModel(rule, kill_after=1).replace(monkeypatch)  # the lost one is tried again, and nothing else
    assert measure_best_of(job).lines == found.lines


def test_what_a_reward_model_cannot_do_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (
        "eval",
        "best-of-n",
        "--data",
        str(write_questions(tmp_path)),
        "--output",
        str(tmp_path / "out"),
        "--n",
        "2",
    )
    pairwise = write_reward_model(tmp_path / "pairwise", "pairwise")
    assert run_cepo(monkeypatch, *common, "--reward-model", str(pairwise)) == 2
    assert "which compares two responses" in capsys.readouterr().err
    assert run_cepo(monkeypatch, *common, "--reward-model", str(pairwise), "--draws", "3") == 2
    assert "--draws cannot be used with --reward-model, which is exact" in capsys.readouterr().err
