"""The figures of the pages: forest plots, curves, histories, histograms, reliability, heat maps of numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cepo.eval.report.numbers import digits
from cepo.eval.statistics import Estimate, proportion
from cepo.files import replacing

_WIDTH = 7.2  # inches
_DOTS_PER_INCH = 120  # for PNG files
_ROW = 0.27  # inches of height per row of a forest or heat map
_BINS = 8
_PLAIN = {"text.parse_math": False}  # names come from data, where a dollar sign does not start a formula


@rc_context(_PLAIN)
def forest(rows: Sequence[tuple[str, Estimate]], *, axis: str, reference: float | None = None) -> Figure:
    """Draw one estimate per row, from top to bottom, with its interval.

    Args:
        rows: label and estimate.
        axis: label of the horizontal axis.
        reference: where to draw a vertical line, such as 0 for a correlation or 0.5 for an accuracy.
    """
    figure, axes = _figure(1.1 + _ROW * max(1, len(rows)))
    places = np.arange(len(rows))[::-1]
    for place, (_, found) in zip(places, rows, strict=True):
        axes.plot([found.low, found.high], [place, place], color="C0", linewidth=2.0)
        axes.plot([found.value], [place], "o", color="C0", markersize=5)
    if reference is not None:
        axes.axvline(reference, color="0.5", linewidth=1.0, linestyle="--")
    axes.set_yticks(places, [label for label, _ in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    _label(axes, across=axis)
    axes.grid(visible=False, axis="y")
    return figure


@rc_context(_PLAIN)
def curves(
    lines: Mapping[str, Sequence[tuple[float, Estimate]]], *, across: str, up: str, logarithmic: bool = False
) -> Figure:
    """Draw estimates against a number, one curve per name, with shaded intervals.

    Args:
        lines: (x, estimate) pairs of each curve, x ascending.
        across: label of the horizontal axis.
        up: label of the vertical axis.
        logarithmic: whether the horizontal axis is in powers of two.
    """
    figure, axes = _figure(3.6)
    for number, (name, points) in enumerate(lines.items()):
        places = [place for place, _ in points]
        axes.plot(places, [found.value for _, found in points], "o-", markersize=4, color=f"C{number % 10}", label=name)
        lows, highs = [found.low for _, found in points], [found.high for _, found in points]
        axes.fill_between(places, lows, highs, color=f"C{number % 10}", alpha=0.15, linewidth=0)
    if logarithmic:
        axes.set_xscale("log", base=2)
    _label(axes, across, up, legend=bool(lines))
    return figure


@rc_context(_PLAIN)
def history(lines: Mapping[str, Sequence[tuple[float, float]]], *, across: str = "step") -> Figure:
    """Draw logged values: each value faintly, and their centred mean over a tenth of the values; NaN is a gap.

    Args:
        lines: (step, value) pairs of each curve, steps ascending.
        across: label of the horizontal axis.
    """
    figure, axes = _figure(3.0)
    for number, (name, points) in enumerate(lines.items()):
        steps_N, values_N = np.asarray(points, dtype=float).reshape(-1, 2).T
        axes.plot(steps_N, values_N, ".-", color=f"C{number % 10}", alpha=0.3, linewidth=1.0, markersize=3)
        axes.plot(steps_N, _smooth(values_N), color=f"C{number % 10}", linewidth=2.0, label=name)
    _label(axes, across, legend=bool(lines))
    return figure


@rc_context(_PLAIN)
def reliability(scores: Sequence[float], effects: Sequence[float], *, across: str, up: str) -> Figure:
    """Draw effects against scores: each observation faintly, and the mean effect in each eighth of the scores.

    Args:
        scores: N numbers.
        effects: N numbers in [0, 1].
        across: label of the scores' axis.
        up: label of the effects' axis.
    """
    figure, axes = _figure(3.8)
    scores_N, effects_N = np.asarray(scores, dtype=float), np.asarray(effects, dtype=float)
    axes.plot(scores_N, effects_N, ".", color="0.6", alpha=0.5, markersize=4)
    parts = [part for part in np.array_split(np.argsort(scores_N, kind="stable"), _BINS) if len(part)]
    places = [float(scores_N[part].mean()) for part in parts]
    found = [proportion(effects_N[part]) for part in parts]
    bars = np.abs([[part.value - part.low, part.high - part.value] for part in found]).T.reshape(2, len(parts))
    axes.errorbar(places, [part.value for part in found], yerr=bars, fmt="o-", color="C0", capsize=3)
    _label(axes, across, up)
    return figure


@rc_context(_PLAIN)
def histogram(samples: Mapping[str, Sequence[float]], *, across: str, marks: Sequence[float] = ()) -> Figure:
    """Draw a histogram of numbers in [0, 1] with 20 bins, one outline per name.

    Args:
        samples: numbers by name.
        across: label of the horizontal axis.
        marks: where to draw vertical lines.
    """
    figure, axes = _figure(3.0)
    for number, (name, values) in enumerate(samples.items()):
        axes.hist(
            values, bins=20, range=(0.0, 1.0), histtype="step", color=f"C{number % 10}", linewidth=2.0, label=name
        )
    for mark in marks:
        axes.axvline(mark, color="0.5", linewidth=1.0, linestyle="--")
    _label(axes, across, "count", legend=bool(samples))
    return figure


@rc_context(_PLAIN)
def grid(values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], *, label: str) -> Figure:
    """Draw a table of numbers as a heat map with the numbers written in it; NaN cells are empty.

    Args:
        values: one list per row.
        rows: names of the rows.
        columns: names of the columns.
        label: label of the colour bar.
    """
    figure, axes = _figure(1.6 + 1.3 * _ROW * max(1, len(rows)))
    values_RC = np.asarray(values, dtype=float).reshape(len(rows), len(columns))
    image = axes.imshow(values_RC, aspect="auto", cmap="viridis")
    middle = np.nanmean([np.nanmin(values_RC), np.nanmax(values_RC)]) if np.isfinite(values_RC).any() else 0.0
    for row, column in np.argwhere(np.isfinite(values_RC)):
        value = values_RC[row, column]
        dark = value < middle
        axes.text(column, row, digits(value), ha="center", va="center", fontsize=8, color="w" if dark else "k")
    axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    figure.colorbar(image, label=label)
    return figure


def picture(figure: Figure) -> str:
    """Return a figure as a data URL: SVG in base64, the same for the same figure."""
    held = io.BytesIO()
    # Without a fixed salt, the ids of clipping paths and markers would be random.
    with rc_context({"svg.hashsalt": "cepo", **_PLAIN}):
        figure.savefig(held, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(held.getvalue()).decode("ascii")


def write_png(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG file atomically; the same figure gives the same bytes."""
    with replacing(path) as unfinished, rc_context(_PLAIN):
        figure.savefig(unfinished, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})


def _smooth(values_N: np.ndarray) -> np.ndarray:
    """Return the centred mean of finite values over a tenth of the values; NaN where the value is not finite."""
    finite_N = np.isfinite(values_N)
    if not finite_N.any():
        return np.full_like(values_N, np.nan)
    window = np.ones(len(values_N) // 20 * 2 + 1)
    totals_N = np.convolve(np.where(finite_N, values_N, 0.0), window, mode="same")
    counts_N = np.convolve(finite_N.astype(float), window, mode="same")
    return np.where(finite_N, totals_N / np.maximum(counts_N, 1.0), np.nan)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _label(axes: Axes, across: str, up: str = "", *, legend: bool = False) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=8)
