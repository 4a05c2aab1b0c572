"""An effect expanded to second order about the rollout, by gradients and Hessian-vector products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cepo.jacobian.links import Link
from cepo.jacobian.model import HeldModel, eager_attention
from cepo.jacobian.path import between
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import sum_of_terms, target_terms


@dataclass(frozen=True)
class Expansion:
    """The first two terms of s(X) - s(X') about X, in nats for log-likelihoods.

    Attributes:
        first: the gradient's term, <J, d> with d = E(X) - E(X').
        second: the curvature's term, -d^T H d / 2.
    """

    first: float
    second: float

    @property
    def total(self) -> float:
        """The second-order estimate of the effect."""
        return self.first + self.second


def expansions(
    model: HeldModel, rollout: Rollout, others: Sequence[Rollout], links: Sequence[Link]
) -> dict[str, list[Expansion]]:
    """Return the expansion of each link for each counterfactual, by the link's name.

    J and H are the gradient and the Hessian of the link's target function at the rollout itself, with respect to the
    source's embeddings. They take one backward pass, and one second-order pass per counterfactual. Attention is eager,
    since its backward pass can be differentiated. The tokens before the source are run without a graph.

    Args:
        model: the model.
        rollout: a well-formed rollout.
        others: counterfactuals that differ from it only in the source's tokens.
        links: links of one source, each a total effect.
    """
    source = rollout.spans[links[0].source].positions
    start, end = source[0], max(target_terms(rollout, link.target, link.function)[-1].position for link in links)
    device = model.embedding.weight.device
    found: dict[str, list[Expansion]] = {}
    with model.prepared(), eager_attention(model.causal_lm):
        own_BT = torch.tensor([rollout.token_ids[start:end]], device=device)
        own_BTD = model.embedding(own_BT).detach().requires_grad_()
        options: dict[str, Any] = {"use_cache": False}
        if start:
            before_BT = torch.tensor([rollout.token_ids[:start]], device=device)
            with torch.no_grad():
                past = model.forward(model.causal_lm, input_ids=before_BT, use_cache=True).past_key_values
            options = {"past_key_values": past, "use_cache": True}
        rows = sorted(
            {term.position - 1 - start for link in links for term in target_terms(rollout, link.target, link.function)}
        )
        logits_PV = model.logits(rows, inputs_embeds=own_BTD, **options)
        place = {row: index for index, row in enumerate(rows)}
        for link in links:
            terms = target_terms(rollout, link.target, link.function)
            value = sum_of_terms(logits_PV[[place[term.position - 1 - start] for term in terms]], terms)
            (gradient_BTD,) = torch.autograd.grad(value, [own_BTD], create_graph=True)
            found[link.name] = [
                _expansion(gradient_BTD, own_BTD, _step(model, own_BTD, other, start, end)) for other in others
            ]
    return found


def _step(model: HeldModel, own_BTD: Tensor, other: Rollout, start: int, end: int) -> Tensor:
    ids_BT = torch.tensor([other.token_ids[start:end]], device=own_BTD.device)
    return between(own_BTD.detach(), model.embedding(ids_BT).detach(), 1.0)[1].to(own_BTD.dtype)


def _expansion(gradient_BTD: Tensor, own_BTD: Tensor, step_BTD: Tensor) -> Expansion:
    first = (gradient_BTD * step_BTD).sum()
    (product_BTD,) = torch.autograd.grad(first, [own_BTD], retain_graph=True)
    return Expansion(float(first.detach()), -0.5 * float((product_BTD * step_BTD).double().sum()))
