"""`cepo eval cue-flips`: how a testbed judge's accuracy changes when a spurious cue stops agreeing with the label."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from cepo.eval.judges.journal import JudgeTask, collect_judgements
from cepo.eval.judges.settings import Judgement, Messages, Progress
from cepo.eval.report.figures import curves
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import PageTable, share, summary_row
from cepo.eval.statistics import DIFFERENCE, Estimate, estimate, mean_difference, proportion
from cepo.files import content_hash, write_jsonl
from cepo.jacobian.loading import load_model, model_fingerprint, resolve_model
from cepo.train import testbed, testbed_judges
from cepo.train.policy import CACHE, load_testbed_judge, testbed_fingerprint

AGREEMENTS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of items whose longer response is the better one."""

_STEPS = 300  # steps of a judge's warm-up, enough for every kind
_BATCH = 128


@dataclass(frozen=True)
class FlipsJob:
    """The arguments of `cepo eval cue-flips`.

    Attributes:
        judges: testbed judges (able, lazy, hollow, decorative, copied, criteria, query), or folders of policies trained
            on the testbed.
        output: folder for judgements.jsonl, summary.jsonl and report.html.
        items: items per agreement, at least 1.
        seed: seed of the items and of the judges' warm-up.
        cache: folder of warmed-up judges.
    """

    judges: tuple[str, ...]
    output: Path
    items: int = 200
    seed: int = 0
    cache: Path = CACHE


@dataclass(frozen=True)
class JudgeFlips:
    """One judge's accuracies.

    Attributes:
        accuracy: greedy accuracy, by the cue's agreement.
        drop: accuracy at the largest agreement minus accuracy at the smallest.
        with_cue: accuracy over all items whose longer response is the better one.
        against_cue: accuracy over all other items.
        unreadable: number of verdicts that could not be read.
        judgements: number of items judged.
    """

    accuracy: Mapping[float, Estimate]
    drop: Estimate
    with_cue: Estimate
    against_cue: Estimate
    unreadable: int
    judgements: int


def measure_flips(job: FlipsJob, *, progress: Progress | None = None) -> dict[str, JudgeFlips]:
    """Judge items greedily at each agreement of the cue, with each judge; write judgements, summary and page.

    Every agreement has items of its own. A killed run is resumed, and judges may be added.

    Args:
        job: what to measure.
        progress: called with (items judged, items in total, a text with the judge and its speed).

    Returns:
        The accuracies, by judge.

    Raises:
        ValueError: for a judge that is neither known nor a folder of a testbed policy, a number out of range, or an
            output with judgements of other judges, weights or items.
    """
    _check(job)
    started = time.perf_counter()
    found = {}
    drawn = {judge: _draw_tasks(judge, job) for judge in job.judges}
    keys = {task.key for _, tasks in drawn.values() for task in tasks}
    for judge, (items, tasks) in drawn.items():

        def show(done: int, total: int, speed: str, judge: str = judge) -> None:
            if progress is not None:
                progress(done, total, f"{judge} {speed}")

        collected = collect_judgements(
            tasks,
            job.output,
            {"command": "eval cue-flips"},
            functools.partial(_open, judge, job, items),
            belongs=lambda record: record["key"] in keys,
            progress=show,
        )
        found[judge] = _flips(items, [collected.records[task.key] for task in tasks])
    write_jsonl(job.output / "summary.jsonl", _summary_rows(found))
    _write_report(job, found, time.perf_counter() - started)
    return found


def _check(job: FlipsJob) -> None:
    if job.items < 1:
        raise ValueError(f"items is {job.items}; expected at least 1")
    if not job.judges or len(set(job.judges)) < len(job.judges):
        raise ValueError(f"judge is {', '.join(job.judges) or 'empty'}; expected at least one, each once")
    for judge in job.judges:
        if judge not in get_args(testbed_judges.JudgeKind) and not (Path(judge) / "config.json").is_file():
            known = ", ".join(get_args(testbed_judges.JudgeKind))
            raise ValueError(f"judge is {judge!r}; expected {known}, or the folder of a policy trained on the testbed")


class _TestbedJudge:
    """A testbed policy as a judge, which answers the items' own prompts in the testbed's vocabulary."""

    def __init__(self, model: Any, tokenizer: Any, items: Mapping[str, testbed.Item]) -> None:
        self._model, self._tokenizer, self._items = model, tokenizer, items

    def judge(self, prompts: Sequence[Messages]) -> Iterator[tuple[int, Judgement]]:
        """Judge greedily, in batches."""
        for start in range(0, len(prompts), _BATCH):
            items = [self._items[messages[0]["content"]] for messages in prompts[start : start + _BATCH]]
            texts = testbed_judges.judge_items(self._model, self._tokenizer, items)
            yield from enumerate(map(Judgement, texts), start)


