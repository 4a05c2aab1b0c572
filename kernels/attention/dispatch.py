"""Shared-prefix attention: a segment's queries over the keys of what came before it and over the segment's own."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cepo.kernels.attention.blocks import KEPT_BYTES, block_forward, block_vjp
from cepo.kernels.attention.definition import prefix_attention
from cepo.kernels.cotangents import differentiable
from cepo.kernels.launch import Implementation, unit_last, use_triton

HEAD_SIZES = (16, 128)  # smallest and largest that the kernels take


def attend(
    query_BHTE: Tensor,
    past_key_BJLE: Tensor,
    past_value_BJLE: Tensor,
    key_BJTE: Tensor,
    value_BJTE: Tensor,
    past_lengths_B: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    implementation: Implementation = "auto",
    kept_bytes: int = KEPT_BYTES,
) -> Tensor:
    """Return `prefix_attention` of the same arguments, by the Triton kernels on CUDA and in blocks elsewhere.

    Where the scores are large, the backward pass recomputes them; the Triton kernels never store them. A batch of
    cotangents (`torch.func.vmap` over `torch.autograd.grad`) takes one pass through the VJP. Gradients of the past are
    per rollout, and computed only if the past requires grad: detach it if they are not needed. There is no second
    derivative.

    Args:
        query_BHTE: queries; this and the other tensors are as in `prefix_attention`, with any strides.
        past_key_BJLE: keys of the past.
        past_value_BJLE: its values.
        key_BJTE: keys of the segment itself.
        value_BJTE: its values.
        past_lengths_B: how many keys of the past are not padding, int64, in [0, L].
        scale: factor of the scores.
        softcap: c for scores c * tanh(scores / c), or None.
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.
        kept_bytes: in plain PyTorch, attention weights are kept for the backward pass if the scores take at most this
            many bytes, >= 0.

    Returns:
        Tensor (B, H, T, E) of the query's dtype.

    Raises:
        ValueError: if shapes or dtypes don't fit together, or Triton is asked for and can't serve them (it takes head
            sizes 16 to 128 in float32, float16 or bfloat16).
        RuntimeError: if Triton is needed and is missing, or the device is too old.
    """
    tensors = (query_BHTE, past_key_BJLE, past_value_BJLE, key_BJTE, value_BJTE)
    asked = [tensor.requires_grad for tensor in tensors]
    if not use_triton(implementation, *tensors, past_lengths_B):
        if _score_bytes(*tensors) <= kept_bytes:
            return prefix_attention(*tensors, past_lengths_B, scale=scale, softcap=softcap)
        return differentiable(
            partial(block_forward, scale=scale, softcap=softcap),
            partial(block_vjp, scale=scale, softcap=softcap, past_wanted=asked[1] or asked[2]),
            *tensors,
            past_lengths_B,
        )
    _check_shapes(*tensors, past_lengths_B)
    from cepo.kernels.attention.forward import attention_forward
    from cepo.kernels.attention.vjp import attention_vjp

    wanted = (asked[0], asked[1] or asked[2], asked[3] or asked[4])
    return differentiable(
        partial(attention_forward, scale=scale, softcap=softcap),
        partial(attention_vjp, scale=scale, softcap=softcap, wanted=wanted),
        *map(unit_last, tensors),
        past_lengths_B.contiguous(),
    )


def _score_bytes(query_BHTE: Tensor, past_key_BJLE: Tensor, *_: Tensor) -> int:
    """Return the bytes of the scores, in float32 or wider."""
    tokens, past = query_BHTE.shape[2], past_key_BJLE.shape[2]
    return query_BHTE.shape[:3].numel() * (past + tokens) * max(4, query_BHTE.itemsize)


def _check_shapes(*inputs: Tensor) -> None:
    """Check shapes and dtypes: the kernels see only pointers and would read other memory."""
    *tensors, past_lengths_B = inputs
    query_BHTE, past_key_BJLE, past_value_BJLE, key_BJTE, value_BJTE = tensors
    if any(tensor.ndim != 4 or tensor.dtype != query_BHTE.dtype for tensor in tensors):
        seen = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        raise ValueError(f"query, past and segment must be 4-dimensional and of one dtype, got {seen}")
    rollouts, heads, tokens, size = query_BHTE.shape
    key_heads, past = past_key_BJLE.shape[1:3]
    segment = (rollouts, key_heads, tokens, size)
    if key_BJTE.shape != segment or value_BJTE.shape != segment or tokens == 0 or heads % max(key_heads, 1):
        shapes = [tuple(tensor.shape) for tensor in (query_BHTE, key_BJTE, value_BJTE)]
        raise ValueError(f"expected segment keys and values {segment} with T > 0 and H a multiple of J, got {shapes}")
    if past_key_BJLE.shape != (rollouts, key_heads, past, size) or past_value_BJLE.shape != past_key_BJLE.shape:
        shapes = [tuple(tensor.shape) for tensor in (past_key_BJLE, past_value_BJLE)]
        raise ValueError(f"expected past keys and values ({rollouts}, {key_heads}, L, {size}), got {shapes}")
    if past_lengths_B.shape != (rollouts,) or past_lengths_B.dtype != torch.int64:
        raise ValueError(
            f"past_lengths_B must be int64 of shape ({rollouts},), got {past_lengths_B.dtype} of {past_lengths_B.shape}"
        )
    if not HEAD_SIZES[0] <= size <= HEAD_SIZES[1]:
        raise ValueError(f"the Triton attention takes head sizes 16 to 128, got {size}; use implementation='torch'")
