"""The tables, figures and page of `cepo eval causal`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from cepo.eval.causal.evidence import ANALYSIS_DEFINITION, BASELINES, DEFAULT_LINK, PAPER_DEFINITION, SWEPT, definition
from cepo.eval.causal.summary import PRIMARY, SWEPT_ALONE, CausalSummary, JudgeResults, effect_of
from cepo.eval.report.figures import curves, forest, grid, reliability
from cepo.eval.report.heat_maps import HeatMap
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import console_table
from cepo.eval.statistics import Estimate

_SHOWN = 14  # definitions in a table for the console, beside those that every table shows
# Caption, kind of record, the keys that name a row, and the key that names a column.
_PIVOTS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("Judgements", "count", ("population",), "figure"),
    ("Certificates: what forced criteria do to each judge's verdict", "certificate", ("population",), "figure"),
    ("What the interventions do to the scores", "effect", ("population", "intervention"), "measure"),
    ("Criteria masked out: the largest value over all rollouts", "masked", ("population",), "figure"),
    ("Permuted labels: rank correlation with the effects of other items", "permuted", ("population",), "definition"),
    ("Parameters redrawn: rank correlation with the original", "randomised", ("population", "figure"), "redrawn"),
    (
        "Criteria tokens removed, or kept alone: loss of the scores' log-likelihood, nats, by share of the tokens",
        "removal",
        ("population", "figure", "ranking"),
        "share",
    ),
    (
        "Nuisance subspace and the Jacobian's own: mean principal angle, degrees (90: orthogonal), by rank",
        "angle",
        ("population", "link", "permutation"),
        "rank",
    ),
    ("Random subspaces of the same dimension: degrees, by rank", "random angle", ("population",), "rank"),
    ("Captum: largest relative difference of J_XY", "captum", ("population",), "figure"),
)


def console_tables(summary: CausalSummary) -> list[Table]:
    """Return the tables for the console."""
    found = []
    for caption, (header, rows) in text_tables(summary).items():
        table = console_table(*header, title=caption)
        for row in rows:
            table.add_row(*row)
        found.append(table)
    return found


def text_tables(summary: CausalSummary, *, every: bool = False) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Return header and rows of each table by its caption.

    Args:
        summary: from `summarise_causal`.
        every: whether to list all definitions, or only the best, the defaults and the baselines.
    """
    found: dict[str, tuple[list[str], list[list[str]]]] = {}
    for group, members in summary.groups.items():
        places = (
            {group: "pooled", **{name: f"within {name}" for name in members}} if len(members) > 1 else {group: group}
        )
        known = {title: _correlations(summary, place) for place, title in places.items()}
        columns = {title: of_place for title, of_place in known.items() if of_place}
        areas = _areas(summary, group)
        for caption, of_caption in (
            (f"Rank correlation with what resampled criteria do ({PRIMARY}): {group}", columns),
            (f"Area under the ROC curve, separating the two judges: {group}", {"AUC": areas} if areas else {}),
        ):
            if of_caption:
                names = _ranked(next(iter(of_caption.values())))
                names = names if every else _worth(names, summary, group)
                rows = [[name, *(str(estimates[name]) for estimates in of_caption.values())] for name in names]
                found[caption] = (["definition", *of_caption], rows)
    for caption, what, keys, across in _PIVOTS:
        records = [record for record in summary.records if record["what"] == what]
        headers = list(dict.fromkeys(str(record[across]) for record in records))
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        for record in records:
            shown = str(_estimate(record)) if "low" in record else f"{record['value']:.3g}"
            cells.setdefault(tuple(str(record[key]) for key in keys), {})[str(record[across])] = shown
        if records:
            rows = [[*names, *(of_row.get(header, "") for header in headers)] for names, of_row in cells.items()]
            found[caption] = ([*keys, *headers], rows)
    return found


def write_causal_report(
    path: Path, results: Sequence[JudgeResults], summary: CausalSummary, facts: Mapping[str, str]
) -> None:
    """Write the page: forests, reliability, randomisation and angle figures, every table, and heat maps.

    Args:
        path: the file to write.
        results: of each judge.
        summary: from `summarise_causal`.
        facts: what was run, by label.
    """
    figures: dict[str, Figure] = {}
    for group, members in summary.groups.items():
        rows = [row for one in results if one.name in members for row in one.sound]
        figures |= _group_figures(group, rows, summary)
    for one in results:
        figures |= _control_figures(
            one.name, [record for record in summary.records if record["population"] == one.name]
        )
    notes = [
        "An effect is what an intervention on the criteria does to the scores: tv is the total variation distance of "
        "the digits' distributions (mean of the two scores), margin the absolute change of the expected margin, flip "
        "whether the winner changed. direct keeps the analysis as it was sampled; total lets the judge write analysis "
        "and scores anew, greedily, and reads the digits there.",
        f"Definitions are compared by {PRIMARY}. Intervals are 95% bootstrap intervals over prompts. Choose on one "
        "seed and confirm on another: the best of many looks better than it is on the data that chose it.",
        *summary.warnings,
        *(f"No AUC for {name}: {reason}." for name, reason in summary.refused.items()),
    ]
    write_report(
        path,
        title="cepo eval causal",
        summary={**facts, **{f"best by {PRIMARY}, {group}": name for group, name in summary.best.items()}},
        figures=figures,
        tables=text_tables(summary, every=True),
        heat_maps={one.name: [_heat_map(row) for row in one.sound[:4]] for one in results},
        notes=notes,
    )


