"""Differentiable operations from two launchers, whose backward pass takes a whole batch of cotangents in one launch.

The VJP is itself an autograd function, with the cotangents' C axis first. Its `vmap` rule, which `torch.func.vmap` over
`torch.autograd.grad` calls, folds the batch into the C axis. `torch.autograd.grad(..., is_grads_batched=True)` is
PyTorch's older vmap: it ignores such rules and passes tensors without storage, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ForwardLauncher = Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
VjpLauncher = Callable[..., tuple[Tensor | None, ...]]


def differentiable(forward: ForwardLauncher, vjp: VjpLauncher, *tensors: Tensor) -> Tensor:
    """Run a forward launcher, and compute gradients of its output with a VJP launcher.

    There is no second derivative.

    Args:
        forward: takes the tensors; returns the output and the tensors that `vjp` reads.
        vjp: takes C cotangents of the output, stacked along a leading axis, then what `forward` saved. Returns one
            gradient with a leading C axis for each of the first tensors, or None where none is required; the
            remaining tensors are constants.
        tensors: the operation's inputs.

    Returns:
        The output. Its backward pass raises RuntimeError if a saved tensor is batched, or with `is_grads_batched`.
    """
    output: Tensor = _Forward.apply(forward, vjp, *tensors)
    return output


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: ForwardLauncher, vjp: VjpLauncher, *tensors: Tensor) -> Tensor:
        with torch.cuda.device_of(tensors[0]):
            output, saved = forward(*tensors)
        ctx.save_for_backward(*saved)
        ctx.vjp = vjp
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        gradients = iter(_Vjp.apply(ctx.vjp, wanted, cotangents[0][None], *ctx.saved_tensors))
        return None, None, *(next(gradients)[0] if asked else None for asked in wanted)


class _Vjp(torch.autograd.Function):
    @staticmethod
    def forward(vjp: VjpLauncher, wanted: Sequence[bool], cotangent_C: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        with torch.cuda.device_of(cotangent_C):
            gradients = vjp(cotangent_C, *saved)
        return tuple(
            gradient for gradient, asked in zip(gradients, wanted, strict=False) if asked and gradient is not None
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing: there is no second derivative."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], vjp: VjpLauncher, wanted: Sequence[bool], *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        cotangent_C, *saved = tensors
        dim, *saved_dims = in_dims[2:]
        if any(saved_dim is not None for saved_dim in saved_dims):
            raise RuntimeError(
                "batched backward through batched activations is not supported; batch the cotangents only"
            )
        gradients = _Vjp.apply(vjp, wanted, cotangent_C.movedim(dim, 0).flatten(0, 1), *saved)
        return tuple(gradient.unflatten(0, (info.batch_size, -1)) for gradient in gradients), (0,) * len(gradients)
