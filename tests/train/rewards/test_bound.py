"""Protects users of TRL alone from a run that teaches nothing: a bound reward says so, once, and how to go on."""

import logging

import pytest

from cepo.jacobian.records import Rollout
from cepo.train.prompts import JUDGE
from cepo.train.rewards.bound import BoundReward

BAD, GOOD = Rollout((1,), (2,), malformed="no scores"), Rollout((1,), (2,))


@pytest.mark.parametrize(("batches", "warnings"), [([BAD] * 7, 1), ([BAD] * 2, 0), ([BAD, BAD, GOOD] + [BAD] * 7, 0)])
def test_malformed_batches_alone_are_told_once(
    batches: list[Rollout], warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    reward = BoundReward(None, JUDGE, "causal")
    with caplog.at_level(logging.WARNING):
        for rollout in batches:
            reward._warn_of_malformed([rollout, BAD])
    assert len(caplog.records) == warnings
    assert all("every reward of causal was 0" in text and "warm-start" in text for text in caplog.messages)
