"""The tables, figures and page of `cepo eval causal`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cepo.eval.causal.controls import PAIR
from cepo.eval.causal.measures import ESTIMATES, LINKS, NODES, PLACES
from cepo.eval.causal.summary import EXACT, CausalSummary, JudgeResults
from cepo.eval.report.figures import curves, forest
from cepo.eval.report.heat_maps import Attribution, HeatMap
from cepo.eval.report.numbers import digits
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import ConsoleTable, PageTable
from cepo.eval.statistics import Estimate

_MAPS = 8  # number of heat maps
_AGREEMENTS = {
    "auc": "AUC within a prompt: how often the completion whose verdict came from evidence scores higher",
    "rank correlation": "Rank correlation with the exact effect",
    "auc, modes shuffled within prompts": "Control, modes shuffled within prompts: AUC, 95% of shuffles",
    "pair": f"Control, certified: AUC of {PAIR[0]}, which follows its criteria, against {PAIR[1]}, which ignores them",
}
# Caption, kind of record, the keys whose values name a row, and the key whose value names a column.
_PIVOTS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("Judgements", "count", ("population",), "figure"),
    ("Certificates: what forced criteria do to a judge's verdict", "certificate", ("population",), "figure"),
    ("Control, criteria hidden by the mask: the largest value, expected 0", "masked", ("population",), "figure"),
    (
        "Control, weights randomised from the top: rank correlation with the original over judgements",
        "randomised",
        ("population", "figure"),
        "redrawn",
    ),
    ("Control, Captum: largest relative difference of J_XY", "captum", ("population",), "figure"),
)


def console_tables(summary: CausalSummary) -> list[ConsoleTable]:
    """Return the tables for the console."""
    return [ConsoleTable(header, rows, name) for name, (header, rows) in text_tables(summary).items()]


def text_tables(summary: CausalSummary) -> dict[str, PageTable]:
    """Return header and rows of each table by its caption, the main results first."""
    population = summary.records[0]["population"]
    found: dict[str, PageTable] = {}
    for place in ("chain", *LINKS):
        rows = _approximations(summary, population, place)
        if rows:
            header = ["estimate of the effect", "AUC within a prompt", "rank correlation", "mean error, nats", "cost"]
            known = [column for column in range(len(header)) if any(row[column] for row in rows)]
            found[f"What each approximation is worth: {place}"] = (
                [header[column] for column in known],
                [[row[column] for column in known] for row in rows],
            )
    for what, caption in _AGREEMENTS.items():
        of_kind = summary.found(what, " against ".join(PAIR) if what == "pair" else population)
        places = [place for place in PLACES if any(at == place for _, at in of_kind)]
        if places:
            names = list(dict.fromkeys(name for name, _ in of_kind))
            names.sort(key=lambda name: -max(_rank(of_kind.get((name, place))) for place in places))
            rows = [[name, *(str(of_kind.get((name, place), "")) for place in places)] for name in names]
            found[caption] = (["score", *places], rows)
    means = summary.found("mean", population)
    if means:
        header = ["donors", *(place for _, place in means)]
        found["Mean exact effect, nats"] = (header, [["fresh", *map(str, means.values())]])
    for caption, what, keys, across in _PIVOTS:
        records = [record for record in summary.records if record["what"] == what]
        headers = list(dict.fromkeys(str(record[across]) for record in records))
        cells: dict[tuple[str, ...], dict[str, str]] = {}
        for record in records:
            labels = tuple(str(record[key]) for key in keys)
            shown = f"{record['value']:g}" if what == "count" else digits(record["value"])
            cells.setdefault(labels, {})[str(record[across])] = shown
        if records:
            rows = [[*labels, *(of_row.get(header, "") for header in headers)] for labels, of_row in cells.items()]
            found[caption] = ([*keys, *headers], rows)
    return found


def write_causal_report(
    path: Path, results: Sequence[JudgeResults], summary: CausalSummary, facts: Mapping[str, str]
) -> None:
    """Write the page: figures, tables, heat maps and notes.

    Args:
        path: the file to write.
        results: the results of each judge.
        summary: from `summarise_causal`.
        facts: what was run, by label.
    """
    main = results[0]
    notes = [
        "The ground truth of a completion is what its own text does: the exact effect of a span is how much less "
        "likely what followed becomes with another prompt's content in the span's place, in nats, for donors that "
        "the scores did not see (where the judgements hold enough different ones). On the testbed the mode of a "
        "completion is known too: whether its verdict came from evidence that its criteria asked for, or from "
        "length.",
        "GRPO compares completions of one prompt, so all agreement is measured within prompts. AUC is the probability "
        "that the completion with the evidence scores higher than one of the same prompt without. Intervals are 95% "
        "intervals over prompts.",
        "Estimates are compared with the effect of the donors that they saw: that difference is their error. Cost "
        "is in token rows through the layers, forward and backward, relative to those of the effect itself, for the "
        "chain.",
        *summary.warnings,
        *(f"No figure for {name}: {reason}." for name, reason in summary.refused.items()),
    ]
    write_report(
        path,
        title="cepo eval causal",
        summary=facts,
        figures=_figures(main, summary) if main.sound else {},
        tables=text_tables(summary),
        heat_maps={main.name: [_heat_map(row) for row in main.sound[:_MAPS]]},
        notes=notes,
    )


def _approximations(summary: CausalSummary, population: str, place: str) -> list[list[str]]:
    """Return a row for each approximation, and one for the exact effect, which has other donors."""
    errors, costs = (summary.found(what, population) for what in ("error", "cost"))
    areas, correlations = (summary.found(what, population) for what in ("auc", "rank correlation"))
    rows = []
    for name in (*ESTIMATES, EXACT):
        cost = costs.get((name, place))
        cells = [str(areas.get((name, place), "")), str(correlations.get((name, place), ""))]
        cells += [str(errors.get((name, place), "")), "" if cost is None else digits(cost.value)]
        if any(cells[:3]):
            rows.append([name, *cells])
    return rows


def _figures(main: JudgeResults, summary: CausalSummary) -> dict[str, Figure]:
    """Draw the agreement of each score of the chain, and the error of the path by its number of nodes."""
    figures: dict[str, Figure] = {}
    for what, axis, reference in (
        ("auc", "AUC within a prompt", 0.5),
        ("rank correlation", "rank correlation with the exact effect", 0.0),
    ):
        found = summary.found(what, main.name)
        rows = [(f"{name}, {place}", one) for (name, place), one in found.items() if place in ("chain", LINKS[-1])]
        if rows:
            rows.sort(key=lambda row: -_rank(row[1]))
            figures[f"{axis}: {main.name}"] = forest(rows, axis=axis, reference=reference)
    errors = summary.found("error", main.name)
    counts = [count for count in NODES if (f"path {count}", "chain") in errors]
    lines = {place: [(float(count), errors[f"path {count}", place]) for count in counts] for place in ("chain", *LINKS)}
    figures[f"Error of the path by its nodes: {main.name}"] = curves(
        lines, across="nodes along the path", up="mean error, nats", logarithmic=True
    )
    return figures


def _heat_map(row: Mapping[str, Any]) -> HeatMap:
    attributions = {
        name: Attribution(
            nats=dict(zip(row["positions"][name.split("->")[0]], nats, strict=True)),
            delta=row["nats"]["effect"][name],
            path_sum=sum(nats),
        )
        for name, nats in row["attributions"].items()
    }
    targets = {name: tuple(row["positions"][name.split("->")[1]]) for name in attributions}
    facts = {
        f"effect, {name}": f"{digits(row['exact'][name], sign='+')} nats"
        for name in LINKS
        if row["exact"][name] is not None
    }
    if row["mode"] is not None:
        facts = {"mode": row["mode"], **facts}
    return HeatMap(
        f"row {row['row']}",
        tuple(row["tokens"]),
        row["prompt_tokens"],
        attributions=attributions,
        targets=targets,
        facts=facts,
    )


def _rank(found: Estimate | None) -> float:
    return found.value if found is not None and math.isfinite(found.value) else -math.inf
