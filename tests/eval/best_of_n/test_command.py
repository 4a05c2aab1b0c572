"""Protects `cepo eval best-of-n`: knockouts by hand, resumption, what the command says."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cepo.eval.best_of_n.candidates import Question, answer_groups, read_questions
from cepo.eval.best_of_n.command import BestOfJob, estimate_curves, measure_best_of
from cepo.eval.best_of_n.knockout import Match, candidate_order, majority_share, pick_by_knockout, score_picks
from tests.eval.judges.fake_judge import SETTINGS, FakeJudge, prefers_word, run_cepo, serving
from tests.paths import DATA

PAIRS = DATA / "pref"


def question(correct: Sequence[bool], name: str = "q") -> Question:
    return Question(name, tuple(f"{name} solution {place}" for place in range(len(correct))), tuple(correct))


def knock_out(questions: Sequence[Question], sizes: Sequence[int], judge: str, **options: Any) -> dict:
    """Picks of a judge that is always right, always wrong, or never decides."""

    def decide(matches: Sequence[Match]) -> list[Any]:
        return [
            {"right": "A" if questions[match.question].correct[match.first] else "B",
             "wrong": "B" if questions[match.question].correct[match.first] else "A",
             "undecided": None}[judge]
            for match in matches
        ]  # fmt: skip

    return pick_by_knockout(questions, sizes, decide, **options)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_a_perfect_judge_is_the_oracle_and_a_hostile_one_its_mirror(size: int) -> None:
    questions = [question([place == number for place in range(8)], f"q{number}") for number in range(6)]
    questions.append(question([True] * 8, "all"))
    ways = score_picks(questions, knock_out(questions, [size], "right", draws=5), [size], draws=5)
    assert ways["judge"][size] == ways["oracle"][size]
    hostile = score_picks(questions, knock_out(questions, [size], "wrong", draws=5), [size], draws=5)
    assert hostile["judge"][size] == [0.0] * 6 + [1.0]
    assert ways["random"][size][-1] == 1.0


def test_ways_of_picking_by_hand() -> None:
    """Of the drawn order's first N: the share that is right, whether any is, and the vote, all over the same ones."""
    texts = ("so \\boxed{4}", "thus \\boxed{4}", "hence \\boxed{5}", "then \\boxed{6}")
    item = Question("2 + 2", texts, (True, True, False, False))
    order = candidate_order(item, draw=0, seed=0)
    sizes = [1, 2, 3, 4]
    ways = score_picks([item], {(0, 0, size): order[0] for size in sizes}, sizes)
    for size in sizes:
        right = [item.correct[candidate] for candidate in order[:size]]
        assert ways["random"][size] == [sum(right) / size]
        assert ways["oracle"][size] == [float(any(right))]
        assert ways["judge"][size] == [float(item.correct[order[0]])]
    assert ways["majority"][4] == [1.0]
    assert ways["random"][4] == [0.5]


def test_an_undecided_judge_picks_at_random_on_average() -> None:
    """The first of a drawn order stays champion: over many orders its accuracy is the share that is right."""
    item = question([True, False, False, False])
    picks = knock_out([item], [1, 4], "undecided", draws=400)
    ways = score_picks([item], picks, [1, 4], draws=400)
    assert ways["judge"][4] == ways["judge"][1]
    assert ways["judge"][4][0] == pytest.approx(0.25, abs=0.07)


def test_each_challenger_meets_the_champion_once() -> None:
    """N - 1 matches per question, places drawn: whoever always names A is no better than a random pick."""
    questions = [question([True] + [False] * 3, f"q{number}") for number in range(50)]
    rounds: list[list[Match]] = []

    def decide(matches: Sequence[Match]) -> list[Any]:
        rounds.append(list(matches))
        return ["A"] * len(matches)

    picks = pick_by_knockout(questions, [4], decide, draws=4)
    assert [len(matches) for matches in rounds] == [200, 200, 200]
    for number in range(50):
        order = candidate_order(questions[number], draw=0, seed=0)
        met = [
            {match.first, match.second}
            for matches in rounds
            for match in matches
            if (match.question, match.draw) == (number, 0)
        ]
        assert [challenger in pair for challenger, pair in zip(order[1:], met, strict=True)] == [True] * 3
    kept = [
        match.first == candidate_order(questions[match.question], draw=match.draw, seed=0)[0] for match in rounds[0]
    ]
    assert sum(kept) / 200 == pytest.approx(0.5, abs=0.15)
    share = sum(score_picks(questions, picks, [4], draws=4)["judge"][4]) / 50
    assert share == pytest.approx(0.25, abs=0.12)


