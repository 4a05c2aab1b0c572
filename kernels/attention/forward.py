"""Triton forward of the shared-prefix attention; the definition is `prefix_attention`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.attention.tiles import (
    attention_variants,
    base2_scores,
    load_rows,
    padded_size,
    seen,
    store_rows,
    strides,
    token_major,
)
from cepo.kernels.launch import COUNTS, Tile, Variant, architecture, interpreted
from cepo.kernels.product import product

# (architecture, bytes of an element, head size rounded up to a power of two, at least 64) -> tile.
# float32 products are exact ("ieee": fused multiply-adds, no tensor cores) and take many registers, so tiles are small.
FORWARD_TILES = {
    (80, 2, 64): Tile(128, 64, 8, 3),
    (80, 2, 128): Tile(128, 32, 8, 3),
    (90, 2, 64): Tile(128, 128, 8, 2),
    (90, 2, 128): Tile(128, 64, 8, 2),
    **{(arch, 4, 64): Tile(32, 32, 8, 1) for arch in (80, 90)},
    **{(arch, 4, 128): Tile(32, 16, 8, 1) for arch in (80, 90)},
}


def attention_forward(
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
    """Launch the forward kernel; see `prefix_attention` for the arguments (last axis of stride 1).

    Returns:
        The output (B, H, T, E), stored as (B, T, H, E) so that the layer's next reshape copies nothing; and what
        `attention_vjp` reads: the arguments, the output, and the base-2 logsumexp of the scores, (B, H, T) float32.
    """
    inputs = (query_BHTE, past_key_BJLE, past_value_BJLE, key_BJTE, value_BJTE, past_lengths_B)
    rollouts, heads, tokens, size = query_BHTE.shape
    key_heads = key_BJTE.shape[1]
    output_BHTE = token_major((rollouts, heads, tokens, size), query_BHTE)
    lse_BHT = torch.empty((rollouts, heads, tokens), dtype=torch.float32, device=query_BHTE.device)
    tile = FORWARD_TILES[architecture(query_BHTE.device), query_BHTE.element_size(), padded_size(size)]
    attention_forward_kernel[triton.cdiv(tokens * (heads // key_heads), tile.rows), key_heads, rollouts](
        *inputs,
        output_BHTE,
        lse_BHT,
        *strides(*inputs[:5]),
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
        **tile.options,
    )
    return output_BHTE, (*inputs, output_BHTE, lse_BHT)


@triton.jit(do_not_specialize=COUNTS)
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
    heads = tl.num_programs(1) * GROUP
    first_head = key_head * GROUP
    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token_M = row_M // GROUP
    rows = tokens * GROUP
    query = query_ptr + rollout * query_stride_b + first_head * query_stride_h
    query_ME = load_rows(query, query_stride_h, query_stride_t, row_M, rows, GROUP, SIZE, BLOCK_E)

    largest_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    sum_ME = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    past = tl.load(past_lengths_i64_ptr + rollout).to(tl.int32)
    past_key = past_key_ptr + rollout * past_key_stride_b + key_head * past_key_stride_h
    past_value = past_value_ptr + rollout * past_value_stride_b + key_head * past_value_stride_h
    for start in range(0, past, BLOCK_N):
        place_N = start + tl.arange(0, BLOCK_N)
        key_NE = load_rows(past_key, 0, past_key_stride_t, place_N, past, 1, SIZE, BLOCK_E)
        value_NE = load_rows(past_value, 0, past_value_stride_t, place_N, past, 1, SIZE, BLOCK_E)
        scores_MN, _ = base2_scores(query_ME, key_NE, scale_f32, softcap_f32, SOFTCAP, INTERPRETED)
        scores_MN = tl.where(seen(token_M, place_N, past, False), scores_MN, float("-inf"))
        largest_M, total_M, sum_ME = _online(scores_MN, value_NE, largest_M, total_M, sum_ME, INTERPRETED)

    key = key_ptr + rollout * key_stride_b + key_head * key_stride_h
    value = value_ptr + rollout * value_stride_b + key_head * value_stride_h
    end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, tokens)
    for start in range(0, end, BLOCK_N):
        place_N = start + tl.arange(0, BLOCK_N)
        key_NE = load_rows(key, 0, key_stride_t, place_N, tokens, 1, SIZE, BLOCK_E)
        value_NE = load_rows(value, 0, value_stride_t, place_N, tokens, 1, SIZE, BLOCK_E)
        scores_MN, _ = base2_scores(query_ME, key_NE, scale_f32, softcap_f32, SOFTCAP, INTERPRETED)
        scores_MN = tl.where(seen(token_M, place_N, tokens, True), scores_MN, float("-inf"))
        largest_M, total_M, sum_ME = _online(scores_MN, value_NE, largest_M, total_M, sum_ME, INTERPRETED)

    output = output_ptr + (rollout * tokens * heads + first_head) * SIZE
    store_rows(output, heads, row_M, rows, sum_ME / total_M[:, None], GROUP, SIZE, BLOCK_E)
    lse_M = lse_f32_ptr + (rollout * heads + first_head + row_M % GROUP) * tokens + token_M
    tl.store(lse_M, largest_M + tl.log2(total_M), mask=row_M < rows)


@triton.jit
def _online(scores_MN, value_NE, largest_M, total_M, sum_ME, INTERPRETED: tl.constexpr):
    """Add one tile of scores to the online softmax: running maximum, sum of exponentials, weighted sum of values."""
    new_M = tl.maximum(largest_M, tl.max(scores_MN, 1))
    probs_MN = tl.exp2(scores_MN - new_M[:, None])
    keep_M = tl.exp2(largest_M - new_M)
    total_M = total_M * keep_M + tl.sum(probs_MN, 1)
    sum_ME = sum_ME * keep_M[:, None] + product(probs_MN.to(value_NE.dtype), value_NE, INTERPRETED)
    return new_M, total_M, sum_ME


def forward_variants(arch: int) -> Iterator[Variant]:
    """Yield the variants of the forward kernel that represent all its launches on an architecture."""
    for (table_arch, width, padded), tile in FORWARD_TILES.items():
        if table_arch == arch:
            yield from attention_variants(attention_forward_kernel, width, padded, tile, {})
