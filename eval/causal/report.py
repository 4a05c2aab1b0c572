"""The tables, figures and page of `cepo eval causal`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from cepo.eval.causal.evidence import BASELINES, DEFAULT, DEFAULT_LINK, PAPER, REWARD, SWEPT, definition
from cepo.eval.causal.summary import PRIMARY, SWEPT_ALONE, CausalSummary, Population, effect_of
from cepo.eval.report.figures import curves, forest, grid, reliability
from cepo.eval.report.heat_maps import HeatMap
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import console_table
from cepo.eval.statistics import Estimate

_SHOWN = 14  # definitions in a table for the console, beside the ones always shown
# Caption, kind of record, the keys that name a row, and the key that names a column.
_PIVOTS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("Judgements", "count", ("population",), "figure"),
    ("Certificates: what forced criteria do to each judge's verdict", "certificate", ("population",), "figure"),
    ("What the interventions do to the scores", "effect", ("population", "intervention"), "measure"),
    ("Criteria masked out: the largest of all rollouts", "masked", ("population",), "figure"),
    ("Permuted labels: rank correlation with the effects of other items", "permuted", ("population",), "definition"),
    ("Parameters redrawn: rank correlation with the original", "randomised", ("population", "figure"), "redrawn"),
    (
        "Criteria tokens removed, or alone: loss of the scores' log-likelihood, nats",
        "removal",
        ("population", "figure", "ranking"),
        "share",
    ),
    (
        "Nuisance subspace and the Jacobian's own: mean principal angle, degrees, by rank",
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
        summary: of `summarise`.
        every: whether to list all definitions, or the best, the defaults and the baselines alone.
    """
    found: dict[str, tuple[list[str], list[list[str]]]] = {}
    for group, members in summary.groups.items():
        places = (
            {group: "pooled", **{name: f"within {name}" for name in members}} if len(members) > 1 else {group: group}
        )
        of_group = {place: _correlations(summary, place) for place in places if _correlations(summary, place)}
        if group in of_group:
            ranked = _ranked(of_group[group])
            header = ["definition", *(places[place] for place in of_group)]
            rows = [
                [name, *(str(known[name]) for known in of_group.values())]
                for name in (ranked if every else _worth(ranked, summary, group))
            ]
            found[f"Rank correlation with what resampled criteria do ({PRIMARY}): {group}"] = (header, rows)
        areas = {name: one for (pair, name), one in summary.aucs.items() if pair == group}
        if areas:
            ranked = _ranked(areas) if every else _worth(_ranked(areas), summary, group)
            caption = f"Area under the ROC curve, telling the two judges apart: {group}"
            found[caption] = (["definition", "AUC"], [[name, str(areas[name])] for name in ranked])
    for caption, what, keys, across in _PIVOTS:
        records = [record for record in summary.records if record["what"] == what]
        columns = list(dict.fromkeys(str(record[across]) for record in records))
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        for record in records:
            cells.setdefault(tuple(str(record[key]) for key in keys), {})[str(record[across])] = _shown(record)
        if records:
            rows = [[*names, *(of_row.get(column, "") for column in columns)] for names, of_row in cells.items()]
            found[caption] = ([*keys, *columns], rows)
    return found


def write_causal_report(
    path: Path, populations: Sequence[Population], summary: CausalSummary, facts: Mapping[str, str]
) -> None:
    """Write the page: forests, reliability, randomisation and angle figures, every table, and heat maps.

    Args:
        path: where it goes.
        populations: the judges.
        summary: of `summarise`.
        facts: what was run, by label.
    """
    figures: dict[str, Figure] = {}
    by_name = {population.name: population for population in populations}
    for group, members in summary.groups.items():
        pooled = [row for name in members for row in by_name[name].sound]
        found = _correlations(summary, group)
        if not found:
            continue
        chosen = _worth(_ranked(found), summary, group)
        figures[f"Rank correlation with {PRIMARY}: {group}"] = forest(
            [(name, found[name]) for name in chosen], axis="Spearman's rank correlation", reference=0.0
        )
        for name in dict.fromkeys((PAPER, DEFAULT, REWARD, summary.best.get(group, PAPER))):
            kept = [
                (row["evidence"][name], effect) for row in pooled if (effect := effect_of(row, PRIMARY)) is not None
            ]
            figures[f"{name} against what resampling does: {group}"] = reliability(
                [value for value, _ in kept], [effect for _, effect in kept], across=name, up=PRIMARY
            )
        areas = {name: one for (pair, name), one in summary.aucs.items() if pair == group}
        if areas:
            chosen = _worth(_ranked(areas), summary, group)
            figures[f"AUC: {group}"] = forest(
                [(name, areas[name]) for name in chosen], axis="area under the ROC curve", reference=0.5
            )
        figures[f"Rank correlation of hardened phi on X->Y with {PRIMARY}, by K and r: {group}"] = grid(
            [
                [found[definition("phi", DEFAULT_LINK, count, rank)].value for rank in (0, *SWEPT)]
                for count in (0, *SWEPT)
            ],
            [f"K={count}" for count in (0, *SWEPT)],
            [f"r={rank}" for rank in (0, *SWEPT)],
            label="Spearman",
        )
    figures |= _control_figures(populations, summary)
    notes = [
        "An effect is what an intervention on the criteria does to the scores: tv is the total variation distance of "
        "the digits' distributions (mean of the two scores), margin the absolute change of the expected margin, flip "
        "whether the winner changed. direct keeps the analysis as it was sampled; total lets the judge write analysis "
        "and scores anew, greedily, and reads the digits there.",
        f"Definitions are compared by {PRIMARY}. Intervals are 95% bootstrap intervals over prompts. Choose on one "
        "seed and confirm on another: the best of many is flattered on the data that chose it.",
        *summary.warnings,
        *(f"No AUC for {name}: {reason}." for name, reason in summary.refused.items()),
    ]
    facts = {**facts, **{f"best by {PRIMARY}, {group}": name for group, name in summary.best.items()}}
    heat_maps = {population.name: [_heat_map(row) for row in population.sound[:4]] for population in populations}
    write_report(
        path,
        title="cepo eval causal",
        summary=facts,
        figures=figures,
        tables=text_tables(summary, every=True),
        heat_maps=heat_maps,
        notes=notes,
    )


