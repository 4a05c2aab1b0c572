"""Protects `cepo eval robustness`: effects, knockouts and flips by hand; resumption; what the command says."""

import json
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cepo.cli import app as cli
from cepo.eval.best_of_n.candidates import Problem, answer_groups, read_problems
from cepo.eval.best_of_n.command import (
    BestOfJob,
    Match,
    candidate_order,
    estimate_curves,
    majority_share,
    measure_best_of,
    pick_by_knockout,
    score_picks,
)
from cepo.eval.cue_flips import command as cue_flips
from cepo.eval.cue_flips.command import AGREEMENTS, FlipsJob, measure_flips
from cepo.eval.judges.settings import Judgement, JudgeSettings, Messages, OnDone
from cepo.eval.robustness.command import ALL, ORIGINAL, RobustnessJob, compare, measure_robustness, worst_case
from cepo.train import testbed, testbed_judges
from cepo.train.prompts import JUDGE_LITERALS
from tests.paths import DATA

PAIRS = DATA / "pref"
SETTINGS = JudgeSettings(model="smollm2")


def responses(messages: Messages) -> tuple[str, str]:
    """The responses A and B of a judge prompt."""
    _, _, rest = messages[0]["content"].partition(JUDGE_LITERALS[1])
    first, _, rest = rest.partition(JUDGE_LITERALS[2])
    return first, rest.removesuffix(JUDGE_LITERALS[3])


def verdict(first: float, second: float) -> str:
    return f"<scores>\n\\boxed{{{first:g}, {second:g}}}\n</scores>"


class FakeJudge:
    """Writes what a function of the two responses says; counts prompts; may be killed after some of them."""

    def __init__(self, write: Callable[[str, str], str], *, kill_after: int | None = None) -> None:
        self.write, self.kill_after = write, kill_after
        self.prompts: list[tuple[str, str]] = []

    def judge(self, prompts: Sequence[Messages], on_done: OnDone | None = None) -> list[Judgement]:
        judgements = []
        for place, messages in enumerate(prompts):
            if len(self.prompts) == self.kill_after:
                raise KeyboardInterrupt
            self.prompts.append(responses(messages))
            text = self.write(*responses(messages))
            judgement = Judgement("", error="refused") if text == "error" else Judgement(text, tokens=1)
            judgements.append(judgement)
            if on_done is not None:
                on_done(place, judgement)
        return judgements

    def open(self, _: JudgeSettings) -> "FakeJudge":
        return self


def prefers_word(word: str) -> Callable[[str, str], str]:
    """Score a response by whether it holds the word."""
    return lambda first, second: verdict(1 + 8 * (word in first), 1 + 8 * (word in second))


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
    return RobustnessJob(SETTINGS, str(source), tmp_path / "out", names, **options)


def record(row: int, transformation: str, winner: str | None, label: str = "A", error: str | None = None) -> dict:
    facts = {"row": row, "transformation": transformation, "label": label, "winner": winner, "error": error}
    return {**facts, "forced": winner == "tie"}


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


def test_pooled_interval_takes_pairs_as_clusters() -> None:
    """Ten transformations of the same two pairs are not twenty observations."""
    records = []
    for row, right in ((0, "A"), (1, "B")):
        records += [record(row, ORIGINAL, "A"), *(record(row, f"t{number}", right) for number in range(10))]
    pooled = compare(records)[ALL].drop
    assert (pooled.low, pooled.value, pooled.high) == (0.0, 0.5, 1.0)


def test_a_steady_judge_does_not_drop_and_a_shallow_one_does(tmp_path: Path) -> None:
    """The whole way: a judge that reads the content keeps its verdicts, one put off by quotes loses those pairs."""
    steady = measure_robustness(job(tmp_path), open_=FakeJudge(prefers_word("good")).open)
    assert steady.effects["quotes"].drop.value == 0.0
    assert steady.worst.value == steady.original.value == 1.0
    assert steady.idle == ("comment-bad",)
    assert (steady.judgements, steady.resumed, steady.failed) == (18, 0, {})
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
    assert {"transformation": "quotes", "metric": "drop", "value": 1.0, "low": 1.0, "high": 1.0, "count": 6} in rows
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
    assert resumed.resumed == 7
    assert len(judge.prompts) == 11
    assert not set(judge.prompts) & set(killed.prompts)
    assert resumed.effects == expected.effects
    lines = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    assert len(lines) == 18
    assert len({(line["row"], line["transformation"]) for line in lines}) == 18


