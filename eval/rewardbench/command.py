"""`cepo eval rewardbench`: how often a generative judge prefers the better response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cepo.eval.judges.journal import Collected, Record, collect_judgements
from cepo.eval.judges.open import open_judge
from cepo.eval.judges.settings import JudgeSettings, Progress, check_judge, decisive_settings
from cepo.eval.report.figures import forest, reliability
from cepo.eval.report.heat_maps import HeatMap
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import PageTable, console_table, summary_row
from cepo.eval.rewardbench.items import PreferenceItem, judge_tasks, load_items
from cepo.eval.rewardbench.metrics import MetricEstimate, measure_preferences, outcome
from cepo.files import BrokenLine, content_hash, write_jsonl

_SHOWN = 3  # items of each kind that the page holds in full
_FOREST_ROWS = 60
_TITLES = {
    "consistent": "right in both orders",
    "average": "right, mean of both orders",
    "single_swap": "right, one drawn order",
    "verdicts_only": "right, of judgements with a verdict",
    "soft_average": "right by expected margin, mean of both orders",
    "soft_summed": "right by expected margin, orders summed",
    "expected_margin": "expected margin in points, chosen minus rejected",
    "position_bias": "position bias, verdicts for A minus for B",
    "follows_position": "pairs whose verdict names the same place twice",
    "ties": "ties",
    "parse_failures": "no verdict could be read",
    "forced": "scores forced",
    "not_judged": "not judged",
}
_SHORT = {
    "consistent": "both orders",
    "average": "mean",
    "single_swap": "drawn order",
    "soft_average": "soft",
    "position_bias": "bias",
    "parse_failures": "unread",
}


@dataclass(frozen=True)
class RewardBenchJob:
    """What `cepo eval rewardbench` is asked to do.

    Attributes:
        judge: which judge, and how it generates; its seed is also that of the draws and the intervals.
        data: see `load_items`.
        output: folder for judgements.jsonl, summary.jsonl and report.html.
        split: of a hub data set, or None for its usual one.
        limit: number of items to draw at random, or None for all.
        subsets: names of the subsets to keep; all where empty.
    """

    judge: JudgeSettings
    data: str
    output: Path
    split: str | None = None
    limit: int | None = None
    subsets: tuple[str, ...] = ()


@dataclass(frozen=True)
class RewardBenchSummary:
    """The results.

    Attributes:
        measures: see `measure_preferences`.
        items: number of rows that were judged.
        collected: the judgements.
        broken: (line number, reason) of rows that could not be used.
    """

    measures: tuple[MetricEstimate, ...]
    items: int
    collected: Collected
    broken: tuple[BrokenLine, ...]

    @property
    def unread(self) -> float:
        """The share of judgements in which no verdict could be read, in [0, 1]."""
        shares = [one.estimate.value for one in self.measures if (one.metric, one.scope) == ("parse_failures", "all")]
        return shares[0] if shares else 0.0

    def all_table(self) -> PageTable:
        """Return every metric over all items."""
        whole = [(one.metric, one.estimate) for one in self.measures if one.scope == "all"]
        rows = [[_TITLES[metric], f"{found.value:.3f}", found.interval, str(found.count)] for metric, found in whole]
        return ["metric", "value", "95% interval", "count"], rows

    def scope_table(self) -> PageTable:
        """Return the accuracies by subset and section; no rows if there is only one subset."""
        found = {(one.scope, one.metric): one.estimate for one in self.measures}
        columns = {metric: short for metric, short in _SHORT.items() if ("all", metric) in found}
        rows = []
        for scope in dict.fromkeys(one.scope for one in self.measures if one.scope != "all"):
            cells = [f"{cell.value:.3f}" if (cell := found.get((scope, metric))) else "" for metric in columns]
            counted = found.get((scope, "consistent"))
            rows.append([scope, *cells, str(counted.count) if counted else "0"])
        return ["subset", *columns.values(), "items"], rows

    def tables(self) -> list[Table]:
        """Return what the console shows: all metrics, then the accuracies by subset and section."""
        header, rows = self.all_table()
        whole = console_table(*header, rows=rows, title="all items")
        whole.add_section()
        whole.add_row("judgements", str(len(self.collected.records)), "", "")
        whole.add_row("of which from an earlier run", str(self.collected.resumed), "", "")
        if speed := self.collected.speed():
            whole.add_row("speed", speed, "", "")
        header, rows = self.scope_table()
        return [whole, console_table(*header, rows=rows, title="by subset and section")] if rows else [whole]


def run_rewardbench(job: RewardBenchJob, *, progress: Progress | None = None) -> RewardBenchSummary:
    """Judge every pair in both orders, and write judgements, summary and page; resume a killed run.

    Args:
        job: what to do.
        progress: called after each judgement.

    Raises:
        ValueError: for data, settings or a model that cannot be used, or a folder with results of other settings.
    """
    check_judge(job.judge)
    items, broken = load_items(job.data, split=job.split, limit=job.limit, subsets=job.subsets, seed=job.judge.seed)
    collected = collect_judgements(
        judge_tasks(items),
        job.output,
        {"command": "eval rewardbench", **decisive_settings(job.judge)},
        lambda: open_judge(job.judge),
        progress=progress,
    )
    measures = measure_preferences(items, collected.records, seed=job.judge.seed)
    summary = RewardBenchSummary(tuple(measures), len(items), collected, tuple(broken))
    rows = [summary_row({"metric": one.metric, "subset": one.scope}, one.estimate) for one in measures]
    write_jsonl(job.output / "summary.jsonl", rows)
    _write_report(job, items, summary)
    return summary


def _write_report(job: RewardBenchJob, items: Sequence[PreferenceItem], summary: RewardBenchSummary) -> None:
    measures, records = summary.measures, summary.collected.records
    figures = {}
    for metric, reference in (("consistent", 0.25), ("average", 0.5), ("position_bias", 0.0)):
        rows = [(one.scope, one.estimate) for one in measures if one.metric == metric]
        if rows:
            caption = f"{_TITLES[metric].capitalize()}, with 95% intervals"
            figures[caption] = forest(rows[:_FOREST_ROWS], axis=_TITLES[metric], reference=reference)
    judged = [record for record in records.values() if record["soft"] and not record["error"]]
    if judged:
        figures["Reliability of the expected margin"] = reliability(
            [record["soft"][0] - record["soft"][1] for record in judged],
            [float(record["chosen_at"] == "A") for record in judged],
            across="expected score of A minus that of B, in points",
            up="share of pairs whose better response is A",
        )
    tables = {"All items": summary.all_table()}
    if summary.scope_table()[1]:
        tables["By subset and section"] = summary.scope_table()
    if failed := summary.collected.failed:
        tables["Not judged"] = (
            ["reason", "judgements"],
            [[reason, str(count)] for reason, count in failed.most_common()],
        )
    if summary.broken:
        tables["Lines that could not be used"] = (
            ["line", "reason"],
            [[str(number), reason] for number, reason in summary.broken],
        )
    write_report(
        job.output / "report.html",
        title="cepo eval rewardbench",
        summary={
            "judge": str(job.judge),
            "data": job.data,
            "items": str(summary.items),
            "judgements": str(len(records)),
            **({"speed": speed} if (speed := summary.collected.speed()) else {}),
        },
        figures=figures,
        tables=tables,
        heat_maps=_shown_judgements(items, records, job.judge.seed),
        notes=[
            "Every pair is judged in both orders. Ties and judgements without a verdict count as wrong. Items with a "
            "failed judgement are left out of the accuracies. A judge that guesses, and always gives a verdict, is "
            "right in both orders for 0.25 of the items, and for 0.5 in the mean of the orders.",
        ],
    )


def _shown_judgements(
    items: Sequence[PreferenceItem], records: Mapping[str, Record], seed: int
) -> dict[str, list[HeatMap]]:
    """Return some judgements in full, drawn at random, by how the item was judged."""
    kinds: dict[str, list[HeatMap]] = {
        name: []
        for name in ("Right in both orders", "Right in one order", "Wrong in both orders", "No verdict", "Not judged")
    }
    for item in sorted(items, key=lambda item: content_hash("show", seed, item.key)):
        found = outcome(item, records, seed=seed)
        shown = found.records[0]
        if any(record["error"] for record in shown):
            kind = "Not judged"
        elif any(record["winner"] is None for record in shown):
            kind = "No verdict"
        else:
            kind = ("Wrong in both orders", "Right in one order", "Right in both orders")[sum(found.right or ())]
        if len(kinds[kind]) < 2 * _SHOWN:
            kinds[kind] += [_shown(item, record) for record in shown]
    return {name: maps for name, maps in kinds.items() if maps}


def _shown(item: PreferenceItem, record: Mapping[str, Any]) -> HeatMap:
    first, second = item.chosen[0], item.rejected[0]
    if record["chosen_at"] == "B":
        first, second = second, first
    prompt = f"{item.prompt}\n\n[Response A]\n{first}\n\n[Response B]\n{second}\n\n"
    facts = {"subset": item.subset, "better": record["chosen_at"], "verdict": record["winner"] or "none"}
    if record["scores"]:
        facts["scores"] = ", ".join(f"{score:g}" for score in record["scores"])
    if record["soft"]:
        facts["expected scores"] = ", ".join(f"{score:.2f}" for score in record["soft"])
    if record["forced"]:
        facts["scores forced"] = "yes"
    if record["error"]:
        facts["not judged"] = record["error"]
    name = f"{item.name or item.key}, better response at {record['chosen_at']}"
    return HeatMap(name, (prompt, record["text"]), 1, facts=facts)
