"""Protects the shuffled control: a completion that kept its own reward would make the control partly the treatment."""

import random

import pytest

from cepo.jacobian.records import Rollout
from cepo.train.rewards.shuffled import shuffled

ROLLOUTS = [Rollout((prompt,), (10 * prompt + number,)) for prompt in range(3) for number in range(5)]
REWARDS: list[float | None] = [float(place) for place in range(15)]
ALL = [True] * 15


def test_no_completion_keeps_its_own_and_each_prompt_keeps_its_rewards() -> None:
    shifts = set()
    for seed in range(40):
        found, alone = shuffled(REWARDS, ROLLOUTS, ALL, seed=seed)
        assert alone == 0
        assert all(own != other for own, other in zip(REWARDS, found, strict=True))
        for start in (0, 5, 10):
            assert sorted(map(float, found[start : start + 5])) == REWARDS[start : start + 5]
        shifts.add(found[0])
    assert shifts == {1.0, 2.0, 3.0, 4.0}


def test_what_a_completion_gets_does_not_depend_on_the_order_of_the_batch() -> None:
    order = random.Random(0).sample(range(15), 15)
    found, _ = shuffled(REWARDS, ROLLOUTS, ALL, seed=3)
    moved, _ = shuffled([REWARDS[place] for place in order], [ROLLOUTS[place] for place in order], ALL, seed=3)
    assert moved == [found[place] for place in order]


def test_what_was_not_scored_neither_gives_nor_gets_and_one_that_is_left_keeps_its_own() -> None:
    scored = [True, False, True, *[True] * 5, True, *[False] * 3, True, False, False]
    scored[8], scored[12] = False, True
    rewards = [reward if takes_part else None for reward, takes_part in zip(REWARDS, scored, strict=True)]
    found, alone = shuffled(rewards, ROLLOUTS, scored, seed=1)
    assert [reward is None for reward in found] == [not takes_part for takes_part in scored]
    assert found[0] != 0.0
    assert (found[12], alone) == (12.0, 1)


def test_a_group_that_is_split_over_ranks_is_shuffled_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of two holds the last eight rows, and must give them what one process would."""
    whole, _ = shuffled(REWARDS, ROLLOUTS, ALL, seed=5)
    everyone = [(one.prompt_ids, one.completion_ids, reward) for one, reward in zip(ROLLOUTS, REWARDS, strict=True)]
    monkeypatch.setattr("cepo.train.rewards.shuffled.of_ranks", lambda mine: (1, [everyone[:7], mine]))
    found, alone = shuffled(REWARDS[7:], ROLLOUTS[7:], ALL[7:], seed=5)
    assert (found, alone) == (whole[7:], 0)
