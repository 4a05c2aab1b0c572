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
    """

    group: Group
    links: tuple[Link, ...]
    context_energy: bool = True

    def __post_init__(self) -> None:
        if not self.links:
            raise ValueError("links is empty; a request needs at least one link")
