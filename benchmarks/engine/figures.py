"""Plots of how cost grows along each axis, as measured and as the operations predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from cepo.eval.report.figures import write_png

_AXES = {
    "G": "rollouts of the prompt (G)",
    "Lz": "tokens of the prompt (Lz)",
    "Lx": "tokens of the rationale (Lx)",
    "K": "counterfactuals (K)",
}


def draw_scaling(rows: Sequence[Mapping[str, Any]], axis: str, title: str, path: Path) -> None:
    """Plot the seconds of each case along an axis, on logarithmic scales.

    A dashed line shows the time that the operations would take at the rate of the case's first point; where the solid
    line departs from it, something other than matrix products takes the time.

    Args:
        rows: one per case and point; those without a time are left out.
        axis: "G", "Lz", "Lx" or "K".
        title: model and device.
        path: path of the PNG.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    values = sorted({row["shapes"][axis] for row in rows})
    for index, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
        points = [row for row in rows if row["case"] == case and row["seconds"] is not None]
        points.sort(key=lambda row: row["shapes"][axis])
        if not points:
            continue
        at = [row["shapes"][axis] for row in points]
        colour = f"C{index}"
        plot.plot(at, [row["seconds"] for row in points], marker="o", color=colour, label=case)
        rate = points[0]["seconds"] / points[0]["flops"]
        plot.plot(at, [rate * row["flops"] for row in points], linestyle="--", linewidth=1, color=colour)
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.xaxis.set_major_locator(FixedLocator(values))
    plot.xaxis.set_major_formatter(ScalarFormatter())
    plot.xaxis.set_minor_locator(NullLocator())
    plot.set_xlabel(_AXES[axis])
    plot.set_ylabel("seconds (dashed: as the operations predict)")
    plot.grid(visible=True, which="both", linewidth=0.3)
    others = {name: value for name, value in rows[0]["shapes"].items() if name in (*_AXES, "Ly") and name != axis}
    plot.set_title(f"{title}\n" + ", ".join(f"{name} {value}" for name, value in others.items()), fontsize=9)
    if plot.lines:
        plot.legend(fontsize=8)
    write_png(path, figure)