def _control_figures(populations: Sequence[Population], summary: CausalSummary) -> dict[str, Figure]:
    """Draw what happens when parameters are redrawn, and the angles between nuisance and signal."""
    figures: dict[str, Figure] = {}
    for population in populations:
        own = [record for record in summary.records if record["population"] == population.name]
        redrawn = [record for record in own if record["what"] == "randomised"]
        if not redrawn:
            continue
        lines = {
            figure: [(record["depth"], _estimate(record)) for record in redrawn if record["figure"] == figure]
            for figure in dict.fromkeys(record["figure"] for record in redrawn)
        }
        figures[f"Parameters redrawn from the top layer down, the embeddings last: {population.name}"] = curves(
            lines, across="steps", up="rank correlation with the original"
        )
        angles = [record for record in own if record["what"] == "angle" and record["permutation"] == "uniform"]
        by_rank = {
            link: [(record["rank"], _estimate(record)) for record in angles if record["link"] == link]
            for link in dict.fromkeys(record["link"] for record in angles)
        }
        random = [
            (record["rank"], Estimate(record["value"], record["value"], record["value"], 0))
            for record in own
            if record["what"] == "random angle"
        ]
        figures[f"Angle of the nuisance subspace to the Jacobian's own, by rank: {population.name}"] = curves(
            {**by_rank, "random subspaces": random},
            across="rank r",
            up="mean principal angle, degrees",
            logarithmic=True,
        )
    cells = [record for record in summary.records if record["what"] == "angle" and record["rank"] == 2]
    if cells:
        rows = list(dict.fromkeys((record["population"], record["permutation"]) for record in cells))
        columns = list(dict.fromkeys(record["link"] for record in cells))
        values = {(record["population"], record["permutation"], record["link"]): record["value"] for record in cells}
        figures["Angle of the nuisance subspace to the Jacobian's own, r = 2, degrees (90: orthogonal)"] = grid(
            [[values.get((*row, column), math.nan) for column in columns] for row in rows],
            [", ".join(row) for row in rows],
            columns,
            label="degrees",
        )
    return figures


def _heat_map(row: Mapping[str, Any]) -> HeatMap:
    links = {}
    for name, norms in row["saliency"].items():
        links[name] = dict(zip(row["positions"][name.split("->")[0]], norms, strict=True))
    facts = {PAPER: f"{row['evidence'][PAPER]:.4f}", DEFAULT: f"{row['evidence'][DEFAULT]:.4f}"}
    effect = effect_of(row, PRIMARY)
    if effect is not None:
        facts[PRIMARY] = f"{effect:.4f}"
    targets = {name: tuple(row["positions"][name.split("->")[1].split("@")[0]]) for name in links}
    return HeatMap(f"row {row['row']}", tuple(row["tokens"]), row["prompt_tokens"], links, targets, facts)


def _correlations(summary: CausalSummary, place: str) -> dict[str, Estimate]:
    """Return each definition's correlation with the primary effect in a population or group."""
    return {name: one for (at, name, effect), one in summary.correlations.items() if at == place and effect == PRIMARY}


def _ranked(found: Mapping[str, Estimate]) -> list[str]:
    return sorted(found, key=lambda name: -found[name].value if math.isfinite(found[name].value) else math.inf)


def _worth(ranked: Sequence[str], summary: CausalSummary, group: str) -> list[str]:
    """Return the best definitions, the defaults and the baselines, in order."""
    plain = [name for name in ranked if name not in SWEPT_ALONE]
    kept = {*plain[:_SHOWN], PAPER, DEFAULT, REWARD, summary.best.get(group, ""), *BASELINES}
    return [name for name in ranked if name in kept]


def _estimate(record: Mapping[str, Any]) -> Estimate:
    value, low, high = (_number(record[key]) for key in ("value", "low", "high"))
    return Estimate(value, low, high, record["count"])


def _shown(record: Mapping[str, Any]) -> str:
    if "low" in record:
        return str(_estimate(record))
    value = record["value"]
    return f"{value:.3g}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value
