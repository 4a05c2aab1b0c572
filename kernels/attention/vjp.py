"""Triton VJP of the prefix attention for C cotangents: the scores' tiles are formed again, nothing of them was saved.

The cotangent is a grid axis, and the fastest one: the programs of all cotangents of a tile run together, so queries,
keys and values come from memory once and from L2 after that. (Two cotangents in one program spill at head size 128.)
With P = 2^(scores - logsumexp), dP = dO V^T and delta = sum_e dO O:  dS = P (dP - delta),  dQ = scale dS K,
dK = scale dS^T Q,  dV = P^T dO.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.attention.forward import (
    attention_variants,
    base2_scores,
    load_rows,
    padded_size,
    product,
    token_major,
)
from cepo.kernels.launch import Tile, Variant, architecture, interpreted

# Keys as in triton_attention.FORWARD_TILES.
QUERY_TILES = {
    (80, 2, 64): Tile(128, 64, 8, 2),
    (80, 2, 128): Tile(64, 64, 8, 2),
    (80, 4, 64): Tile(32, 32, 8, 1),
    (80, 4, 128): Tile(32, 16, 8, 1),
    (90, 2, 64): Tile(128, 64, 8, 2),
    (90, 2, 128): Tile(64, 64, 8, 2),
    (90, 4, 64): Tile(32, 32, 8, 1),
    (90, 4, 128): Tile(16, 16, 8, 1),
}
KEY_TILES = {
    (80, 2, 64): Tile(64, 64, 8, 2),
    (80, 2, 128): Tile(64, 64, 8, 2),
    (80, 4, 64): Tile(32, 32, 8, 1),
    (80, 4, 128): Tile(32, 32, 8, 1),
    (90, 2, 64): Tile(64, 64, 8, 2),
    (90, 2, 128): Tile(64, 64, 8, 2),
    (90, 4, 64): Tile(32, 32, 8, 1),
    (90, 4, 128): Tile(16, 32, 8, 1),
}
# Capped scores keep their slope in registers too; where that spills, half the rows.
CAPPED_KEY_TILES = {(80, 2, 128): Tile(32, 64, 8, 2), (90, 2, 128): Tile(32, 64, 8, 2)}
DELTA_TILE = Tile(32, 0, 4, 1)


def attention_vjp(
    cotangent_CBHTE: Tensor,
    query_BHTE: Tensor,
    past_key_BJLE: Tensor,
    past_value_BJLE: Tensor,
    key_BJTE: Tensor,
    value_BJTE: Tensor,
    past_lengths_B: Tensor,
    output_BHTE: Tensor,
    lse_BHT: Tensor,
    scale: float,
    softcap: float | None,
    *,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Launch the VJP kernels; see `attention.prefix_attention` for the arguments (last axis of stride 1).

    Args:
        wanted: whether gradients are asked for the query, the past's keys and values, the segment's keys and values.

    Returns:
        The wanted ones of dQ (C, B, H, T, E), dK and dV of the past (C, B, J, L, E), dK and dV of the segment
        (C, B, J, T, E), in this order, of the inputs' dtypes.
    """
    count, rollouts, heads, tokens, size = cotangent_CBHTE.shape
    key_heads, past = past_key_BJLE.shape[1:3]
    group = heads // key_heads
    key = architecture(query_BHTE.device), query_BHTE.element_size(), padded_size(size)
    shape = {"GROUP": group, "SIZE": size, "BLOCK_E": padded_size(size)}
    delta_CBHT = torch.empty((count, rollouts, heads, tokens), dtype=torch.float32, device=query_BHTE.device)
    attention_delta_kernel[triton.cdiv(tokens * group, DELTA_TILE.rows), key_heads, rollouts](
        cotangent_CBHTE,
        output_BHTE,
        delta_CBHT,
        *cotangent_CBHTE.stride()[:4],
        *output_BHTE.stride()[:3],
        count,
        tokens,
        **shape,
        BLOCK_M=DELTA_TILE.rows,
        num_warps=DELTA_TILE.warps,
        num_stages=DELTA_TILE.stages,
    )
    shape |= {"SOFTCAP": softcap is not None, "INTERPRETED": interpreted(query_BHTE)}
    gradients: list[Tensor] = []
    if wanted[0]:
        query_gradient = token_major((count, rollouts, heads, tokens, size), query_BHTE)
        tile = QUERY_TILES[key]
        attention_query_vjp_kernel[count * triton.cdiv(tokens * group, tile.rows), key_heads, rollouts](
            cotangent_CBHTE,
            query_BHTE,
            past_key_BJLE,
            past_value_BJLE,
            key_BJTE,
            value_BJTE,
            past_lengths_B,
            lse_BHT,
            delta_CBHT,
            query_gradient,
            *cotangent_CBHTE.stride()[:4],
            *query_BHTE.stride()[:3],
            *past_key_BJLE.stride()[:3],
            *past_value_BJLE.stride()[:3],
            *key_BJTE.stride()[:3],
            *value_BJTE.stride()[:3],
            *query_gradient.stride()[:4],
            count,
            tokens,
            scale,
            softcap or 0.0,
            **shape,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        gradients.append(query_gradient)
    for is_past, asked, keys, values in (
        (True, wanted[1], past_key_BJLE, past_value_BJLE),
        (False, wanted[2], key_BJTE, value_BJTE),
    ):
        if not asked:
            continue
        length = past if is_past else tokens
        key_gradient = token_major((count, rollouts, key_heads, length, size), keys)
        value_gradient = token_major((count, rollouts, key_heads, length, size), values)
        gradients += [key_gradient, value_gradient]
        if length == 0:
            continue
        tile = KEY_TILES[key] if softcap is None else CAPPED_KEY_TILES.get(key, KEY_TILES[key])
        attention_key_vjp_kernel[count * triton.cdiv(length, tile.columns), key_heads, rollouts](
            cotangent_CBHTE,
            query_BHTE,
            keys,
            values,
            past_lengths_B,
            lse_BHT,
            delta_CBHT,
            key_gradient,
            value_gradient,
            *cotangent_CBHTE.stride()[:4],
            *query_BHTE.stride()[:3],
            *keys.stride()[:3],
            *values.stride()[:3],
            *key_gradient.stride()[:4],
            count,
            tokens,
            length,
            scale,
            softcap or 0.0,
            **shape,
            PAST=is_past,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return tuple(gradients)


@triton.jit
def attention_delta_kernel(
    cotangent_ptr,
    output_ptr,
    delta_f32_ptr,
    cotangent_stride_c,
    cotangent_stride_b,
    cotangent_stride_h,
    cotangent_stride_t,
    output_stride_b,
    output_stride_h,
    output_stride_t,
    count,
    tokens,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Form delta = sum_e dO O for all cotangents of a tile of rows; the output is read once.

    Bytes, e per element: (C + 1) B H T E e read, 4 C B H T written. FLOPs: 2 C B H T E.
    """
    key_head = tl.program_id(1)
    rollout = tl.program_id(2).to(tl.int64)
    rollouts = tl.num_programs(2)
    heads = tl.num_programs(1) * GROUP
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token_M = row_M // GROUP
    head_M = key_head * GROUP + row_M % GROUP
    column_E = tl.arange(0, BLOCK_E)
    real_ME = (row_M < tokens * GROUP)[:, None] & (column_E < SIZE)[None, :]
    output_M = output_ptr + rollout * output_stride_b + head_M * output_stride_h + token_M * output_stride_t
    output_ME = tl.load(output_M[:, None] + column_E[None, :], mask=real_ME, other=0.0).to(tl.float32)
    cotangent_M = cotangent_ptr + rollout * cotangent_stride_b + head_M * cotangent_stride_h
    cotangent_M += token_M * cotangent_stride_t
    for which in range(0, count):
        cotangent_ME = tl.load(cotangent_M[:, None] + column_E[None, :], mask=real_ME, other=0.0).to(tl.float32)
        delta_M = delta_f32_ptr + ((which * rollouts + rollout) * heads + head_M) * tokens + token_M
        tl.store(delta_M, tl.sum(cotangent_ME * output_ME, 1), mask=row_M < tokens * GROUP)
        cotangent_M += cotangent_stride_c


@triton.jit
def attention_query_vjp_kernel(
    cotangent_ptr,
    query_ptr,
    past_key_ptr,
    past_value_ptr,
    key_ptr,
    value_ptr,
    past_lengths_i64_ptr,
    lse_f32_ptr,
    delta_f32_ptr,
    gradient_ptr,
    cotangent_stride_c,
    cotangent_stride_b,
    cotangent_stride_h,
    cotangent_stride_t,
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
    gradient_stride_c,
    gradient_stride_b,
    gradient_stride_h,
    gradient_stride_t,
    count,
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
    """Form dQ of one tile of rows under one cotangent, over the past and then causally over the segment.

    Bytes, e per element: queries B H T E e, keys and values 2 B J (L + T) E e once for all cotangents (from L2
    after the first), cotangents and gradients 2 C B H T E e, logsumexp and delta 4 (1 + C) B H T.
    FLOPs: 6 C B H E T (L + T / 2): scores, dP and dQ.
    """
    which = (tl.program_id(0) % count).to(tl.int64)
    tile = tl.program_id(0) // count
    key_head = tl.program_id(1)
    rollout = tl.program_id(2).to(tl.int64)
    rollouts = tl.num_programs(2)
    heads = tl.num_programs(1) * GROUP
    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token_M = row_M // GROUP
    head_M = key_head * GROUP + row_M % GROUP
    column_E = tl.arange(0, BLOCK_E)
    row_real_M = row_M < tokens * GROUP
    real_ME = row_real_M[:, None] & (column_E < SIZE)[None, :]
    query_M = query_ptr + rollout * query_stride_b + head_M * query_stride_h + token_M * query_stride_t
    query_ME = tl.load(query_M[:, None] + column_E[None, :], mask=real_ME, other=0.0)
    cotangent_M = cotangent_ptr + which * cotangent_stride_c + rollout * cotangent_stride_b
    cotangent_M += head_M * cotangent_stride_h + token_M * cotangent_stride_t
    cotangent_ME = tl.load(cotangent_M[:, None] + column_E[None, :], mask=real_ME, other=0.0)
    lse_M = tl.load(lse_f32_ptr + (rollout * heads + head_M) * tokens + token_M, mask=row_real_M, other=0.0)
    delta_place_M = ((which * rollouts + rollout) * heads + head_M) * tokens + token_M
    delta_M = tl.load(delta_f32_ptr + delta_place_M, mask=row_real_M, other=0.0)

    gradient_ME = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    length = tl.load(past_lengths_i64_ptr + rollout).to(tl.int32)
    past_key_base = past_key_ptr + rollout * past_key_stride_b + key_head * past_key_stride_h
    past_value_base = past_value_ptr + rollout * past_value_stride_b + key_head * past_value_stride_h
    for start in range(0, length, BLOCK_N):
        place_N = start + tl.arange(0, BLOCK_N)
        key_NE = load_rows(past_key_base, past_key_stride_t, place_N, length, SIZE, BLOCK_E)
        value_NE = load_rows(past_value_base, past_value_stride_t, place_N, length, SIZE, BLOCK_E)
        scores_MN, slope_MN = base2_scores(query_ME, key_NE, scale_f32, softcap_f32, SOFTCAP, INTERPRETED)
        seen_MN = row_real_M[:, None] & (place_N < length)[None, :]
        shares_MN = tl.where(seen_MN, tl.exp2(scores_MN - lse_M[:, None]), 0.0)
        pull_MN = shares_MN * (product(cotangent_ME, tl.trans(value_NE), INTERPRETED) - delta_M[:, None])
        if SOFTCAP:
            pull_MN = pull_MN * slope_MN
        gradient_ME += product(pull_MN.to(key_NE.dtype), key_NE, INTERPRETED)

    key_base = key_ptr + rollout * key_stride_b + key_head * key_stride_h
    value_base = value_ptr + rollout * value_stride_b + key_head * value_stride_h
    end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, tokens)
    for start in range(0, end, BLOCK_N):
        place_N = start + tl.arange(0, BLOCK_N)
        key_NE = load_rows(key_base, key_stride_t, place_N, tokens, SIZE, BLOCK_E)
        value_NE = load_rows(value_base, value_stride_t, place_N, tokens, SIZE, BLOCK_E)
        scores_MN, slope_MN = base2_scores(query_ME, key_NE, scale_f32, softcap_f32, SOFTCAP, INTERPRETED)
        seen_MN = row_real_M[:, None] & (place_N[None, :] <= token_M[:, None])
        shares_MN = tl.where(seen_MN, tl.exp2(scores_MN - lse_M[:, None]), 0.0)
        pull_MN = shares_MN * (product(cotangent_ME, tl.trans(value_NE), INTERPRETED) - delta_M[:, None])
        if SOFTCAP:
            pull_MN = pull_MN * slope_MN
        gradient_ME += product(pull_MN.to(key_NE.dtype), key_NE, INTERPRETED)

    gradient_M = gradient_ptr + which * gradient_stride_c + rollout * gradient_stride_b
    gradient_M += head_M * gradient_stride_h + token_M * gradient_stride_t
    gradient_ME = (gradient_ME * scale_f32).to(gradient_ptr.dtype.element_ty)
    tl.store(gradient_M[:, None] + column_E[None, :], gradient_ME, mask=real_ME)


@triton.jit
def attention_key_vjp_kernel(
    cotangent_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    past_lengths_i64_ptr,
    lse_f32_ptr,
    delta_f32_ptr,
    key_gradient_ptr,
    value_gradient_ptr,
    cotangent_stride_c,
    cotangent_stride_b,
    cotangent_stride_h,
    cotangent_stride_t,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    gradient_stride_c,
    gradient_stride_b,
    gradient_stride_h,
    gradient_stride_t,
    count,
    tokens,
    padded_length,
    scale_f32,
    softcap_f32,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Form dK and dV of one tile of keys of one rollout under one cotangent: of the past (PAST) or of the segment.

    All query heads of the group are rows here, so their sum needs no atomics. A past's padding gets zeros.
    With N keys (L of the past, or T): bytes, e per element: keys and values 2 B J N E e and queries B H T E e once for
    all cotangents, cotangents C B H T E e (both from L2 after the first tile), gradients 2 C B J N E e.
    FLOPs: 8 C B H E T N for the past, half of that for the segment: scores, dP, dK and dV.
    """
    which = (tl.program_id(0) % count).to(tl.int64)
    first = tl.program_id(0) // count * BLOCK_N
    key_head = tl.program_id(1)
    rollout = tl.program_id(2).to(tl.int64)
    rollouts = tl.num_programs(2)
    heads = tl.num_programs(1) * GROUP
    place_N = first + tl.arange(0, BLOCK_N)
    column_E = tl.arange(0, BLOCK_E)
    rows = tokens * GROUP
    if PAST:
        length = tl.load(past_lengths_i64_ptr + rollout).to(tl.int32)
        start_row = 0
        end_row = tl.where(first < length, rows, 0)
    else:
        length = tokens
        start_row = first * GROUP // BLOCK_M * BLOCK_M
        end_row = rows
    key_base = key_ptr + rollout * key_stride_b + key_head * key_stride_h
    value_base = value_ptr + rollout * value_stride_b + key_head * value_stride_h
    key_NE = load_rows(key_base, key_stride_t, place_N, length, SIZE, BLOCK_E)
    value_NE = load_rows(value_base, value_stride_t, place_N, length, SIZE, BLOCK_E)
    query_base = query_ptr + rollout * query_stride_b + key_head * GROUP * query_stride_h
    cotangent_base = cotangent_ptr + which * cotangent_stride_c + rollout * cotangent_stride_b
    cotangent_base += key_head * GROUP * cotangent_stride_h
    lse_base = lse_f32_ptr + (rollout * heads + key_head * GROUP) * tokens
    delta_base = delta_f32_ptr + ((which * rollouts + rollout) * heads + key_head * GROUP) * tokens

    key_gradient_NE = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    value_gradient_NE = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(start_row, end_row, BLOCK_M):
        row_M = start + tl.arange(0, BLOCK_M)
        token_M = row_M // GROUP
        head_M = row_M % GROUP
        row_real_M = row_M < rows
        real_ME = row_real_M[:, None] & (column_E < SIZE)[None, :]
        query_M = query_base + head_M * query_stride_h + token_M * query_stride_t
        query_ME = tl.load(query_M[:, None] + column_E[None, :], mask=real_ME, other=0.0)
        cotangent_M = cotangent_base + head_M * cotangent_stride_h + token_M * cotangent_stride_t
        cotangent_ME = tl.load(cotangent_M[:, None] + column_E[None, :], mask=real_ME, other=0.0)
        lse_M = tl.load(lse_base + head_M * tokens + token_M, mask=row_real_M, other=0.0)
        delta_M = tl.load(delta_base + head_M * tokens + token_M, mask=row_real_M, other=0.0)
        scores_MN, slope_MN = base2_scores(query_ME, key_NE, scale_f32, softcap_f32, SOFTCAP, INTERPRETED)
        seen_MN = row_real_M[:, None] & (place_N < length)[None, :]
        if not PAST:
            seen_MN = seen_MN & (place_N[None, :] <= token_M[:, None])
        shares_MN = tl.where(seen_MN, tl.exp2(scores_MN - lse_M[:, None]), 0.0)
        value_gradient_NE += product(tl.trans(shares_MN.to(cotangent_ME.dtype)), cotangent_ME, INTERPRETED)
        pull_MN = shares_MN * (product(cotangent_ME, tl.trans(value_NE), INTERPRETED) - delta_M[:, None])
        if SOFTCAP:
            pull_MN = pull_MN * slope_MN
        key_gradient_NE += product(tl.trans(pull_MN.to(query_ME.dtype)), query_ME, INTERPRETED)

    real_NE = (place_N < padded_length)[:, None] & (column_E < SIZE)[None, :]
    # Both gradients are laid out alike.
    offset_N = which * gradient_stride_c + rollout * gradient_stride_b + key_head * gradient_stride_h
    offset_NE = offset_N + place_N[:, None] * gradient_stride_t + column_E[None, :]
    key_gradient_NE = (key_gradient_NE * scale_f32).to(key_gradient_ptr.dtype.element_ty)
    tl.store(key_gradient_ptr + offset_NE, key_gradient_NE, mask=real_NE)
    tl.store(value_gradient_ptr + offset_NE, value_gradient_NE.to(value_gradient_ptr.dtype.element_ty), mask=real_NE)


def vjp_variants(arch: int) -> Iterator[Variant]:
    """Yield every form in which the VJP kernels are launched on an architecture."""
    for (table_arch, width, padded), tile in QUERY_TILES.items():
        if table_arch != arch:
            continue
        shape = {"GROUP": 2, "SIZE": padded, "BLOCK_E": padded, "BLOCK_M": DELTA_TILE.rows}
        dtype = torch.float32 if width == 4 else torch.bfloat16
        yield Variant(attention_delta_kernel, dtype, shape, DELTA_TILE)
        yield from attention_variants(attention_query_vjp_kernel, width, padded, tile, {})
        key = table_arch, width, padded
        for past in (True, False):
            constants = {"PAST": past}
            yield from attention_variants(
                attention_key_vjp_kernel, width, padded, KEY_TILES[key], constants, CAPPED_KEY_TILES.get(key)
            )
