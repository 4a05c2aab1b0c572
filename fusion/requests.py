"""What to ask the engine for: base Jacobians and counterfactual ones, group by group, and which answer is whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        owners: for each counterfactual request, the member that each of its rollouts is a counterfactual of.
    """

    members: tuple[int, ...]
    requests: tuple[Request, ...]
    owners: tuple[tuple[int, ...], ...]

    def counterfactuals(self, answers: Sequence[Answer], name: str) -> dict[int, list[Tensor]]:
        """Return the counterfactual Jacobians (S, D) of a link by member, in the order of k.

        Args:
            answers: to the counterfactual requests.
            name: of the link.
        """
        found: dict[int, list[Tensor]] = {index: [] for index in self.members}
        for owners, answer in zip(self.owners, answers, strict=True):
            for owner, records in zip(owners, answer, strict=True):
                if name in records:
                    found[owner].append(records[name].jac_SD)
        return found


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
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, rollout in rollouts.items():
        by_prompt.setdefault(rollout.prompt_ids, []).append(index)
    found = []
    for prompt_ids, members in by_prompt.items():
        base = Request(Group(tuple(rollouts[index] for index in members)), tuple(links), context_energy)
        in_completion: list[tuple[Request, tuple[int, ...]]] = []
        in_prompt: list[tuple[Request, tuple[int, ...]]] = []
        for source in dict.fromkeys(link.source for link in links):
            from_source = tuple(link for link in links if link.source == source)
            batches: dict[int | None, list[tuple[int, Rollout]]] = {}
            for k in range(counterfactuals):
                for index in members:
                    permuted = permute_rollout(rollouts[index], source, k, seed=seed, kind=permutation)
                    if permuted is not None:
                        batch = None if permuted.prompt_ids == prompt_ids else k
                        batches.setdefault(batch, []).append((index, permuted))
            for batch, chosen in batches.items():
                group = Group(tuple(rollout for _, rollout in chosen))
                request = Request(group, from_source, context_energy=False)
                asked = in_completion if batch is None else in_prompt
                asked.append((request, tuple(index for index, _ in chosen)))
        counterfactual = [*in_completion, *in_prompt]
        requests = (base, *(request for request, _ in counterfactual))
        found.append(GroupRequests(tuple(members), requests, tuple(owners for _, owners in counterfactual)))
    return found
