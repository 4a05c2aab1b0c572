"""The plots of an ablation: S against K, S against rank, reward against p, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cepo.benchmarks.ablation.sweep import PAPER_HARDENING, rank_label
from cepo.eval.report.figures import write_png

_PANEL = (4.6, 3.4)  # inches
_ACROSS = 3  # panels in a row
_SPREAD = 0.25  # offset between curves, as a fraction of the distance between two ticks
_K, _RANK = PAPER_HARDENING.counterfactuals, PAPER_HARDENING.rank
Point = tuple[Mapping[str, Any], str, str]
"""A row, the name of its curve, and its label on the axis."""


def draw_figures(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `s_against_k.png`, `s_against_rank.png` and `reward_against_p.png`.

    One panel per score. S has one curve per link, with the paper's rank where K varies and the paper's K where the rank
    varies. Rewards have one curve per set of links, at the paper's hardening. Axes are categorical, since energies
    appear among ranks, and p may be infinite.

    Args:
        folder: folder of the pictures.
        rows: from `summarise_sweep`.
    """
    links = [row for row in rows if row["kind"] == "link"]
    at_rank = [row for row in links if not row["counterfactuals"] or (row["rank"], row["tau"]) == (_RANK, None)]
    at_k = [row for row in links if row["counterfactuals"] == _K]
    rewards = [row for row in rows if row["kind"] == "reward"]
    for name, points, value, axis in (
        (
            "s_against_k",
            [(row, row["link"], str(row["counterfactuals"])) for row in at_rank],
            "S",
            f"counterfactuals K, at rank {_RANK}",
        ),
        ("s_against_rank", [(row, row["link"], rank_label(row)) for row in at_k], "S", f"nuisance rank, at K = {_K}"),
        (
            "reward_against_p",
            [(row, row["links"], f"{row['p']:g}") for row in rewards],
            "reward",
            f"exponent p, at K = {_K}, rank {_RANK}",
        ),
    ):
        write_png(folder / f"{name}.png", _panels(points, value, axis))


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


def _panels(points: Sequence[Point], value: str, axis: str) -> Figure:
    scores = list(dict.fromkeys(row["score"] for row, _, _ in points))
    across = min(_ACROSS, len(scores))
    down = -(-len(scores) // across)
    figure = Figure(figsize=(_PANEL[0] * across, _PANEL[1] * down), layout="constrained")
    FigureCanvasAgg(figure)
    for number, score in enumerate(scores, start=1):
        panel = figure.add_subplot(down, across, number)
        draw_curves(panel, [point for point in points if point[0]["score"] == score], value)
        panel.set_title(f"score {score}", fontsize=10)
        panel.set_xlabel(axis)
        panel.set_ylabel(f"mean {value}")
        panel.set_ylim(bottom=0.0)  # no common top: influence is much smaller than the other scores
    figure.suptitle("95% intervals over prompts", fontsize=9)
    figure.axes[0].legend(fontsize=8)
    return figure