@pytest.mark.parametrize(
    ("groups", "correct", "share"),
    [
        ([0, 0, 1], [True, True, False], 1.0),
        ([0, 1, 1], [True, False, False], 0.0),
        ([0, 1], [True, False], 0.5),
        ([None, None, 2], [True, True, False], 0.0),
        ([None, None], [True, False], 0.5),
        ([0, 0, 1, 1, 2], [True, True, False, False, True], 0.5),
    ],
)
def test_majority_by_hand(groups: Sequence[int | None], correct: Sequence[bool], share: float) -> None:
    assert majority_share(groups, correct) == share


def test_equal_answers_are_one_group() -> None:
    texts = ["The sum\nA: 1,200", "a: 1200.", "<answer>7</answer>", "\\boxed{7}", "  ", "Eight", "So\n#### 7"]
    assert answer_groups(texts) == [0, 0, 1, 1, None, 2, 1]


@pytest.mark.parametrize("sizes", [(), (0, 2), (2, 2)])
def test_sizes_are_checked(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="n is .*; expected different numbers of at least 1"):
        knock_out([question([True, False])], sizes, "right")
    with pytest.raises(ValueError, match="n holds 3, but a question has 2 candidates"):
        knock_out([question([True, False])], (3,), "right")
    with pytest.raises(ValueError, match="draws is 0"):
        knock_out([question([True, False])], (2,), "right", draws=0)


def test_questions_are_read_graded_and_put_together(tmp_path: Path) -> None:
    lines = [
        {"question": "2 + 2", "completions": ["\\boxed{4}", "\\boxed{5}", "\\boxed{\\frac{8}{2}}"], "answer": "4"},
        {"prompt": "1 + 1", "chosen": "2", "rejected": "3"},
        {"prompt": "1 + 1", "chosen": "two", "rejected": "3"},
        {"question": "3 + 3", "completions": ["x", "y"], "correct": [0, 1]},
        {"question": "lone", "completions": ["x"], "correct": [True]},
        {"question": "4 + 4", "completions": ["x", "y"], "correct": [True]},
        {"question": "4 + 4", "completions": ["x", "y"]},
        {"prompt": "1 + 1", "chosen": "3", "rejected": "2"},
        {"prompt": "1 + 1", "chosen": "same", "rejected": "same"},
        {"question": "5 + 5", "completions": ["It is\n#### 10", "#### 11"], "answer": "5 + 5 = <<5+5=10>>10\n#### 10"},
        {"question": "9 + 9", "completions": ["\ud83d\n#### 18", "#### 19"], "answer": 18.0},  # as a table writes 18
        {"question": "no answer", "completions": ["#### 18", "#### 19"], "answer": float("nan")},
        {"prompt": "1 + 1", "chosen": "4", "rejected": "3", "kept": False, "reason": "wrong direction"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{torn\n")
    questions, broken = read_questions(path)
    assert questions == [
        Question("2 + 2", ("\\boxed{4}", "\\boxed{5}", "\\boxed{\\frac{8}{2}}"), (True, False, True)),
        Question("1 + 1", ("2", "3", "two"), (True, False, True)),
        Question("3 + 3", ("x", "y"), (False, True)),
        Question("lone", ("x",), (True,)),
        Question("5 + 5", ("It is\n#### 10", "#### 11"), (True, False)),
        Question("9 + 9", ("?\n#### 18", "#### 19"), (True, False)),  # half a character, which no tokenizer takes
    ]
    assert [number for number, _ in broken] == [6, 7, 8, 9, 12, 13, 14]
    exactly, _ = read_questions(path, verifier="exact")
    assert (exactly[0].correct, exactly[-1].correct) == ((True, False, False), (True, False))
    with pytest.raises(ValueError, match="verifier is 'bleu'"):
        read_questions(path, verifier="bleu")  # type: ignore[arg-type]


def test_real_pairs_of_one_question_are_put_together() -> None:
    if not (PAIRS / "gsm8k_solution_pairs.jsonl").is_file():
        pytest.skip("needs gsm8k_solution_pairs.jsonl of the shared data")
    questions, broken = read_questions(PAIRS / "gsm8k_solution_pairs.jsonl")
    assert not broken
    assert max(len(found.candidates) for found in questions) > 2
    assert all(any(found.correct) and not all(found.correct) for found in questions)


def best_of_job(tmp_path: Path, **options: Any) -> BestOfJob:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": f"q{number}", "completions": [f"{number} good", *(f"{number} bad {place}" for place in range(3))],
         "correct": [1, 0, 0, 0]}
        for number in range(8)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "few", "completions": ["a", "b"],
                                                                       "correct": [1, 0]},
                                                               {"question": "lone", "completions": ["a"],
                                                                "correct": [1]}]))  # fmt: skip
    return BestOfJob(SETTINGS, path, tmp_path / "out", (1, 2, 4), **options)


