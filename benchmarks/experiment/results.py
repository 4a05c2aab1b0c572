"""What an experiment found: means over seeds, differences paired by seed, world by world, and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cepo.benchmarks.experiment.recipe import BASELINE, SHUFFLED, UNTRAINED
from cepo.eval.report.figures import forest
from cepo.eval.report.numbers import digits, mean_and_range
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import ConsoleTable
from cepo.eval.statistics import SHARE, Estimate, mean_over_seeds, sign_flip_p, undetermined

# What is shown of a row; a slash leads into a mapping.
COLUMNS = {
    "flipped": "accuracy where length is flipped",
    "turned": "verdict turned by the criterion alone",
    "in_distribution": "accuracy in distribution",
    "modes/evidence": "mode evidence",
    "modes/length": "mode length",
    "modes/hint": "mode hint",
    "modes/hollow": "mode hollow",
    "modes/copied": "mode copied",
    "modes/other": "other modes",
    "malformed": "malformed",
    "tokens": "completion tokens",
    "S": "S: effect of the chain",
    "time/rewards": "seconds of the rewards, per step",
    "time/policy_update": "seconds of the policy update, per step",
    "time/step": "seconds per step",
    "time/cost": "rewards over policy update, in seconds",
}
_DRAWN = ("flipped", "turned")
Row = Mapping[str, Any]


def paired_gains(
    rows: Sequence[Row], measure: str, *, baseline: str = BASELINE, arms: Sequence[str] | None = None
) -> dict[str, tuple[Estimate, float]]:
    """Return each arm's mean difference to another arm, within the seeds that both have.

    Args:
        rows: one per run of one world, in any order.
        measure: one of COLUMNS.
        baseline: the arm to compare with.
        arms: the arms to compare; None for all that were trained.

    Returns:
        By arm, the estimate with its paired t interval, whose `count` is the number of shared seeds, and the p-value of
        the sign-flip permutation test. Without a shared seed both are NaN.
    """
    by_arm = _by_arm(rows, measure)
    theirs = by_arm.get(baseline, {})
    gains = {}
    for arm, values in by_arm.items():
        if arm in (baseline, UNTRAINED) or (arms is not None and arm not in arms):
            continue
        differences = [values[seed] - theirs[seed] for seed in values if seed in theirs]
        gain = mean_over_seeds(differences) if differences else undetermined("no shared seed")
        gains[arm] = gain, sign_flip_p(differences)
    return gains


def means_tables(rows: Sequence[Row]) -> list[ConsoleTable]:
    """Return the mean over seeds and the range of the main measures, a table per world, a row per arm."""
    shown = (*_DRAWN, "in_distribution")
    header = ("arm", "seeds", *(measure.replace("_", " ") for measure in shown))
    return [
        ConsoleTable(header, _mean_cells(of_world, shown), f"world {world}: mean over seeds (range)")
        for world, of_world in _by_world(rows).items()
    ]


def write_page(path: Path, rows: Sequence[Row], commit: str | None) -> None:
    """Write the page: for each world means and differences, then every run.

    Args:
        path: of the page.
        rows: one per run.
        commit: of the code, or None where it is unknown.
    """
    seeds = sorted({row["seed"] for row in rows})
    figures, tables = {}, {}
    for world, of_world in _by_world(rows).items():
        cells = _mean_cells(of_world, tuple(COLUMNS))
        tables[f"World {world}: means over seeds (range)"] = (["arm", "seeds", *COLUMNS.values()], cells)
        for measure in _DRAWN:
            label = COLUMNS[measure]
            means = [
                (arm, mean_over_seeds(list(values.values()), within=SHARE))
                for arm, values in _by_arm(of_world, measure).items()
            ]
            figures[f"World {world}, {label}: mean over seeds, 95% t interval over seeds"] = forest(means, axis=label)
            tables |= _gain_tables(world, of_world, measure)
    tables |= _certificate_table(rows)
    runs = [
        [row["world"], row["arm"], str(row["seed"]), *(digits(_value(row, measure)) for measure in COLUMNS)]
        for row in rows
    ]
    write_report(
        path,
        title="Which reward makes the criteria cause the verdict?",
        summary={
            "worlds": ", ".join(_by_world(rows)),
            "seeds": ", ".join(map(str, seeds)),
            "GRPO steps": str(max(row["steps"] for row in rows)),
            "seconds in total": f"{sum(row['seconds'] for row in rows):.0f}",
            "commit": str(commit),
        },
        figures=figures,
        tables={**tables, "Every run": (["world", "arm", "seed", *COLUMNS.values()], runs)},
        notes=[
            "All arms of a world start from the same diseased judge, which follows length, and train on items where "
            "length is right 90% of the time. 'Turned' replaces the aspect in the criteria that the judge wrote and "
            "lets it go on: the fraction of items whose verdict the criterion alone turned. No reward reads this "
            "intervention. Modes tell how sampled completions came to their verdict, on items where length is wrong "
            "90% of the time. Seconds are medians over the steps of one process on one thread; a causal loss is "
            "paid inside the policy update.",
            "In a reasoner's world a friend's hint stands for length, and 'turned' forces another question's thought.",
            f"Intervals are paired t intervals over {len(seeds)} seeds; p is of the sign-flip permutation test, which "
            "asks only that a difference is as likely to have either sign."
            if len(seeds) > 1
            else "One seed has no interval.",
        ],
    )


def _certificate_table(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what interventions said of the pretrained judges that training starts from, once per world."""
    cells = []
    for world, of_world in _by_world(rows).items():
        certificate = next((row["certificate"] for row in of_world if "certificate" in row), None)
        if certificate is not None:
            measured = "; ".join(f"{name} {digits(value)}" for name, value in certificate["measures"].items())
            cells.append([world, certificate["uncertified"] or "certified", measured])
    header = ["world", "verdict", "interventions on the judge before training"]
    return {"Certificates of the judges in words": (header, cells)} if cells else {}


