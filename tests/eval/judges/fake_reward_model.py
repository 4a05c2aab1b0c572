"""Reward models for tests: a folder that is really one, and scoring by a rule in its place."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cepo.train.pair_encoding import Shown
from cepo.train.reward_scores import RewardModel, Scores
from cepo.train.reward_testbed import TEMPLATE, build_reward_model


def write_reward_model(folder: Path, form: Any = "bradley-terry") -> Path:
    """Write an untrained reward model of the testbed as `cepo reward-model` would."""
    model, tokenizer = build_reward_model(form, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Shown(form, TEMPLATE).write(folder)
    return folder


class RuleModel:
    """Gives the last message of each text what a rule says of it; refuses what it has no number for."""

    def __init__(self, rule: Callable[[str], float], *, kill_after: int | None = None) -> None:
        self.rule, self.kill_after = rule, kill_after
        self.read: list[str] = []

    def numbers(self, conversations: Sequence[Any]) -> Scores:
        values, left_out = np.full(len(conversations), np.nan), {}
        for place, messages in enumerate(conversations):
            if len(self.read) == self.kill_after:
                raise KeyboardInterrupt
            self.read.append(messages[-1]["content"])
            try:
                values[place] = self.rule(self.read[-1])
            except ValueError as reason:
                left_out[place] = str(reason)
        return Scores(values, left_out)

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be what is opened in the place of any reward model."""
        monkeypatch.setattr(RewardModel, "open", lambda *_, **__: self)
