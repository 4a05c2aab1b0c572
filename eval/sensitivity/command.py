"""`cepo eval sensitivity`: does a reward model's gradient fall on the attribute that was edited, or elsewhere?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from cepo.eval.judges.reward import RewardSettings
from cepo.eval.rank_statistics import rank_correlations
from cepo.eval.report.figures import forest
from cepo.eval.report.heat_maps import Attribution, HeatMap
from cepo.eval.report.numbers import digits
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import ConsoleTable, PageTable, summary_row
from cepo.eval.sensitivity.edits import CLEAN, UNCHECKED, Edit, known_edits, read_edits
from cepo.eval.sensitivity.measures import METRICS, measure_sensitivity
from cepo.eval.statistics import (
    ANYWHERE,
    AT_LEAST_0,
    DIFFERENCE,
    SHARE,
    Estimate,
    areas,
    estimate,
    mean,
)
from cepo.files import SETTINGS, BrokenLine, Row, append_jsonl, claim, resume_jsonl, write_jsonl
from cepo.jacobian.loading import load_tokenizer, resolve_model
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.train.config import TESTBED
from cepo.train.reward_scores import RewardModel

Progress: TypeAlias = Callable[[int, int], None]
ROWS = "rows.jsonl"
_KNOWN = 100  # default number of the testbed's responses
_SHOWN = 24  # edits that the report shows as heat maps
_SIZES = ("edit_distance", "error_of_sum")
_TITLES = {
    "difference": "reward, chosen minus rejected",
    "right": "chosen response preferred",
    "energy_share": "energy at the attribute's tokens",
    "token_share": "share of the tokens that are the attribute's",
    "edit_distance": "edit distance, tokens",
    "leak": "leak",
    "error_of_sum": "error of the attributions' sum",
    "exact_share": "share of other changes, by intervention",
}


@dataclass(frozen=True)
class SensitivityJob:
    """The arguments of `cepo eval sensitivity`.

    Attributes:
        model: the reward model (Bradley-Terry); its seed is that of the testbed's edits.
        data: see `read_edits`, or "testbed".
        output: folder for rows.jsonl, summary.jsonl and report.html.
        split: split of a hub data set.
        limit: number of edits, or None for all; for the testbed the number of responses, which have two edits each.
    """

    model: RewardSettings
    data: str
    output: Path
    split: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class SensitivitySummary:
    """The results.

    Attributes:
        means: means by scope ("all" or a kind) and metric, see `measure_sensitivity`.
        comparison: by measure (leak, edit_distance) and statistic: `auc` of telling the testbed's unchecked edits from
            its clean ones, and `rank_correlation` with the exact share among the unchecked ones; empty for other data.
        edits: number of edits that were measured.
        failed: number of edits that could not be measured, by reason.
        left_out: (row number, reason) of rows that are not edits.
    """

    means: Mapping[tuple[str, str], Estimate]
    comparison: Mapping[tuple[str, str], Estimate]
    edits: int
    failed: Counter[str]
    left_out: tuple[BrokenLine, ...]

    def page_tables(self) -> dict[str, PageTable]:
        """Return the means per kind, and, for the testbed, the comparison of leak with edit distance."""
        scopes = list(dict.fromkeys(scope for scope, _ in self.means))
        measured = [metric for metric in METRICS if any((scope, metric) in self.means for scope in scopes)]
        rows = [
            [_TITLES[metric], *(str(self.means.get((scope, metric), "")) for scope in scopes)] for metric in measured
        ]
        tables: dict[str, PageTable] = {"Means, with 95% intervals over prompts": (("mean", *scopes), rows)}
        if self.comparison:
            figures = list(dict.fromkeys(figure for _, figure in self.comparison))
            tables["Leak compared with edit distance"] = (
                ("measure", "AUC, unchecked against clean edits", "rank correlation with the exact share, unchecked"),
                [
                    [_TITLES[name], *(str(self.comparison[name, figure]) for figure in figures)]
                    for name in dict.fromkeys(name for name, _ in self.comparison)
                ],
            )
        return tables

    def tables(self) -> list[ConsoleTable]:
        """Return the tables for the console."""
        return [ConsoleTable(header, rows, name) for name, (header, rows) in self.page_tables().items()]


def run_sensitivity(job: SensitivityJob, *, progress: Progress | None = None) -> SensitivitySummary:
    """Measure every edit, and write rows, summary and report; resume an interrupted run.

    Args:
        job: what to measure.
        progress: called with (edits done, edits in total).

    Raises:
        ValueError: for data or a model that cannot be used, or an output with other settings or data.
    """
    settings = job.model
    settings.require_rewards("sensitivity")
    edits, left_out = _edits(job)
    rows_file, summary_file, page = (job.output / name for name in (ROWS, "summary.jsonl", "report.html"))
    decisive = {"command": "eval sensitivity", **settings.decisive()}
    claim(job.output / SETTINGS, decisive, results=[rows_file, summary_file, page])
    keys = {edit.key for edit in edits}
    known = resume_jsonl(rows_file, belongs=lambda row: row["key"] in keys)
    pending = [edit for edit in edits if edit.key not in known]
    if pending:
        model = settings.open()
        token_bytes = TokenBytes(
            load_tokenizer(resolve_model(settings.model), trust_remote_code=settings.trust_remote_code)
        )
        for done, edit in enumerate(pending, start=1):
            known[edit.key] = _row(edit, model, token_bytes)
            append_jsonl(rows_file, [known[edit.key]])
            if progress is not None:
                progress(len(edits) - len(pending) + done, len(edits))
    summary = summarise(edits, [known[edit.key] for edit in edits], left_out)
    lines = [summary_row({"scope": scope, "metric": metric}, found) for (scope, metric), found in summary.means.items()]
    lines += [summary_row({"measure": name, "metric": figure}, at) for (name, figure), at in summary.comparison.items()]
    write_jsonl(summary_file, lines)
    _write_report(job, summary, [(edit, known[edit.key]) for edit in edits])
    return summary


def summarise(
    edits: Sequence[Edit], rows: Sequence[Mapping[str, Any]], left_out: Sequence[BrokenLine] = ()
) -> SensitivitySummary:
    """Return means over all edits and over each kind, with intervals clustered by prompt.

    Args:
        edits: the edits.
        rows: the row of each edit, see `measure_sensitivity`.
        left_out: (row number, reason) of rows that are not edits.
    """
    pairs = [(edit, row) for edit, row in zip(edits, rows, strict=True) if not row["error"]]
    kinds = list(dict.fromkeys(edit.kind for edit, _ in pairs))
    means = {}
    for scope in ["all", *kinds] if len(kinds) > 1 else ["all"]:
        for metric in METRICS:
            found = [
                (edit, row[metric]) for edit, row in pairs if scope in ("all", edit.kind) and row[metric] is not None
            ]
            if found:
                ends = None if metric in ("difference", *_SIZES) else SHARE
                within = AT_LEAST_0 if metric in _SIZES else ANYWHERE
                values, prompts = [value for _, value in found], [edit.prompt for edit, _ in found]
                means[scope, metric] = estimate(mean, values, clusters=prompts, ends=ends, within=within, unit="prompt")
    failed = Counter(str(row["error"]) for row in rows if row["error"])
    return SensitivitySummary(means, _comparison(pairs), len(pairs), failed, tuple(left_out))


def _comparison(pairs: Sequence[tuple[Edit, Mapping[str, Any]]]) -> dict[tuple[str, str], Estimate]:
    known = [(edit, row) for edit, row in pairs if edit.kind in (CLEAN, UNCHECKED) and row["leak"] is not None]
    unchecked = [(edit, row) for edit, row in known if row["exact_share"] is not None]
    if not unchecked:
        return {}
    found = {}
    for name in ("leak", "edit_distance"):
        truth = [float(edit.kind == UNCHECKED) for edit, _ in known]
        (found[name, "auc"],) = areas(
            [row[name] for _, row in known], truth, clusters=[edit.prompt for edit, _ in known], unit="prompt"
        )
        found[name, "rank_correlation"] = estimate(
            lambda *columns: rank_correlations(*columns)[:, 0, 0],
            *([row[name] for _, row in unchecked], [row["exact_share"] for _, row in unchecked]),
            clusters=[edit.prompt for edit, _ in unchecked],
            ends=DIFFERENCE,
            unit="prompt",
        )
    return found


def _edits(job: SensitivityJob) -> tuple[list[Edit], list[BrokenLine]]:
    if job.data == TESTBED:
        return known_edits(job.limit or _KNOWN, seed=job.model.seed), []
    return read_edits(job.data, split=job.split, limit=job.limit)


def _row(edit: Edit, model: RewardModel, token_bytes: TokenBytes) -> Row:
    said = {"key": edit.key, "id": edit.name, "kind": edit.kind, "attribute": edit.attribute}
    try:
        return {**said, **measure_sensitivity(edit, model, token_bytes), "error": None}
    except ValueError as reason:
        return {**said, "error": str(reason)}


def _write_report(job: SensitivityJob, summary: SensitivitySummary, pairs: Sequence[tuple[Edit, Row]]) -> None:
    figures = {}
    for metric in ("energy_share", "leak"):
        rows = [(scope, found) for (scope, name), found in summary.means.items() if name == metric]
        if rows:
            figures[f"{_TITLES[metric]}, with 95% intervals"] = forest(rows, axis=_TITLES[metric])
    measured = [(edit, row) for edit, row in pairs if not row["error"]]
    tables = summary.page_tables()
    if summary.failed:
        tables["Not measured"] = (("reason", "edits"), [[why, str(count)] for why, count in summary.failed.items()])
    write_report(
        job.output / "report.html",
        title="cepo eval sensitivity",
        summary={
            "reward model": job.model.model,
            "data": job.data,
            "edits": f"{summary.edits}, {summary.failed.total()} not measured, {len(summary.left_out)} rows left out",
        },
        figures=figures,
        tables=tables,
        heat_maps={"Edits": [_heat_map(edit, row) for edit, row in measured[:_SHOWN]]},
        notes=[
            "The gradient of the reward at the chosen response's tokens: its energy is the squared norm, and the "
            "attribute's share of it says how much the reward depends on the attribute. Compare it with the "
            "attribute's share of the tokens. An attribution is what a token contributed to the reward, relative to "
            "the rejected response, which differs by the edit alone; attributions add up to the difference of the "
            "rewards.",
            "Leak is the share of these changes that falls outside the attribute's tokens. It needs rows "
            "whose attribute_words name the words that show the attribute.",
        ],
    )


def _heat_map(edit: Edit, row: Mapping[str, Any]) -> HeatMap:
    places = range(1, 1 + len(row["tokens"]))
    attribution = {place: value for place, value in zip(places, row["attribution"], strict=True) if value}
    own = tuple(place for place, chosen in zip(places, row["of_attribute"], strict=True) if chosen)
    facts = {name: row[name] for name in ("difference", "energy_share", "token_share", "edit_distance", "leak")}
    return HeatMap(
        edit.name,
        (f"{edit.prompt}\n\n", *row["tokens"]),
        1,
        links={"gradient of the reward": dict(zip(places, map(math.sqrt, row["energy"]), strict=True))},
        attributions={
            "reward": Attribution(attribution, row["difference"], float(np.sum(row["attribution"])), unit="reward")
        },
        targets={"gradient of the reward": own},
        facts={"kind": edit.kind, "attribute": edit.attribute}
        | {_TITLES[name]: digits(value) for name, value in facts.items() if value is not None},
    )
