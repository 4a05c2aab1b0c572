"""`cepo eval robustness`: does the judge still find the better response when both are transformed?"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from rich.table import Table

from cepo.eval.judges.journal import Collected, JudgeTask, Record, collect_judgements
from cepo.eval.judges.open import open_judge
from cepo.eval.judges.settings import PLACES, Judge, JudgeSettings, Progress, check_judge, decisive_settings
from cepo.eval.report.figures import forest, grid
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import PageTable, console_table, share, summary_row
from cepo.eval.rewardbench.items import PreferenceItem, load_items
from cepo.eval.robustness.transformations import TRANSFORMATIONS, ResponsePair, check_names, transform
from cepo.eval.statistics import DIFFERENCE, Estimate, estimate, mean_difference, proportion, ratio
from cepo.files import BrokenLine, content_hash, write_jsonl
from cepo.train.prompts import judge_prompt

ORIGINAL = "original"
"""Name of the untransformed pairs, beside the names of the transformations."""
ALL = "all"
"""Name of the row over all transformations, each pair a cluster."""
BeforeAfter: TypeAlias = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The records of an original and of its transformed pair."""

_EXAMPLES = 8  # turned verdicts that the page shows
_EXCERPT = 700  # characters of a text that it shows


@dataclass(frozen=True)
class RobustnessJob:
    """What `cepo eval robustness` is asked to do.

    Attributes:
        judge: which judge, and how it generates; its seed is also that of every draw.
        data: file or hub data set of prompt, chosen, rejected, see `load_items`. Of a row's several chosen or
            rejected responses, one is drawn.
        output: folder for judgements.jsonl, summary.jsonl and report.html.
        transformations: names from `TRANSFORMATIONS`, each once.
        limit: number of pairs to draw, or None for all.
        split: of the hub data set.
        subsets: names of the subsets to keep; all where empty.
    """

    judge: JudgeSettings
    data: str
    output: Path
    transformations: tuple[str, ...] = tuple(TRANSFORMATIONS)
    limit: int | None = None
    split: str | None = None
    subsets: tuple[str, ...] = ()


@dataclass(frozen=True)
class TransformationEffect:
    """The effect of one transformation on the pairs that it applies to, without those with a failed judgement.

    Attributes:
        pairs: number of pairs.
        before: accuracy on the originals of these pairs; ties and verdicts that cannot be read count as wrong.
        after: accuracy on the transformed pairs.
        drop: before - after, pair by pair.
        ratio: after / before; NaN where before is 0.
        changed: share of the pairs whose verdict (A, B, tie, unreadable) changed.
        unreadable_before: share of the originals whose verdict cannot be read.
        unreadable_after: share of the transformed pairs whose verdict cannot be read.
        forced_before: share of the originals whose scores were forced, since the judge gave none.
        forced_after: share of the transformed pairs whose scores were forced.
    """

    pairs: int
    before: Estimate
    after: Estimate
    drop: Estimate
    ratio: Estimate
    changed: Estimate
    unreadable_before: float
    unreadable_after: float
    forced_before: float
    forced_after: float


@dataclass(frozen=True)
class RobustnessSummary:
    """The results.

    Attributes:
        effects: by transformation, and under ALL over all of them; without those that apply to no pair.
        original: accuracy on the originals of the pairs that some transformation applies to.
        worst: accuracy where a pair counts only if the judge is right on it and under every transformation of it.
        idle: transformations that apply to no pair.
        collected: the judgements.
        broken: (line number, reason) of data lines that could not be used.
    """

    effects: Mapping[str, TransformationEffect]
    original: Estimate
    worst: Estimate
    idle: tuple[str, ...]
    collected: Collected
    broken: tuple[BrokenLine, ...]

    def table(self) -> Table:
        """Return the effects as a table for the console."""
        rows = [
            [
                name,
                str(effect.pairs),
                f"{effect.before.value:.3f} → {effect.after.value:.3f}",
                str(effect.drop),
                f"{effect.changed.value:.3f}",
                f"{effect.unreadable_before:.0%} → {effect.unreadable_after:.0%}",
            ]
            for name, effect in self.effects.items()
        ]
        return console_table(
            *("transformation", "pairs", "accuracy", "drop", "verdicts changed", "unreadable"),
            rows=rows,
            title=f"accuracy on the originals {self.original}\nright under all transformations too {self.worst}",
        )