def test_failed_judgements_are_left_out_and_judged_anew(tmp_path: Path) -> None:
    failing = FakeJudge(lambda a, b: "error" if '"' in a and "3" in a else prefers_word("good")(a, b))
    first = measure_robustness(job(tmp_path), open_=failing.open)
    assert first.failed == {"refused": 1}
    assert first.effects["quotes"].pairs == 5
    judge = FakeJudge(prefers_word("good"))
    second = measure_robustness(job(tmp_path), open_=judge.open)
    assert len(judge.prompts) == 1
    assert (second.failed, second.effects["quotes"].pairs) == ({}, 6)


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
    with pytest.raises(ValueError, match="other settings .*seed was 0 and is 1"):
        measure_robustness(job(tmp_path, seed=1), open_=FakeJudge(prefers_word("good")).open)


# Best of N


def problem(correct: Sequence[bool], name: str = "q") -> Problem:
    return Problem(name, tuple(f"{name} solution {place}" for place in range(len(correct))), tuple(correct))


def knock_out(problems: Sequence[Problem], sizes: Sequence[int], judge: str, **options: Any) -> dict:
    """Picks of a judge that is always right, always wrong, or never decides."""

    def decide(matches: Sequence[Match]) -> list[Any]:
        return [
            {"right": "A" if problems[match.problem].correct[match.first] else "B",
             "wrong": "B" if problems[match.problem].correct[match.first] else "A",
             "undecided": None}[judge]
            for match in matches
        ]  # fmt: skip

    return pick_by_knockout(problems, sizes, decide, **options)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_a_perfect_judge_is_the_oracle_and_a_hostile_one_its_mirror(size: int) -> None:
    problems = [problem([place == number for place in range(8)], f"q{number}") for number in range(6)]
    problems.append(problem([True] * 8, "all"))
    ways = score_picks(problems, knock_out(problems, [size], "right", draws=5), [size], draws=5)
    assert ways["judge"][size] == ways["oracle"][size]
    hostile = score_picks(problems, knock_out(problems, [size], "wrong", draws=5), [size], draws=5)
    assert hostile["judge"][size] == [0.0] * 6 + [1.0]
    assert ways["random"][size][-1] == 1.0


def test_ways_of_picking_by_hand() -> None:
    """Of the drawn order's first N: the share that is right, whether any is, and the vote, all over the same ones."""
    texts = ("so \\boxed{4}", "thus \\boxed{4}", "hence \\boxed{5}", "then \\boxed{6}")
    item = Problem("2 + 2", texts, (True, True, False, False))
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
    item = problem([True, False, False, False])
    picks = knock_out([item], [1, 4], "undecided", draws=400)
    ways = score_picks([item], picks, [1, 4], draws=400)
    assert ways["judge"][4] == ways["judge"][1]
    assert ways["judge"][4][0] == pytest.approx(0.25, abs=0.07)


def test_each_challenger_meets_the_champion_once() -> None:
    """N - 1 matches a problem, places drawn: whoever always names A is no better than a random pick."""
    problems = [problem([True] + [False] * 3, f"q{number}") for number in range(50)]
    rounds: list[list[Match]] = []

    def decide(matches: Sequence[Match]) -> list[Any]:
        rounds.append(list(matches))
        return ["A"] * len(matches)

    picks = pick_by_knockout(problems, [4], decide, draws=4)
    assert [len(matches) for matches in rounds] == [200, 200, 200]
    for number in range(50):
        order = candidate_order(problems[number], draw=0, seed=0)
        met = [
            {match.first, match.second}
            for matches in rounds
            for match in matches
            if (match.problem, match.draw) == (number, 0)
        ]
        assert [challenger in pair for challenger, pair in zip(order[1:], met, strict=True)] == [True] * 3
    kept = [match.first == candidate_order(problems[match.problem], draw=match.draw, seed=0)[0] for match in rounds[0]]
    assert sum(kept) / 200 == pytest.approx(0.5, abs=0.15)
    share = sum(score_picks(problems, picks, [4], draws=4)["judge"][4]) / 50
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
    texts = ["The sum\nA: 1,200", "a: 1200.", "<answer>7</answer>", "\\boxed{7}", "  ", "Eight"]
    assert answer_groups(texts) == [0, 0, 1, 1, None, 2]


