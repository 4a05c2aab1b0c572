"""`cepo reward-experiment`: which training pairs make a reward model follow the cause, not a cue; over seeds."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import torch
import yaml

import cepo
from cepo.benchmarks.measure import environment
from cepo.benchmarks.reward_model.real_text import RealText
from cepo.benchmarks.reward_model.testbed import Testbed
from cepo.eval.report.numbers import mean_and_range
from cepo.eval.report.tables import ConsoleTable
from cepo.files import SETTINGS, append_jsonl, claim, resume_jsonl
from cepo.train.recipe import read_yaml, reason_of
from cepo.train.reward_config import RewardModelConfig
from cepo.train.reward_data import load_pairs
from cepo.train.reward_model import train_reward_model
from cepo.train.reward_scores import RewardModel

RECIPE = Path(cepo.__file__).parent / "benchmarks" / "recipes" / "testbed-reward-models.yaml"
RESULTS = "results.jsonl"
Row = Mapping[str, Any]


class World(Protocol):
    """Where reward models are trained and measured: the testbed, or real text."""

    @property
    def columns(self) -> Sequence[Mapping[str, str]]:
        """Titles of the measures by name, for each table."""

    def settings(self) -> Mapping[str, Any]:
        """Return what decides a row besides its arm and seed; ValueError if something is missing."""

    def training(self, folder: Path, changes: Mapping[str, Any], seed: int, steps: int | None) -> RewardModelConfig:
        """Return the training configuration of a run: the shared recipe with the arm's changes of its data."""

    def measure(self, model: RewardModel, *, seed: int, items: int) -> Mapping[str, float | None]:
        """Return the measures of a trained model by name."""


@dataclass(frozen=True)
class Plan:
    """The contents of a recipe.

    Attributes:
        world: where models are trained and measured.
        arms: by name, the arm's changes of the data of the shared training recipe.
        seeds: seeds of data, model and training.
        items: number of pairs per measure.
        gates: `least` and `most`, bounds by arm on its mean flipped accuracy, and `above`, by arm the arm that it must
            beat in every seed.
    """

    world: World
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    items: int
    gates: Mapping[str, Mapping[str, Any]]


def read_plan(
    recipe: Path = RECIPE,
    *,
    data: Path | None = None,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
) -> Plan:
    """Return the plan of a recipe.

    Args:
        recipe: YAML with arms, seeds, items and gates; on real text also `text`, the fields of `RealText`.
        data: folder of the preferences of real text.
        seeds: seeds instead of the recipe's; None for those.
        arms: names of the arms to run; None for all.

    Raises:
        ValueError: for a recipe that cannot be used, or an arm that it does not have.
    """
    try:
        loaded = read_yaml(recipe.read_text())
        world = RealText(data=data, **loaded["text"]) if "text" in loaded else Testbed()
        seeds, items = list(seeds or loaded["seeds"]), int(loaded["items"])
        plan = Plan(world, dict(loaded["arms"]), seeds, items, dict(loaded["gates"]))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"recipe {str(recipe)!r} cannot be used: {reason_of(error)}; expected arms, seeds, items and gates"
        ) from None
    if data is not None and isinstance(world, Testbed):
        raise ValueError(f"data is {str(data)!r}, but recipe {str(recipe)!r} makes its own; leave it out")
    unknown = sorted({*(arms or ())} - {*plan.arms})
    if unknown:
        raise ValueError(f"arms names {', '.join(unknown)}; expected some of {', '.join(plan.arms)}")
    return replace(plan, arms={name: changes for name, changes in plan.arms.items() if not arms or name in arms})


