"""The definition of shared-prefix attention, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


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
        past_lengths_B: how many of the L are not padding, int64, in [0, L].
        scale: factor of the scores, usually E ** -0.5.
        softcap: c for scores c * tanh(scores / c), or None.

    Returns:
        Tensor (B, H, T, E) of the query's dtype.
    """
    rollouts, heads, tokens, size = query_BHTE.shape
    key_heads, past = past_key_BJLE.shape[1:3]
    # One matrix product per key head: its query heads are folded into the rows, so that keys are not repeated. Keys are
    # concatenated rather than scores, and the mask is added: in the backward pass both are mere views.
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
    probs_BJMN = scores_BJGTN.softmax(-1).flatten(2, 3).to(value_BJTE.dtype)
    return (probs_BJMN @ value_BJNE).reshape(rollouts, heads, tokens, size)
