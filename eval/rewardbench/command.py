"""`cepo eval rewardbench`: how often a generative judge prefers the better response; resumable, with a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from cepo.eval.judges.journal import Collected, Record, collect_judgements, content_key
from cepo.eval.judges.settings import JudgeSettings, check_judge, open_judge
from cepo.eval.report.figures import forest, reliability
from cepo.eval.report.heat_maps import HeatMap
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import console_table, summary_row
from cepo.eval.rewardbench.items import PLACES, Item, load_items, requests
from cepo.eval.rewardbench.metrics import Measure, outcome, summarise
from cepo.eval.statistics import warning_of_few
from cepo.files import BrokenLine, make_folder, write_jsonl

_SHOWN = 3  # judgements of each kind that the page holds in full
_FOREST_ROWS = 60
_TITLES = {
    "consistent": "right in both orders",
    "average": "right, mean of both orders",
    "single_swap": "right, one drawn order",
    "verdicts_only": "right, where there is a verdict",
    "soft_average": "right by expected margin, mean of both orders",
    "soft_summed": "right by expected margin, orders summed",
    "expected_margin": "expected margin, chosen less rejected",
    "position_bias": "position bias, verdicts for A less for B",
    "follows_position": "pairs whose verdict stays at its place",
    "ties": "ties",
    "parse_failures": "no verdict could be read",
    "forced": "scores forced",
    "not_judged": "not judged",
}
_SHORT = {
    "consistent": "both",
    "average": "mean",
    "single_swap": "drawn",
    "soft_average": "soft",
    "position_bias": "bias",
    "parse_failures": "unread",
}


@dataclass(frozen=True)
class RewardBenchJob:
    """What `cepo eval rewardbench` was asked to do.

    Attributes:
        judge: which judge, and how it generates.
        data: see `load_items`.
        output: folder for judgements.jsonl, summary.jsonl and report.html.
        split: of a hub data set, or None for its usual one.
        limit: number of items to draw by the judge's seed, or None for all.
        subsets: names of subsets to keep; all where empty.
    """

    judge: JudgeSettings
    data: str
    output: Path
    split: str | None = None
    limit: int | None = None
    subsets: tuple[str, ...] = ()


@dataclass(frozen=True)
class RewardBenchSummary:
    """What came of it.

    Attributes:
        measures: see `summarise`.
        items: rows that were judged.
        collected: the judgements.
        broken: (line number, reason) of rows that could not be used.
        not_judged: reasons and how often each came.
    """

    measures: tuple[Measure, ...]
    items: int
    collected: Collected
    broken: tuple[BrokenLine, ...]
    not_judged: Mapping[str, int]

    @property
    def unread(self) -> float:
        """The share of judgements in which no verdict could be read, in [0, 1]."""
        shares = [one.estimate.value for one in self.measures if (one.metric, one.scope) == ("parse_failures", "all")]
        return shares[0] if shares else 0.0

    def tables(self) -> list[Table]:
        """Return what the console shows: all measures, then the accuracies by subset and section."""
        whole = console_table("measure", "value", "95% interval", "count", title="all")
        for measure in self.measures:
            if measure.scope == "all":
                found = measure.estimate
                interval = f"{found.low:.3f} to {found.high:.3f}"
                whole.add_row(_TITLES[measure.metric], f"{found.value:.3f}", interval, str(found.count))
        whole.add_section()
        whole.add_row("judgements", str(len(self.collected.records)), "", "")
        whole.add_row("from an earlier run", str(self.collected.resumed), "", "")
        if speed := self.collected.speed():
            whole.add_row("speed", speed, "", "")
        header, rows = _scope_rows(self.measures)
        parts = console_table(*header, title="by subset and section")
        for row in rows:
            parts.add_row(*row)
        return [whole, parts] if rows else [whole]


def run_rewardbench(
    job: RewardBenchJob, *, progress: Callable[[int, int, str], None] | None = None
) -> RewardBenchSummary:
    """Judge every pair in both orders and write what came of it, going on from a killed run of the same settings.

    Args:
        job: what to do.
        progress: called with (judgements done, in all, speed in words).

    Raises:
        ValueError: for data, settings or a model that cannot be used; a folder that holds other settings' judgements.
    """
    check_judge(job.judge)
    if job.output.exists() and not job.output.is_dir():
        raise ValueError(f"output is {str(job.output)!r}, which is a file; expected a folder, which may be new")
    items, broken = load_items(job.data, split=job.split, limit=job.limit, subsets=job.subsets, seed=job.judge.seed)
    make_folder(job.output)
    collected = collect_judgements(
        requests(items),
        job.output / "judgements.jsonl",
        job.judge.decisive(),
        lambda: open_judge(job.judge),
        progress=progress,
    )
    measures = tuple(summarise(items, collected.records, seed=job.judge.seed))
    reasons = Counter(str(record["error"]) for record in collected.records.values() if record["error"])
    summary = RewardBenchSummary(measures, len(items), collected, tuple(broken), dict(reasons.most_common()))
    _write_summary(job.output / "summary.jsonl", measures)
    _write_report(job, items, summary)
    return summary


def _write_summary(path: Path, measures: Sequence[Measure]) -> None:
    write_jsonl(path, [summary_row({"metric": one.metric, "subset": one.scope}, one.estimate) for one in measures])


def _scope_rows(measures: Sequence[Measure]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table by subset and section; no rows where there is nothing but "all"."""
    found = {(measure.scope, measure.metric): measure.estimate for measure in measures}
    columns = {metric: short for metric, short in _SHORT.items() if ("all", metric) in found}
    scopes = list(dict.fromkeys(measure.scope for measure in measures if measure.scope != "all"))
    rows = []
    for scope in scopes:
        cells = [f"{cell.value:.3f}" if (cell := found.get((scope, metric))) else "" for metric in columns]
        counted = found.get((scope, "consistent"))
        rows.append([scope, *cells, str(counted.count) if counted else "0"])
    return ["subset", *columns.values(), "items"], rows