def run_reward_experiment(
    output: Path,
    plan: Plan,
    *,
    steps: int | None = None,
    commit: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[ConsoleTable], list[str]]:
    """Train a reward model on every arm's pairs from every seed, and measure it by interventions.

    Each run's row is added to `results.jsonl` when it is done; a finished run is not repeated, and a killed one resumes
    from its checkpoint, where recipe, settings and world are the same.

    Args:
        output: folder of the rows, with a folder per run.
        plan: from `read_plan`.
        steps: optimiser steps of every arm; None for the training recipe's.
        commit: commit of this code; None to ask git.
        progress: called with (runs done, runs in total).

    Returns:
        Tables with the mean over seeds and the range per arm; and a line per gate with its outcome.

    Raises:
        ValueError: for an output of other settings, or a world that lacks something.
    """
    results = output / RESULTS
    world = plan.world.settings()
    training = {"training": {**world["training"], "steps": steps}}
    settings = {"command": "reward-experiment", "items": plan.items, **world, **training}
    claim(output / SETTINGS, settings, results=[results])
    rows: list[Row] = list(resume_jsonl(results, lambda row: (row["arm"], row["seed"])).values())
    runs = [(arm, seed) for seed in plan.seeds for arm in plan.arms]
    for done, (arm, seed) in enumerate(runs):
        before = next((row for row in rows if (row["arm"], row["seed"]) == (arm, seed)), None)
        if before is not None and before["data"] != dict(plan.arms[arm]):
            raise ValueError(
                f"output {str(output)!r} holds arm {arm!r} with other data: {before['data']}; name another"
            )
        if before is None:
            rows.append(_run(output, arm, seed, plan, steps) | environment(torch.device("cpu"), commit))
            append_jsonl(results, rows[-1:])
        if progress is not None:
            progress(done + 1, len(runs))
    shown = [row for row in rows if (row["arm"], row["seed"]) in runs]
    return [means_table(shown, columns) for columns in plan.world.columns], verdicts(shown, plan.gates)


def means_table(rows: Sequence[Row], columns: Mapping[str, str]) -> ConsoleTable:
    """Return the mean over seeds and the range of each measure, per arm."""
    table = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        cells = [mean_and_range([float(row[name]) for row in of_arm if row[name] is not None]) for name in columns]
        table.append([arm, str(len(of_arm)), *cells])
    return ConsoleTable(("arm", "seeds", *columns.values()), table, "mean over seeds (range)")


def verdicts(rows: Sequence[Row], gates: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each gate that the rows can decide: the bound, the result, and passed or failed."""
    flipped: dict[str, dict[int, float]] = {}
    for row in rows:
        flipped.setdefault(row["arm"], {})[row["seed"]] = row["flipped"]
    lines = []
    for name, sign in (("least", 1), ("most", -1)):
        for arm, bound in gates.get(name, {}).items():
            if arm in flipped:
                found = mean(flipped[arm].values())
                asked = f"{arm}: flipped at {name} {bound}"
                lines.append(f"{asked}: {found:.3f}, {'passed' if sign * (found - bound) >= 0 else 'FAILED'}")
    for arm, other in gates.get("above", {}).items():
        shared = [seed for seed in flipped.get(arm, {}) if seed in flipped.get(other, {})]
        if shared:
            above = sum(flipped[arm][seed] > flipped[other][seed] for seed in shared)
            outcome = "passed" if above == len(shared) else "FAILED"
            lines.append(f"{arm}: flipped above {other} in every seed: {above} of {len(shared)}, {outcome}")
    return lines


def _run(output: Path, arm: str, seed: int, plan: Plan, steps: int | None) -> dict[str, Any]:
    started = time.perf_counter()
    folder = output / f"{re.sub('[^A-Za-z0-9]+', '-', arm)}-{seed}"
    config = plan.world.training(folder, plan.arms[arm], seed, steps)
    pairs = load_pairs(config.data, seed=seed)
    model = RewardModel.open(str(train_reward_model(config)))
    return {
        "arm": arm,
        "seed": seed,
        "steps": config.reward["max_steps"],
        "pairs": len(pairs.train),
        "ties": sum(pair.tie for pair in pairs.train),
        "dropped": len(pairs.left_out),
        "seconds": round(time.perf_counter() - started, 1),
        **plan.world.measure(model, seed=seed, items=plan.items),
        "data": dict(plan.arms[arm]),
    }
