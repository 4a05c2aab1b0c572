"""A recipe's rewards inside verl: verl's reward function computes those that read text; here all are added up."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cepo.train.config import TrainConfig
from cepo.train.grpo import build_rewards, load_config
from cepo.train.rewards.causal import CausalReward, TaskReward

_NO_DEVIATION = 1e-4  # added to a standard deviation, as in TRL


@dataclass(frozen=True)
class VerlRewards:
    """The rewards of a recipe.

    Attributes:
        names: names of the rewards, in the recipe's order.
        weights: weight of each reward.
        causal: the reward that reads the policy.
        of_text: rewards that read a completion's text, by name: all others, and the causal reward's task.
        truth: the column that they compare with, label or answer.
        standardised: whether each reward is standardised over its prompt's completions before they are added.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    causal: CausalReward
    of_text: Mapping[str, TaskReward]
    truth: str
    standardised: bool

    @property
    def task(self) -> str:
        """The name of the causal reward's task in `of_text`."""
        return f"{self.causal.__name__}/task"

    def read_text(self, text: str, truth: str, *, thought_opened: bool) -> dict[str, float]:
        """Return those rewards of one completion that read its text, by name; rewards of None are left out."""
        columns = {self.truth: [truth], "thought_opened": [thought_opened]}
        found = {name: function(completions=[text], **columns)[0] for name, function in self.of_text.items()}
        return {name: value for name, value in found.items() if value is not None}

    def total(self, rewards_BN: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the weighted sum (B,) of N rewards; if `standardised`, as TRL's normalize_then_sum.

        Args:
            rewards_BN: rewards in the order of `names`.
            prompts: a key of each completion's prompt.
        """
        weights_N = torch.tensor(self.weights, dtype=rewards_BN.dtype)
        if not self.standardised:
            return rewards_BN @ weights_N
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        group_B = torch.tensor([places[prompt] for prompt in prompts])
        scaled_BN = torch.empty_like(rewards_BN)
        for group in range(len(places)):
            scaled_BN[group_B == group] = _standardised(rewards_BN[group_B == group])
        return _standardised(scaled_BN @ weights_N)


def read_rewards(recipe: str) -> VerlRewards:
    """Return the rewards of a recipe that `cepo train --engine verl` wrote, by its path."""
    return verl_rewards(load_config(recipe, {}))


def verl_rewards(config: TrainConfig) -> VerlRewards:
    """Return the rewards of a run with one causal reward; raise ValueError for rewards that cannot be built."""
    functions, weights = build_rewards(config)
    named = {function.__name__: function for function in functions}
    (causal,) = (function for function in functions if isinstance(function, CausalReward))
    of_text = {name: function for name, function in named.items() if function is not causal}
    if causal.task is not None:
        of_text[f"{causal.__name__}/task"] = causal.task
    return VerlRewards(
        tuple(named),
        tuple(weights),
        causal,
        of_text,
        truth="label" if config.kind == "judge" else "answer",
        standardised=config.grpo.get("multi_objective_aggregation") == "normalize_then_sum",
    )


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any], *, recipe: str, **_: Any
) -> dict[str, float]:
    """Return those rewards of one completion that read its text, and their weighted sum as `score`; called by verl.

    In training the trainer adds the causal reward; in validation `score` is the reward.

    Args:
        data_source: ignored.
        solution_str: the completion.
        ground_truth: its label or answer.
        extra_info: `thought_opened` says whether the prompt ended inside a thought.
        recipe: path of the recipe.
    """
    rewards = _rewards(recipe)
    found = rewards.read_text(solution_str, ground_truth, thought_opened=bool(extra_info["thought_opened"]))
    weights = {rewards.task: 1.0, **dict(zip(rewards.names, rewards.weights, strict=True))}
    return {"score": sum(weights[name] * value for name, value in found.items()), **found}


_rewards = functools.cache(read_rewards)


def _standardised(values_B: Tensor) -> Tensor:
    deviation = values_B.std(0) if len(values_B) > 1 else torch.zeros_like(values_B[0])
    return (values_B - values_B.mean(0)) / (deviation + _NO_DEVIATION)
