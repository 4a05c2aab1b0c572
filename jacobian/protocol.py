"""The protocol of an engine: requests in, Jacobians or paths out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cepo.jacobian.links import Link
from cepo.jacobian.records import Group, LinkJacobian, LinkPath, Rollout

Answer = list[dict[str, LinkJacobian]]
"""For each rollout of a request, the Jacobian of each link by the link's name."""

PathAnswer = list[dict[str, LinkPath]]
"""For each rollout of a path request, the path record of each link by the link's name."""

Nodes = int | Literal["auto"]


class Engine(Protocol):
    """Turns rollouts into Jacobians; all engines give equal results."""

    @property
    def width(self) -> int:
        """D, the size of the embeddings."""

    def refusal(self, rollout: Rollout) -> str | None:
        """Return why the model cannot run the rollout, or None."""

    def compute(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Yield the answer to each request, in order."""

    def paths(self, requests: Sequence[PathRequest]) -> Iterator[PathAnswer]:
        """Yield the answer to each path request, in order."""


@dataclass(frozen=True)
class Request:
    """A request for the Jacobians of some links, for rollouts that share a prompt.

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


@dataclass(frozen=True)
class PathRequest:
    """A request for effects and paths, for rollouts that share a prompt, each with its counterfactuals.

    Attributes:
        group: the rollouts.
        counterfactuals: for each rollout any number of counterfactual rollouts. With nodes, they may differ from it
            only in the tokens of the links' source. Without nodes, they may differ in any token before the target, and
            the prompt may be shorter or longer.
        links: from `parse_link`, of one source, each a total effect.
        nodes: nodes of the quadrature along the path; 0 computes only the values, which give the effect. "auto" doubles
            them from 1 until every sum is within `tolerance * max(1, |delta|)` of its delta, up to `most_nodes`.
        tolerance: for "auto", above 0.
        most_nodes: for "auto", at least 1.
    """

    group: Group
    counterfactuals: tuple[tuple[Rollout, ...], ...]
    links: tuple[Link, ...]
    nodes: Nodes = 0
    tolerance: float = 0.1
    most_nodes: int = 32

    def __post_init__(self) -> None:
        if len({link.source for link in self.links}) != 1:
            raise ValueError(f"links holds {len(self.links)} links; expected at least one, all of the same source")
        for link in self.links:
            if link.effect != "total":
                raise ValueError(f"link {link.name!r} is a {link.effect} effect; a path measures total effects alone")
        if len(self.counterfactuals) != len(self.group.rollouts):
            raise ValueError(
                f"counterfactuals holds {len(self.counterfactuals)} entries for {len(self.group.rollouts)} rollouts; "
                "expected one for each"
            )
        check_nodes(self.nodes)
        for rollout, others in zip(self.group.rollouts, self.counterfactuals, strict=True) if self.nodes else ():
            _check_aligned(rollout, others, self.links[0].source)


def check_nodes(nodes: Nodes, *, least: int = 0) -> None:
    """Raise ValueError unless `nodes` is a number of nodes, at least `least`, or "auto"."""
    if nodes != "auto" and (not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < least):
        raise ValueError(f"nodes is {nodes!r}; expected an integer >= {least}, or 'auto'")


def _check_aligned(rollout: Rollout, others: Sequence[Rollout], source: str) -> None:
    own, positions = rollout.token_ids, set(rollout.spans[source].positions)
    for other in others:
        theirs = other.token_ids
        if len(theirs) != len(own) or any(
            a != b and at not in positions for at, (a, b) in enumerate(zip(own, theirs, strict=True))
        ):
            raise ValueError(
                f"counterfactuals holds a rollout that differs outside of {source!r}; expected the same tokens there"
            )
