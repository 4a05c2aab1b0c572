"""The requests to the engine, for Jacobians and effects, and the assignment of answers to rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cepo.counterfactual.donors import Candidate, drawn
from cepo.counterfactual.permute import Permutation, permutations
from cepo.jacobian.links import Link
from cepo.jacobian.protocol import Answer, Nodes, PathAnswer, PathRequest, Request
from cepo.jacobian.records import Group, LinkJacobian, LinkPath, Rollout

if TYPE_CHECKING:
    from torch import Tensor

NoDonor = Literal["zero", "permute"]
Against = Literal["donors", "same verdict", "permuted", "same", "immovable", "nothing"]
"""What a span was compared with.

- donors: the content of donors that led to another verdict.
- same verdict: that of donors, all of which led to the rollout's own verdict, so that the effect on the verdict is near
  0 whatever caused it.
- permuted: its own tokens in other orders.
- same: every donor or order equals the span itself, so that its effect is exactly 0.
- immovable: nothing, since none of its tokens can be replaced: each also holds part of a tag.
- nothing: nothing, since no other prompt has content for it.
"""


@dataclass(frozen=True)
class LinkGradients:
    """The Jacobians of one link of one rollout.

    Attributes:
        rollout: index of the rollout.
        base: the Jacobian of the rollout as sampled.
        counterfactuals: (S, D) each, the Jacobians with the link's source permuted, in the order of k; fewer than K
            if the tokens have fewer orders.
    """

    rollout: int
    base: LinkJacobian
    counterfactuals: tuple[Tensor, ...]

    @property
    def is_finite(self) -> bool:
        """Whether all matrices, and the gradient at all rows of the context, are finite."""
        if not math.isfinite(self.base.context_energy or 0.0):
            return False
        return all(math.isfinite(jac_SD.abs().max()) for jac_SD in (self.base.jac_SD, *self.counterfactuals))

    @property
    def nbytes(self) -> int:
        """The bytes that the matrices take."""
        return sum(jac_SD.nbytes for jac_SD in (self.base.jac_SD, *self.counterfactuals))


@dataclass(frozen=True)
class GroupRequests:
    """The requests of one group of rollouts.

    Attributes:
        members: index of each of the group's rollouts among all rollouts.
        requests: the base request, then the counterfactual requests.
        owners: for each counterfactual request, the members whose counterfactuals its rollouts are.
    """

    members: tuple[int, ...]
    requests: tuple[Request, ...]
    owners: tuple[tuple[int, ...], ...]

    def gradients(self, base: Answer, counterfactuals: Sequence[Answer]) -> list[LinkGradients]:
        """Return the Jacobians of each link of each member, in the order of the members.

        Args:
            base: answer to the base request.
            counterfactuals: answers to the counterfactual requests.
        """
        found: dict[tuple[int, str], list[Tensor]] = {}
        for owners, answer in zip(self.owners, counterfactuals, strict=True):
            for owner, of_links in zip(owners, answer, strict=True):
                for name, jacobian in of_links.items():
                    found.setdefault((owner, name), []).append(jacobian.jac_SD)
        return [
            LinkGradients(index, jacobian, tuple(found.get((index, name), ())))
            for index, of_links in zip(self.members, base, strict=True)
            for name, jacobian in of_links.items()
        ]


def reward_requests(
    rollouts: Mapping[int, Rollout],
    links: Sequence[Link],
    *,
    counterfactuals: int,
    permutation: Permutation,
    seed: int,
    context_energy: bool,
) -> list[GroupRequests]:
    """Return the requests of each group of rollouts that share a prompt, in order of first appearance.

    In each rollout, the source span of each link is permuted K times (fewer if it has fewer orders), and the link's
    Jacobian is requested for each permutation. Requests with the base's prompt come first, so that an engine runs each
    prompt once; a permuted prompt is the same for all rollouts of the group.

    Args:
        rollouts: well-formed rollouts by index.
        links: from `parse_link`.
        counterfactuals: K >= 0.
        permutation: "uniform", "sentence" or "block".
        seed: seed of the permutations.
        context_energy: whether the base records hold it.
    """
    found = []
    for prompt_ids, members in _by_prompt(rollouts).items():
        batches: dict[tuple[bool, str, int], list[tuple[int, Rollout]]] = {}
        for source in dict.fromkeys(link.source for link in links):
            orders = {
                index: permutations(rollout, source, counterfactuals, seed=seed, kind=permutation)
                for index, rollout in members.items()
            }
            for k in range(counterfactuals):
                for index, permuted in ((index, each[k]) for index, each in orders.items() if k < len(each)):
                    in_prompt = permuted.prompt_ids != prompt_ids
                    batches.setdefault((in_prompt, source, k if in_prompt else 0), []).append((index, permuted))
        requests, owners = [Request(Group(tuple(members.values())), tuple(links), context_energy)], []
        for (_, source, _), chosen in sorted(batches.items(), key=lambda batch: batch[0][0]):
            from_source = tuple(link for link in links if link.source == source)
            requests.append(Request(Group(tuple(rollout for _, rollout in chosen)), from_source, context_energy=False))
            owners.append(tuple(index for index, _ in chosen))
        found.append(GroupRequests(tuple(members), tuple(requests), tuple(owners)))
    return found


@dataclass(frozen=True)
class Compared:
    """A link of a rollout compared with counterfactuals.

    Attributes:
        against: what the counterfactuals are.
        path: the link's path record; None if there are no counterfactuals.
    """

    against: Against
    path: LinkPath | None


@dataclass(frozen=True)
class EffectRequests:
    """The path requests of one group of rollouts, one for each source.

    Attributes:
        members: index of each of the group's rollouts among all rollouts.
        requests: the requests.
        owners: for each request, the members that its rollouts are.
        against: what each member's span is compared with, by member and source.
        links: the links to compare.
    """

    members: tuple[int, ...]
    requests: tuple[PathRequest, ...]
    owners: tuple[tuple[int, ...], ...]
    against: Mapping[tuple[int, str], Against]
    links: tuple[Link, ...]

    def compared(self, answers: Sequence[PathAnswer]) -> dict[tuple[int, str], Compared]:
        """Return the comparison of each link of each member, by member and the link's name."""
        paths = {
            (owner, name): path
            for owners, answer in zip(self.owners, answers, strict=True)
            for owner, of_links in zip(owners, answer, strict=True)
            for name, path in of_links.items()
        }
        return {
            (member, link.name): Compared(self.against[member, link.source], paths.get((member, link.name)))
            for member in self.members
            for link in self.links
        }