def measure_robustness(
    job: RobustnessJob,
    *,
    progress: Progress | None = None,
    open_: Callable[[JudgeSettings], Judge] = open_judge,
) -> RobustnessSummary:
    """Judge every pair as it is and under each transformation that applies; write judgements, summary and page.

    The responses of a pair stand in the same order in all its prompts. A killed run is resumed.

    Args:
        job: what to measure.
        progress: called after each judgement.
        open_: opens the judge; called only if a judgement is missing.

    Raises:
        ValueError: for data, settings or a judge that cannot be used, or a folder with results of other settings.
    """
    check_names(job.transformations)
    check_judge(job.judge)
    items, broken = load_items(job.data, split=job.split, limit=job.limit, subsets=job.subsets, seed=job.judge.seed)
    tasks = [task for item in items for task in _tasks(item, job)]
    applied = {task.facts["transformation"] for task in tasks}
    if not applied:
        raise ValueError(f"none of the transformations {', '.join(job.transformations)} applies to a pair of the data")
    collected = collect_judgements(
        tasks,
        job.output,
        {"command": "eval robustness", **decisive_settings(job.judge)},
        functools.partial(open_, job.judge),
        progress=progress,
    )
    questions = {item.key: item.prompt for item in items}
    records = [collected.records[task.key] for task in tasks]
    records = [{**record, "question": questions[record["row"]]} for record in records]
    original, worst = worst_case(records)
    summary = RobustnessSummary(
        effects=compare(records),
        original=original,
        worst=worst,
        idle=tuple(name for name in job.transformations if name not in applied),
        collected=collected,
        broken=tuple(broken),
    )
    write_jsonl(job.output / "summary.jsonl", _summary_rows(summary))
    _write_report(job, summary, len(items), records)
    return summary


def compare(records: Sequence[Mapping[str, Any]]) -> dict[str, TransformationEffect]:
    """Compare the verdicts on transformed pairs with those on their originals.

    Args:
        records: with row, question, transformation (or ORIGINAL), label, winner, forced and error; one original for
            every row.

    Returns:
        The effect of each transformation, in order of first appearance, and under ALL over all of them. All that was
        judged of one question is one unit of the intervals.
    """
    paired = _paired(records)
    effects = {name: _effect(pairs) for name, pairs in paired.items()}
    if paired:
        effects[ALL] = _effect([pair for pairs in paired.values() for pair in pairs])
    return effects


def _paired(records: Sequence[Mapping[str, Any]]) -> dict[str, list[BeforeAfter]]:
    """Return (original, transformed) by transformation, without those with a failed judgement."""
    originals = {record["row"]: record for record in records if record["transformation"] == ORIGINAL}
    paired: dict[str, list[BeforeAfter]] = {}
    for record in records:
        before = originals[record["row"]]
        if record["transformation"] != ORIGINAL and record["error"] is None and before["error"] is None:
            paired.setdefault(record["transformation"], []).append((before, record))
    return paired


def worst_case(records: Sequence[Mapping[str, Any]]) -> tuple[Estimate, Estimate]:
    """Return the accuracy on the originals, and that of being right on the original and all its transformations.

    Both are over the pairs that some transformation applies to and that have no failed judgement.

    Args:
        records: as for `compare`.
    """
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_row.setdefault(record["row"], []).append(record)
    complete = [
        group for group in by_row.values() if len(group) > 1 and all(record["error"] is None for record in group)
    ]
    originals = [_right(record) for group in complete for record in group if record["transformation"] == ORIGINAL]
    of_prompts: dict[str, Any] = {"clusters": [group[0]["question"] for group in complete], "unit": "question"}
    return proportion(originals, **of_prompts), proportion(
        [min(map(_right, group)) for group in complete], **of_prompts
    )


def _effect(pairs: Sequence[BeforeAfter]) -> TransformationEffect:
    before, after, turned = np.array(
        [(_right(one), _right(other), float(one["winner"] != other["winner"])) for one, other in pairs]
    ).T
    of_prompts: dict[str, Any] = {"clusters": [original["question"] for original, _ in pairs], "unit": "question"}
    return TransformationEffect(
        len(pairs),
        proportion(before, **of_prompts),
        proportion(after, **of_prompts),
        estimate(mean_difference, before, after, ends=DIFFERENCE, **of_prompts),
        estimate(ratio, after, before, lacking="nothing is right before", **of_prompts),
        proportion(turned, **of_prompts),
        *(float(np.mean([pair[place]["winner"] is None for pair in pairs])) for place in (0, 1)),
        *(float(np.mean([pair[place]["forced"] for pair in pairs])) for place in (0, 1)),
    )


def _right(record: Mapping[str, Any]) -> float:
    return float(record["winner"] == record["label"])


def _tasks(item: PreferenceItem, job: RobustnessJob) -> list[JudgeTask]:
    """Return the pair as it is and under each transformation that applies, or nothing if none does."""
    drawn = random.Random(content_hash("pair", job.judge.seed, item.key))
    pair = ResponsePair(item.prompt, drawn.choice(item.chosen), drawn.choice(item.rejected))
    label = drawn.choice(PLACES)
    changed = {name: transform(name, pair, seed=job.judge.seed) for name in job.transformations}
    variants = {ORIGINAL: pair} | {name: variant for name, variant in changed.items() if variant is not None}
    tasks = []
    for name, variant in variants.items() if len(variants) > 1 else ():
        responses = (variant.chosen, variant.rejected)
        messages = judge_prompt(item.prompt, *(responses if label == "A" else responses[::-1]))
        facts = {"row": item.key, "id": item.name, "subset": item.subset, "transformation": name, "label": label}
        tasks.append(JudgeTask(f"{item.key}/{name}", messages, facts))
    return tasks


