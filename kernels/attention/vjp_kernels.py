"""Triton kernels of the attention's VJP: the tiles of scores are recomputed, since none were saved.

The cotangent is the fastest grid axis: the programs of a tile's cotangents run together, so queries, keys and values
are read from memory once and then from L2. (Two cotangents in one program spill registers at head size 128.)
With P = 2^(scores - logsumexp), dP = dO V^T and delta = sum_e dO O:  dS = P (dP - delta),  dQ = scale dS K,
dK = scale dS^T Q,  dV = P^T dO.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from cepo.kernels.attention.tiles import base2_scores, load_rows, seen, store_rows
from cepo.kernels.launch import COUNTS
from cepo.kernels.product import product


@triton.jit(do_not_specialize=COUNTS)
def attention_delta_kernel(
    cotangent_ptr,
    output_ptr,
    delta_f32_ptr,
    cotangent_stride_c,
    cotangent_stride_b,
    cotangent_stride_h,
    cotangent_stride_t,
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
    first_head = tl.program_id(1) * GROUP
    rollout = tl.program_id(2).to(tl.int64)
    rollouts = tl.num_programs(2)
    heads = tl.num_programs(1) * GROUP
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tokens * GROUP
    output = output_ptr + (rollout * tokens * heads + first_head) * SIZE
    output_ME = load_rows(output, SIZE, heads * SIZE, row_M, rows, GROUP, SIZE, BLOCK_E).to(tl.float32)
    cotangent = cotangent_ptr + rollout * cotangent_stride_b + first_head * cotangent_stride_h
    delta_M = delta_f32_ptr + (rollout * heads + first_head + row_M % GROUP) * tokens + row_M // GROUP
    for _ in range(0, count):
        cotangent_ME = load_rows(
            cotangent, cotangent_stride_h, cotangent_stride_t, row_M, rows, GROUP, SIZE, BLOCK_E
        ).to(tl.float32)
        tl.store(delta_M, tl.sum(cotangent_ME * output_ME, 1), mask=row_M < rows)
        cotangent += cotangent_stride_c
        delta_M += rollouts * heads * tokens


@triton.jit(do_not_specialize=COUNTS)
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
    first_head = key_head * GROUP
    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token_M = row_M // GROUP
    rows = tokens * GROUP
    query = query_ptr + rollout * query_stride_b + first_head * query_stride_h
    query_ME = load_rows(query, query_stride_h, query_stride_t, row_M, rows, GROUP, SIZE, BLOCK_E)
    cotangent = cotangent_ptr + which * cotangent_stride_c + rollout * cotangent_stride_b
    cotangent += first_head * cotangent_stride_h
    cotangent_ME = load_rows(cotangent, cotangent_stride_h, cotangent_stride_t, row_M, rows, GROUP, SIZE, BLOCK_E)
    head_M = first_head + row_M % GROUP
    lse_M = tl.load(lse_f32_ptr + (rollout * heads + head_M) * tokens + token_M, mask=row_M < rows, other=0.0)
    delta_M = delta_f32_ptr + ((which * rollouts + rollout) * heads + head_M) * tokens + token_M
    delta_M = tl.load(delta_M, mask=row_M < rows, other=0.0)

    gradient_ME = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    past = tl.load(past_lengths_i64_ptr + rollout).to(tl.int32)
    past_key = past_key_ptr + rollout * past_key_stride_b + key_head * past_key_stride_h
    past_value = past_value_ptr + rollout * past_value_stride_b + key_head * past_value_stride_h
    for start in range(0, past, BLOCK_N):
        place_N = start + tl.arange(0, BLOCK_N)
        key_NE = load_rows(past_key, 0, past_key_stride_t, place_N, past, 1, SIZE, BLOCK_E)
        value_NE = load_rows(past_value, 0, past_value_stride_t, place_N, past, 1, SIZE, BLOCK_E)
        scores_MN, slope_MN = base2_scores(query_ME, key_NE, scale_f32, softcap_f32, SOFTCAP, INTERPRETED)
        probs_MN = _probabilities(scores_MN, lse_M, row_M < rows, seen(token_M, place_N, past, False))
        score_gradient_MN = _score_gradient(probs_MN, slope_MN, cotangent_ME, value_NE, delta_M, SOFTCAP, INTERPRETED)
        gradient_ME += product(score_gradient_MN.to(key_NE.dtype), key_NE, INTERPRETED)

    key = key_ptr + rollout * key_stride_b + key_head * key_stride_h
    value = value_ptr + rollout * value_stride_b + key_head * value_stride_h
    end = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, tokens)
    for start in range(0, end, BLOCK_N):
        place_N = start + tl.arange(0, BLOCK_N)
        key_NE = load_rows(key, 0, key_stride_t, place_N, tokens, 1, SIZE, BLOCK_E)
        value_NE = load_rows(value, 0, value_stride_t, place_N, tokens, 1, SIZE, BLOCK_E)
        scores_MN, slope_MN = base2_scores(query_ME, key_NE, scale_f32, softcap_f32, SOFTCAP, INTERPRETED)
        probs_MN = _probabilities(scores_MN, lse_M, row_M < rows, seen(token_M, place_N, tokens, True))
        score_gradient_MN = _score_gradient(probs_MN, slope_MN, cotangent_ME, value_NE, delta_M, SOFTCAP, INTERPRETED)
        gradient_ME += product(score_gradient_MN.to(key_NE.dtype), key_NE, INTERPRETED)

    gradient = gradient_ptr + ((which * rollouts + rollout) * tokens * heads + first_head) * SIZE
    store_rows(gradient, heads, row_M, rows, gradient_ME * scale_f32, GROUP, SIZE, BLOCK_E)


@triton.jit(do_not_specialize=COUNTS)
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

    All query heads of the group are rows here, so their sum needs no atomics. The past's padding gets zeros.
    With N keys (L of the past, or T): bytes, e per element: keys and values 2 B J N E e and queries B H T E e once for
    all cotangents, cotangents C B H T E e (both from L2 after the first tile), gradients 2 C B J N E e.
    FLOPs: 8 C B H E T N for the past, half of that for the segment: scores, dP, dK and dV.
    """
    which = (tl.program_id(0) % count).to(tl.int64)
    first = tl.program_id(0) // count * BLOCK_N
    key_head = tl.program_id(1)
    rollout = tl.program_id(2).to(tl.int64)
    rollouts = tl.num_programs(2)
    key_heads = tl.num_programs(1)
    first_head = key_head * GROUP
    place_N = first + tl.arange(0, BLOCK_N)
    rows = tokens * GROUP
    if PAST:
        length = tl.load(past_lengths_i64_ptr + rollout).to(tl.int32)
        start_row = 0
        end_row = tl.where(first < length, rows, 0)
    else:
        length = tokens
        start_row = first * GROUP // BLOCK_M * BLOCK_M
        end_row = rows
    key = key_ptr + rollout * key_stride_b + key_head * key_stride_h
    value = value_ptr + rollout * value_stride_b + key_head * value_stride_h
    key_NE = load_rows(key, 0, key_stride_t, place_N, length, 1, SIZE, BLOCK_E)
    value_NE = load_rows(value, 0, value_stride_t, place_N, length, 1, SIZE, BLOCK_E)
    query = query_ptr + rollout * query_stride_b + first_head * query_stride_h
    cotangent = cotangent_ptr + which * cotangent_stride_c + rollout * cotangent_stride_b
    cotangent += first_head * cotangent_stride_h
    lse = lse_f32_ptr + (rollout * key_heads * GROUP + first_head) * tokens
    delta = delta_f32_ptr + ((which * rollouts + rollout) * key_heads * GROUP + first_head) * tokens

    key_gradient_NE = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    value_gradient_NE = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for start in range(start_row, end_row, BLOCK_M):
        row_M = start + tl.arange(0, BLOCK_M)
        token_M = row_M // GROUP
        place_M = row_M % GROUP * tokens + token_M
        query_ME = load_rows(query, query_stride_h, query_stride_t, row_M, rows, GROUP, SIZE, BLOCK_E)
        cotangent_ME = load_rows(cotangent, cotangent_stride_h, cotangent_stride_t, row_M, rows, GROUP, SIZE, BLOCK_E)
        lse_M = tl.load(lse + place_M, mask=row_M < rows, other=0.0)
        delta_M = tl.load(delta + place_M, mask=row_M < rows, other=0.0)
        scores_MN, slope_MN = base2_scores(query_ME, key_NE, scale_f32, softcap_f32, SOFTCAP, INTERPRETED)
        probs_MN = _probabilities(scores_MN, lse_M, row_M < rows, seen(token_M, place_N, length, not PAST))
        value_gradient_NE += product(tl.trans(probs_MN.to(cotangent_ME.dtype)), cotangent_ME, INTERPRETED)
        score_gradient_MN = _score_gradient(probs_MN, slope_MN, cotangent_ME, value_NE, delta_M, SOFTCAP, INTERPRETED)
        key_gradient_NE += product(tl.trans(score_gradient_MN.to(query_ME.dtype)), query_ME, INTERPRETED)

    base = ((which * rollouts + rollout) * padded_length * key_heads + key_head) * SIZE
    key_gradient, value_gradient = key_gradient_ptr + base, value_gradient_ptr + base
    store_rows(key_gradient, key_heads, place_N, padded_length, key_gradient_NE * scale_f32, 1, SIZE, BLOCK_E)
    store_rows(value_gradient, key_heads, place_N, padded_length, value_gradient_NE, 1, SIZE, BLOCK_E)


@triton.jit
def _probabilities(scores_MN, lse_M, real_M, seen_MN):
    """Return the attention weights P = 2^(scores - logsumexp), 0 for padding rows and for keys that a row can't see."""
    return tl.where(real_M[:, None] & seen_MN, tl.exp2(scores_MN - lse_M[:, None]), 0.0)


@triton.jit
def _score_gradient(
    probs_MN, slope_MN, cotangent_ME, value_NE, delta_M, SOFTCAP: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Return dS = P (dP - delta), times the cap's slope."""
    score_gradient_MN = probs_MN * (product(cotangent_ME, tl.trans(value_NE), INTERPRETED) - delta_M[:, None])
    if SOFTCAP:
        score_gradient_MN = score_gradient_MN * slope_MN
    return score_gradient_MN
