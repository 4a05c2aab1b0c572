"""The shuffled control: each completion gets the reward of another completion of its prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cepo.jacobian.records import Rollout
from cepo.train.rewards.bound import of_ranks


def shuffled(
    rewards: Sequence[float | None], rollouts: Sequence[Rollout], scored: Sequence[bool], *, seed: int
) -> tuple[list[float | None], int]:
    """Return the rewards with those of each prompt's scored completions exchanged, and how many kept their own.

    The n scored completions of a prompt, over all ranks, are sorted by their ids, and their rewards are shifted
    cyclically by 1 to n - 1 places, so that none gets its own. The shift depends only on the seed and these ids, not on
    batch order or ranks.

    Args:
        rewards: rewards of this rank's completions.
        rollouts: the completions, with their prompts.
        scored: which completions take part; the others keep their reward.
        seed: seed of the shift.

    Returns:
        The rewards, and the number of completions that had no other to exchange with.
    """
    taking_part = [place for place, takes_part in enumerate(scored) if takes_part]
    mine = [(rollouts[place].prompt_ids, rollouts[place].completion_ids, rewards[place]) for place in taking_part]
    rank, parts = of_ranks(mine)
    first = sum(map(len, parts[:rank]))
    by_prompt: dict[tuple[int, ...], list[tuple[tuple[int, ...], int, float | None]]] = {}
    for number, (prompt, ids, reward) in enumerate(one for part in parts for one in part):
        by_prompt.setdefault(prompt, []).append((ids, number, reward))
    found, alone = list(rewards), 0
    for members in by_prompt.values():
        members.sort(key=lambda member: member[:2])
        drawn = random.Random(f"{seed} {[ids for ids, *_ in members]}")
        shift = drawn.randrange(1, len(members)) if len(members) > 1 else 0
        for (_, number, _), (*_, reward) in zip(members, members[shift:] + members[:shift], strict=True):
            if first <= number < first + len(mine):
                found[taking_part[number - first]] = reward
                alone += shift == 0
    return found, alone
