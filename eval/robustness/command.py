"""`cepo eval robustness`: does the judge still find the better response when both are transformed."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cepo.eval.judges.journal import Request, collect_judgements, content_key
from cepo.eval.judges.settings import Judge, JudgeSettings, check_judge, open_judge
from cepo.eval.report.figures import forest, grid
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import console_table, share, summary_row
from cepo.eval.rewardbench.items import PLACES, Item, load_items
from cepo.eval.robustness.transformations import TRANSFORMATIONS, Pair, check_names, transform
from cepo.eval.statistics import Estimate, estimates, mean, proportion, warning_of_few, widened
from cepo.files import BrokenLine, make_folder, write_jsonl
from cepo.train.prompts import judge_prompt

ORIGINAL = "original"
"""Name of the pairs as they are, beside the names of the transformations."""
ALL = "all"
"""Name of the row over all transformations, each pair a cluster."""

_EXAMPLES = 8  # turned verdicts that the report shows
_EXCERPT = 700  # characters of a text that it shows


@dataclass(frozen=True)
class RobustnessJob:
    """What to measure.

    Attributes:
        judge: which judge, and how it generates.
        input: .jsonl file or hub data set of prompt, chosen, rejected, see `load_items`. Of several chosen or rejected
            responses of a row one each is drawn.
        output: folder to write.
        transformations: names of `TRANSFORMATIONS`, each once.
        limit: pairs to take, drawn by the seed; None for all.
        split: of the hub data set.
        subsets: names of subsets to keep; all where empty.
        seed: of the pairs taken, of which response is shown first, and of the transformations.
    """

    judge: JudgeSettings
    input: str
    output: Path
    transformations: tuple[str, ...] = tuple(TRANSFORMATIONS)
    limit: int | None = None
    split: str | None = None
    subsets: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Effect:
    """What one transformation did to the pairs that it applies to; those with a judgement that failed are left out.

    Attributes:
        pairs: number of pairs.
        before: accuracy on the originals of these very pairs; ties and verdicts that cannot be read count as wrong.
        after: accuracy on the transformed pairs.
        drop: before - after, pair by pair.
        ratio: after / before; NaN where before is 0.
        changed: share of pairs whose verdict (A, B, tie, unreadable) is another one.
        unreadable_before: share of originals whose verdict cannot be read.
        unreadable_after: share of transformed pairs whose verdict cannot be read.
        forced_before: share of originals for which the scores were opened, since the judge had given none.
        forced_after: share of transformed pairs for which they were.
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
    """What came of it.

    Attributes:
        effects: by transformation, and under ALL over them; without those that apply to no pair.
        original: accuracy on the originals of the pairs that some transformation applies to.
        worst: accuracy where a pair counts only if the judge is right on it and under every transformation of it.
        idle: transformations that apply to no pair.
        judgements: number of records.
        resumed: how many of them come from an earlier run.
        forced: how many had the scores' opening put into the judge's mouth.
        failed: of those without a judgement the reasons, such as a server that did not answer, and how often each.
        broken: (line number, reason) of input lines that could not be used.
        speed: judgements and tokens a second of this run, in words.
    """

    effects: Mapping[str, Effect]
    original: Estimate
    worst: Estimate
    idle: tuple[str, ...]
    judgements: int
    resumed: int
    forced: int
    failed: Counter[str]
    broken: tuple[BrokenLine, ...]
    speed: str

    def table(self) -> Table:
        """Return the effects as a table for the console."""
        title = f"right on the originals {self.original}\nunder all transformations too {self.worst}"
        table = console_table("transformation", "pairs", "right", "drop", "changed", "unreadable", title=title)
        for name, effect in self.effects.items():
            right = f"{effect.before.value:.3f} → {effect.after.value:.3f}"
            unreadable = f"{effect.unreadable_before:.0%} → {effect.unreadable_after:.0%}"
            table.add_row(name, str(effect.pairs), right, str(effect.drop), f"{effect.changed.value:.3f}", unreadable)
        return table


_HEADER = (
    "transformation",
    "pairs",
    "right before",
    "right after",
    "drop",
    "ratio",
    "verdict changed",
    "unreadable",
    "forced",
)


