"""`cepo eval best-of-n`: how often a judge's, or a reward model's, pick among N candidate solutions is right."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cepo.eval.best_of_n.candidates import Question, Verifier, read_questions
from cepo.eval.best_of_n.closed_form import pick_by_reward
from cepo.eval.best_of_n.knockout import Match, check_sizes, pick_by_knockout, score_picks
from cepo.eval.judges.journal import JudgeTask, Record, collect_judgements
from cepo.eval.judges.open import open_judge
from cepo.eval.judges.reward import RewardSettings
from cepo.eval.judges.settings import PLACES, Judge, JudgeSettings, Place, Progress, check_judge, decisive_settings
from cepo.eval.report.figures import curves
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import ConsoleTable, PageTable, summary_row
from cepo.eval.statistics import DIFFERENCE, Estimate, estimate, mean_difference, proportion, undetermined
from cepo.files import BrokenLine, content_hash, write_jsonl
from cepo.train.prompts import judge_prompt

GAIN = "judge - random"
_COMMAND = "eval best-of-n"
_NOTE = (
    "The judge picks in a knockout: the solutions come in a random order, and each one meets the winner so far. A "
    "match without a readable winner keeps the earlier solution, which is a random choice. Random, majority and "
    "oracle pick from the same solutions."
)
_REWARD_NOTE = (
    "The judge is a reward model: of N solutions drawn without replacement it picks the one with the highest reward, "
    "ties broken evenly. Accuracies are exact over all draws. Longest and shortest pick by characters alone. A "
    "question with a solution that has no reward is left out."
)


@dataclass(frozen=True)
class BestOfJob:
    """The arguments of `cepo eval best-of-n`.

    Attributes:
        judge: the judge and its settings, or the reward model; its seed is also that of every draw.
        data: file, see `read_questions`.
        output: folder for judgements.jsonl, summary.jsonl and report.html.
        sizes: the values of N, at least 1 each.
        draws: number of random orders of each question's candidates, at least 1.
        verifier: "math" or "exact", for rows with an answer.
        limit: number of questions to draw; None for all.
    """

    judge: JudgeSettings | RewardSettings
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
        left_out: number of questions with fewer candidates than the largest N.
        matches: number of matches; a match that several draws share counts in each. For a reward model, of solutions.
        undecided: number of matches without a winner: ties, and verdicts that cannot be read. For a reward model, of
            solutions without a reward.
        failed: number of matches that were not judged, by reason; these count as undecided.
        broken: (line number, reason) of data lines that could not be used.
    """

    lines: Mapping[str, Sequence[tuple[float, Estimate]]]
    questions: int
    left_out: int
    matches: int
    undecided: int
    failed: Counter[str]
    broken: tuple[BrokenLine, ...]

    @property
    def counted(self) -> str:
        """What was judged, as text."""
        if "longest" in self.lines:
            return f"{self.matches} solutions, {self.undecided} without a reward"
        return f"{self.matches} matches, {self.undecided} undecided"

    def page_table(self) -> PageTable:
        """Return the accuracy of each way of picking, and the gain, for each N."""
        sizes = [f"{size:g}" for size, _ in self.lines["judge"]]
        rows = [[size, *(str(points[at][1]) for points in self.lines.values())] for at, size in enumerate(sizes)]
        return ("N", *self.lines), rows

    def table(self) -> ConsoleTable:
        """Return the accuracies as a table for the console."""
        header, rows = self.page_table()
        title = f"accuracy on {self.questions} questions, {self.counted}"
        return ConsoleTable(header, rows, title)


