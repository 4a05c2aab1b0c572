"""`cepo eval rewardbench`: how often a judge, generative or a reward model, prefers the better response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cepo.eval.judges.journal import Collected, collect_judgements
from cepo.eval.judges.open import open_judge
from cepo.eval.judges.reward import RewardSettings, collect_rewards
from cepo.eval.judges.settings import JudgeSettings, Progress, check_judge, decisive_settings
from cepo.eval.report.figures import forest, reliability
from cepo.eval.report.heat_maps import HeatMap
from cepo.eval.report.numbers import digits
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import ConsoleTable, PageTable, summary_row
from cepo.eval.rewardbench.examples import shown_judgements, shown_rewards
from cepo.eval.rewardbench.items import judge_tasks, load_items
from cepo.eval.rewardbench.metrics import MetricEstimate, measure_preferences
from cepo.eval.rewardbench.reward_metrics import TIES_MEASURE, measure_rewards, shown_texts
from cepo.files import BrokenLine, write_jsonl

_COMMAND = "eval rewardbench"
_FOREST_ROWS = 60
_REFERENCES = {"consistent": 0.25, "average": 0.5, "position_bias": 0.0, "strict": 0.5, "longest": 0.5}
"""The value of random guessing for each metric that is drawn."""
_NOTES = (
    "Every pair is judged in both orders. Ties and judgements without a verdict count as wrong. Items with a failed "
    "judgement are left out of the accuracies. A judge that guesses, and always gives a verdict, is right in both "
    "orders for 0.25 of the items, and for 0.5 in the mean of the orders.",
)
_REWARD_NOTES = (
    "A reward model is right where the better response has the higher reward. An item of several pairs is right where "
    "every pair is. Where ties share the credit, a response that is as good as k others at the top earns 1 / (1 + k). "
    "Items with a text that has no reward (too long, for example) are left out of the accuracies and counted.",
    "Compare the accuracy with that of length alone, in characters, and with that on the two kinds of pairs: a model "
    "that follows length is right where the better response is the longer one, and wrong elsewhere.",
)
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
    "ties_on_ties": "ties, of rows without a better response",
    "parse_failures": "no verdict could be read",
    "forced": "scores forced",
    "not_judged": "not judged",
    "strict": "right, ties as wrong",
    "half_credit": "right, ties share the credit",
    "longest": "longer response wins",
    "shortest": "shorter response wins",
    "longer_right": "right, better response longer",
    "shorter_right": "right, better response shorter",
    "margin": "reward, better minus other",
    TIES_MEASURE: "RewardBench 2's measure of Ties",
}
_SHORT = {
    "strict": "right",
    "half_credit": "ties shared",
    "longest": "longest wins",
    "shortest": "shortest wins",
    "longer_right": "better longer",
    "shorter_right": "better shorter",
    TIES_MEASURE: "Ties' own",
    "consistent": "both orders",
    "average": "mean",
    "single_swap": "drawn order",
    "soft_average": "soft",
    "position_bias": "bias",
    "parse_failures": "unread",
}


@dataclass(frozen=True)
class RewardBenchJob:
    """The arguments of `cepo eval rewardbench`.

    Attributes:
        judge: the judge and its settings, or the reward model; its seed is also that of the draws.
        data: see `load_items`.
        output: folder for judgements.jsonl, summary.jsonl and report.html.
        split: split of a hub data set; None for the benchmark's own, or "train".
        limit: number of items to draw at random; None for all.
        subsets: names of the subsets to keep; all if empty.
        ties: whether to judge rows in which neither response is better too, and let every prompt allow equal scores.
    """

    judge: JudgeSettings | RewardSettings
    data: str
    output: Path
    split: str | None = None
    limit: int | None = None
    subsets: tuple[str, ...] = ()
    ties: bool = False


@dataclass(frozen=True)
class RewardBenchSummary:
    """The results.

    Attributes:
        measures: see `measure_preferences`, or `measure_rewards`.
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
        """The share of judgements without a readable verdict, in [0, 1]."""
        shares = [one.estimate.value for one in self.measures if (one.metric, one.scope) == ("parse_failures", "all")]
        return shares[0] if shares else 0.0

    def all_table(self) -> PageTable:
        """Return every metric over all items."""
        whole = [(one.metric, one.estimate) for one in self.measures if one.scope == "all"]
        rows = [[_TITLES[metric], found.number, found.interval, str(found.count)] for metric, found in whole]
        return ["metric", "value", "95% interval", "count"], rows

    def scope_table(self) -> PageTable:
        """Return the accuracies by subset and section; no rows if there is only one subset."""
        found = {(one.scope, one.metric): one.estimate for one in self.measures}
        measured = {metric for _, metric in found}
        columns = {metric: short for metric, short in _SHORT.items() if metric in measured}
        rows = []
        for scope in dict.fromkeys(one.scope for one in self.measures if one.scope != "all"):
            cells = [digits(cell.value) if (cell := found.get((scope, metric))) else "" for metric in columns]
            counted = found.get((scope, "consistent")) or found.get((scope, "strict"))
            rows.append([scope, *cells, str(counted.count) if counted else "0"])
        return ["subset", *columns.values(), "items"], rows

    def tables(self) -> list[ConsoleTable]:
        """Return the tables for the console: all metrics, then the accuracies by subset and section."""
        header, rows = self.all_table()
        judged = f"{len(self.collected.records)} judgements, {self.collected.resumed} of them from an earlier run"
        speed = self.collected.speed()
        whole = ConsoleTable(header, rows, f"all items: {judged}" + (f", {speed}" if speed else ""))
        header, rows = self.scope_table()
        return [whole, ConsoleTable(header, rows, "by subset and section")] if rows else [whole]


