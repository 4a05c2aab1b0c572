"""Best-of-N: which of N candidate solutions the judge picks by a knockout, and how often the picked one is right."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from cepo.eval.best_of_n.candidates import Problem, Verifier, answer_groups, read_problems
from cepo.eval.judges.journal import Request, collect_judgements, content_key
from cepo.eval.judges.settings import Judge, JudgeSettings, check_judge, open_judge
from cepo.eval.report.figures import curves
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import console_table, summary_row
from cepo.eval.statistics import Estimate, estimate, mean_difference, proportion, warning_of_few
from cepo.files import BrokenLine, make_folder, write_jsonl
from cepo.train.prompts import judge_prompt

Side = Literal["A", "B"]
WAYS = ("judge", "majority", "random", "oracle")
GAIN = "judge - random"
_HEADER = ("N", *WAYS, GAIN)
_SIDES: Mapping[str | None, Side] = {"A": "A", "B": "B"}  # a tie or nothing readable is neither


@dataclass(frozen=True)
class Match:
    """Two candidates of a problem to be judged against each other.

    Attributes:
        problem: number of the problem.
        draw: number of the order in which the candidates come.
        first: number of the candidate shown as A.
        second: number of the candidate shown as B.
    """

    problem: int
    draw: int
    first: int
    second: int


Decide = Callable[[Sequence[Match]], Sequence[Side | None]]


@dataclass(frozen=True)
class BestOfJob:
    """What to measure.

    Attributes:
        judge: which judge, and how it generates.
        input: JSONL file, see `read_problems`.
        output: folder to write.
        sizes: the N, at least 1 each.
        draws: orders in which each problem's candidates come, at least 1.
        verifier: "math" or "exact", for rows with an answer.
        limit: problems to take, drawn by the seed; None for all.
        seed: of the problems taken, the orders, and who is shown first.
    """

    judge: JudgeSettings
    input: Path
    output: Path
    sizes: tuple[int, ...]
    draws: int = 1
    verifier: Verifier = "math"
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class BestOfSummary:
    """What came of it.

    Attributes:
        lines: (N, estimate) by way of picking, and the judge's gain over random; see `estimate_curves`.
        problems: number of problems.
        left_out: problems with fewer candidates than the greatest N.
        matches: number of matches, those that several draws share counted in each.
        undecided: matches without a winner: a tie, or a verdict that cannot be read.
        resumed: judgements that an earlier run, or an earlier round, had made.
        failed: of matches without a judgement the reasons, and how often each; they count as undecided.
        broken: (line number, reason) of input lines that could not be used.
        seconds: of this run.
    """

    lines: Mapping[str, Sequence[tuple[float, Estimate]]]
    problems: int
    left_out: int
    matches: int
    undecided: int
    resumed: int
    failed: Counter[str]
    broken: tuple[BrokenLine, ...]
    seconds: float

    def table(self) -> Table:
        """Return the accuracies as a table for the console."""
        table = console_table(
            *_HEADER, title=f"{self.problems} problems, {self.matches} matches, {self.undecided} undecided"
        )
        for place, (size, judged) in enumerate(self.lines["judge"]):
            others = [f"{self.lines[way][place][1].value:.3f}" for way in WAYS[1:]]
            table.add_row(f"{size:g}", str(judged), *others, str(self.lines[GAIN][place][1]))
        return table


def measure_best_of(
    job: BestOfJob,
    *,
    progress: Callable[[int, int, str], None] | None = None,
    open_: Callable[[JudgeSettings], Judge] = open_judge,
) -> BestOfSummary:
    """Let the judge pick among candidate solutions, and write records, summary and report.

    Records are appended as they come; started again with the same arguments, it goes on where it stopped, and judges
    anew what failed.

    Args:
        job: what to measure.
        progress: called with (matches decided, matches in all, speed in words).
        open_: opens the judge; called only where a judgement is missing.

    Raises:
        ValueError: for input, settings or a judge that cannot be used.
    """
    started = time.perf_counter()
    check_judge(job.judge)
    if job.limit is not None and job.limit < 1:
        raise ValueError(f"limit is {job.limit}; expected at least 1, or None for all problems")
    found, broken = read_problems(job.input, verifier=job.verifier)
    largest = max(job.sizes, default=0)
    problems = [problem for problem in found if len(problem.candidates) >= largest]
    if not problems:
        most = max(len(problem.candidates) for problem in found)
        raise ValueError(
            f"best_of holds {largest}, but no question has more than {most} solutions; expected up to {most}"
        )
    left_out = len(found) - len(problems)
    if job.limit is not None and job.limit < len(problems):
        drawn = sorted(random.Random(job.seed).sample(range(len(problems)), job.limit))
        problems = [problems[number] for number in drawn]
    _check_sizes(problems, job.sizes)
    make_folder(job.output)
    opened = functools.cache(functools.partial(open_, job.judge))
    records: list[Mapping[str, Any]] = []
    resumed = 0
    total = len(problems) * job.draws * (largest - 1)

    def decide(matches: Sequence[Match]) -> list[Side | None]:
        nonlocal resumed
        requests = [_request(problems, match) for match in matches]
        before = len(records)

        def show(done: int, _: int, speed: str) -> None:
            if progress is not None:
                progress(before + done, total, speed)

        collected = collect_judgements(
            list({request.key: request for request in requests}.values()),
            job.output / "judgements.jsonl",
            {"what": "best of", **job.judge.decisive()},
            opened,
            progress=show,
        )
        resumed += collected.resumed
        found = [collected.records[request.key] for request in requests]
        records.extend(found)
        return [_SIDES.get(record["winner"]) for record in found]

    picks = pick_by_knockout(problems, job.sizes, decide, draws=job.draws, seed=job.seed)
    summary = BestOfSummary(
        lines=estimate_curves(score_picks(problems, picks, job.sizes, draws=job.draws, seed=job.seed)),
        problems=len(problems),
        left_out=left_out,
        matches=len(records),
        undecided=sum(record["winner"] not in _SIDES for record in records),
        resumed=resumed,
        failed=Counter(record["error"] for record in records if record["error"] is not None),
        broken=tuple(broken),
        seconds=time.perf_counter() - started,
    )
    write_jsonl(job.output / "summary.jsonl", _summary_rows(summary))
    _write_report(job, summary)
    return summary


def pick_by_knockout(
    problems: Sequence[Problem], sizes: Sequence[int], decide: Decide, *, draws: int = 1, seed: int = 0
) -> dict[tuple[int, int, int], int]:
    """Let a judge pick one of the first N candidates, for every N at once.

    The candidates of a problem come in a drawn order. The first is the champion; each further one challenges it, and
    the winner of their match is the champion. A tie, or a verdict that cannot be read, leaves the champion in place:
    the order is drawn, so that favours no candidate. After N candidates the champion is the pick of N, so the subsets
    of one draw lie in each other, and N - 1 matches serve all sizes up to N. Who is shown as A is drawn too.

    Args:
        problems: each with at least max(sizes) candidates.
        sizes: the N, at least 1 each.
        decide: tells the winner of each match, None where there is none; called once a round, with one match for each
            problem and draw.
        draws: orders of each problem's candidates, at least 1.
        seed: of the orders and places.

    Returns:
        The number of the picked candidate by (problem, draw, N).

    Raises:
        ValueError: if a number is out of range.
    """
    _check_sizes(problems, sizes)
    if draws < 1:
        raise ValueError(f"draws is {draws}; expected at least 1")
    orders = {
        (number, draw): candidate_order(problem, draw=draw, seed=seed)
        for number, problem in enumerate(problems)
        for draw in range(draws)
    }
    champions = {place: order[0] for place, order in orders.items()}
    picks: dict[tuple[int, int, int], int] = {}
    for size in range(1, max(sizes) + 1):
        if size > 1:
            matches = [_match(problems, *place, champions[place], orders[place][size - 1], seed) for place in orders]
            for match, winner in zip(matches, decide(matches), strict=True):
                if winner is not None:
                    champions[match.problem, match.draw] = match.first if winner == "A" else match.second
        if size in sizes:
            picks |= {(*place, size): champion for place, champion in champions.items()}
    return picks


def candidate_order(problem: Problem, *, draw: int, seed: int) -> list[int]:
    """Draw the order in which a problem's candidates come; it depends on the problem, the draw and the seed alone."""
    order = list(range(len(problem.candidates)))
    _random("order", seed, draw, problem.question, *problem.candidates).shuffle(order)
    return order