@pytest.mark.parametrize("sizes", [(), (0, 2), (2, 2)])
def test_sizes_are_checked(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="best_of is .*; expected different numbers of at least 1"):
        knock_out([problem([True, False])], sizes, "right")
    with pytest.raises(ValueError, match="best_of holds 3, but a problem has 2 candidates"):
        knock_out([problem([True, False])], (3,), "right")
    with pytest.raises(ValueError, match="draws is 0"):
        knock_out([problem([True, False])], (2,), "right", draws=0)


def test_problems_are_read_graded_and_put_together(tmp_path: Path) -> None:
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
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{torn\n")
    problems, broken = read_problems(path)
    assert problems == [
        Problem("2 + 2", ("\\boxed{4}", "\\boxed{5}", "\\boxed{\\frac{8}{2}}"), (True, False, True)),
        Problem("1 + 1", ("2", "3", "two"), (True, False, True)),
        Problem("3 + 3", ("x", "y"), (False, True)),
    ]
    assert [number for number, _ in broken] == [6, 7, 8, 9, 10]
    assert read_problems(path, verifier="exact")[0][0].correct == (True, False, False)
    with pytest.raises(ValueError, match="verifier is 'bleu'"):
        read_problems(path, verifier="bleu")  # type: ignore[arg-type]


def test_real_pairs_of_one_question_are_put_together() -> None:
    if not (PAIRS / "gsm8k_solution_pairs.jsonl").is_file():
        pytest.skip("needs gsm8k_solution_pairs.jsonl of the shared data")
    problems, broken = read_problems(PAIRS / "gsm8k_solution_pairs.jsonl")
    assert not broken
    assert max(len(found.candidates) for found in problems) > 2
    assert all(any(found.correct) and not all(found.correct) for found in problems)


def best_of_job(tmp_path: Path, **options: Any) -> BestOfJob:
    path = tmp_path / "problems.jsonl"
    rows = [
        {"question": f"q{number}", "completions": [f"{number} good", *(f"{number} bad {place}" for place in range(3))],
         "correct": [1, 0, 0, 0]}
        for number in range(8)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": "few", "completions": ["a", "b"],
                                                                       "correct": [1, 0]}]))  # fmt: skip
    return BestOfJob(SETTINGS, path, tmp_path / "out", (1, 2, 4), **options)


def test_best_of_n_the_whole_way(tmp_path: Path) -> None:
    """A good judge reaches the oracle, a killed run goes on to the same figures, and the pages are there."""
    killed = FakeJudge(prefers_word("good"), kill_after=13)
    with pytest.raises(KeyboardInterrupt):
        measure_best_of(best_of_job(tmp_path, draws=2), open_=killed.open)
    judge = FakeJudge(prefers_word("good"))
    found = measure_best_of(best_of_job(tmp_path, draws=2), open_=judge.open)
    assert not set(judge.prompts) & set(killed.prompts)
    assert (found.problems, found.left_out, found.matches, found.failed) == (8, 1, 48, {})
    assert found.lines["judge"] == found.lines["oracle"]
    assert [estimate.value for _, estimate in found.lines["random"]][-1] == 0.25
    assert found.lines["judge - random"][-1][1].value == 0.75
    rows = [json.loads(line) for line in (tmp_path / "out" / "summary.jsonl").read_text().splitlines()]
    low = pytest.approx(8.0 / (8.0 + 1.959964**2))  # Wilson's, for eight of eight
    assert {"way": "oracle", "n": 4, "value": 1.0, "low": low, "high": 1.0, "count": 8} in rows
    page = (tmp_path / "out" / "report.html").read_text()
    assert "best of N" in page
    assert "Only 8 problems" in page
    again = FakeJudge(prefers_word("bad"))
    assert measure_best_of(best_of_job(tmp_path, draws=2), open_=again.open).lines == found.lines
    assert again.prompts == []


def test_failed_matches_leave_the_champion_and_are_counted(tmp_path: Path) -> None:
    found = measure_best_of(best_of_job(tmp_path), open_=FakeJudge(lambda a, b: "error").open)
    assert (found.failed, found.undecided, found.matches) == ({"refused": 24}, 24, 24)
    assert measure_best_of(best_of_job(tmp_path), open_=FakeJudge(prefers_word("good")).open).failed == {}


def test_too_large_an_n_is_refused(tmp_path: Path) -> None:
    wanted = best_of_job(tmp_path)
    with pytest.raises(ValueError, match="best_of holds 9, but no question has more than 4 solutions"):
        measure_best_of(BestOfJob(SETTINGS, wanted.input, wanted.output, (9,)))


