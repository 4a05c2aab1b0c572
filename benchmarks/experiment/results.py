"""What an experiment found: means over seeds, differences paired by seed, and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cepo.benchmarks.experiment.recipe import BASELINE, UNTRAINED
from cepo.eval.report.figures import forest
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import console_table
from cepo.eval.statistics import Estimate, mean_of_few

COLUMNS = {
    "flipped": "accuracy where length is flipped",
    "turned": "verdict turned by the criterion alone",
    "in_distribution": "accuracy in distribution",
    "tokens": "completion tokens",
    "malformed": "malformed",
    "influence": "influence of X->Y",
    "phi": "phi of X->Y",
}
_DRAWN = ("flipped", "turned")
Row = Mapping[str, Any]


def paired_gains(rows: Sequence[Row], measure: str) -> dict[str, Estimate]:
    """Return each arm's mean difference to the baseline arm, within the seeds that both have.

    Args:
        rows: one per run, in any order.
        measure: one of COLUMNS.

    Returns:
        Estimates by arm, with t intervals; `count` is the number of shared seeds. Without one the estimate is NaN.
    """
    by_arm = _by_arm(rows, measure)
    baseline = by_arm.get(BASELINE, {})
    gains = {}
    for arm, values in by_arm.items():
        if arm in (BASELINE, UNTRAINED):
            continue
        shared = [seed for seed in values if seed in baseline]
        gains[arm] = mean_of_few([values[seed] - baseline[seed] for seed in shared])
    return gains


def means_table(rows: Sequence[Row]) -> Table:
    """Return the mean over seeds and the range of the main measures, per arm."""
    shown = (*_DRAWN, "in_distribution")
    title = "mean over seeds (range); the report has the other measures"
    table = console_table("arm", "seeds", *(measure.replace("_", " ") for measure in shown), title=title)
    for cells in _mean_cells(rows, shown):
        table.add_row(*cells)
    return table


def write_page(path: Path, rows: Sequence[Row], commit: str | None) -> None:
    """Write the page: means, differences to the baseline, and every run.

    Args:
        path: of the page.
        rows: one per run.
        commit: of the code, or None where it is unknown.
    """
    seeds = sorted({row["seed"] for row in rows})
    figures = {}
    tables = {"Means over seeds (range)": (["arm", "seeds", *COLUMNS.values()], _mean_cells(rows, tuple(COLUMNS)))}
    for measure in _DRAWN:
        label = COLUMNS[measure]
        by_arm = _by_arm(rows, measure)
        means = [(arm, mean_of_few(list(values.values()))) for arm, values in by_arm.items()]
        figures[f"{label}: mean over seeds, 95% t interval over seeds"] = forest(means, axis=label)
        gains = paired_gains(rows, measure)
        if BASELINE in by_arm and gains:
            caption = f"{label}: difference to {BASELINE}, paired by seed"
            figures[caption] = forest(list(gains.items()), axis=f"difference in {label}", reference=0.0)
            header = ["arm", f"seeds shared with {BASELINE}", "seeds", "difference [95% interval]"]
            cells = [[arm, str(gain.count), str(len(by_arm[arm])), str(gain)] for arm, gain in gains.items()]
            tables[caption] = (header, cells)
    runs = [
        [f"{row['arm']}, seed {row['seed']}", *(f"{_value(row, measure):.3f}" for measure in COLUMNS)] for row in rows
    ]
    write_report(
        path,
        title="Which reward makes the criteria cause the verdict?",
        summary={
            "seeds": ", ".join(map(str, seeds)),
            "GRPO steps": str(max(row["steps"] for row in rows)),
            "seconds in total": f"{sum(row['seconds'] for row in rows):.0f}",
            "commit": str(commit),
        },
        figures=figures,
        tables={**tables, "Every run": (["run", *COLUMNS.values()], runs)},
        notes=[
            "All arms start from the testbed's lazy judge, which follows length, and train on items where length is "
            "right 90% of the time. 'Turned' replaces the criterion with another one and lets the judge write on: the "
            "fraction of items whose verdict the criterion alone turned. No reward reads this intervention.",
            f"Intervals are over {len(seeds)} seeds only: read them as a range, not as a test."
            if len(seeds) > 1
            else "One seed: there are no intervals.",
        ],
    )


def _mean_cells(rows: Sequence[Row], measures: Sequence[str]) -> list[list[str]]:
    columns = [_by_arm(rows, measure) for measure in measures]
    return [
        [arm, str(len(values)), *(_range(list(column[arm].values())) for column in columns)]
        for arm, values in columns[0].items()
    ]


def _range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _by_arm(rows: Sequence[Row], measure: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[row["seed"]] = _value(row, measure)
    return found


def _value(row: Row, measure: str) -> float:
    value = row[measure] if measure in row else row["links"].get("X->Y", {}).get(measure)
    return math.nan if value is None else float(value)
