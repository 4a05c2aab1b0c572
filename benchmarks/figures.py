"""The pictures of the documentation, drawn from `benchmarks/results`: `python -m cepo.benchmarks.figures [FOLDER]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cepo.benchmarks.ablation.figures import draw_curves
from cepo.eval.report.figures import write_png
from cepo.files import make_folder, read_jsonl

_TOP = Path(__file__).resolve().parent.parent
_RESULTS = _TOP / "benchmarks" / "results"
_FRESH = 6  # first seed that was not used to choose the default reward
_MEASURES = {"flipped": "accuracy where length is flipped", "turned": "verdict turned by the criterion alone"}


def draw_documentation(folder: Path, results: Path = _RESULTS) -> list[Path]:
    """Draw `training.png`, `speed.png` and `ablation.png`.

    Args:
        folder: folder of the pictures, created if needed.
        results: folder of the recorded rows.

    Returns:
        The paths of the pictures.

    Raises:
        ValueError: for a file of rows that is missing or broken.
    """
    training = _rows(results / "testbed-training.jsonl") + _rows(results / "testbed-training-fresh-seeds.jsonl")
    figures = {
        "training": draw_training(training),
        "speed": draw_speed(_rows(results / "bench-small-cpu.jsonl")),
        "ablation": draw_ablation(_rows(results / "ablate-testbed.jsonl")),
    }
    make_folder(folder)
    for name, figure in figures.items():
        write_png(folder / f"{name}.png", figure)
    return [folder / f"{name}.png" for name in figures]


def draw_training(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw two measures of every run of `cepo experiment`: one line per arm, one dot per seed, a bar at the mean.

    Args:
        rows: all rows of `results.jsonl`; the arms keep their order.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    figure = _new_figure(9.0, 0.9 + 0.3 * len(arms))
    panels: list[Axes] = list(figure.subplots(1, len(_MEASURES), sharey=True))
    for panel, (measure, label) in zip(panels, _MEASURES.items(), strict=True):
        for place, arm in enumerate(arms):
            of_arm = [row for row in rows if row["arm"] == arm]
            for row in of_arm:
                fresh = row["seed"] >= _FRESH
                panel.plot(row[measure], place, "o", color="C0", alpha=0.7, fillstyle="none" if fresh else "full")
            mean = sum(row[measure] for row in of_arm) / len(of_arm)
            panel.plot(mean, place, "|", color="C3", markersize=16, markeredgewidth=2.5)
        panel.set_xlabel(label)
        panel.set_xlim(-0.03, 1.03)
        panel.grid(axis="x", alpha=0.3)
    counts = [sum(row["arm"] == arm for row in rows) for arm in arms]
    labels = [f"{arm} ({count} seed{'s' * (count > 1)})" for arm, count in zip(arms, counts, strict=True)]
    panels[0].set_yticks(range(len(arms)), labels)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(
        f"Bar: mean. Filled dots: seeds 1 to {_FRESH - 1}, which chose the default reward. Open dots: later seeds.",
        fontsize=9,
    )
    return figure


def draw_speed(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the speedup of each contender of `cepo bench` over the reference schedule.

    Args:
        rows: rows of `results.jsonl`; those of the section "peers" with a speedup are drawn.
    """
    timed = [row for row in rows if row["section"] == "peers" and row["speedup"] is not None]
    timed.sort(key=lambda row: row["speedup"])
    figure = _new_figure(7.2, 1.1 + 0.3 * len(timed))
    axes = figure.add_subplot()
    colours = ["C0" if row["case"].startswith("group") else "0.6" for row in timed]
    bars = axes.barh([row["case"] for row in timed], [row["speedup"] for row in timed], color=colours)
    axes.bar_label(bars, [f"{row['speedup']:.1f}" for row in timed], padding=3)
    axes.margins(x=0.1)
    axes.set_xlabel("times faster than the reference schedule")
    shapes = timed[0]["shapes"]
    lengths = ", ".join(f"{name} {shapes[name]}" for name in ("G", "Lz", "Lx", "Ly", "K"))
    machine = f"{timed[0]['device']}, {timed[0]['threads']} threads"
    axes.set_title(f"{timed[0]['model']}, {timed[0]['dtype']}, {lengths}; {machine}", fontsize=9)
    return figure


def draw_ablation(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the rank correlation of phi with the reference's phi (K = 4, rank 2) against K and against rank, per link.

    Args:
        rows: rows of the `summary.jsonl` of `cepo ablate`.
    """
    phi = [row for row in rows if row["kind"] == "link" and row["score"] == "phi" and row.get("rank") is not None]
    figure = _new_figure(8.4, 3.4)
    panels: list[Axes] = list(figure.subplots(1, 2, sharey=True))
    for panel, axis, held, value in zip(
        panels, ("counterfactuals", "rank"), ("rank", "counterfactuals"), (2, 4), strict=True
    ):
        chosen = sorted((row for row in phi if row[held] == value), key=lambda row: row[axis])
        draw_curves(panel, [(row, row["link"], str(row[axis])) for row in chosen], "spearman_paper")
        panel.axhline(0.0, color="0.5", linewidth=0.8)
    panels[0].set_xlabel("counterfactuals K, at rank 2")
    panels[1].set_xlabel("nuisance rank r, at K = 4")
    panels[0].set_ylabel("rank correlation of phi")
    panels[0].legend(fontsize=8)
    figure.suptitle(
        "Agreement with phi at K = 4, r = 2, where it is 1; 95% bootstrap intervals over prompts", fontsize=9
    )
    return figure


def _rows(path: Path) -> list[dict[str, Any]]:
    rows, broken = read_jsonl(path)
    if broken:
        raise ValueError(f"{path}, line {broken[0][0]} is {broken[0][1]}; expected a JSON object")
    return [row for _, row in rows]


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


if __name__ == "__main__":
    for written in draw_documentation(Path(sys.argv[1]) if sys.argv[1:] else _TOP / "docs" / "figures"):
        print(written)
