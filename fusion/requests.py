"""What to ask the engine for: base Jacobians and counterfactual ones, group by group, and which answer is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cepo.counterfactual.permute import Permutation, permute_rollout
from cepo.jacobian.links import Link
from cepo.jacobian.protocol import Answer, Request
from cepo.jacobian.records import Group, LinkJacobian, Rollout


@dataclass(frozen=True)
class LinkGradients:
    """The Jacobians of one link of one rollout.

    Attributes:
        rollout: index of the rollout.
        base: the Jacobian of the rollout as sampled.
        counterfactuals: (S, D) each, the Jacobians with the link's source permuted, in the order of k; fewer than K
            where no order of the tokens differs.
    """

    rollout: int
    base: LinkJacobian
    counterfactuals: tuple[Tensor, ...]

    @property
    def is_finite(self) -> bool:
        """Whether no matrix holds a NaN or an infinity."""
        return all(bool(torch.isfinite(jac_SD).all()) for jac_SD in (self.base.jac_SD, *self.counterfactuals))


@dataclass(frozen=True)
class GroupRequests:
    """The requests of one group of rollouts.

    Attributes:
        members: index of each rollout of the group among all rollouts.
        requests: the base request, then the counterfactual ones.
        owners: for each counterfactual request, the member that each of its rollouts is a counterfactual of.
    """

    members: tuple[int, ...]
    requests: tuple[Request, ...]
    owners: tuple[tuple[int, ...], ...]

    def gradients(self, base: Answer, counterfactuals: Sequence[Answer]) -> list[LinkGradients]:
        """Return the Jacobians of each link of each member, member by member.

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

    The source span of each link is permuted K times in each rollout, and the link's Jacobian is asked for at every
    permutation. Requests whose prompt is the base's come first, so that an engine runs each prompt once; a permuted
    prompt is the same for all rollouts of the group.

    Args:
        rollouts: well-formed rollouts by index.
        links: from `parse_link`.
        counterfactuals: K >= 0.
        permutation: "uniform", "sentence" or "block".
        seed: seed of the permutations.
        context_energy: whether the base records carry it.
    """
    by_prompt: dict[tuple[int, ...], dict[int, Rollout]] = {}
    for index, rollout in rollouts.items():
        by_prompt.setdefault(rollout.prompt_ids, {})[index] = rollout
    found = []
    for prompt_ids, members in by_prompt.items():
        batches: dict[tuple[bool, str, int], list[tuple[int, Rollout]]] = {}
        for source in dict.fromkeys(link.source for link in links):
            for k in range(counterfactuals):
                for index, rollout in members.items():
                    permuted = permute_rollout(rollout, source, k, seed=seed, kind=permutation)
                    if permuted is not None:
                        in_prompt = permuted.prompt_ids != prompt_ids
                        batches.setdefault((in_prompt, source, k if in_prompt else 0), []).append((index, permuted))
        requests, owners = [Request(Group(tuple(members.values())), tuple(links), context_energy)], []
        for (_, source, _), chosen in sorted(batches.items(), key=lambda batch: batch[0][0]):
            from_source = tuple(link for link in links if link.source == source)
            requests.append(Request(Group(tuple(rollout for _, rollout in chosen)), from_source, context_energy=False))
            owners.append(tuple(index for index, _ in chosen))
        found.append(GroupRequests(tuple(members), tuple(requests), tuple(owners)))
    return found
