"""The plots of an ablation: S against K, S against rank, reward against p, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cepo.benchmarks.ablation.group import REFERENCE
from cepo.benchmarks.ablation.summary import rank_label

_PANEL = (4.6, 3.4)  # inches
_ACROSS = 3  # panels in a row
_SPREAD = 0.25  # of the distance between two places on the axis
_DOTS_PER_INCH = 130


def draw_figures(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write `s_against_k.png`, `s_against_rank.png` and `reward_against_p.png`.

    One panel per score. S: one curve per link; where K varies the rank is the reference's, and the other way round.
    Rewards: one curve per set of links, at the reference hardening. Axes are in steps, not to scale: energies stand
    beside ranks, and p may be infinite.

    Args:
        folder: where they go.
        rows: from `cepo.benchmarks.ablation.summary.summarise`.
    """
    links = [row for row in rows if row["kind"] == "link"]
    at_rank = [row for row in links if (row["rank"], row["tau"]) == (REFERENCE.rank, REFERENCE.tau)]
    at_k = [row for row in links if row["counterfactuals"] == REFERENCE.counterfactuals]
    rewards = [row for row in rows if row["kind"] == "reward"]
    return [
        _draw(
            folder / "s_against_k.png",
            [(row, row["link"], str(row["counterfactuals"])) for row in at_rank],
            "S",
            f"counterfactuals K, at rank {REFERENCE.rank_label}",
        ),
        _draw(
            folder / "s_against_rank.png",
            [(row, row["link"], rank_label(row)) for row in at_k],
            "S",
            f"nuisance rank, at K = {REFERENCE.counterfactuals}",
        ),
        _draw(
            folder / "reward_against_p.png",
            [(row, row["links"], f"{row['p']:g}") for row in rewards],
            "reward",
            f"exponent p, at K = {REFERENCE.counterfactuals}, rank {REFERENCE.rank_label}",
        ),
    ]


def _draw(path: Path, points: Sequence[tuple[Mapping[str, Any], str, str]], value: str, axis: str) -> Path:
    """Write one figure of points (row, curve, place on the axis); rows come in the order of the axis."""
    scores = _distinct(row["score"] for row, _, _ in points)
    names = _distinct(curve for _, curve, _ in points)
    across = min(_ACROSS, len(scores))
    down = -(-len(scores) // across)
    figure = Figure(figsize=(_PANEL[0] * across, _PANEL[1] * down), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(down, across, 1 + number) for number in range(len(scores))]
    for panel, score in zip(panels, scores, strict=True):
        here = [point for point in points if point[0]["score"] == score]
        places = _distinct(place for _, _, place in here)
        curves = _distinct(curve for _, curve, _ in here)
        for number, curve in enumerate(curves):
            rows = {place: row for row, other, place in here if other == curve}
            aside = _SPREAD * (number / max(1, len(curves) - 1) - 0.5)  # so that intervals do not hide each other
            means = [row[value] for row in rows.values()]
            errors = [
                [
                    0.0 if row[f"{value}{side}"] is None else abs(row[value] - row[f"{value}{side}"])
                    for row in rows.values()
                ]
                for side in ("_low", "_high")
            ]
            panel.errorbar(
                [places.index(place) + aside for place in rows],
                means,
                yerr=errors,
                marker="o",
                markersize=4,
                capsize=3,
                color=f"C{names.index(curve)}",
                label=curve,
            )
        panel.set_xticks(range(len(places)), places)
        panel.set_title(f"score {score}", fontsize=10)
        panel.set_xlabel(axis)
        panel.set_ylabel(f"mean {value}")
        panel.set_ylim(bottom=0.0)  # each its own top: influences are small, shapes are not
        panel.grid(alpha=0.3)
    figure.suptitle("95% bootstrap intervals over prompts", fontsize=9)
    panels[0].legend(fontsize=8)
    unfinished = path.with_name(path.name + ".tmp")
    figure.savefig(unfinished, dpi=_DOTS_PER_INCH, format="png", metadata={"Software": None})
    unfinished.replace(path)
    return path


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