def run_rewardbench(job: RewardBenchJob, *, progress: Progress | None = None) -> RewardBenchSummary:
    """Judge every pair in both orders, and write judgements, summary and page; resume a killed run.

    Args:
        job: what to do.
        progress: called after each judgement.

    Raises:
        ValueError: for data, settings or a model that cannot be used, or an output with other settings.
    """
    judge = job.judge
    read: dict[str, Any] = {"split": job.split, "limit": job.limit, "subsets": job.subsets}
    if isinstance(judge, RewardSettings):
        if job.ties:
            raise ValueError("ties is set, but a reward model gives no verdict that could be a tie; leave --ties out")
        shown = judge.shown
        items, broken = load_items(job.data, seed=judge.seed, **read)
        rewards = collect_rewards(judge, shown_texts(items, shown), job.output, _COMMAND, progress=progress)
        collected, measures = rewards.collected, measure_rewards(items, rewards)
        examples = shown_rewards(items, rewards, judge.seed)
    else:
        check_judge(judge)
        items, broken = load_items(job.data, seed=judge.seed, ties=job.ties, **read)
        collected = collect_judgements(
            judge_tasks(items, ties=job.ties),
            job.output,
            {"command": _COMMAND, **decisive_settings(judge)},
            lambda: open_judge(judge),
            progress=progress,
        )
        measures = measure_preferences(items, collected.records, seed=judge.seed)
        examples = shown_judgements(items, collected.records, judge.seed)
    summary = RewardBenchSummary(tuple(measures), len(items), collected, tuple(broken))
    rows = [summary_row({"metric": one.metric, "subset": one.scope}, one.estimate) for one in measures]
    write_jsonl(job.output / "summary.jsonl", rows)
    _write_report(job, summary, examples)
    return summary


def _write_report(job: RewardBenchJob, summary: RewardBenchSummary, examples: Mapping[str, list[HeatMap]]) -> None:
    measures, records = summary.measures, summary.collected.records
    figures = {}
    for metric, reference in _REFERENCES.items():
        rows = [(one.scope, one.estimate) for one in measures if one.metric == metric]
        if rows:
            caption = f"{_TITLES[metric]}, with 95% intervals"
            figures[caption] = forest(rows[:_FOREST_ROWS], axis=_TITLES[metric], reference=reference)
    judged = [
        record for record in records.values() if record.get("soft") and not record["error"] and not record.get("tie")
    ]
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
        tables["Rows that were left out"] = (
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
        heat_maps=examples,
        notes=_REWARD_NOTES if isinstance(job.judge, RewardSettings) else _NOTES,
    )