def test_curves_hold_paired_gains() -> None:
    lines = estimate_curves({"judge": {2: [1.0, 0.0]}, "random": {2: [0.5, 0.5]}})
    assert lines["judge - random"][0][1].value == 0.0


# Cue flips


def follows_length(_: str, __: FlipsJob) -> Any:
    class Judge:
        def judge(self, prompts: Sequence[Messages], on_done: OnDone | None = None) -> list[Judgement]:
            judgements = []
            for place, messages in enumerate(prompts):
                _, first, second = (len(line.split()) for line in messages[0]["content"].split("\n"))
                judgements.append(Judgement(verdict(first, second)))
                if on_done is not None:
                    on_done(place, judgements[-1])
            return judgements

    return Judge()


def test_a_judge_by_length_has_the_accuracy_of_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its accuracy is the cue's agreement, exactly; its drop is 0.8; and a second run judges nothing."""
    monkeypatch.setattr(cue_flips, "_open", follows_length)
    flips = measure_flips(FlipsJob(("lazy",), tmp_path / "out", count=40))["lazy"]
    assert {agreement: found.value for agreement, found in flips.accuracy.items()} == {
        agreement: pytest.approx(agreement) for agreement in AGREEMENTS
    }
    assert flips.drop.value == pytest.approx(0.8)
    assert flips.drop.low > 0.5
    assert (flips.with_cue.value, flips.against_cue.value, flips.unreadable) == (1.0, 0.0, 0)
    monkeypatch.setattr(cue_flips, "_open", lambda *_: pytest.fail("nothing is left to judge"))
    assert measure_flips(FlipsJob(("lazy",), tmp_path / "out", count=40))["lazy"] == flips
    assert "the cue flips" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_of_a_testbed_policy_is_a_judge(tmp_path: Path) -> None:
    """One that was never trained writes nothing readable: wrong everywhere, and counted."""
    tokenizer = testbed.build_tokenizer()
    testbed_judges.build_model(tokenizer, seed=0).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    judge = str(tmp_path / "policy")
    flips = measure_flips(FlipsJob((judge,), tmp_path / "out", count=4))[judge]
    assert (flips.judgements, flips.unreadable, flips.drop.value) == (20, 20, 0.0)


@pytest.mark.parametrize(
    ("judges", "count", "message"),
    [
        (("sleepy",), 4, "testbed names 'sleepy'; expected able, lazy, criteria, decorative, or the folder"),
        (("able", "able"), 4, "expected judges, each once"),
        (("able",), 0, "count is 0"),
    ],
)
def test_flips_are_checked(tmp_path: Path, judges: tuple[str, ...], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_flips(FlipsJob(judges, tmp_path / "out", count=count))


# The command


class _Server(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = prefers_word("good")(*responses(body["messages"]))
        message = {"role": "assistant", "content": text}
        answer = {
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 3},
        }
        payload = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Any:
    running = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    thread.join()
    running.server_close()


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["cepo", "eval", "robustness", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_judges_with_a_server(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A good run ends in 0; a broken line is named and ends in 2 after all others are judged."""
    source = write_pairs(tmp_path / "pairs.jsonl", 4)
    common = ("--model", "any", "--base-url", server, "--input", str(source), "--transformation", "quotes")
    assert run_command(monkeypatch, *common, "--output", str(tmp_path / "out")) == 0
    assert "quotes" in capsys.readouterr().out
    source.write_text(source.read_text() + "{torn\n")
    assert run_command(monkeypatch, *common, "--output", str(tmp_path / "second")) == 2
    captured = capsys.readouterr()
    assert "1 line(s) that could not be used: line 5: not JSON" in captured.err
    assert (tmp_path / "second" / "report.html").is_file()


def test_the_command_runs_best_of(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = best_of_job(tmp_path)
    common = ("--model", "any", "--base-url", server, "--input", str(wanted.input), "--output", str(wanted.output))
    assert run_command(monkeypatch, *common, "--best-of", "1,4") == 0
    assert "8 problems, 24 matches" in capsys.readouterr().out
    assert run_command(monkeypatch, *common, "--best-of", "1,four") == 2
    assert "--best-of holds 'four'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "smollm2"), "needs --model and --input"),
        (("--testbed", "lazy", "--model", "smollm2"), "--testbed brings its own judges"),
        (("--testbed", "lazy", "--best-of", "2"), "different things"),
        (("--model", "m", "--input", "i", "--best-of", "2", "--transformation", "quotes"), "different things"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert run_command(monkeypatch, *arguments, "--output", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