def effect_requests(
    rollouts: Mapping[int, Rollout],
    links: Sequence[Link],
    pools: Mapping[str, Sequence[Candidate]],
    *,
    donors: int,
    no_donor: NoDonor,
    permutation: Permutation,
    seed: int,
    nodes: Nodes,
) -> list[EffectRequests]:
    """Return the path requests of each group of rollouts that share a prompt, in order of first appearance.

    Args:
        rollouts: well-formed rollouts by index.
        links: total effects, from `parse_chain`.
        pools: candidates for each source.
        donors: K >= 1.
        no_donor: "permute" compares a span without donors with permutations of its own tokens.
        permutation: the kind of permutation.
        seed: seed of donors and permutations.
        nodes: see `PathRequest`.
    """
    found = []
    for members in _by_prompt(rollouts).values():
        requests, owners, against = [], [], {}
        for source in dict.fromkeys(link.source for link in links):
            others = {}
            for index, rollout in members.items():
                kind: Against
                kind, chosen = drawn(rollout, source, pools[source], donors, seed=seed)
                if not rollout.spans[source].movable:
                    kind = "immovable"
                elif kind == "nothing" and no_donor == "permute":
                    chosen = permutations(rollout, source, donors, seed=seed, kind=permutation)
                    kind = "permuted" if chosen else "same"
                against[index, source] = kind
                if chosen:
                    others[index] = chosen
            if others:
                group = Group(tuple(members[index] for index in others))
                from_source = tuple(link for link in links if link.source == source)
                requests.append(PathRequest(group, tuple(others.values()), from_source, nodes))
                owners.append(tuple(others))
        found.append(EffectRequests(tuple(members), tuple(requests), tuple(owners), against, tuple(links)))
    return found


def _by_prompt(rollouts: Mapping[int, Rollout]) -> dict[tuple[int, ...], dict[int, Rollout]]:
    by_prompt: dict[tuple[int, ...], dict[int, Rollout]] = {}
    for index, rollout in rollouts.items():
        by_prompt.setdefault(rollout.prompt_ids, {})[index] = rollout
    return by_prompt