def score_picks(
    problems: Sequence[Problem],
    picks: Mapping[tuple[int, int, int], int],
    sizes: Sequence[int],
    *,
    draws: int = 1,
    seed: int = 0,
) -> dict[str, dict[int, list[float]]]:
    """Hold the picks beside what other ways of picking give on the very same candidates.

    random: the share of the candidates that is right, which is what picking blindly gives on average.
    majority: the most frequent answer; of equally frequent ones, their mean. Where no answer can be read, as random.
    oracle: whether any candidate is right.

    Args:
        problems: as for `pick_by_knockout`.
        picks: from `pick_by_knockout`, complete.
        sizes: the N.
        draws: as there.
        seed: as there.

    Returns:
        By way of picking ("judge", "majority", "random", "oracle") and N: for every problem how often the pick is
        right, a mean over the draws, in [0, 1].
    """
    ways: dict[str, dict[int, list[float]]] = {way: {size: [] for size in sizes} for way in WAYS}
    for number, problem in enumerate(problems):
        groups = answer_groups(problem.candidates)
        orders = [candidate_order(problem, draw=draw, seed=seed) for draw in range(draws)]
        for size in sizes:
            subsets = [order[:size] for order in orders]
            judged = [problem.correct[picks[number, draw, size]] for draw in range(draws)]
            right = [[problem.correct[candidate] for candidate in subset] for subset in subsets]
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
        groups: number of each candidate's answer, equal for equal answers; None where it has none and does not vote.
        correct: whether each candidate is right.

    Returns:
        The share that is right within the most frequent answer, a mean over equally frequent ones; the share of all
        candidates that is right where none votes.
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
        way: [(float(size), proportion(values)) for size, values in sorted(by_size.items())]
        for way, by_size in ways.items()
    }
    lines[GAIN] = [
        (float(size), estimate(mean_difference, values, ways["random"][size]))
        for size, values in sorted(ways["judge"].items())
    ]
    return lines


