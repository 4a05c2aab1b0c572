"""Triton forward of the prefix attention, and what both passes share. The definition: `attention.prefix_attention`.

The G = H / J query heads that read one key head are folded into the rows of a tile (row = token * G + head in group),
so a key or value is loaded once for all of them, and a suffix of a few tokens still fills a tile.
Scores are kept in base 2: exp2 is what the hardware has.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.launch import Tile, Variant, architecture, interpreted

# (architecture, bytes of an element, head size rounded up to a power of two, at least 64) -> tile.
# float32 products are exact ("ieee": fused multiply-adds, no tensor cores), which takes registers: small tiles.
FORWARD_TILES = {
    (80, 2, 64): Tile(128, 64, 8, 3),
    (80, 2, 128): Tile(128, 32, 8, 3),
    (80, 4, 64): Tile(32, 32, 8, 1),
    (80, 4, 128): Tile(32, 16, 8, 1),
    (90, 2, 64): Tile(128, 128, 8, 2),
    (90, 2, 128): Tile(128, 64, 8, 2),
    (90, 4, 64): Tile(32, 32, 8, 1),
    (90, 4, 128): Tile(32, 16, 8, 1),
}


def attention_forward(
    query_BHTE: Tensor,
    past_key_BJLE: Tensor,
    past_value_BJLE: Tensor,
    key_BJTE: Tensor,
    value_BJTE: Tensor,
    past_lengths_B: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; see `attention.prefix_attention` for the arguments (last axis of stride 1).

    Returns:
        The output (B, H, T, E), whose memory is laid out (B, T, H, E) as the layer's next reshape wants it, and the
        base-2 logsumexp of the scores, (B, H, T) float32.
    """
    rollouts, heads, tokens, size = query_BHTE.shape
    key_heads = key_BJTE.shape[1]
    output_BHTE = token_major((rollouts, heads, tokens, size), query_BHTE)
    lse_BHT = torch.empty((rollouts, heads, tokens), dtype=torch.float32, device=query_BHTE.device)
    tile = FORWARD_TILES[architecture(query_BHTE.device), query_BHTE.element_size(), padded_size(size)]
    grid = (triton.cdiv(tokens * (heads // key_heads), tile.rows), key_heads, rollouts)
    attention_forward_kernel[grid](
        query_BHTE,
        past_key_BJLE,
        past_value_BJLE,
        key_BJTE,
        value_BJTE,
        past_lengths_B,
        output_BHTE,
        lse_BHT,
        *query_BHTE.stride()[:3],
        *past_key_BJLE.stride()[:3],
        *past_value_BJLE.stride()[:3],
        *key_BJTE.stride()[:3],
        *value_BJTE.stride()[:3],
        *output_BHTE.stride()[:3],
        tokens,
        scale,
        softcap or 0.0,
        GROUP=heads // key_heads,
        SIZE=size,
        BLOCK_E=padded_size(size),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        SOFTCAP=softcap is not None,
        INTERPRETED=interpreted(query_BHTE),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return output_BHTE, lse_BHT


def padded_size(size: int) -> int:
    """Return the width of the tile that holds a head of this size."""
    return max(64, triton.next_power_of_2(size))


def token_major(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an unwritten (..., heads, tokens, E) tensor whose memory is laid out (..., tokens, heads, E)."""
    *batch, heads, tokens, size = shape
    return torch.empty((*batch, tokens, heads, size), dtype=like.dtype, device=like.device).transpose(-3, -2)


@triton.jit
def attention_forward_kernel(
    query_ptr,
    past_key_ptr,
    past_value_ptr,
    key_ptr,
    value_ptr,
    past_lengths_i64_ptr,
    output_ptr,
    lse_f32_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    past_key_stride_b,
    past_key_stride_h,
    past_key_stride_t,
    past_value_stride_b,
    past_value_stride_h,
    past_value_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    output_stride_b,
    output_stride_h,
    output_stride_t,
    tokens,
    scale_f32,
    softcap_f32,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Attend from one tile of rows of one key head of one rollout: first over the past, then causally over the segment.

    Bytes, e per element: queries and output 2 B H T E e; keys and values 2 B J (L + T) E e once from memory (every row
    tile reads them again, from L2); logsumexp 4 B H T.
    FLOPs: 4 B H E T (L + T / 2), half of them scores, half the weighted sum of values.
    """
    tile = tl.program_id(0)
    key_head = tl.program_id(1)
    rollout = tl.program_id(2).to(tl.int64)
    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token_M = row_M // GROUP
    head_M = key_head * GROUP + row_M % GROUP
    column_E = tl.arange(0, BLOCK_E)
    real_ME = (row_M < tokens * GROUP)[:, None] & (column_E < SIZE)[None, :]
    query_M = query_ptr + rollout * query_stride_b + head_M * query_stride_h + token_M * query_stride_t
    query_ME = tl.load(query_M[:, None] + column_E[None, :], mask=real_ME, other=0.0)

    length = tl.load(past_lengths_i64_ptr + rollout).to(tl.int32)
    past_key_base = past_key_ptr + rollout * past_key_stride_b + key_head * past_key_stride_h
    past_value_base = past_value_ptr + rollout * past_value_stride_b + key_head * past_value_stride_h
    largest_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    sum_ME = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for start in range(0, length, BLOCK_N):
        place_N = start + tl.arange(0, BLOCK_N)
        key_NE = load_rows(past_key_base, past_key_stride_t, place_N, length, SIZE, BLOCK_E)
        value_NE = load_rows(past_value_base, past_value_stride_t, place_N, length, SIZE, BLOCK_E)
        scores_MN, _ = base2_scores(query_ME, key_NE, scale_f32, softcap_f32, SOFTCAP, INTERPRETED)
        scores_MN = tl.where((place_N < length)[None, :], scores_MN, float("-inf"))
        largest_M, total_M, sum_ME = _online(scores_MN, value_NE, largest_M, total_M, sum_ME, INTERPRETED)

    key_base = key_ptr + rollout * key_stride_b + key_head * key_stride_h
    value_base = value_ptr + rollout * value_stride_b + key_head * value_stride_h
    end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, tokens)
    for start in range(0, end, BLOCK_N):
        place_N = start + tl.arange(0, BLOCK_N)
        key_NE = load_rows(key_base, key_stride_t, place_N, tokens, SIZE, BLOCK_E)
        value_NE = load_rows(value_base, value_stride_t, place_N, tokens, SIZE, BLOCK_E)
        scores_MN, _ = base2_scores(query_ME, key_NE, scale_f32, softcap_f32, SOFTCAP, INTERPRETED)
        seen_MN = (place_N[None, :] <= token_M[:, None]) & (place_N < tokens)[None, :]
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
        largest_M, total_M, sum_ME = _online(scores_MN, value_NE, largest_M, total_M, sum_ME, INTERPRETED)

    output_M = output_ptr + rollout * output_stride_b + head_M * output_stride_h + token_M * output_stride_t
    output_ME = sum_ME / total_M[:, None]
    tl.store(output_M[:, None] + column_E[None, :], output_ME.to(output_ptr.dtype.element_ty), mask=real_ME)
    lse_M = lse_f32_ptr + (rollout * tl.num_programs(1) * GROUP + head_M) * tokens + token_M
    tl.store(lse_M, largest_M + tl.log2(total_M), mask=row_M < tokens * GROUP)


@triton.jit
def _online(scores_MN, value_NE, largest_M, total_M, sum_ME, INTERPRETED: tl.constexpr):
    """Take one tile of scores into the running maximum, sum of exponentials and weighted sum of values."""
    new_M = tl.maximum(largest_M, tl.max(scores_MN, 1))
    shares_MN = tl.exp2(scores_MN - new_M[:, None])
    keep_M = tl.exp2(largest_M - new_M)
    total_M = total_M * keep_M + tl.sum(shares_MN, 1)
    sum_ME = sum_ME * keep_M[:, None] + product(shares_MN.to(value_NE.dtype), value_NE, INTERPRETED)
    return new_M, total_M, sum_ME


@triton.jit
def product(left_MK, right_KN, INTERPRETED: tl.constexpr):
    """Multiply two tiles into float32. The interpreter multiplies the raw bits of bfloat16: widen there."""
    if INTERPRETED:
        left_MK = left_MK.to(tl.float32)
        right_KN = right_KN.to(tl.float32)
    return tl.dot(left_MK, right_KN, input_precision="ieee")


@triton.jit
def load_rows(base, stride, place_N, limit, SIZE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load rows of a head; rows at or past the limit and columns past the head size come as zeros."""
    column_E = tl.arange(0, BLOCK_E)
    mask_NE = (place_N < limit)[:, None] & (column_E < SIZE)[None, :]
    return tl.load(base + place_N[:, None] * stride + column_E[None, :], mask=mask_NE, other=0.0)


@triton.jit
def base2_scores(query_ME, key_NE, scale, softcap, SOFTCAP: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the scores times log2 e, and d score / d (uncapped score), which is 1 without a cap."""
    scores_MN = product(query_ME, tl.trans(key_NE), INTERPRETED) * scale
    if SOFTCAP:
        # tanh x = 1 - 2 / (1 + e^2x): no library call, and right at both ends.
        tanh_MN = 1.0 - 2.0 / (1.0 + tl.exp2(scores_MN * (2.0 * 1.4426950408889634 / softcap)))
        slope_MN = 1.0 - tanh_MN * tanh_MN
        scores_MN = tanh_MN * (softcap * 1.4426950408889634)
    else:
        slope_MN = 1.0
        scores_MN = scores_MN * 1.4426950408889634
    return scores_MN, slope_MN


def forward_variants(arch: int) -> Iterator[Variant]:
    """Yield every form in which the forward kernel is launched on an architecture."""
    for (table_arch, width, padded), tile in FORWARD_TILES.items():
        if table_arch == arch:
            yield from attention_variants(attention_forward_kernel, width, padded, tile, {})


def attention_variants(
    kernel: object, width: int, padded: int, tile: Tile, constants: dict[str, Any], capped_tile: Tile | None = None
) -> Iterator[Variant]:
    """Yield one kernel of the attention for full heads, for masked ones, and with capped scores."""
    dtype = torch.float32 if width == 4 else torch.bfloat16
    masked = [(96, 3, False)] if (width, padded) == (2, 128) else []
    for size, group, capped in [(padded, 2, False), *masked, (padded if width == 2 else padded * 3 // 4, 1, True)]:
        used = capped_tile if capped and capped_tile else tile
        shape = {"GROUP": group, "SIZE": size, "BLOCK_E": padded, "BLOCK_M": used.rows, "BLOCK_N": used.columns}
        yield Variant(kernel, dtype, {**shape, "SOFTCAP": capped, "INTERPRETED": False, **constants}, used)
