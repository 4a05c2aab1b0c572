"""`cepo eval robustness`: does the judge still find the better response when both are transformed?"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cepo.eval.judges.journal import Collected, Record, collect_judgements
from cepo.eval.judges.open import open_judge
from cepo.eval.judges.reward import RewardSettings
from cepo.eval.judges.settings import Judge, JudgeSettings, Progress, check_judge, decisive_settings
from cepo.eval.report.figures import forest, grid
from cepo.eval.report.numbers import digits, numbers
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import ConsoleTable, PageTable, share, summary_row
from cepo.eval.rewardbench.items import load_items
from cepo.eval.robustness.effects import (
    ALL,
    ORIGINAL,
    TransformationEffect,
    compare,
    follow_rules,
    is_right,
    paired,
    worst_case,
)
from cepo.eval.robustness.transformations import TRANSFORMATIONS, check_names
from cepo.eval.robustness.variants import judge_task, reward_records, variants_of
from cepo.eval.statistics import Estimate
from cepo.files import BrokenLine, write_jsonl

_COMMAND = "eval robustness"
_EXAMPLES = 8  # verdicts that turned wrong, in the report
_EXCERPT = 700  # characters of each judgement in the report


@dataclass(frozen=True)
class RobustnessJob:
    """The arguments of `cepo eval robustness`.

    Attributes:
        judge: the judge and its settings, or the reward model; its seed also seeds every draw.
        data: file or hub data set of prompt, chosen, rejected, see `load_items`. If a row has several chosen or
            rejected responses, one of them is drawn.
        output: folder for judgements.jsonl, summary.jsonl and report.html.
        transformations: names from `TRANSFORMATIONS`, each once.
        limit: number of pairs to draw, or None for all.
        split: split of the hub data set.
        subsets: names of the subsets to keep; empty for all.
    """

    judge: JudgeSettings | RewardSettings
    data: str
    output: Path
    transformations: tuple[str, ...] = tuple(TRANSFORMATIONS)
    limit: int | None = None
    split: str | None = None
    subsets: tuple[str, ...] = ()


@dataclass(frozen=True)
class RobustnessSummary:
    """The results.

    Attributes:
        effects: effect of each transformation that applies to some pair, and of all together under `ALL`.
        original: accuracy on the originals of the pairs that some transformation applies to.
        worst: accuracy if a pair counts as right only if the judge is right on it and on each of its transformations.
        rules: accuracies (on the originals, on the transformed pairs) by rule, see `follow_rules`.
        idle: transformations that apply to no pair.
        collected: the judgements.
        broken: (line number, reason) of data lines that could not be used.
    """

    effects: Mapping[str, TransformationEffect]
    original: Estimate
    worst: Estimate
    rules: Mapping[str, tuple[Estimate, Estimate]]
    idle: tuple[str, ...]
    collected: Collected
    broken: tuple[BrokenLine, ...]

    def rules_table(self) -> PageTable:
        """Return the accuracies by rule."""
        rows = [[rule, *map(str, found)] for rule, found in self.rules.items()]
        return ("over all transformations", "accuracy before", "accuracy after"), rows

    def tables(self) -> list[ConsoleTable]:
        """Return the tables for the console: the effects, and the accuracies by rule."""
        rows = [
            [
                name,
                str(effect.pairs),
                " → ".join(numbers(effect.before.value, effect.after.value)),
                str(effect.drop),
                digits(effect.changed.value),
                f"{effect.unreadable_before:.0%} → {effect.unreadable_after:.0%}",
            ]
            for name, effect in self.effects.items()
        ]
        effects = ConsoleTable(
            ("transformation", "pairs", "accuracy", "drop", "verdicts changed", "unreadable"),
            rows,
            f"accuracy on the originals {self.original}\nright under all transformations too {self.worst}",
        )
        header, rules = self.rules_table()
        return [effects, ConsoleTable(header, rules)]


def measure_robustness(
    job: RobustnessJob,
    *,
    progress: Progress | None = None,
    open_: Callable[[JudgeSettings], Judge] = open_judge,
) -> RobustnessSummary:
    """Judge every pair as it is and under each transformation that applies; write judgements, summary and report.

    All prompts of a pair show its responses in the same order. An interrupted run is resumed.

    Args:
        job: what to measure.
        progress: called after each judgement.
        open_: opens the judge; called only if a judgement is missing.

    Raises:
        ValueError: for data, settings or a judge that cannot be used, or an output with other settings.
    """
    check_names(job.transformations)
    judge = job.judge
    if not isinstance(judge, RewardSettings):
        check_judge(judge)
    items, broken = load_items(job.data, split=job.split, limit=job.limit, subsets=job.subsets, seed=judge.seed)
    variants = [variant for item in items for variant in variants_of(item, job.transformations, judge.seed)]
    applied = {variant.name for variant in variants}
    if not applied:
        raise ValueError(f"none of the transformations {', '.join(job.transformations)} applies to a pair of the data")
    if isinstance(judge, RewardSettings):
        collected, found = reward_records(variants, judge, job.output, _COMMAND, progress)
    else:
        collected = collect_judgements(
            [judge_task(variant) for variant in variants],
            job.output,
            {"command": _COMMAND, **decisive_settings(judge)},
            functools.partial(open_, judge),
            progress=progress,
        )
        found = [collected.records[variant.key] for variant in variants]
    records = [
        {**record, "question": variant.item.prompt, "longer": len(variant.pair.chosen) - len(variant.pair.rejected)}
        for variant, record in zip(variants, found, strict=True)
    ]
    original, worst = worst_case(records)
    summary = RobustnessSummary(
        effects=compare(records),
        original=original,
        worst=worst,
        rules=follow_rules(records),
        idle=tuple(name for name in job.transformations if name not in applied),
        collected=collected,
        broken=tuple(broken),
    )
    write_jsonl(job.output / "summary.jsonl", _summary_rows(summary))
    _write_report(job, summary, len(items), records)
    return summary


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
    for rule, found in summary.rules.items():
        for name, accuracy in zip((ORIGINAL, ALL), found, strict=True):
            rows.append(summary_row({"transformation": name, "metric": rule}, accuracy))
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
        figures["Drop by subset"] = grid(drops, list(paired(records)), subsets, label="drop of accuracy")
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
            "Beside them": summary.rules_table(),
            "Verdicts that a transformation turned from right to wrong": (
                ("pair", "transformation", "better response", "judgement before", "judgement after"),
                _turned(records),
            ),
        },
        notes=[
            "A transformation never changes which response is better. Each row of the table holds only the pairs that "
            "the transformation applies to, and compares them with their own originals. Ties and verdicts that cannot "
            "be read count as wrong; failed judgements are left out. A verdict is forced if the judge gave none and "
            "the opening of its scores was appended.",
            "Compare the share of changed verdicts with the drop: where as many verdicts turn right as turn wrong, the "
            "drop is zero although the judge is not robust.",
        ],
    )


def _subset_drops(records: Sequence[Mapping[str, Any]], subsets: Sequence[str]) -> list[list[float]]:
    """Return the drop of each transformation (row) in each subset (column); NaN where it applies to no pair."""
    drops = []
    for pairs in paired(records).values():
        lost = {subset: [is_right(a) - is_right(b) for a, b in pairs if a["subset"] == subset] for subset in subsets}
        drops.append([float(np.mean(values)) if values else math.nan for values in lost.values()])
    return drops


def _turned(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    originals = {record["row"]: record for record in records if record["transformation"] == ORIGINAL}
    rows: list[list[str]] = []
    for record in records:
        before = originals[record["row"]]
        if is_right(before) and not is_right(record) and record["error"] is None and len(rows) < _EXAMPLES:
            shown = [_excerpt(before["text"]), _excerpt(record["text"])]
            rows.append([str(record["id"]), record["transformation"], record["label"], *shown])
    return rows


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else f"… {text[-_EXCERPT:]}"
