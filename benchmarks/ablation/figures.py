"""The plots of an ablation: S against K, S against rank, reward against p, with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cepo.benchmarks.ablation.sweep import Hardening, rank_label
from cepo.eval.report.figures import write_png

_PANEL = (4.6, 3.4)  # inches
_ACROSS = 3  # panels in a row, where each score has one
_SPREAD = 0.25  # offset between curves, as a fraction of the distance between two ticks
Point = tuple[Mapping[str, Any], str, str]
"""A row, the name of its curve, and its label on the axis."""


def draw_figures(folder: Path, rows: Sequence[Mapping[str, Any]], asked: Sequence[Hardening]) -> None:
    """Write `s_against_k.png`, `s_against_rank.png` and `reward_against_p.png`.

    S has one curve per link: against K in a panel per score and rank, against rank in a panel per score and K. S at
    K = 0, where nothing is removed and there is no rank, is a dashed line in every panel. Rewards have one curve per
    set of links, at the paper's hardening. Axes are categorical, since energies appear among ranks, and p may be
    infinite.

    Args:
        folder: folder of the pictures.
        rows: from `summarise_sweep`.
        asked: the hardenings whose S is drawn.
    """
    links = [row for row in rows if row["kind"] == "link" and _hardening(row) in asked]
    hardened = [row for row in links if row["counterfactuals"]]
    bare = [row for row in links if not row["counterfactuals"]]
    by_k = [(row, row["link"], str(row["counterfactuals"])) for row in hardened]
    by_rank = [(row, row["link"], rank_label(row)) for row in hardened]
    rewards = [(row, row["links"], f"{row['p']:g}") for row in rows if row["kind"] == "reward"]
    for name, figure in {
        "s_against_k": _panels(by_k, "S", "counterfactuals K", _size, bare),
        "s_against_rank": _panels(by_rank, "S", "nuisance rank", _at_k, bare),
        "reward_against_p": _panels(rewards, "reward", "exponent p", lambda row: f"{_at_k(row)}, {_size(row)}"),
    }.items():
        write_png(folder / f"{name}.png", figure)


def draw_curves(panel: Axes, points: Sequence[Point], value: str) -> None:
    """Draw one curve with intervals per name.

    Args:
        panel: axes to draw on.
        points: in the order of the axis; rows have the column `value`, and may have its bounds with _low and _high.
        value: name of the column.
    """
    places = list(dict.fromkeys(place for _, _, place in points))
    curves = list(dict.fromkeys(curve for _, curve, _ in points))
    for number, curve in enumerate(curves):
        rows = {place: row for row, other, place in points if other == curve}
        aside = _SPREAD * (number / max(1, len(curves) - 1) - 0.5)  # so that intervals do not overlap
        errors = [
            [
                0.0 if row.get(f"{value}_{end}") is None else abs(row[value] - row[f"{value}_{end}"])
                for row in rows.values()
            ]
            for end in ("low", "high")
        ]
        panel.errorbar(
            [places.index(place) + aside for place in rows],
            [row[value] for row in rows.values()],
            yerr=errors,
            marker="o",
            markersize=4,
            capsize=3,
            label=curve,
        )
    panel.set_xticks(range(len(places)), places)
    panel.grid(alpha=0.3)


def _panels(
    points: Sequence[Point],
    value: str,
    axis: str,
    held: Callable[[Mapping[str, Any]], str],
    bare: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """Draw a row of panels per score, with a panel per setting that is held.

    Args:
        points: see `draw_curves`.
        value: name of the column.
        axis: label of the horizontal axis.
        held: row -> the setting that all points of a panel share.
        bare: rows to draw as dashed lines in each panel of their score.
    """
    scores = list(dict.fromkeys(row["score"] for row in [*(row for row, _, _ in points), *bare]))
    settings = list(dict.fromkeys(held(row) for row, _, _ in points)) or ["K = 0"]
    shape = (len(scores), len(settings)) if len(settings) > 1 else (-(-len(scores) // _ACROSS), _ACROSS)
    down, across = shape[0], min(shape[1], len(scores) * len(settings))
    figure = Figure(figsize=(_PANEL[0] * across, _PANEL[1] * down), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (score, setting) in enumerate(itertools.product(scores, settings), start=1):
        panel = figure.add_subplot(down, across, number)
        draw_curves(
            panel, [point for point in points if (point[0]["score"], held(point[0])) == (score, setting)], value
        )
        for place, row in enumerate(row for row in bare if row["score"] == score):
            panel.axhline(row[value], color=f"C{place % 10}", linestyle="--", label=f"{row['link']}, K = 0")
        panel.set_title(f"score {score}, {setting}", fontsize=10)
        panel.set_xlabel(axis)
        panel.set_ylabel(f"mean {value}")
        panel.set_ylim(bottom=0.0)  # no common top: influence is much smaller than the other scores
    figure.suptitle("95% intervals over prompts", fontsize=9)
    figure.axes[0].legend(fontsize=8)
    return figure


def _hardening(row: Mapping[str, Any]) -> Hardening:
    return Hardening(row["counterfactuals"], row["rank"], row["tau"])


def _at_k(row: Mapping[str, Any]) -> str:
    return f"K = {row['counterfactuals']}"


def _size(row: Mapping[str, Any]) -> str:
    return rank_label(row) if row["rank"] is None else f"rank {row['rank']}"
