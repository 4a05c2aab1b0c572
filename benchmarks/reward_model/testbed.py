"""The testbed as the world of an experiment on reward models: pairs with known causes, and length as the cue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cepo
from cepo.eval.reward_measures import measure_reward_model
from cepo.train.recipe import read_recipe, read_yaml
from cepo.train.reward_config import RewardModelConfig
from cepo.train.reward_scores import RewardModel
from cepo.train.reward_testbed import reward_model_fingerprint

TRAINING = Path(cepo.__file__).parent / "train" / "recipes" / "reward-model-testbed.yaml"
COLUMNS = {
    "flipped": "right where length is flipped",
    "in_distribution": "right in distribution",
    "length_share": "length over cause",
    "cause_effect": "effect of the cause",
    "other_effect": "of another aspect",
}


class Testbed:
    """See `World`."""

    __test__ = False  # not a test class
    columns: Sequence[Mapping[str, str]] = (COLUMNS,)

    def settings(self) -> dict[str, Any]:
        """Return the shared recipe, and the testbed's fingerprint."""
        return {
            "training": read_yaml(TRAINING.read_text()),
            "testbed": reward_model_fingerprint("bradley-terry", seed=0),
        }

    def training(self, folder: Path, changes: Mapping[str, Any], seed: int, steps: int | None) -> RewardModelConfig:
        """Return the training configuration of a run: the shared recipe with the arm's changes of its data."""
        overrides: dict[str, Any] = {"output": str(folder), "seed": seed, "reward.report_to": "none"}
        overrides |= {f"data.{name}": value for name, value in changes.items()}
        overrides |= {} if steps is None else {"reward.max_steps": steps}
        return read_recipe(RewardModelConfig, TRAINING, overrides)

    def measure(self, model: RewardModel, *, seed: int, items: int) -> Mapping[str, float | None]:
        """Return the fields of `RewardMeasures`."""
        return asdict(measure_reward_model(model, seed=seed, items=items))