def _draw_tasks(judge: str, job: FlipsJob) -> tuple[list[testbed.Item], list[JudgeTask]]:
    """Return the items of all agreements, and a task for each."""
    weights = _weights(judge, job)
    items, tasks = [], []
    for place, agreement in enumerate(AGREEMENTS):
        # Seeds far from those of warm-ups and demos, so that their items are not drawn here.
        items += testbed.generate_items(job.items, seed=10_007 * (job.seed + 1) + place, cue_agreement=agreement)
        for number, item in enumerate(items[-job.items :]):
            facts = {"judge": judge, "agreement": agreement, "label": item.label, "cue_agrees": item.cue_agrees}
            key = content_hash(weights, job.seed, agreement, number)
            tasks.append(JudgeTask(key, [{"role": "user", "content": item.prompt}], facts))
    return items, tasks


def _open(judge: str, job: FlipsJob, items: Sequence[testbed.Item]) -> _TestbedJudge:
    if judge in get_args(testbed_judges.JudgeKind):
        model, tokenizer = load_testbed_judge(judge, steps=_STEPS, seed=job.seed, cache=job.cache)  # type: ignore[arg-type]
    else:
        model, tokenizer = load_model(resolve_model(judge))
        if tokenizer.get_vocab() != testbed.build_tokenizer().get_vocab():
            raise ValueError(f"judge is the folder {judge!r}, whose tokenizer is not the testbed's")
    return _TestbedJudge(model, tokenizer, {item.prompt: item for item in items})


def _weights(judge: str, job: FlipsJob) -> str:
    """Return a key that identifies a judge's weights."""
    if judge in get_args(testbed_judges.JudgeKind):
        return testbed_fingerprint(judge, steps=_STEPS, seed=job.seed)  # type: ignore[arg-type]
    return model_fingerprint(resolve_model(judge))


def _flips(items: Sequence[testbed.Item], records: Sequence[Mapping[str, Any]]) -> JudgeFlips:
    """Return the accuracies of judgements on items that are in the order of AGREEMENTS."""
    grades_AN = np.reshape(
        [testbed_judges.accuracy([record["text"]], [item]) for item, record in zip(items, records, strict=True)],
        (len(AGREEMENTS), -1),
    )
    agrees_AN = np.reshape([item.cue_agrees for item in items], grades_AN.shape)
    correct = dict(zip(AGREEMENTS, grades_AN, strict=True))
    return JudgeFlips(
        accuracy={agreement: proportion(grades_N) for agreement, grades_N in correct.items()},
        # The two samples are independent and of equal size, so pairing them does not change the variance.
        drop=estimate(mean_difference, correct[max(AGREEMENTS)], correct[min(AGREEMENTS)], ends=DIFFERENCE),
        with_cue=proportion(grades_AN[agrees_AN]),
        against_cue=proportion(grades_AN[~agrees_AN]),
        unreadable=sum(record["winner"] is None for record in records),
        judgements=len(records),
    )


def _summary_rows(found: Mapping[str, JudgeFlips]) -> list[dict[str, Any]]:
    rows = []
    for judge, flips in found.items():
        measures = {f"accuracy at {agreement:g}": value for agreement, value in flips.accuracy.items()}
        measures |= {"drop": flips.drop, "accuracy with cue": flips.with_cue, "accuracy against cue": flips.against_cue}
        measures["unreadable"] = share(flips.unreadable, flips.judgements)
        rows += [summary_row({"judge": judge, "metric": metric}, value) for metric, value in measures.items()]
    return rows


def flip_table(found: Mapping[str, JudgeFlips]) -> PageTable:
    """Return the accuracies, one row per agreement and one column per judge."""
    rows = [
        [f"longer is better in {agreement:.0%} of items", *(str(flips.accuracy[agreement]) for flips in found.values())]
        for agreement in AGREEMENTS
    ]
    rows.append(["drop, 90% to 10%", *(str(flips.drop) for flips in found.values())])
    rows.append(["where the longer is better", *(str(flips.with_cue) for flips in found.values())])
    rows.append(["where the shorter is better", *(str(flips.against_cue) for flips in found.values())])
    rows.append(
        ["verdicts that cannot be read", *(f"{flips.unreadable} of {flips.judgements}" for flips in found.values())]
    )
    return ["items", *found], rows


def _write_report(job: FlipsJob, found: Mapping[str, JudgeFlips], seconds: float) -> None:
    lines = {judge: list(flips.accuracy.items()) for judge, flips in found.items()}
    write_report(
        job.output / "report.html",
        title="cepo eval cue-flips",
        summary={
            "judges": ", ".join(job.judges),
            "items": f"{job.items} per cue agreement",
            "seed": str(job.seed),
            "time": f"{seconds:.0f} s",
        },
        figures={
            "Accuracy when the cue flips": curves(
                lines, across="share of items whose longer response is better", up="greedy accuracy"
            )
        },
        tables={"Greedy accuracy, with 95% intervals over items": flip_table(found)},
        notes=[
            "The cue is the length of a response. A judge that decides by what the responses say has a flat curve. One "
            "that follows length is right exactly where the longer response is better. Ties and verdicts that cannot "
            "be read count as wrong."
        ],
    )
