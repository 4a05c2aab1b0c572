"""What to ask the engine for: base Jacobians and counterfactual ones, group by group, and which answer is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from torch import Tensor

from cepo.counterfactual.permute import Permutation, permute_rollout
from cepo.jacobian.links import Link
from cepo.jacobian.protocol import Answer, Request
from cepo.jacobian.records import Group, Rollout


@dataclass(frozen=True)
class GroupRequests:
    """The requests of one group of rollouts.

    Attributes:
        members: index of each rollout of the group among all rollouts.
        requests: the base request first, then the counterfactual ones.
        owners: for each counterfactual request and each of its answers, the member that it belongs to; None for one
            that belongs to the whole group.
    """

    members: tuple[int, ...]
    requests: tuple[Request, ...]
    owners: tuple[tuple[int | None, ...], ...]

    def counterfactuals(self, answers: Sequence[Answer], name: str) -> dict[int | None, list[Tensor]]:
        """Return the counterfactual Jacobians (S, D) of a link by owner, and all of them under None.

        Args:
            answers: to the counterfactual requests.
            name: of the link.
        """
        found: dict[int | None, list[Tensor]] = {None: []}
        for owners, answer in zip(self.owners, answers, strict=True):
            for owner, records in zip(owners, answer, strict=True):
                if name in records:
                    found[None].append(records[name].jac_SD)
                    if owner is not None:
                        found.setdefault(owner, []).append(records[name].jac_SD)
        return found


def reward_requests(
    rollouts: Mapping[int, Rollout],
    links: Sequence[Link],
    *,
    counterfactuals: int,
    permutation: Permutation,
    seed: int,
    context_energy: bool,
    pool: bool = False,
) -> list[GroupRequests]:
    """Return the requests of each group of rollouts that share a prompt, in order of first appearance.

    Exact: each rollout's source spans are permuted K times, each link's Jacobian is asked for at every permutation of
    its source. A permuted completion keeps its prompt, so that its requests stand beside the base's; a permuted prompt
    is the same for all rollouts of the group.

    Pooled: K permutations for the whole group, or one a rollout where there are more rollouts. Permutation k serves the
    rollouts i with i = k modulo K (in the order of their ids, so that the batch's order does not matter); at a permuted
    prompt their cotangents are summed with random signs into half as many.

    Args:
        rollouts: well-formed rollouts by index.
        links: from `parse_link`.
        counterfactuals: K >= 0.
        permutation: "uniform", "sentence" or "block".
        seed: of permutations and signs.
        context_energy: whether the base records carry it.
        pool: whether the group shares its counterfactuals.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, rollout in rollouts.items():
        by_prompt.setdefault(rollout.prompt_ids, []).append(index)
    found = []
    for members in by_prompt.values():
        group = Group(tuple(rollouts[index] for index in members))
        asked: list[tuple[Request, tuple[int | None, ...]]] = []
        order = sorted(members, key=lambda index: rollouts[index].completion_ids)
        for source in dict.fromkeys(link.source for link in links):
            from_source = tuple(link for link in links if link.source == source)
            pairs = _pairs(order, counterfactuals, pool)
            permuted = [
                (owner, k, permute_rollout(rollouts[owner], source, k, seed=seed, kind=permutation))
                for owner, k in pairs
            ]
            changed = [(owner, k, rollout) for owner, k, rollout in permuted if rollout is not None]
            in_prompt = group.rollouts[0].spans[source].positions[0] < len(group.rollouts[0].prompt_ids)
            for k in range(counterfactuals) if in_prompt else [None]:
                chosen = [(owner, rollout) for owner, at, rollout in changed if k is None or at == k]
                asked += _ask(chosen, from_source, in_prompt and pool, f"{seed} {k}")
        asked.sort(key=lambda pair: pair[0].group.rollouts[0].prompt_ids != group.rollouts[0].prompt_ids)
        base = Request(group, tuple(links), context_energy)
        found.append(
            GroupRequests(tuple(members), (base, *(pair[0] for pair in asked)), tuple(pair[1] for pair in asked))
        )
    return found


def _pairs(order: Sequence[int], counterfactuals: int, pool: bool) -> list[tuple[int, int]]:
    """Return which rollout is permuted in which way: (rollout, k)."""
    if not pool:
        return [(index, k) for k in range(counterfactuals) for index in order]
    count = max(len(order), counterfactuals) if counterfactuals else 0
    return [(order[place % len(order)], place % counterfactuals) for place in range(count)]


def _ask(
    chosen: Sequence[tuple[int, Rollout]], links: tuple[Link, ...], mix: bool, key: str
) -> list[tuple[Request, tuple[int | None, ...]]]:
    if not chosen:
        return []
    rollouts = tuple(rollout for _, rollout in chosen)
    owners = tuple(owner for owner, _ in chosen)
    if not mix:
        return [(Request(Group(rollouts), links, context_energy=False), owners)]
    alone = tuple(link for link in links if link.effect == "residual")  # not linear in the cotangents
    mixed = tuple(link for link in links if link.effect != "residual")
    asked: list[tuple[Request, tuple[int | None, ...]]] = []
    if alone:
        asked.append((Request(Group(rollouts), alone, context_energy=False), owners))
    if mixed:
        signs = tuple(tuple(_sign(key, row, rollout) for rollout in rollouts) for row in range(-(-len(rollouts) // 2)))
        asked.append((Request(Group(rollouts), mixed, context_energy=False, signs=signs), (None,) * len(signs)))
    return asked


def _sign(key: str, row: int, rollout: Rollout) -> float:
    """Return a sign that depends on the seed, the permutation, the row and the rollout's own ids alone."""
    return 1.0 if sha256(repr((key, row, rollout.completion_ids)).encode()).digest()[0] % 2 else -1.0
