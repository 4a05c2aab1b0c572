"""Recompute modules in the backward pass (checkpointing), so that the graph keeps their inputs and nothing inside.

MLPs and attention weights are most of what a graph keeps besides keys, values and hidden states. Recomputing them costs
one of their forward passes per backward pass of a segment, however many cotangents go back at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cepo.jacobian.group.swaps import Forward, Swaps
from cepo.kernels.cotangents import differentiable


def recomputing(swaps: Swaps, modules: Sequence[nn.Module]) -> Swaps:
    """Return the swaps with all attention and these modules recomputed, each with its kernels if it has any."""
    forwards = dict(swaps.forwards)
    for module in modules:
        own = partial(type(module).forward, module)
        forwards[module] = partial(_recomputed, forwards.get(module, own))
    return replace(swaps, forwards=tuple(forwards.items()), kept_bytes=0)


@contextmanager
def watching_mlps(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, None]]:
    """Collect the modules that can be recomputed, as keys, while the model runs in this context.

    They are direct children of a decoder layer, have children of their own, and map one tensor to one tensor.
    """
    found: dict[nn.Module, None] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if len(inputs) == 1 and not options and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            found[module] = None

    handles = [
        child.register_forward_hook(note, with_kwargs=True)
        for layer in layers
        for child in layer.children()
        if any(child.children())
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _recomputed(forward: Forward, hidden: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return forward(hidden)
    return differentiable(lambda entered: (forward(entered), (entered,)), partial(_vjp, forward), hidden)


def _vjp(forward: Forward, cotangent_C: Tensor, hidden: Tensor) -> tuple[Tensor]:
    with torch.enable_grad():
        entered = hidden.detach().requires_grad_()
        output = forward(entered)

        def pull_back(cotangent: Tensor) -> Tensor:
            return torch.autograd.grad(output, entered, cotangent)[0]

        if len(cotangent_C) == 1:
            return (pull_back(cotangent_C[0])[None],)
        return (torch.func.vmap(pull_back)(cotangent_C),)
