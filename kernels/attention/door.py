"""Shared-prefix attention: the queries of a segment over the keys of what came before it and over their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cepo.kernels.cotangents import fold_cotangents, run_vjp
from cepo.kernels.launch import Implementation, unit_last, use_triton

HEAD_SIZES = (16, 128)  # smallest and largest that the kernels take


def prefix_attention(
    query_BHTE: Tensor,
    past_key_BJLE: Tensor,
    past_value_BJLE: Tensor,
    key_BJTE: Tensor,
    value_BJTE: Tensor,
    past_lengths_B: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Return softmax(scale * q [k_past, k]^T) [v_past, v], each query over its past and, causally, its own segment.

    Query i of rollout b sees past keys j < past_lengths[b] and segment keys j <= i. Segments are padded on the right,
    so a padded key is seen by padded queries only. H is a multiple of J: query head h reads key head h // (H / J).
    The softmax is taken in float32, or in float64 for float64 queries.

    Args:
        query_BHTE: queries, E the head size.
        past_key_BJLE: keys of the past, right-padded to L >= 0. May be expanded from one prompt (stride 0 over B).
        past_value_BJLE: its values.
        key_BJTE: keys of the segment itself.
        value_BJTE: its values.
        past_lengths_B: how many of the L are real, int64, in [0, L].
        scale: factor of the scores, usually E ** -0.5.
        softcap: c for scores c * tanh(scores / c), or None.

    Returns:
        Tensor (B, H, T, E) of the query's dtype.
    """
    rollouts, heads, tokens, size = query_BHTE.shape
    key_heads, past = past_key_BJLE.shape[1:3]
    # One matrix product a key head: its query heads are folded into the rows, nothing is repeated. Keys are put
    # together rather than scores, and masked by a sum: neither costs the backward pass more than a view.
    key_BJNE = torch.cat([past_key_BJLE, key_BJTE], dim=2) if past else key_BJTE
    value_BJNE = torch.cat([past_value_BJLE, value_BJTE], dim=2) if past else value_BJTE
    query_BJME = query_BHTE.reshape(rollouts, key_heads, -1, size) * scale
    scores_BJMN = query_BJME @ key_BJNE.mT
    if softcap is not None:
        scores_BJMN = softcap * torch.tanh(scores_BJMN / softcap)
    if scores_BJMN.dtype not in (torch.float32, torch.float64):
        scores_BJMN = scores_BJMN.float()
    place = torch.arange(past + tokens, device=query_BHTE.device)
    row = torch.arange(tokens, device=query_BHTE.device)
    own_TN = (place >= past) & (place - past <= row[:, None])
    seen_BTN = own_TN | (place < past_lengths_B[:, None])[:, None, :]
    bias_BTN = torch.zeros_like(seen_BTN, dtype=scores_BJMN.dtype).masked_fill(~seen_BTN, float("-inf"))
    scores_BJGTN = scores_BJMN.unflatten(2, (heads // key_heads, tokens)) + bias_BTN[:, None, None]
    shares_BJMN = scores_BJGTN.softmax(-1).flatten(2, 3).to(value_BJTE.dtype)
    return (shares_BJMN @ value_BJNE).reshape(rollouts, heads, tokens, size)


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
) -> Tensor:
    """Return `prefix_attention` of the same arguments, by the Triton kernels where they apply: the door to both.

    In Triton no score is ever in memory, and a batch of cotangents (`torch.func.vmap` over `torch.autograd.grad`) goes
    through each VJP kernel once. Gradients of the past are per rollout, and formed only if the past requires grad:
    detach it where nobody asks. There is no second derivative.

    Args:
        query_BHTE: as in `prefix_attention`, and so all tensors; any strides.
        past_key_BJLE: as there.
        past_value_BJLE: as there.
        key_BJTE: as there.
        value_BJTE: as there.
        past_lengths_B: as there.
        scale: as there.
        softcap: as there.
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.

    Returns:
        Tensor (B, H, T, E) of the query's dtype.

    Raises:
        ValueError: if shapes or dtypes don't fit together, or Triton is asked for and can't serve them (head sizes
            16 to 128; float32, float16, bfloat16).
        RuntimeError: if Triton is needed and is missing, or the device is too old.
    """
    tensors = (query_BHTE, past_key_BJLE, past_value_BJLE, key_BJTE, value_BJTE)
    if not use_triton(implementation, *tensors, past_lengths_B):
        return prefix_attention(*tensors, past_lengths_B, scale=scale, softcap=softcap)
    _check_shapes(*tensors, past_lengths_B)
    return _PrefixAttention.apply(*map(unit_last, tensors), past_lengths_B.contiguous(), scale, softcap)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHTE: Tensor,
        past_key_BJLE: Tensor,
        past_value_BJLE: Tensor,
        key_BJTE: Tensor,
        value_BJTE: Tensor,
        past_lengths_B: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        from cepo.kernels.attention.forward import attention_forward

        inputs = (query_BHTE, past_key_BJLE, past_value_BJLE, key_BJTE, value_BJTE, past_lengths_B)
        with torch.cuda.device_of(query_BHTE):
            output_BHTE, lse_BHT = attention_forward(*inputs, scale, softcap)
        ctx.save_for_backward(*inputs, output_BHTE, lse_BHT)
        ctx.scale, ctx.softcap = scale, softcap
        return output_BHTE

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        asked = ctx.needs_input_grad
        wanted = (asked[0], asked[1] or asked[2], asked[3] or asked[4])
        saved = (*ctx.saved_tensors, ctx.scale, ctx.softcap, *wanted)
        gradients = iter(run_vjp(_PrefixAttentionVjp.apply, cotangents, *saved))
        formed = [next(gradients) if form else None for form in (wanted[0], *(wanted[1],) * 2, *(wanted[2],) * 2)]
        return *(gradient if ask else None for gradient, ask in zip(formed, asked, strict=False)), None, None, None


class _PrefixAttentionVjp(torch.autograd.Function):
    @staticmethod
    def forward(cotangent_CBHTE: Tensor, *saved: Any) -> tuple[Tensor, ...]:
        from cepo.kernels.attention.vjp import attention_vjp

        with torch.cuda.device_of(cotangent_CBHTE):
            return attention_vjp(unit_last(cotangent_CBHTE), *saved[:-3], wanted=saved[-3:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing: there is no second derivative."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return fold_cotangents(_PrefixAttentionVjp.apply, 1, info.batch_size, in_dims, arguments)


def _check_shapes(
    query_BHTE: Tensor,
    past_key_BJLE: Tensor,
    past_value_BJLE: Tensor,
    key_BJTE: Tensor,
    value_BJTE: Tensor,
    past_lengths_B: Tensor,
) -> None:
    """Refuse what the kernels, which only see addresses, would read wrongly."""
    tensors = (query_BHTE, past_key_BJLE, past_value_BJLE, key_BJTE, value_BJTE)
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