def measure_robustness(
    job: RobustnessJob,
    *,
    progress: Callable[[int, int, str], None] | None = None,
    open_: Callable[[JudgeSettings], Judge] = open_judge,
) -> RobustnessSummary:
    """Judge every pair as it is and under each transformation that applies, and write records, summary and report.

    A pair's responses stand in the same places in all its prompts. Records are appended as they come; started again
    with the same arguments, it goes on where it stopped, and judges anew what failed.

    Args:
        job: what to measure.
        progress: called with (judgements there, judgements in all, speed in words).
        open_: opens the judge; called only where a judgement is missing.

    Raises:
        ValueError: for input, settings or a judge that cannot be used.
    """
    check_names(job.transformations)
    check_judge(job.judge)
    items, broken = load_items(job.input, split=job.split, limit=job.limit, subsets=job.subsets, seed=job.seed)
    requests = [request for item in items for request in _requests(item, job)]
    applied = {request.facts["transformation"] for request in requests}
    if not applied:
        raise ValueError(f"none of the transformations {', '.join(job.transformations)} applies to a pair of the input")
    make_folder(job.output)
    collected = collect_judgements(
        requests,
        job.output / "judgements.jsonl",
        {"what": "robustness", **job.judge.decisive(), "seed": job.seed},
        functools.partial(open_, job.judge),
        progress=progress,
    )
    records = [collected.records[request.key] for request in requests]
    original, worst = worst_case(records)
    summary = RobustnessSummary(
        effects=compare(records),
        original=original,
        worst=worst,
        idle=tuple(name for name in job.transformations if name not in applied),
        judgements=len(records),
        resumed=collected.resumed,
        forced=sum(record["forced"] for record in records),
        failed=Counter(record["error"] for record in records if record["error"] is not None),
        broken=tuple(broken),
        speed=collected.speed(),
    )
    write_jsonl(job.output / "summary.jsonl", _summary_rows(summary))
    _write_report(job, summary, len(items), records)
    return summary


def compare(records: Sequence[Mapping[str, Any]]) -> dict[str, Effect]:
    """Hold the transformed pairs' verdicts against those of their originals.

    Args:
        records: with row, transformation (or ORIGINAL), label, winner and error; one original for every row.

    Returns:
        The effect of each transformation, in the order in which they first come, and under ALL over all of them, with
        the pairs as clusters.
    """
    paired = _paired(records)
    effects = {name: _effect(pairs) for name, pairs in paired.items()}
    if paired:
        effects[ALL] = _effect([pair for pairs in paired.values() for pair in pairs])
    return effects


