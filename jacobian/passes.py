"""The backward passes that links need, and the Jacobians of the links from the passes' gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cepo.jacobian.links import Link, TargetFunction
from cepo.jacobian.records import LinkJacobian, Rollout
from cepo.jacobian.targets import target_positions


class Pass(NamedTuple):
    """One cotangent: the gradient of a span's target function, blocked at the positions of the named spans."""

    target: str
    function: TargetFunction
    blocked: tuple[str, ...]


def passes_of(links: Sequence[Link]) -> list[Pass]:
    """Return the distinct passes that the links need."""
    passes: dict[Pass, None] = {}
    for link in links:
        passes[pass_of(link)] = None
        if link.effect == "residual":
            passes[_mediated_pass_of(link)] = None
    return list(passes)


def link_jacobians(
    rollout: Rollout, links: Sequence[Link], gradients: Mapping[Pass, Tensor], context_energy: bool
) -> dict[str, LinkJacobian]:
    """Return the Jacobian of each link by its name.

    Args:
        rollout: the rollout that was differentiated.
        links: from `parse_link`.
        gradients: for each of `passes_of(links)` the (T, D) gradient with respect to the embedding rows; rows that
            neither a link nor the context energy needs may be zero.
        context_energy: whether to record it.
    """
    jacobians = {}
    for link in links:
        gradient_TD = gradients[pass_of(link)]
        source = rollout.spans[link.source].positions
        jac_SD = gradient_TD[list(source)]
        energy = float(gradient_TD.double().square().sum()) if context_energy else None
        if link.effect == "residual":
            through_SD = gradients[_mediated_pass_of(link)][list(source)]
            direction_D = gradient_TD[list(rollout.spans[link.mediator[0]].positions)].mean(0)
            residual_SD = _regress_out(jac_SD, through_SD * direction_D)
            if energy is not None:
                energy += float(residual_SD.double().square().sum() - jac_SD.double().square().sum())
            jac_SD = residual_SD
        targets = target_positions(rollout, link.target, link.function)
        jacobians[link.name] = LinkJacobian(link, jac_SD, source, targets, energy)
    return jacobians


def pass_of(link: Link) -> Pass:
    """Return the pass that gives a link its gradient; a residual effect also needs that of its mediator."""
    return Pass(link.target, link.function, link.mediator if link.effect == "direct" else ())


def _mediated_pass_of(link: Link) -> Pass:
    """Return the pass whose gradient is that of a residual effect's mediator."""
    return Pass(link.mediator[0], "log_likelihood", ())


def _regress_out(jac_SD: Tensor, mediated_SD: Tensor) -> Tensor:
    """Return J minus its Frobenius projection on the mediated component (zero where that component is zero)."""
    energy = mediated_SD.square().sum()
    coefficient = torch.where(
        energy > 0, (jac_SD * mediated_SD).sum() / energy.clamp_min(torch.finfo(energy.dtype).tiny), 0
    )
    return jac_SD - coefficient * mediated_SD