def _group_figures(group: str, rows: Sequence[dict[str, Any]], summary: CausalSummary) -> dict[str, Figure]:
    """Draw how the definitions of a group compare, and each one shown against the primary effect."""
    found, areas = _correlations(summary, group), _areas(summary, group)
    if not found:
        return {}
    figures = {
        f"Rank correlation with {PRIMARY}: {group}": forest(
            [(name, found[name]) for name in _worth(_ranked(found), summary, group)],
            axis="Spearman's rank correlation",
            reference=0.0,
        )
    }
    known = [(row["evidence"], effect) for row in rows if (effect := effect_of(row, PRIMARY)) is not None]
    for name in summary.shown(group):
        figures[f"{name} against what resampling does: {group}"] = reliability(
            [evidence[name] for evidence, _ in known], [effect for _, effect in known], across=name, up=PRIMARY
        )
    if areas:
        figures[f"AUC: {group}"] = forest(
            [(name, areas[name]) for name in _worth(_ranked(areas), summary, group)],
            axis="area under the ROC curve",
            reference=0.5,
        )
    sizes = (0, *SWEPT)
    figures[f"Rank correlation of hardened phi on X->Y with {PRIMARY}, by K and r: {group}"] = grid(
        [[found[definition("phi", DEFAULT_LINK, count, rank)].value for rank in sizes] for count in sizes],
        [f"K={count}" for count in sizes],
        [f"r={rank}" for rank in sizes],
        label="Spearman",
    )
    return figures


def _control_figures(name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Draw what happens when a judge's parameters are redrawn, and the angles between nuisance and signal."""
    redrawn: dict[str, list[tuple[float, Estimate]]] = {}
    angles: dict[str, list[tuple[float, Estimate]]] = {}
    for record in (record for record in records if record["population"] == name):
        if record["what"] == "randomised":
            redrawn.setdefault(record["figure"], []).append((record["depth"], _estimate(record)))
        elif record["what"] == "angle" and record["permutation"] == "uniform":
            angles.setdefault(record["link"], []).append((record["rank"], _estimate(record)))
        elif record["what"] == "random angle":
            angle = Estimate(record["value"], record["value"], record["value"], 0)
            angles.setdefault("random subspaces", []).append((record["rank"], angle))
    if not redrawn:
        return {}
    return {
        f"Parameters redrawn from the top layer down, the embeddings last: {name}": curves(
            redrawn, across="steps", up="rank correlation with the original"
        ),
        f"Angle of the nuisance subspace to the Jacobian's own, by rank: {name}": curves(
            angles, across="rank r", up="mean principal angle, degrees", logarithmic=True
        ),
    }


def _heat_map(row: Mapping[str, Any]) -> HeatMap:
    links, targets = {}, {}
    for name, norms in row["saliency"].items():
        source, target = name.split("@")[0].split("->")
        links[name] = dict(zip(row["positions"][source], norms, strict=True))
        targets[name] = tuple(row["positions"][target])
    facts = {name: f"{row['evidence'][name]:.4f}" for name in (PAPER_DEFINITION, ANALYSIS_DEFINITION)}
    effect = effect_of(row, PRIMARY)
    if effect is not None:
        facts[PRIMARY] = f"{effect:.4f}"
    return HeatMap(f"row {row['row']}", tuple(row["tokens"]), row["prompt_tokens"], links, targets, facts)


def _correlations(summary: CausalSummary, place: str) -> dict[str, Estimate]:
    """Return each definition's correlation with the primary effect for a judge or a group."""
    return {name: one for (at, name, effect), one in summary.correlations.items() if (at, effect) == (place, PRIMARY)}


def _areas(summary: CausalSummary, group: str) -> dict[str, Estimate]:
    return {name: one for (pair, name), one in summary.aucs.items() if pair == group}


def _ranked(found: Mapping[str, Estimate]) -> list[str]:
    return sorted(found, key=lambda name: -found[name].value if math.isfinite(found[name].value) else math.inf)


def _worth(ranked: Sequence[str], summary: CausalSummary, group: str) -> list[str]:
    """Return the best definitions, those that every table shows, and the baselines, in order."""
    plain = [name for name in ranked if name not in SWEPT_ALONE]
    kept = {*plain[:_SHOWN], *summary.shown(group), *BASELINES}
    return [name for name in ranked if name in kept]


def _estimate(record: Mapping[str, Any]) -> Estimate:
    return Estimate(record["value"], record["low"], record["high"], record["count"])