def _paired(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """Return (original, transformed) by transformation, without those of which one has no judgement."""
    originals = {record["row"]: record for record in records if record["transformation"] == ORIGINAL}
    paired: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for record in records:
        before = originals[record["row"]]
        if record["transformation"] != ORIGINAL and record["error"] is None and before["error"] is None:
            paired.setdefault(record["transformation"], []).append((before, record))
    return paired


def worst_case(records: Sequence[Mapping[str, Any]]) -> tuple[Estimate, Estimate]:
    """Return the accuracy on the originals, and that of being right on the original and all its transformations.

    Both are over the pairs that a transformation applies to and whose judgements all came.

    Args:
        records: as for `compare`.
    """
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_row.setdefault(record["row"], []).append(record)
    complete = [
        group for group in by_row.values() if len(group) > 1 and all(record["error"] is None for record in group)
    ]
    if not complete:
        nothing = Estimate(float("nan"), float("nan"), float("nan"), 0)
        return nothing, nothing
    originals = [_right(record) for group in complete for record in group if record["transformation"] == ORIGINAL]
    return proportion(originals), proportion([min(map(_right, group)) for group in complete])


def _effect(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Effect:
    before = [_right(original) for original, _ in pairs]
    after = [_right(transformed) for _, transformed in pairs]
    changed = [float(original["winner"] != transformed["winner"]) for original, transformed in pairs]
    rows = [original["row"] for original, _ in pairs]
    clusters = rows if len(set(rows)) < len(rows) else None
    right_before, right_after, drop, ratio, turned = estimates(
        _effect_values, before, after, changed, clusters=clusters
    )
    return Effect(
        pairs=len(pairs),
        before=widened(right_before, len(set(rows))),
        after=widened(right_after, len(set(rows))),
        drop=drop,
        ratio=ratio,
        changed=widened(turned, len(set(rows))),
        unreadable_before=float(np.mean([original["winner"] is None for original, _ in pairs])),
        unreadable_after=float(np.mean([transformed["winner"] is None for _, transformed in pairs])),
        forced_before=float(np.mean([original["forced"] for original, _ in pairs])),
        forced_after=float(np.mean([transformed["forced"] for _, transformed in pairs])),
    )


def _effect_values(
    before_N: np.ndarray, after_N: np.ndarray, changed_N: np.ndarray, weights_BN: np.ndarray
) -> np.ndarray:
    """Return accuracy before and after, drop, ratio and share of changed verdicts, (B, 5)."""
    before_B, after_B, changed_B = mean(np.stack([before_N, after_N, changed_N], axis=1), weights_BN).T
    ratio_B = after_B / np.where(before_B > 0.0, before_B, np.nan)
    return np.stack([before_B, after_B, before_B - after_B, ratio_B, changed_B], axis=1)


def _right(record: Mapping[str, Any]) -> float:
    return float(record["winner"] == record["label"])


def _requests(item: Item, job: RobustnessJob) -> list[Request]:
    """Return the pair as it is, and under each transformation that applies; nothing where none does."""
    drawn = random.Random(content_key("pair", job.seed, item.key))
    pair = Pair(item.prompt, drawn.choice(item.chosen), drawn.choice(item.rejected))
    label = drawn.choice(PLACES)
    changed = {name: transform(name, pair, seed=job.seed) for name in job.transformations}
    variants = {ORIGINAL: pair} | {name: variant for name, variant in changed.items() if variant is not None}
    requests = []
    for name, variant in variants.items() if len(variants) > 1 else ():
        responses = (variant.chosen, variant.rejected)
        messages = judge_prompt(item.prompt, *(responses if label == "A" else responses[::-1]))
        facts = {"row": item.key, "id": item.name, "subset": item.subset, "transformation": name, "label": label}
        requests.append(Request(content_key(name, item.key, messages), messages, facts))
    return requests


def _cells(name: str, effect: Effect) -> list[str]:
    shown = (effect.before, effect.after, effect.drop, effect.ratio, effect.changed)
    unreadable = f"{effect.unreadable_before:.1%} → {effect.unreadable_after:.1%}"
    forced = f"{effect.forced_before:.1%} → {effect.forced_after:.1%}"
    return [name, str(effect.pairs), *map(str, shown), unreadable, forced]


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


def _write_report(
    job: RobustnessJob, summary: RobustnessSummary, pairs: int, records: Sequence[Mapping[str, Any]]
) -> None:
    drops = [(name, effect.drop) for name, effect in summary.effects.items()]
    changes = [(name, effect.changed) for name, effect in summary.effects.items()]
    accuracies = [("originals", summary.original), ("worst case", summary.worst)]
    accuracies += [(name, effect.after) for name, effect in summary.effects.items()]
    figures = {
        "Drop of accuracy, before - after, on the same pairs": forest(drops, axis="drop", reference=0.0),
        "Share of verdicts that changed": forest(changes, axis="share of pairs"),
        "Accuracy": forest(accuracies, axis="accuracy", reference=0.5),
    }
    subsets = list(dict.fromkeys(record["subset"] for record in records))
    if len(subsets) > 1:
        figures["Drop by subset"] = grid(_subset_drops(records, subsets), list(_paired(records)), subsets, label="drop")
    write_report(
        job.output / "report.html",
        title="cepo eval robustness: transformed responses",
        summary={
            "judge": f"{job.judge.model} ({job.judge.backend}, temperature {job.judge.temperature:g})",
            "input": f"{job.input}, {pairs} pairs",
            "right on the originals": str(summary.original),
            "right on the original and under every transformation": str(summary.worst),
            "judgements": f"{summary.judgements}, {summary.forced} forced, {summary.failed.total()} failed",
            "applies to no pair": ", ".join(summary.idle) or "none",
            "seed": str(job.seed),
        },
        figures=figures,
        tables={
            "Effects, with 95% bootstrap intervals over pairs": (
                _HEADER,
                [_cells(name, effect) for name, effect in summary.effects.items()],
            ),
            "Verdicts that a transformation turned from right to wrong": (
                ("pair", "transformation", "right", "before", "after"),
                _turned(records),
            ),
        },
        notes=[
            "Each transformation leaves the better response the better one. A row holds only pairs that the "
            "transformation applies to, and compares them with their own originals. A tie, and a verdict that cannot "
            "be read, count as wrong; judgements that failed are left out. Forced verdicts are those of a judge that "
            "had given none, and whose scores were opened for it.",
            "Beside the drop, read the share of verdicts that changed: where as many turn right as turn wrong, the "
            "drop is zero and the judge is not robust.",
            *warning_of_few(pairs, "pairs"),
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
