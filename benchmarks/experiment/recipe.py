"""What an experiment runs: every arm of its recipe in every world from every seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

import cepo
from cepo.eval.testbed_measures import ITEMS, SCORED
from cepo.train.policy import REASONER_TESTBED, WORDS
from cepo.train.reasoner_testbed_models import ReasonerKind
from cepo.train.recipe import read_yaml, reason_of
from cepo.train.testbed_judges import JudgeKind

_PACKAGE = Path(cepo.__file__).parent
RECIPE = _PACKAGE / "benchmarks" / "recipes" / "testbed-worlds.yaml"
# What all arms share, in the testbed's own worlds, in those of a pretrained model, and in those of a reasoner.
TESTBED, TESTBED_WORDS, TESTBED_REASONER = (
    _PACKAGE / "train" / "recipes" / f"{name}.yaml" for name in ("testbed", WORDS, REASONER_TESTBED)
)
IN_WORDS = "words-"  # begins the name of a world whose judge is a pretrained model
REASONS = "reasoner-"  # begins the name of a world that has a reasoner instead of a judge
BASELINE, UNTRAINED = "task", "untrained"  # arms that the others are compared with
SHUFFLED = " shuffled"  # ends the name of an arm that is another one's control
_KEYS = ("rewards", "causal_loss", "grpo")


@dataclass(frozen=True)
class Run:
    """One arm in one world from one seed.

    Attributes:
        world: the testbed judge that training starts from, see `cepo.train.testbed_judges.warm_start`; after "words-",
            one of a pretrained model, see `cepo.train.testbed_words`; after "reasoner-", the reasoner, see
            `cepo.train.reasoner_testbed_models.warm_start`.
        arm: name of the arm.
        changes: what the arm sets in the testbed's training recipe: `rewards`, and perhaps `causal_loss` and fields of
            `grpo`; empty for the judge before training.
        seed: of everything.
        steps: GRPO steps.
        items: items per measure.
        scored: sampled judgements whose links are scored.
        folder: where the run lives.
        device: where it is trained and measured.
        layers: how many of its first layers a pretrained model keeps; None for those of its training recipe.
    """

    world: str
    arm: str
    changes: Mapping[str, Any]
    seed: int
    steps: int
    items: int
    scored: int
    folder: Path
    device: str = "cpu"
    layers: int | None = None

    @property
    def judge(self) -> str:
        """The kind of judge, or of reasoner, that training starts from."""
        return self.world.removeprefix(IN_WORDS).removeprefix(REASONS)

    @property
    def in_words(self) -> bool:
        """Whether that judge is a pretrained model."""
        return self.world.startswith(IN_WORDS)

    @property
    def reasons(self) -> bool:
        """Whether it is a reasoner."""
        return self.world.startswith(REASONS)


def read_plan(
    output: Path,
    recipe: Path = RECIPE,
    *,
    worlds: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    arms: Sequence[str] | None = None,
    items: int = ITEMS,
    scored: int = SCORED,
    device: str = "cpu",
    layers: int | None = None,
) -> list[Run]:
    """Return the runs of a recipe, seed by seed and world by world; the judge before training is always among them.

    Args:
        output: folder of all runs.
        recipe: YAML with worlds, steps, seeds and arms. An arm is a list of rewards as in `TrainConfig`, or a mapping
            with `rewards` and any of `causal_loss` and `grpo`.
        worlds: instead of the recipe's.
        seeds: instead of the recipe's.
        steps: GRPO steps instead of the recipe's.
        arms: names of the arms to run; None for all.
        items: items per measure.
        scored: sampled judgements whose links are scored.
        device: where runs are trained and measured.
        layers: of a pretrained model, instead of its training recipe's.

    Raises:
        ValueError: for a recipe that cannot be used, an arm that it does not have, a world that there is not, or worlds
            of different testbeds.
    """
    try:
        loaded = read_yaml(recipe.read_text())
        named = {str(name): _changes(str(name), given) for name, given in loaded["arms"].items()}
        worlds, seeds = list(worlds or loaded["worlds"]), list(seeds or loaded["seeds"])
        steps = steps or int(loaded["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"recipe {str(recipe)!r} cannot be used: {reason_of(error)}; expected worlds, steps, seeds and arms"
        ) from None
    for what, found in (("worlds", worlds), ("seeds", seeds), ("arms", named)):
        if not found:
            raise ValueError(f"recipe {str(recipe)!r} has no {what}; expected at least one of each")
    judges = get_args(JudgeKind)
    in_words, reasoners = [IN_WORDS + judge for judge in judges], [REASONS + kind for kind in get_args(ReasonerKind)]
    all_worlds = (*judges, *in_words, *reasoners)
    for what, given, known in (("worlds", worlds, all_worlds), ("arms", arms or (), tuple(named))):
        unknown = sorted({*given} - {*known})
        if unknown:
            raise ValueError(f"{what} names {', '.join(unknown)}; expected some of {', '.join(known)}")
    if len({(world in in_words, world in reasoners) for world in worlds}) > 1:
        raise ValueError(f"worlds names {', '.join(worlds)}, of different testbeds, which share no settings")
    if layers is not None and not worlds[0].startswith(IN_WORDS):
        raise ValueError(f"layers is {layers} for {', '.join(worlds)}; expected worlds in words, such as words-lazy")
    chosen = [name for name in {UNTRAINED: None, **named} if not arms or name in arms or name == UNTRAINED]
    return [
        Run(world, name, named.get(name, {}), seed, steps, items, scored, folder, device, layers)
        for seed in seeds
        for world in worlds
        for name in chosen
        for folder in [output / world / _folder(name, seed)]
    ]


def _changes(name: str, given: Any) -> dict[str, Any]:
    """Return what an arm changes, however it is written."""
    changes = {"rewards": given} if isinstance(given, list) else dict(given)
    unknown = sorted(set(changes) - set(_KEYS))
    if unknown:
        raise ValueError(f"arm {name!r} holds {', '.join(unknown)}; expected some of {', '.join(_KEYS)}")
    if name == UNTRAINED and any(changes.values()):
        raise ValueError(f"arm {name!r} holds {changes!r}; expected nothing: it is the judge before training")
    if name != UNTRAINED and not changes.get("rewards"):
        raise ValueError(f"arm {name!r} has no rewards; expected a list of mappings such as {{name: format}}")
    return {key: value for key, value in changes.items() if value}


def _folder(arm: str, seed: int) -> str:
    return f"{re.sub('[^A-Za-z0-9]+', '-', arm)}-{seed}"
