"""Batched backward: a batch of cotangents goes through a kernel once, as its C axis, instead of once each.

A custom function's `backward` calls `run_vjp`, and its VJP is a second autograd function whose first arguments are the
cotangents, with a leading C axis. Two kinds of vmap reach a backward pass, and both end in one launch:

- `torch.func.vmap` over `torch.autograd.grad` asks the VJP function for its `vmap` rule, which is `fold_cotangents`;
- `torch.autograd.grad(..., is_grads_batched=True)` still uses PyTorch's older vmap, which knows no rules for custom
  functions and would hand them wrapped tensors without storage. `run_vjp` unwraps those and wraps the gradients again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# is_grads_batched cannot be nested (a vmapped backward has no graph), so its vmap is the outermost: level 1.
_LEVEL = 1


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
        RuntimeError: if a saved tensor is batched, or a cotangent is batched more than once.
    """
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    if any(isinstance(value, Tensor) and is_batched(value) for value in saved):
        raise RuntimeError("batched backward through batched activations is not supported; batch the cotangents only")
    batched = [cotangent is not None and is_batched(cotangent) for cotangent in cotangents]
    if not any(batched):
        gradients = vjp(*(None if cotangent is None else cotangent[None] for cotangent in cotangents), *saved)
        return tuple(gradient[0] for gradient in gradients)
    # A cotangent that is not batched comes out expanded to the batch: the size is read off one that is.
    first = cotangents[batched.index(True)]
    count = torch._remove_batch_dim(first, _LEVEL, 1, 0).shape[0]  # type: ignore[arg-type]
    folded = [None if one is None else torch._remove_batch_dim(one, _LEVEL, count, 0) for one in cotangents]
    if any(tensor is not None and is_batched(tensor) for tensor in folded):
        raise RuntimeError("nested batched backward is not supported; fold the cotangents into one batch axis")
    return tuple(torch._add_batch_dim(gradient, 0, _LEVEL) for gradient in vjp(*folded, *saved))


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