def test_best_of_n_the_whole_way(tmp_path: Path) -> None:
    """A good judge reaches the oracle, a killed run goes on to the same figures, and the pages are there."""
    killed = FakeJudge(prefers_word("good"), kill_after=13)
    with pytest.raises(KeyboardInterrupt):
        measure_best_of(best_of_job(tmp_path, draws=2), open_=killed.open)
    judge = FakeJudge(prefers_word("good"))
    found = measure_best_of(best_of_job(tmp_path, draws=2), open_=judge.open)
    assert not set(judge.prompts) & set(killed.prompts)
    assert (found.questions, found.left_out, found.matches, found.failed) == (8, 2, 48, {})
    assert found.lines["judge"] == found.lines["oracle"]
    assert [estimate.value for _, estimate in found.lines["random"]][-1] == 0.25
    assert found.lines["judge - random"][-1][1].value == 0.75
    rows = [json.loads(line) for line in (tmp_path / "out" / "summary.jsonl").read_text().splitlines()]
    low = pytest.approx(0.025 ** (1 / 8))  # Clopper and Pearson's, for eight of eight
    assert {"way": "oracle", "n": 4, "value": 1.0, "low": low, "high": 1.0, "count": 8} in rows
    page = (tmp_path / "out" / "report.html").read_text()
    assert "best-of-n" in page
    again = FakeJudge(prefers_word("bad"))
    assert measure_best_of(best_of_job(tmp_path, draws=2), open_=again.open).lines == found.lines
    assert again.prompts == []
    with pytest.raises(ValueError, match="n was 4 and is 2"):
        measure_best_of(replace(best_of_job(tmp_path, draws=2), sizes=(1, 2)), open_=again.open)
    with pytest.raises(ValueError, match="records in judgements.jsonl belong to rows that this run does not read"):
        measure_best_of(best_of_job(tmp_path, draws=2, limit=2), open_=again.open)


def test_failed_matches_leave_the_champion_and_are_counted(tmp_path: Path) -> None:
    found = measure_best_of(best_of_job(tmp_path), open_=FakeJudge(lambda a, b: "error").open)
    assert (found.failed, found.undecided, found.matches) == ({"refused": 24}, 24, 24)
    assert measure_best_of(best_of_job(tmp_path), open_=FakeJudge(prefers_word("good")).open).failed == {}


def test_too_large_an_n_is_refused(tmp_path: Path) -> None:
    wanted = best_of_job(tmp_path)
    with pytest.raises(ValueError, match="n holds 9, but no question has more than 4 solutions"):
        measure_best_of(BestOfJob(SETTINGS, wanted.data, wanted.output, (9,)))


def test_curves_hold_paired_gains() -> None:
    lines = estimate_curves({"judge": {2: [1.0, 0.0]}, "random": {2: [0.5, 0.5]}})
    assert lines["judge - random"][0][1].value == 0.0


@pytest.fixture
def server() -> Iterator[str]:
    with serving() as address:
        yield address


def test_the_command_runs_best_of(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = best_of_job(tmp_path)
    common = ("--model", "any", "--base-url", server, "--data", str(wanted.data), "--output", str(wanted.output))
    assert run_cepo(monkeypatch, "eval", "best-of-n", *common, "--n", "1,4") == 0
    assert "8 questions, 24 matches" in capsys.readouterr().out
    assert run_cepo(monkeypatch, "eval", "best-of-n", *common, "--n", "1,four") == 2
    assert "--n is '1,four'" in capsys.readouterr().err
