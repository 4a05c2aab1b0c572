"""`cepo eval best-of-n`: how often the judge's pick among N candidate solutions is right."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from rich.table import Table

from cepo.eval.best_of_n.candidates import Question, Verifier, answer_groups, read_questions
from cepo.eval.judges.journal import JudgeTask, Record, collect_judgements
from cepo.eval.judges.open import open_judge
from cepo.eval.judges.settings import PLACES, Judge, JudgeSettings, Place, Progress, check_judge, decisive_settings
from cepo.eval.report.figures import curves
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import PageTable, console_table, summary_row
from cepo.eval.statistics import DIFFERENCE, Estimate, estimate, mean_difference, proportion
from cepo.files import BrokenLine, content_hash, write_jsonl
from cepo.train.prompts import judge_prompt

WAYS = ("judge", "majority", "random", "oracle")
"""Ways of picking: the judge, a majority vote, a blind pick, and a pick that is right if any candidate is."""
GAIN = "judge - random"


@dataclass(frozen=True)
class Match:
    """Two candidates of a question to be judged against each other.

    Attributes:
        question: index of the question.
        draw: index of the order in which the candidates come.
        first: index of the candidate shown as A.
        second: index of the candidate shown as B.
    """

    question: int
    draw: int
    first: int
    second: int


Decide: TypeAlias = Callable[[Sequence[Match]], Sequence[Place | None]]


@dataclass(frozen=True)
class BestOfJob:
    """What `cepo eval best-of-n` is asked to do.

    Attributes:
        judge: which judge, and how it generates; its seed is also that of every draw.
        data: file, see `read_questions`.
        output: folder for judgements.jsonl, summary.jsonl and report.html.
        sizes: the N, at least 1 each.
        draws: number of random orders of each question's candidates, at least 1.
        verifier: "math" or "exact", for rows with an answer.
        limit: number of questions to draw, or None for all.
    """

    judge: JudgeSettings
    data: Path
    output: Path
    sizes: tuple[int, ...]
    draws: int = 1
    verifier: Verifier = "math"
    limit: int | None = None


@dataclass(frozen=True)
class BestOfSummary:
    """The results.

    Attributes:
        lines: (N, estimate) for each way of picking, and the judge's gain over random; see `estimate_curves`.
        questions: number of questions.
        left_out: questions with fewer candidates than the largest N.
        matches: number of matches; one that several draws share counts in each.
        undecided: matches without a winner: a tie, or a verdict that cannot be read.
        failed: how often each reason kept a match from being judged; these matches count as undecided.
        broken: (line number, reason) of data lines that could not be used.
    """

    lines: Mapping[str, Sequence[tuple[float, Estimate]]]
    questions: int
    left_out: int
    matches: int
    undecided: int
    failed: Counter[str]
    broken: tuple[BrokenLine, ...]

    def page_table(self) -> PageTable:
        """Return the accuracy of each way of picking, and the gain, per N."""
        sizes = [f"{size:g}" for size, _ in self.lines["judge"]]
        rows = [[size, *(str(points[at][1]) for points in self.lines.values())] for at, size in enumerate(sizes)]
        return ("N", *self.lines), rows

    def table(self) -> Table:
        """Return the accuracies as a table for the console."""
        header, rows = self.page_table()
        title = f"accuracy on {self.questions} questions, {self.matches} matches, {self.undecided} undecided"
        return console_table(*header, rows=rows, title=title)


def measure_best_of(
    job: BestOfJob,
    *,
    progress: Progress | None = None,
    open_: Callable[[JudgeSettings], Judge] = open_judge,
) -> BestOfSummary:
    """Let the judge pick among candidate solutions, and write judgements, summary and page; resume a killed run.

    Args:
        job: what to measure.
        progress: called after each match.
        open_: opens the judge; called only if a judgement is missing.

    Raises:
        ValueError: for data, settings or a judge that cannot be used, or a folder with results of other settings.
    """
    check_judge(job.judge)
    if job.limit is not None and job.limit < 1:
        raise ValueError(f"limit is {job.limit}; expected at least 1, or None for all questions")
    seed = job.judge.seed
    found, broken = read_questions(job.data, verifier=job.verifier)
    largest = max(job.sizes, default=0)
    questions = [question for question in found if len(question.candidates) >= largest]
    if not questions:
        most = max(len(question.candidates) for question in found)
        raise ValueError(f"n holds {largest}, but no question has more than {most} solutions; expected up to {most}")
    left_out = len(found) - len(questions)
    if job.limit is not None and job.limit < len(questions):
        drawn = sorted(random.Random(seed).sample(range(len(questions)), job.limit))
        questions = [questions[number] for number in drawn]
    _check_sizes(questions, job.sizes)
    settings = {"command": "eval best-of-n", **decisive_settings(job.judge)}
    opened = functools.cache(functools.partial(open_, job.judge))
    records: list[Record] = []
    total = len(questions) * job.draws * (largest - 1)

    def decide(matches: Sequence[Match]) -> list[Place | None]:
        before = len(records)

        def show(done: int, _: int, speed: str) -> None:
            if progress is not None:
                progress(before + done, total, speed)

        tasks = [_task(questions[match.question], match) for match in matches]
        different = list({task.key: task for task in tasks}.values())
        collected = collect_judgements(different, job.output, settings, opened, progress=show)
        records.extend(collected.records[task.key] for task in tasks)
        return [record["winner"] if record["winner"] in PLACES else None for record in records[before:]]

    picks = pick_by_knockout(questions, job.sizes, decide, draws=job.draws, seed=seed)
    summary = BestOfSummary(
        lines=estimate_curves(score_picks(questions, picks, job.sizes, draws=job.draws, seed=seed)),
        questions=len(questions),
        left_out=left_out,
        matches=len(records),
        undecided=sum(record["winner"] not in PLACES for record in records),
        failed=Counter(record["error"] for record in records if record["error"] is not None),
        broken=tuple(broken),
    )
    write_jsonl(
        job.output / "summary.jsonl",
        [
            summary_row({"way": way, "n": int(size)}, found)
            for way, points in summary.lines.items()
            for size, found in points
        ],
    )
    _write_report(job, summary)
    return summary


def pick_by_knockout(
    questions: Sequence[Question], sizes: Sequence[int], decide: Decide, *, draws: int = 1, seed: int = 0
) -> dict[tuple[int, int, int], int]:
    """Let a judge pick one of the first N candidates, for every N at once.

    The candidates of a question come in a random order. The first is the champion; each further one challenges it, and
    the winner of their match is the champion. A tie, or a verdict that cannot be read, leaves the champion in place,
    which favours no candidate since the order is random. After N candidates the champion is the pick of N, so that the
    subsets of one draw are nested, and N - 1 matches serve all sizes up to N. Who is shown as A is random too.

    Args:
        questions: each with at least max(sizes) candidates.
        sizes: the N, at least 1 each.
        decide: returns the winner of each match, None without one; called once per round, with one match for each
            question and draw.
        draws: number of orders of each question's candidates, at least 1.
        seed: of the orders and places.

    Returns:
        The index of the picked candidate by (question, draw, N).

    Raises:
        ValueError: if a number is out of range.
    """
    _check_sizes(questions, sizes)
    if draws < 1:
        raise ValueError(f"draws is {draws}; expected at least 1")
    orders = {
        (number, draw): candidate_order(question, draw=draw, seed=seed)
        for number, question in enumerate(questions)
        for draw in range(draws)
    }
    champions = {place: order[0] for place, order in orders.items()}
    picks: dict[tuple[int, int, int], int] = {}
    for size in range(1, max(sizes) + 1):
        if size > 1:
            matches = [_match(questions, *place, champions[place], orders[place][size - 1], seed) for place in orders]
            for match, winner in zip(matches, decide(matches), strict=True):
                if winner is not None:
                    champions[match.question, match.draw] = match.first if winner == "A" else match.second
        if size in sizes:
            picks |= {(*place, size): champion for place, champion in champions.items()}
    return picks


def candidate_order(question: Question, *, draw: int, seed: int) -> list[int]:
    """Return the random order of a question's candidates, a function of the question, the draw and the seed alone."""
    order = list(range(len(question.candidates)))
    random.Random(content_hash("order", seed, draw, question.text, *question.candidates)).shuffle(order)
    return order


