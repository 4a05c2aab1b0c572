"""Batched backward: a batch of cotangents goes through a kernel once, as its C axis, instead of once each.

A custom function's `backward` calls `run_vjp`, and its VJP is a second autograd function whose first arguments are the
cotangents, with a leading C axis. `torch.func.vmap` over `torch.autograd.grad` asks that second function for its `vmap`
rule, which is `fold_cotangents`: one launch, whatever the batch. `torch.autograd.grad(..., is_grads_batched=True)` is
PyTorch's older vmap: it knows no rules of custom functions, hands them tensors without storage, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def run_vjp(
    vjp: Callable[..., tuple[Tensor, ...]], cotangents: tuple[Tensor | None, ...], *saved: Any
) -> tuple[Tensor, ...]:
    """Return the gradients that `vjp` forms from these cotangents, batched exactly as they are.

    Args:
        vjp: `apply` of the VJP function: takes the cotangents, each with a leading C axis or None, then `saved`;
            returns a tuple of tensors that all lead with C.
        cotangents: what backward received, None where no gradient arrived.
        saved: the rest of its arguments, never batched.

    Returns:
        The gradients without the C axis (under a vmap: one logical gradient each).

    Raises:
        RuntimeError: if a saved tensor is batched, or the batch is one of `is_grads_batched`.
    """
    gradients = vjp(*(None if cotangent is None else cotangent[None] for cotangent in cotangents), *saved)
    return tuple(gradient[0] for gradient in gradients)


def fold_cotangents(
    vjp: Callable[..., tuple[Tensor, ...]], count: int, batch: int, in_dims: tuple[int | None, ...], arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Fold a vmapped axis of the cotangents into their C axis: the `vmap` rule of every VJP function.

    Args:
        vjp: `apply` of the VJP function.
        count: how many of the leading arguments are cotangents.
        batch: size of the vmapped axis.
        in_dims: where that axis lies in each argument, None where it does not.
        arguments: the arguments.

    Returns:
        The gradients with the vmapped axis first, and its place (0) for each.

    Raises:
        RuntimeError: if anything but a cotangent is batched.
    """
    if any(dim is not None for dim in in_dims[count:]):
        raise RuntimeError("batched backward through batched activations is not supported; batch the cotangents only")
    folded: list[Tensor | None] = []
    for cotangent, dim in zip(arguments[:count], in_dims[:count], strict=True):
        if cotangent is None:
            folded.append(None)
            continue
        batched = cotangent.expand(batch, *cotangent.shape) if dim is None else cotangent.movedim(dim, 0)
        folded.append(batched.flatten(0, 1))
    gradients = vjp(*folded, *arguments[count:])
    return tuple(gradient.unflatten(0, (batch, -1)) for gradient in gradients), (0,) * len(gradients)
