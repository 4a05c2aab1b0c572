"""Exact gradients of a reward model: d reward / d E(text), and the contribution of each token of an edit.

With E(X) the embeddings of a text and E(X') those of an edit of it with the same number of tokens,

    r(X) - r(X') = integral over a in [0, 1] of <J(E(X') + a (E(X) - E(X'))), E(X) - E(X')>,

so the rows of the integral, one per token, add up to the difference. For a pairwise model r is the logit of A minus
that of B, and the text holds both responses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cepo.jacobian.model import HeldModel
from cepo.jacobian.path import between, gauss_nodes


@dataclass(frozen=True)
class EditAttribution:
    """What each token of a text adds to the reward, relative to an edit of it.

    Attributes:
        difference: r(X) - r(X'), from two forward passes.
        attribution_T: what each token added, float64; 0 where text and edit have the same token. Its sum estimates the
            difference.
        nodes: nodes of the quadrature along the path.
    """

    difference: float
    attribution_T: Tensor
    nodes: int

    @property
    def certificate(self) -> float:
        """The error of the attributions: |their sum - difference|."""
        return abs(float(self.attribution_T.sum()) - self.difference)


def reward_jacobian(model: Any, token_ids: Sequence[int], positions: Sequence[int]) -> tuple[float, Tensor]:
    """Return the reward of a text, and its exact gradient with respect to the embeddings of some of its tokens.

    Args:
        model: from `read_last_token`; restored afterwards.
        token_ids: token ids of the text, without padding.
        positions: positions of S of its tokens, such as the response's.

    Returns:
        The reward, and d reward / d E, (S, D), float32, or float64 for a float64 model. E is the output of the
        embedding module.
    """
    held = HeldModel(model)
    ids_BT = _as_batch(held, token_ids)
    with held.prepared(), _watched(held, lambda output: output.detach().requires_grad_()) as seen:
        reward_B = _rewards(model, ids_BT)
        (gradient_BTD,) = torch.autograd.grad(reward_B.sum(), [seen[0]])
    gradient_TD = gradient_BTD[0].to(torch.promote_types(gradient_BTD.dtype, torch.float32))
    return float(reward_B[0].detach()), gradient_TD[list(positions)].detach()


def attribute_edit(
    model: Any,
    token_ids: Sequence[int],
    edit_ids: Sequence[int],
    *,
    nodes: int | Literal["auto"] = "auto",
    tolerance: float = 0.01,
    most_nodes: int = 64,
) -> EditAttribution:
    """Return what each token of a text contributed to the reward, relative to an edit of the text.

    Args:
        model: from `read_last_token`; restored afterwards.
        token_ids: token ids of the text X, without padding.
        edit_ids: token ids of the edit X', as many as in X.
        nodes: nodes of the Gauss-Legendre quadrature along the path, at least 1; "auto" doubles them from 1 until the
            certificate is within `tolerance * max(1, |difference|)`, up to `most_nodes`.
        tolerance: for "auto", above 0.
        most_nodes: for "auto", at least 1.

    Raises:
        ValueError: if the lengths differ.
    """
    if len(token_ids) != len(edit_ids):
        raise ValueError(
            f"token_ids has {len(token_ids)} tokens and edit_ids {len(edit_ids)}; a path needs the same number in both"
        )
    held = HeldModel(model)
    own_BT, other_BT = _as_batch(held, token_ids), _as_batch(held, edit_ids)
    with held.prepared():
        with torch.no_grad():
            difference = float(_rewards(model, own_BT)[0]) - float(_rewards(model, other_BT)[0])
            own_BTD, other_BTD = held.embedding(own_BT), held.embedding(other_BT)
        count = 1 if nodes == "auto" else nodes
        while True:
            found = EditAttribution(difference, _integrate(model, held, own_BT, own_BTD, other_BTD, count), count)
            close = found.certificate <= tolerance * max(1.0, abs(difference))
            if nodes != "auto" or close or 2 * count > most_nodes:
                return found
            count *= 2


def _integrate(model: Any, held: HeldModel, ids_BT: Tensor, own_BTD: Tensor, other_BTD: Tensor, count: int) -> Tensor:
    """Return the contracted path Jacobian, (T,), from all nodes as one batch."""
    points = gauss_nodes(count)
    fraction_M11 = own_BTD.new_tensor([fraction for fraction, _ in points]).view(-1, 1, 1)
    at_MTD, step_BTD = between(own_BTD, other_BTD, fraction_M11)
    with _watched(held, lambda output: at_MTD.detach().requires_grad_()) as seen:
        (gradient_MTD,) = torch.autograd.grad(_rewards(model, ids_BT.expand(count, -1)).sum(), [seen[0]])
    weight_M = torch.tensor([weight for _, weight in points], dtype=torch.float64)
    rows_MT = (gradient_MTD.double() * step_BTD.double()).sum(-1).cpu()
    return weight_M @ rows_MT


@contextlib.contextmanager
def _watched(held: HeldModel, replace: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Replace the embedding module's outputs, and yield a list that collects the replacements."""
    seen: list[Tensor] = []

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        seen.append(replace(output))
        return seen[-1]

    handle = held.embedding.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def _rewards(model: Any, ids_BT: Tensor) -> Tensor:
    reward_B: Tensor = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits[:, 0]
    return reward_B


def _as_batch(held: HeldModel, token_ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(token_ids)], device=held.embedding.weight.device)
