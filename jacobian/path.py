"""Gradients along the path from a counterfactual to a rollout: the quadrature, its stopping rule, and the records.

With E(X) the embeddings of the source and E(X') those of a counterfactual,

    s(X) - s(X') = integral over a in [0, 1] of <J(E(X') + a (E(X) - E(X'))), E(X) - E(X')>,

so the exact gradient, integrated along the path, spreads the finite effect over tokens. Engines give values and
gradients at points; this file chooses the points.

Source: Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks (arXiv 1703.01365), for completeness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cepo.jacobian.passes import Pass, pass_of
from cepo.jacobian.protocol import PathAnswer, PathRequest
from cepo.jacobian.records import LinkPath
from cepo.jacobian.targets import target_positions


@dataclass(frozen=True)
class Point:
    """A point on the path from a counterfactual to a rollout.

    Attributes:
        rollout: index of the rollout in the request.
        other: index of the counterfactual among the rollout's.
        fraction: a in [0, 1]; 0 is the counterfactual.
    """

    rollout: int
    other: int
    fraction: float


Values = Sequence[Sequence[Mapping[Pass, float]]]
Contract = Callable[[Sequence[Point]], Sequence[Mapping[Pass, Tensor]]]


def path_answer(request: PathRequest, values: Values, contract: Contract) -> PathAnswer:
    """Return the answer to a path request.

    Args:
        request: the request.
        values: for each rollout the values of its target functions, then those of each of its counterfactuals.
        contract: returns for each point the gradient's rows at the source's positions, each contracted with its row of
            E(X) - E(X'): (S,) in float64 on the CPU.
    """
    pairs = [(row, other) for row, of_row in enumerate(values) for other in range(len(of_row) - 1)]
    integrals = _integrate(request, values, contract, pairs) if request.nodes else {}
    return [
        {
            link.name: LinkPath(
                link,
                own=of_row[0][pass_of(link)],
                others=tuple(value[pass_of(link)] for value in of_row[1:]),
                sums=tuple(float(integral.rows[pass_of(link)].sum()) for integral in of_pairs),
                attribution_S=torch.stack([integral.rows[pass_of(link)] for integral in of_pairs]).mean(0)
                if of_pairs
                else None,
                source_positions=rollout.spans[link.source].positions,
                target_positions=target_positions(rollout, link.target, link.function),
                nodes=max((integral.nodes for integral in of_pairs), default=0),
            )
            for link in request.links
        }
        for row, (rollout, of_row) in enumerate(zip(request.group.rollouts, values, strict=True))
        for of_pairs in [[integrals[row, other] for other in range(len(of_row) - 1) if integrals]]
    ]


def gauss_nodes(count: int) -> list[tuple[float, float]]:
    """Return the nodes of Gauss-Legendre quadrature on [0, 1] with their weights; one node is the midpoint.

    The quadrature is exact for polynomials of degree up to 2 count - 1; the midpoint rule is so only for degree 1.
    """
    nodes_M, weights_M = np.polynomial.legendre.leggauss(count)
    return [(float(0.5 * (node + 1)), float(0.5 * weight)) for node, weight in zip(nodes_M, weights_M, strict=True)]


def between(own_BTD: Tensor, other_BTD: Tensor, fraction: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings at a point of the path, and the whole step from E(X') to E(X).

    Args:
        own_BTD: E(X).
        other_BTD: E(X').
        fraction: a in [0, 1], a number or (B, 1, 1).

    Returns:
        E(X') + a (E(X) - E(X')) in the dtype of E, and E(X) - E(X') in float32 or wider.
    """
    wide = torch.promote_types(own_BTD.dtype, torch.float32)
    step_BTD = own_BTD.to(wide) - other_BTD.to(wide)
    fraction = fraction.to(wide) if isinstance(fraction, Tensor) else fraction
    return (other_BTD.to(wide) + fraction * step_BTD).to(own_BTD.dtype), step_BTD


@dataclass(frozen=True)
class _Integral:
    """The contracted path Jacobian of a (rollout, counterfactual) pair: (S,) for each pass, and the nodes used."""

    rows: Mapping[Pass, Tensor]
    nodes: int


def _integrate(
    request: PathRequest, values: Values, contract: Contract, pairs: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], _Integral]:
    found: dict[tuple[int, int], _Integral] = {}
    pending, count = list(pairs), 1 if request.nodes == "auto" else request.nodes
    while pending:
        nodes = gauss_nodes(count)
        at_points = iter(contract([Point(*pair, fraction) for pair in pending for fraction, _ in nodes]))
        for pair in pending:
            parts = [(weight, next(at_points)) for _, weight in nodes]
            rows = {key: torch.stack([weight * part[key] for weight, part in parts]).sum(0) for key in parts[0][1]}
            found[pair] = _Integral(rows, count)
        count *= 2
        if request.nodes != "auto" or count > request.most_nodes:
            break
        pending = [pair for pair in pending if not _is_complete(request, values, pair, found[pair])]
    return found


def _is_complete(request: PathRequest, values: Values, pair: tuple[int, int], integral: _Integral) -> bool:
    own, other = values[pair[0]][0], values[pair[0]][pair[1] + 1]
    return all(
        abs(float(rows_S.sum()) - (own[key] - other[key])) <= request.tolerance * max(1.0, abs(own[key] - other[key]))
        for key, rows_S in integral.rows.items()
    )
