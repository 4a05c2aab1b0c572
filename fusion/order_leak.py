"""The order leak: how much a judge's criteria depend on which response is shown first."""

from __future__ import annotations

from collections.abc import Mapping

from cepo.fusion.records import certainty
from cepo.jacobian.links import parse_link
from cepo.jacobian.protocol import Engine, PathRequest
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import Group, Rollout


def order_leaks(
    rollouts: Mapping[int, Rollout], exchanged: Mapping[int, Rollout | None], engine: Engine, layout: Layout
) -> dict[int, float]:
    """Return how much less likely each rollout's criteria are with the two responses exchanged, in nats.

    leak = s_X(prompt as shown) - s_X(prompt with the responses exchanged), the criteria teacher-forced as sampled.
    Criteria that say what a good answer needs are as likely in either order, and their leak is near 0. Criteria that
    hold the verdict, however it is worded, are not.

    Args:
        rollouts: well-formed rollouts by index.
        exchanged: for each of these indices, the rollout with its responses exchanged, or None.
        engine: computes the two likelihoods.
        layout: the layout that the rollouts were read with.

    Returns:
        The leak by index, for rollouts whose exchanged form exists and can be run.
    """
    link = parse_link("Z->X:total@log_likelihood", names=layout.names, roles=layout.roles)
    others = {index: exchanged[index] for index in rollouts}
    shown = {index: other for index, other in others.items() if other is not None and engine.refusal(other) is None}
    # Grouped by prompt, in either order of its responses, so that each prompt is run once.
    groups: dict[tuple[int, ...], dict[tuple[int, bool], Rollout]] = {}
    for index, other in shown.items():
        for is_exchanged, rollout in ((False, rollouts[index]), (True, other)):
            groups.setdefault(rollout.prompt_ids, {})[index, is_exchanged] = rollout
    requests = [
        PathRequest(Group(tuple(members.values())), ((),) * len(members), (link,)) for members in groups.values()
    ]
    likelihoods = {
        key: of_links[link.name].own
        for members, answer in zip(groups.values(), engine.paths(requests), strict=True)
        for key, of_links in zip(members, answer, strict=True)
    }
    return {index: likelihoods[index, False] - likelihoods[index, True] for index in shown}


def less_leak(value: float, leak: float | None, weight: float) -> float:
    """Return S minus the weighted order leak: max(0, S - weight * max(0, tanh(leak / 2))).

    Args:
        value: S of a link, in [0, 1].
        leak: in nats; None counts as 0.
        weight: >= 0.
    """
    return max(0.0, value - weight * certainty(leak or 0.0))