def _gain_tables(world: str, rows: Sequence[Row], measure: str) -> dict[str, Any]:
    """Return the differences to the baseline, and of each arm to its own shuffle."""
    header = ["arm", "shared seeds", "difference [95% interval]", "p, sign flips"]
    by_arm = _by_arm(rows, measure)
    cells = []
    if BASELINE in by_arm:
        cells = [_gain_cells(arm, *gain) for arm, gain in paired_gains(rows, measure).items()]
    tables = {f"World {world}, {COLUMNS[measure]}: difference to {BASELINE}, paired by seed": (header, cells)}
    controls = [arm for arm in by_arm if f"{arm}{SHUFFLED}" in by_arm]
    cells = []
    for arm in controls:
        (gain,) = paired_gains(rows, measure, baseline=f"{arm}{SHUFFLED}", arms=[arm]).values()
        shared = set(by_arm[arm]) & set(by_arm[f"{arm}{SHUFFLED}"])
        above = sum(by_arm[arm][seed] > by_arm[f"{arm}{SHUFFLED}"][seed] for seed in shared)
        cells.append([*_gain_cells(arm, *gain), f"{above} of {len(shared)}"])
    caption = f"World {world}, {COLUMNS[measure]}: difference to the same rewards shuffled within prompts"
    tables[caption] = ([*header, "seeds above it"], cells)
    return {name: (head, body) for name, (head, body) in tables.items() if body}


def _gain_cells(arm: str, gain: Estimate, p: float) -> list[str]:
    return [arm, str(gain.count), str(gain), digits(p)]


def _mean_cells(rows: Sequence[Row], measures: Sequence[str]) -> list[list[str]]:
    columns = [_by_arm(rows, measure) for measure in measures]
    return [
        [arm, str(len(values)), *(mean_and_range(list(column[arm].values())) for column in columns)]
        for arm, values in columns[0].items()
    ]


def _by_world(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["world"], []).append(row)
    return found


def _by_arm(rows: Sequence[Row], measure: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[row["seed"]] = _value(row, measure)
    return found


def _value(row: Row, measure: str) -> float:
    """Return a measure of a row; NaN where it is not there, as the links of a judge that wrote nothing well formed."""
    found: Any = row
    for name in measure.split("/"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return math.nan if found is None else float(found)