def measure_best_of(
    job: BestOfJob,
    *,
    progress: Progress | None = None,
    open_: Callable[[JudgeSettings], Judge] = open_judge,
) -> BestOfSummary:
    """Let the judge pick among candidate solutions, and write judgements, summary and page; resume a killed run.

    Args:
        job: what to measure.
        progress: called after each match, or each solution that a reward model scored.
        open_: opens a generative judge; called only if a judgement is missing.

    Raises:
        ValueError: for data, settings or a judge that cannot be used, or an output with other settings.
    """
    judge = job.judge
    if not isinstance(judge, RewardSettings):
        check_judge(judge)
    elif job.draws != 1:
        raise ValueError(f"draws is {job.draws}; a reward model's best of N is exact over all draws, leave it out")
    if job.limit is not None and job.limit < 1:
        raise ValueError(f"limit is {job.limit}; expected at least 1")
    found, broken = read_questions(job.data, verifier=job.verifier)
    largest = max(job.sizes, default=0)
    questions = [question for question in found if len(question.candidates) >= largest]
    if not questions:
        most = max(len(question.candidates) for question in found)
        raise ValueError(f"n holds {largest}, but no question has more than {most} solutions; expected up to {most}")
    left_out = len(found) - len(questions)
    if job.limit is not None and job.limit < len(questions):
        drawn = sorted(random.Random(judge.seed).sample(range(len(questions)), job.limit))
        questions = [questions[number] for number in drawn]
    check_sizes(questions, job.sizes)
    if isinstance(judge, RewardSettings):
        ways, records = pick_by_reward(questions, job.sizes, judge, job.output, _COMMAND, progress=progress)
        undecided = sum(record["error"] is not None for record in records)
    else:
        ways, records = _pick_by_judge(job, judge, questions, progress, open_)
        undecided = sum(record["winner"] not in PLACES for record in records)
    summary = BestOfSummary(
        lines=estimate_curves(ways),
        questions=len(questions),
        left_out=left_out,
        matches=len(records),
        undecided=undecided,
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


def _pick_by_judge(
    job: BestOfJob,
    judge: JudgeSettings,
    questions: Sequence[Question],
    progress: Progress | None,
    open_: Callable[[JudgeSettings], Judge],
) -> tuple[dict[str, dict[int, list[float]]], list[Record]]:
    """Return how often each way's pick is right, and the records of all matches."""
    # Which matches are played follows from the largest N and the draws; earlier verdicts decide who meets.
    settings = {"command": _COMMAND, **decisive_settings(judge), "n": max(job.sizes), "draws": job.draws}
    asked = {question.text for question in questions}
    opened = functools.cache(functools.partial(open_, judge))
    records: list[Record] = []
    total = len(questions) * job.draws * (max(job.sizes) - 1)

    def decide(matches: Sequence[Match]) -> list[Place | None]:
        before = len(records)

        def show(done: int, _: int, speed: str) -> None:
            if progress is not None:
                progress(before + done, total, speed)

        tasks = [_task(questions[match.question], match) for match in matches]
        different = list({task.key: task for task in tasks}.values())
        collected = collect_judgements(
            different,
            job.output,
            settings,
            opened,
            belongs=lambda record: record["question"] in asked,
            progress=show,
        )
        records.extend(collected.records[task.key] for task in tasks)
        return [record["winner"] if record["winner"] in PLACES else None for record in records[before:]]

    picks = pick_by_knockout(questions, job.sizes, decide, draws=job.draws, seed=judge.seed)
    return score_picks(questions, picks, job.sizes, draws=job.draws, seed=judge.seed), records


def estimate_curves(ways: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, list[tuple[float, Estimate]]]:
    """Return the accuracy of each way of picking at each N, and the judge's gain over random."""
    lines = {
        way: [(float(size), proportion(values, unit="question")) for size, values in sorted(by_size.items())]
        for way, by_size in ways.items()
    }
    lines[GAIN] = [
        (
            float(size),
            estimate(mean_difference, values, ways["random"][size], ends=DIFFERENCE, unit="question")
            if values
            else undetermined("no question"),
        )
        for size, values in sorted(ways["judge"].items())
    ]
    return lines


def _task(question: Question, match: Match) -> JudgeTask:
    messages = judge_prompt(question.text, question.candidates[match.first], question.candidates[match.second])
    grades = [question.correct[match.first], question.correct[match.second]]
    # The key is the prompt, so that draws in which the same two meet in the same order share a record.
    return JudgeTask(content_hash(messages), messages, {"question": question.text, "correct": grades})


def _write_report(job: BestOfJob, summary: BestOfSummary) -> None:
    by_reward = isinstance(job.judge, RewardSettings)
    lines = {way: points for way, points in summary.lines.items() if way != GAIN}
    gain = {GAIN: summary.lines[GAIN]}
    write_report(
        job.output / "report.html",
        title="cepo eval best-of-n",
        summary={
            "judge": str(job.judge),
            "data": f"{job.data}, {summary.questions} questions, {summary.left_out} left out for too few solutions",
            "judged": f"{summary.counted}, {summary.failed.total()} of which failed",
            **({} if by_reward else {"orders of each question's solutions": str(job.draws)}),
            "seed": str(job.judge.seed),
        },
        figures={
            "Accuracy of the picked solution": curves(lines, across="N", up="accuracy", logarithmic=True),
            "Gain of the judge's pick over a random one": curves(
                gain, across="N", up="gain of accuracy", logarithmic=True
            ),
        },
        tables={"Accuracy, with 95% intervals over questions": summary.page_table()},
        notes=[_REWARD_NOTE if by_reward else _NOTE],
    )