def _write_report(job: RewardBenchJob, items: Sequence[Item], summary: RewardBenchSummary) -> None:
    measures, records = summary.measures, summary.collected.records
    facts = {
        "judge": job.judge.model,
        "data": job.data,
        "items": str(summary.items),
        "judgements": str(len(records)),
        "generation": f"at most {job.judge.max_new_tokens} tokens, "
        + (f"temperature {job.judge.temperature:g}" if job.judge.temperature else "greedy"),
    }
    if speed := summary.collected.speed():
        facts["speed"] = speed
    figures = {}
    for metric, reference in (("consistent", 0.25), ("average", 0.5), ("position_bias", 0.0)):
        rows = [(measure.scope, measure.estimate) for measure in measures if measure.metric == metric]
        if rows:
            caption = f"{_TITLES[metric].capitalize()}, with 95% intervals"
            figures[caption] = forest(rows[:_FOREST_ROWS], axis=_TITLES[metric], reference=reference)
    judged = [record for record in records.values() if record["soft"] and not record["error"]]
    if judged:
        figures["Reliability of the expected margin"] = reliability(
            [record["soft"][0] - record["soft"][1] for record in judged],
            [float(record["chosen_at"] == "A") for record in judged],
            across="expected score of A less that of B",
            up="the better response is A",
        )
    whole = [
        [_TITLES[measure.metric], f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}", str(found.count)]
        for measure in measures
        if measure.scope == "all" and (found := measure.estimate)
    ]
    header, rows_by_scope = _scope_rows(measures)
    tables: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
        "All": (["measure", "value", "95% interval", "count"], whole)
    }
    if rows_by_scope:
        tables["By subset and section"] = (header, rows_by_scope)
    if summary.not_judged:
        reasons = [[reason, str(count)] for reason, count in summary.not_judged.items()]
        tables["Not judged"] = (["reason", "judgements"], reasons)
    if summary.broken:
        tables["Lines that could not be used"] = (
            ["line", "reason"],
            [[str(number), reason] for number, reason in summary.broken],
        )
    write_report(
        job.output / "report.html",
        title="cepo eval rewardbench",
        summary=facts,
        figures=figures,
        tables=tables,
        heat_maps=_shown_judgements(items, records, job.judge.seed),
        notes=[
            "Every pair is judged in both orders. Ties and judgements without a verdict count as wrong; an item with a "
            "judgement that failed is left out of the accuracies. Chance is 0.25 for both orders and 0.5 for their "
            "mean, for a judge that always gives a verdict.",
            *warning_of_few(len(items), "pairs"),
        ],
    )


def _shown_judgements(items: Sequence[Item], records: Mapping[str, Record], seed: int) -> dict[str, list[HeatMap]]:
    """Return some judgements in full by what became of them, drawn by seed."""
    kinds: dict[str, list[HeatMap]] = {
        name: []
        for name in ("Right in both orders", "Right in one order", "Wrong in both orders", "No verdict", "Not judged")
    }
    for item in sorted(items, key=lambda item: content_key("show", seed, item.key)):
        shown = [records[item.request_key(0, 0, place)] for place in PLACES]
        right = outcome(item, records, seed=seed).right
        if any(record["error"] for record in shown):
            kind = "Not judged"
        elif any(record["winner"] is None for record in shown):
            kind = "No verdict"
        else:
            kind = ("Wrong in both orders", "Right in one order", "Right in both orders")[sum(right or ())]
        if len(kinds[kind]) < 2 * _SHOWN:
            kinds[kind] += [_shown(item, record) for record in shown]
    return {name: maps for name, maps in kinds.items() if maps}


def _shown(item: Item, record: Record) -> HeatMap:
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