def _effect_table(effects: Mapping[str, TransformationEffect]) -> PageTable:
    header = ("transformation", "pairs", "accuracy before", "accuracy after", "drop", "ratio", "verdicts changed")
    rows = []
    for name, effect in effects.items():
        shown = (effect.before, effect.after, effect.drop, effect.ratio, effect.changed)
        unreadable = f"{effect.unreadable_before:.1%} → {effect.unreadable_after:.1%}"
        forced = f"{effect.forced_before:.1%} → {effect.forced_after:.1%}"
        rows.append([name, str(effect.pairs), *map(str, shown), unreadable, forced])
    return (*header, "unreadable", "forced"), rows


def _summary_rows(summary: RobustnessSummary) -> list[dict[str, Any]]:
    rows = []
    for name, effect in summary.effects.items():
        for metric in ("before", "after", "drop", "ratio", "changed"):
            rows.append(summary_row({"transformation": name, "metric": metric}, getattr(effect, metric)))
        for metric in ("unreadable_before", "unreadable_after", "forced_before", "forced_after"):
            part = round(getattr(effect, metric) * effect.pairs)
            rows.append(summary_row({"transformation": name, "metric": metric}, share(part, effect.pairs)))
    rows.append(summary_row({"transformation": ORIGINAL, "metric": "accuracy"}, summary.original))
    rows.append(summary_row({"transformation": "worst case", "metric": "accuracy"}, summary.worst))
    return rows


def _write_report(job: RobustnessJob, summary: RobustnessSummary, pairs: int, records: Sequence[Record]) -> None:
    effects, collected = summary.effects, summary.collected
    accuracies = [("originals", summary.original), ("worst case", summary.worst)]
    figures = {
        "Drop of accuracy, before - after, on the same pairs": forest(
            [(name, effect.drop) for name, effect in effects.items()], axis="drop of accuracy", reference=0.0
        ),
        "Share of verdicts that changed": forest(
            [(name, effect.changed) for name, effect in effects.items()], axis="share of pairs"
        ),
        "Accuracy": forest(
            accuracies + [(name, effect.after) for name, effect in effects.items()], axis="accuracy", reference=0.5
        ),
    }
    subsets = list(dict.fromkeys(record["subset"] for record in records))
    if len(subsets) > 1:
        drops = _subset_drops(records, subsets)
        figures["Drop by subset"] = grid(drops, list(_paired(records)), subsets, label="drop of accuracy")
    write_report(
        job.output / "report.html",
        title="cepo eval robustness",
        summary={
            "judge": str(job.judge),
            "data": f"{job.data}, {pairs} pairs",
            "accuracy on the originals": str(summary.original),
            "right on the original and under every transformation": str(summary.worst),
            "judgements": f"{len(records)}, {collected.forced} forced, {collected.failed.total()} failed",
            "transformations that apply to no pair": ", ".join(summary.idle) or "none",
            "seed": str(job.judge.seed),
        },
        figures=figures,
        tables={
            "Effects, with 95% intervals over questions": _effect_table(effects),
            "Verdicts that a transformation turned from right to wrong": (
                ("pair", "transformation", "better response", "judgement before", "judgement after"),
                _turned(records),
            ),
        },
        notes=[
            "A transformation never changes which response is better. Each row of the table holds only the pairs that "
            "the transformation applies to, and compares them with their own originals. Ties and verdicts that cannot "
            "be read count as wrong; failed judgements are left out. A verdict is forced if the judge gave none and "
            "its scores were opened for it.",
            "Read the share of changed verdicts beside the drop: where as many verdicts turn right as turn wrong, the "
            "drop is zero and the judge is still not robust.",
        ],
    )


def _subset_drops(records: Sequence[Mapping[str, Any]], subsets: Sequence[str]) -> list[list[float]]:
    """Return the drop of each transformation (row) in each subset (column); NaN where it applies to no pair."""
    drops = []
    for pairs in _paired(records).values():
        lost = {subset: [_right(a) - _right(b) for a, b in pairs if a["subset"] == subset] for subset in subsets}
        drops.append([float(np.mean(values)) if values else math.nan for values in lost.values()])
    return drops


def _turned(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    originals = {record["row"]: record for record in records if record["transformation"] == ORIGINAL}
    rows: list[list[str]] = []
    for record in records:
        before = originals[record["row"]]
        if _right(before) and not _right(record) and record["error"] is None and len(rows) < _EXAMPLES:
            shown = [_excerpt(before["text"]), _excerpt(record["text"])]
            rows.append([str(record["id"]), record["transformation"], record["label"], *shown])
    return rows


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else f"… {text[-_EXCERPT:]}"
