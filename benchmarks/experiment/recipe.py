"""What an experiment runs: every arm of its recipe from every seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import cepo
from cepo.eval.testbed_measures import ITEMS, SCORED

_PACKAGE = Path(cepo.__file__).parent
RECIPE = _PACKAGE / "benchmarks" / "recipes" / "testbed-training.yaml"
TESTBED = _PACKAGE / "train" / "recipes" / "testbed.yaml"  # what all arms share
BASELINE, UNTRAINED = "task", "untrained"  # arms that the others are compared with


@dataclass(frozen=True)
class Run:
    """One arm from one seed.

    Attributes:
        arm: name of the arm.
        rewards: as in `TrainConfig`; none for the judge before training.
        seed: of everything.
        steps: GRPO steps.
        items: items per measure.
        scored: sampled judgements whose links are scored.
        folder: where the run lives.
    """

    arm: str
    rewards: tuple[Mapping[str, Any], ...]
    seed: int
    steps: int
    items: int
    scored: int
    folder: Path


def read_plan(
    output: Path,
    recipe: Path = RECIPE,
    *,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    arms: Sequence[str] | None = None,
    items: int = ITEMS,
    scored: int = SCORED,
) -> list[Run]:
    """Return the runs of a recipe, seed by seed; the judge before training is always among them.

    Args:
        output: folder of all runs.
        recipe: YAML with steps, seeds and arms.
        seeds: instead of the recipe's.
        steps: GRPO steps instead of the recipe's.
        arms: names of the arms to run; None for all.
        items: items per measure.
        scored: sampled judgements whose links are scored.

    Raises:
        ValueError: for a recipe that cannot be used, or an arm that it does not have.
    """
    try:
        loaded = yaml.safe_load(recipe.read_text())
        named = {str(name): tuple(rewards) for name, rewards in loaded["arms"].items()}
        seeds, steps = list(seeds or loaded["seeds"]), steps or int(loaded["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"recipe {str(recipe)!r} cannot be used: {error!r}; expected steps, seeds and arms") from None
    if not seeds or not named:
        raise ValueError(f"recipe {str(recipe)!r} has no {'arms' if seeds else 'seeds'}; expected at least one of each")
    unknown = sorted(set(arms or ()) - set(named))
    if unknown:
        raise ValueError(f"arms names {', '.join(unknown)}; expected some of {', '.join(named)}")
    chosen = [name for name in named if not arms or name in arms or name == UNTRAINED]
    return [
        Run(name, named[name], seed, steps, items, scored, output / f"{re.sub('[^A-Za-z0-9]+', '-', name)}-{seed}")
        for seed in seeds
        for name in chosen
    ]