def _check_sizes(problems: Sequence[Problem], sizes: Sequence[int]) -> None:
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise ValueError(f"best_of is {list(sizes)}; expected different numbers of at least 1")
    fewest = min((len(problem.candidates) for problem in problems), default=0)
    if fewest < max(sizes):
        raise ValueError(
            f"best_of holds {max(sizes)}, but a problem has {fewest} candidates; expected no more than that"
        )


def _match(problems: Sequence[Problem], problem: int, draw: int, champion: int, challenger: int, seed: int) -> Match:
    candidates = problems[problem].candidates
    drawn = _random("place", seed, draw, problems[problem].question, candidates[champion], candidates[challenger])
    first, second = (champion, challenger) if drawn.random() < 0.5 else (challenger, champion)
    return Match(problem, draw, first, second)


def _random(*parts: str | int) -> random.Random:
    return random.Random(int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()))


def _request(problems: Sequence[Problem], match: Match) -> Request:
    problem = problems[match.problem]
    messages = judge_prompt(problem.question, problem.candidates[match.first], problem.candidates[match.second])
    grades = [problem.correct[match.first], problem.correct[match.second]]
    # One record serves all draws in which the same two meet in the same places.
    return Request(content_key(messages), messages, {"question": problem.question, "correct": grades})


def _rows(lines: Mapping[str, Sequence[tuple[float, Estimate]]]) -> list[list[str]]:
    sizes = [f"{size:g}" for size, _ in lines["judge"]]
    return [[size, *(str(points[place][1]) for points in lines.values())] for place, size in enumerate(sizes)]


def _summary_rows(summary: BestOfSummary) -> list[dict[str, Any]]:
    return [
        summary_row({"way": way, "n": int(size)}, found)
        for way, points in summary.lines.items()
        for size, found in points
    ]


def _write_report(job: BestOfJob, summary: BestOfSummary) -> None:
    lines = {way: points for way, points in summary.lines.items() if way in WAYS}
    gain = {way: points for way, points in summary.lines.items() if way not in WAYS}
    write_report(
        job.output / "report.html",
        title="cepo eval robustness: best of N",
        summary={
            "judge": f"{job.judge.model} ({job.judge.backend}, temperature {job.judge.temperature:g})",
            "input": f"{job.input}, {summary.problems} problems, {summary.left_out} left out for too few solutions",
            "matches": f"{summary.matches}, {summary.undecided} undecided, of these {summary.failed.total()} failed",
            "orders of each problem's solutions": str(job.draws),
            "seed": str(job.seed),
        },
        figures={
            "Accuracy of the picked solution": curves(lines, across="N", up="accuracy", logarithmic=True),
            "Gain of the judge's pick over a random one": curves(gain, across="N", up="gain", logarithmic=True),
        },
        tables={"Accuracy with 95% bootstrap intervals over problems": (_HEADER, _rows(summary.lines))},
        notes=[
            "The judge picks by a knockout: the solutions come in a drawn order, and each further one meets the winner "
            "so far. A match without a readable winner leaves the earlier one in place, which is a random choice. "
            "Random, majority and oracle are over the very same solutions.",
            *warning_of_few(summary.problems, "problems"),
        ],
    )