def score_picks(
    questions: Sequence[Question],
    picks: Mapping[tuple[int, int, int], int],
    sizes: Sequence[int],
    *,
    draws: int = 1,
    seed: int = 0,
) -> dict[str, dict[int, list[float]]]:
    """Compare the picks with other ways of picking from the same candidates.

    random: the share of the candidates that is right, which is what a blind pick gives on average.
    majority: the most frequent answer; of equally frequent ones, their mean. If no answer can be read, as random.
    oracle: whether any candidate is right.

    Args:
        questions: as for `pick_by_knockout`.
        picks: from `pick_by_knockout`, complete.
        sizes: the N.
        draws: as for `pick_by_knockout`.
        seed: as for `pick_by_knockout`.

    Returns:
        By way of picking (see WAYS) and N: for every question how often the pick is right, a mean over the draws, in
        [0, 1].
    """
    ways: dict[str, dict[int, list[float]]] = {way: {size: [] for size in sizes} for way in WAYS}
    for number, question in enumerate(questions):
        groups = answer_groups(question.candidates)
        orders = [candidate_order(question, draw=draw, seed=seed) for draw in range(draws)]
        for size in sizes:
            subsets = [order[:size] for order in orders]
            judged = [question.correct[picks[number, draw, size]] for draw in range(draws)]
            right = [[question.correct[candidate] for candidate in subset] for subset in subsets]
            voted = [majority_share([groups[candidate] for candidate in subset], grades)
                     for subset, grades in zip(subsets, right, strict=True)]  # fmt: skip
            ways["judge"][size].append(float(np.mean(judged)))
            ways["majority"][size].append(float(np.mean(voted)))
            ways["random"][size].append(float(np.mean([np.mean(grades) for grades in right])))
            ways["oracle"][size].append(float(np.mean([any(grades) for grades in right])))
    return ways


