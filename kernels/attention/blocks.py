"""Shared-prefix attention in plain PyTorch, one block of queries at a time; the definition is `prefix_attention`.

For a long rollout, the attention weights of T queries over N keys would be most of what autograd saves for the backward
pass. So each block drops its weights after use, and the backward pass recomputes them, once for all cotangents. Keys
that no query of a block sees are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

KEPT_BYTES = 2**23
"""Up to this many bytes of scores per layer, keeping the attention weights, as the definition does, is faster."""
BLOCK_BYTES = 2**24
"""Most bytes of a block's attention weights and their cotangents: about a CPU cache. Smaller blocks mean more calls."""


def block_forward(
    query_BHTE: Tensor,
    past_key_BJLE: Tensor,
    past_value_BJLE: Tensor,
    key_BJTE: Tensor,
    value_BJTE: Tensor,
    past_lengths_B: Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output (B, H, T, E), and the inputs for `block_vjp`; arguments as for `prefix_attention`."""
    inputs = (query_BHTE, past_key_BJLE, past_value_BJLE, key_BJTE, value_BJTE, past_lengths_B)
    rollouts, heads, tokens, size = query_BHTE.shape
    key_BJNE, value_BJNE = _joined(past_key_BJLE, key_BJTE), _joined(past_value_BJLE, value_BJTE)
    past = key_BJNE.shape[2] - tokens
    # Stored as (B, T, H, E), so that the layer's next reshape copies nothing.
    output_BHTE = query_BHTE.new_empty(rollouts, tokens, heads, size).transpose(1, 2)
    for start, end in _blocks(1, query_BHTE, key_BJNE):
        query_BJME = _folded(query_BHTE[:, :, start:end], key_BJNE.shape[1]) * scale
        probs_BJMN, _ = _probabilities(query_BJME, key_BJNE[:, :, : past + end], past_lengths_B, past, start, softcap)
        output_BJME = probs_BJMN.to(value_BJNE.dtype) @ value_BJNE[:, :, : past + end]
        output_BHTE[:, :, start:end] = output_BJME.reshape(rollouts, heads, end - start, size)
    return output_BHTE, inputs


def block_vjp(
    cotangent_CBHTE: Tensor,
    query_BHTE: Tensor,
    past_key_BJLE: Tensor,
    past_value_BJLE: Tensor,
    key_BJTE: Tensor,
    value_BJTE: Tensor,
    past_lengths_B: Tensor,
    *,
    scale: float,
    softcap: float | None,
    past_wanted: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the query, past keys and values, and own keys and values under C cotangents.

    Args:
        cotangent_CBHTE: cotangents of the output.
        query_BHTE: this and the other inputs are those of `block_forward`.
        past_key_BJLE: as there.
        past_value_BJLE: as there.
        key_BJTE: as there.
        value_BJTE: as there.
        past_lengths_B: as there.
        scale: as there.
        softcap: as there.
        past_wanted: whether to compute gradients of the past; False returns None for both.

    Returns:
        Five gradients of shape (C, *input shape), of the inputs' dtype.
    """
    count, rollouts, heads, tokens, size = cotangent_CBHTE.shape
    key_BJNE, value_BJNE = _joined(past_key_BJLE, key_BJTE), _joined(past_value_BJLE, value_BJTE)
    key_heads, past = key_BJNE.shape[1], key_BJNE.shape[2] - tokens
    dtype, wide = query_BHTE.dtype, torch.promote_types(query_BHTE.dtype, torch.float32)
    first = 0 if past_wanted else past  # first key that gets a gradient
    query_CBHTE = query_BHTE.new_empty(count, rollouts, tokens, heads, size).transpose(2, 3)
    # Sums over blocks, so at least float32.
    key_CBJNE = key_BJNE.new_zeros(count, rollouts, key_heads, past + tokens - first, size, dtype=wide)
    value_CBJNE = torch.zeros_like(key_CBJNE)
    for start, end in _blocks(count, query_BHTE, key_BJNE):
        seen = past + end
        query_BJME = _folded(query_BHTE[:, :, start:end], key_heads) * scale
        probs_BJMN, slope_BJMN = _probabilities(query_BJME, key_BJNE[:, :, :seen], past_lengths_B, past, start, softcap)
        cotangent_CBJME = _folded(cotangent_CBHTE[:, :, :, start:end], key_heads)
        value_CBJNE[..., : seen - first, :] += probs_BJMN[..., first:].to(dtype).mT @ cotangent_CBJME
        scores_CBJMN = (cotangent_CBJME @ value_BJNE[:, :, :seen].mT).to(probs_BJMN.dtype)
        scores_CBJMN -= (scores_CBJMN * probs_BJMN).sum(-1, keepdim=True)
        scores_CBJMN *= probs_BJMN if slope_BJMN is None else probs_BJMN * slope_BJMN
        scores_CBJMN = scores_CBJMN.to(dtype)
        query_CBJME = (scores_CBJMN @ key_BJNE[:, :, :seen]) * scale
        query_CBHTE[:, :, :, start:end] = query_CBJME.reshape(count, rollouts, heads, end - start, size)
        key_CBJNE[..., : seen - first, :] += scores_CBJMN[..., first:].mT @ query_BJME
    both = [gradient_CBJNE.to(dtype) for gradient_CBJNE in (key_CBJNE, value_CBJNE)]
    own = past - first
    of_past = [gradient[..., :own, :] if past_wanted else None for gradient in both]
    return query_CBHTE, *of_past, *(gradient[..., own:, :] for gradient in both)


def _blocks(count: int, query_BHTE: Tensor, key_BJNE: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each block of queries, the last block first: it takes the most memory."""
    rollouts, heads, tokens, _ = query_BHTE.shape
    wide = torch.promote_types(query_BHTE.dtype, torch.float32)
    row_bytes = (count + 1) * rollouts * heads * key_BJNE.shape[2] * wide.itemsize
    size = max(1, BLOCK_BYTES // row_bytes)
    for end in range(tokens, 0, -size):
        yield max(0, end - size), end


def _probabilities(
    query_BJME: Tensor, key_BJNE: Tensor, past_lengths_B: Tensor, past: int, start: int, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Return a block's attention weights, in float32 or wider, and the derivative of the soft cap, if there is one."""
    scores_BJMN, slope_BJMN = query_BJME @ key_BJNE.mT, None
    if softcap is not None:
        capped_BJMN = torch.tanh(scores_BJMN / softcap)
        scores_BJMN, slope_BJMN = softcap * capped_BJMN, 1 - capped_BJMN.square()
    scores_BJMN = scores_BJMN.to(torch.promote_types(scores_BJMN.dtype, torch.float32))
    tokens = key_BJNE.shape[2] - past - start
    place_N = torch.arange(key_BJNE.shape[2], device=key_BJNE.device)
    last_T1 = torch.arange(past + start, key_BJNE.shape[2], device=key_BJNE.device)[:, None]
    hidden_BTN = (place_N > last_T1) | ((place_N < past) & (place_N >= past_lengths_B[:, None]))[:, None]
    scores_BJMN.unflatten(2, (-1, tokens)).masked_fill_(hidden_BTN[:, None, None], float("-inf"))
    return scores_BJMN.softmax(-1), slope_BJMN


def _folded(heads_HTE: Tensor, key_heads: int) -> Tensor:
    """Fold the query heads that read one key head into the rows: (..., H, T, E) to (..., J, H / J * T, E)."""
    *batch, _, _, size = heads_HTE.shape
    return heads_HTE.reshape(*batch, key_heads, -1, size)


def _joined(past_BJLE: Tensor, own_BJTE: Tensor) -> Tensor:
    return torch.cat([past_BJLE, own_BJTE], dim=2) if past_BJLE.shape[2] else own_BJTE
