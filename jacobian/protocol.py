"""The protocol of an engine: requests in, Jacobians out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cepo.jacobian.links import Link
from cepo.jacobian.records import Group, LinkJacobian, Rollout

Answer = list[dict[str, LinkJacobian]]
"""For each rollout of a request, the Jacobian of each link by the link's name."""


class Engine(Protocol):
    """Turns rollouts into Jacobians; all engines give equal results."""

    @property
    def width(self) -> int:
        """D, the size of the embeddings."""

    def refusal(self, rollout: Rollout) -> str | None:
        """Return why the model cannot take the rollout, or None."""

    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield the answer to each request, in order."""


@dataclass(frozen=True)
class Request:
    """Some links of rollouts that share a prompt.

    Attributes:
        group: the rollouts; a counterfactual is a rollout like any other.
        links: from `parse_link`.
        context_energy: whether the records carry the gradient's energy over the whole context. It costs one backward
            pass through the whole prompt per rollout.
        signs: rows of one coefficient a rollout. Empty: one answer a rollout. Else one answer a row, the sum over the
            rollouts of coefficient times Jacobian, which costs the prompt one backward pass a row instead of one a
            rollout. Only for links that start in the prompt, whose rows all rollouts share, and no residual effects.
    """

    group: Group
    links: tuple[Link, ...]
    context_energy: bool = True
    signs: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.links:
            raise ValueError("links is empty; a request needs at least one link")
        if not self.signs:
            return
        first = self.group.rollouts[0]
        if any(len(row) != len(self.group.rollouts) for row in self.signs):
            raise ValueError(
                f"signs has rows that are not one coefficient for each of {len(self.group.rollouts)} rollouts"
            )
        for link in self.links:
            if link.effect == "residual" or first.spans[link.source].positions[-1] >= len(first.prompt_ids):
                raise ValueError(
                    f"signs were given with the link {link.name!r}; expected links that start in the prompt and are "
                    "total or direct"
                )
        if self.context_energy:
            raise ValueError("signs and context_energy exclude each other; set context_energy=False")