def majority_share(groups: Sequence[int | None], correct: Sequence[bool]) -> float:
    """Return how often a majority vote is right, in [0, 1].

    Args:
        groups: number of each candidate's answer, equal for equal answers; None for one without an answer or a vote.
        correct: whether each candidate is right.

    Returns:
        The share of right candidates within the most frequent answer, a mean over equally frequent answers. Without any
        vote, the share of right candidates.
    """
    votes = [group for group in groups if group is not None]
    if not votes:
        return float(np.mean(correct))
    most = max(votes.count(group) for group in votes)
    leaders = [group for group in dict.fromkeys(votes) if votes.count(group) == most]
    shares = [
        np.mean([grade for member, grade in zip(groups, correct, strict=True) if member == leader])
        for leader in leaders
    ]
    return float(np.mean(shares))


def estimate_curves(ways: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, list[tuple[float, Estimate]]]:
    """Return the accuracy of each way of picking at each N, and the judge's gain over random."""
    lines = {
        way: [(float(size), proportion(values, unit="question")) for size, values in sorted(by_size.items())]
        for way, by_size in ways.items()
    }
    lines[GAIN] = [
        (float(size), estimate(mean_difference, values, ways["random"][size], ends=DIFFERENCE, unit="question"))
        for size, values in sorted(ways["judge"].items())
    ]
    return lines


def _check_sizes(questions: Sequence[Question], sizes: Sequence[int]) -> None:
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise ValueError(f"n is {list(sizes)}; expected different numbers of at least 1")
    fewest = min((len(question.candidates) for question in questions), default=0)
    if fewest < max(sizes):
        raise ValueError(f"n holds {max(sizes)}, but a question has {fewest} candidates; expected no more than that")


def _match(questions: Sequence[Question], question: int, draw: int, champion: int, challenger: int, seed: int) -> Match:
    text, candidates = questions[question].text, questions[question].candidates
    drawn = random.Random(content_hash("place", seed, draw, text, candidates[champion], candidates[challenger]))
    first, second = (champion, challenger) if drawn.random() < 0.5 else (challenger, champion)
    return Match(question, draw, first, second)


def _task(question: Question, match: Match) -> JudgeTask:
    messages = judge_prompt(question.text, question.candidates[match.first], question.candidates[match.second])
    grades = [question.correct[match.first], question.correct[match.second]]
    # The key is the prompt alone: one record serves all draws in which the same two meet in the same places.
    return JudgeTask(content_hash(messages), messages, {"question": question.text, "correct": grades})


def _write_report(job: BestOfJob, summary: BestOfSummary) -> None:
    lines = {way: points for way, points in summary.lines.items() if way in WAYS}
    gain = {GAIN: summary.lines[GAIN]}
    write_report(
        job.output / "report.html",
        title="cepo eval best-of-n",
        summary={
            "judge": str(job.judge),
            "data": f"{job.data}, {summary.questions} questions, {summary.left_out} left out for too few solutions",
            "matches": f"{summary.matches}, {summary.undecided} undecided, {summary.failed.total()} of which failed",
            "orders of each question's solutions": str(job.draws),
            "seed": str(job.judge.seed),
        },
        figures={
            "Accuracy of the picked solution": curves(lines, across="N", up="accuracy", logarithmic=True),
            "Gain of the judge's pick over a random one": curves(
                gain, across="N", up="gain of accuracy", logarithmic=True
            ),
        },
        tables={"Accuracy, with 95% intervals over questions": summary.page_table()},
        notes=[
            "The judge picks by a knockout: the solutions come in a random order, and each further one meets the "
            "winner so far. A match without a readable winner keeps the earlier solution, which is a random choice. "
            "Random, majority and oracle pick from the same solutions.",
        ],
    )
