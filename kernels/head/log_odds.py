"""Triton kernels of the head: log-odds of target tokens and their VJP.

With z = W h, y the target and o = logsumexp of the other logits: s = z_y - o, and ds / dh = W_y - sum_{v != y}
exp(z_v - o) W_v. The cotangent is one number per row, so this direction is computed once and scaled for each of the C.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.launch import COUNTS, Tile, Variant, architecture, interpreted
from cepo.kernels.product import product

# (architecture, bytes of an element) -> tile of logits; hidden states and weights are read INNER columns at a time.
TILES = {
    **{(arch, 2): Tile(128, 128, 8, 3) for arch in (80, 90)},
    **{(arch, 4): Tile(64, 32, 8, 1) for arch in (80, 90)},
}
INNER = {2: 64, 4: 16}
# Two programs for each of the 132 multiprocessors of an H100: the vocabulary is split until there are about as many.
PROGRAMS = 264
# Elements of the buffer for the probabilities of one chunk of the vocabulary. Rows are not split into chunks, so the
# weight is read from memory once by the forward pass and twice by the VJP, however many rows there are.
CHUNK_ELEMENTS = 1 << 26


def log_odds_forward(hidden_PD: Tensor, weight_VD: Tensor, ids_P: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Launch the forward kernel.

    Args:
        hidden_PD: rows, last axis of stride 1.
        weight_VD: head, of the same dtype, last axis of stride 1.
        ids_P: targets, int64.

    Returns:
        The log-odds (P,), float32; and what `log_odds_vjp` reads: the arguments and the logsumexp of all other logits
        (P,), float32.
    """
    rows, size = hidden_PD.shape
    vocabulary = weight_VD.shape[0]
    width = hidden_PD.element_size()
    tile = TILES[architecture(hidden_PD.device), width]
    blocks = triton.cdiv(vocabulary, tile.columns)
    splits = max(1, min(blocks, PROGRAMS // max(1, triton.cdiv(rows, tile.rows))))
    blocks_each = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, blocks_each)
    chosen_P = torch.full((rows,), float("nan"), dtype=torch.float32, device=hidden_PD.device)
    others_NP = torch.empty((splits, rows), dtype=torch.float32, device=hidden_PD.device)
    head_forward_kernel[triton.cdiv(rows, tile.rows), splits](
        hidden_PD,
        weight_VD,
        ids_P,
        chosen_P,
        others_NP,
        hidden_PD.stride(0),
        weight_VD.stride(0),
        rows,
        size,
        vocabulary,
        blocks_each,
        **_constants(tile, width, interpreted(hidden_PD)),
        **tile.options,
    )
    others_P = others_NP.logsumexp(0)
    return chosen_P - others_P, (hidden_PD, weight_VD, ids_P, others_P)


def log_odds_vjp(
    cotangent_CP: Tensor, hidden_PD: Tensor, weight_VD: Tensor, ids_P: Tensor, others_P: Tensor
) -> tuple[Tensor, ...]:
    """Form the direction, one chunk of the vocabulary at a time: exp(z_v - o) by the kernel, then a matrix product.

    Bytes of the product, e per element: V D e + P V e read, 8 P D per chunk. FLOPs: 2 P V D.

    Args:
        cotangent_CP: C cotangents of the log-odds, float32.
        hidden_PD: this and the following are what `log_odds_forward` saved.
        weight_VD: head.
        ids_P: targets.
        others_P: logsumexp of all other logits.

    Returns:
        The rows' gradient (C, P, D), of their dtype.
    """
    rows, size = hidden_PD.shape
    vocabulary, width = weight_VD.shape[0], hidden_PD.element_size()
    tile = TILES[architecture(hidden_PD.device), width]
    chunk = min(vocabulary, max(tile.columns, CHUNK_ELEMENTS // max(1, rows) // tile.columns * tile.columns))
    probs_PN = torch.empty((rows, triton.cdiv(chunk, 16) * 16), dtype=hidden_PD.dtype, device=hidden_PD.device)
    direction_PD = weight_VD[ids_P].float()
    for first in range(0, vocabulary, chunk):
        columns = min(chunk, vocabulary - first)
        head_probs_kernel[triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)](
            hidden_PD,
            weight_VD,
            ids_P,
            others_P,
            probs_PN,
            hidden_PD.stride(0),
            weight_VD.stride(0),
            probs_PN.stride(0),
            rows,
            size,
            first,
            columns,
            **_constants(tile, width, interpreted(hidden_PD)),
            **tile.options,
        )
        direction_PD -= probs_PN[:, :columns] @ weight_VD[first : first + columns]
    return ((cotangent_CP[..., None] * direction_PD).to(hidden_PD.dtype),)


def _constants(tile: Tile, width: int, is_interpreted: bool) -> dict[str, Any]:
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": INNER[width]}
    return {**blocks, "INTERPRETED": is_interpreted}


@triton.jit(do_not_specialize=COUNTS)
def head_forward_kernel(
    hidden_ptr,
    weight_ptr,
    ids_i64_ptr,
    chosen_f32_ptr,
    others_f32_ptr,
    hidden_stride_p,
    weight_stride_v,
    rows,
    size,
    vocabulary,
    blocks_each,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Reduce one split of the vocabulary for one tile of rows; tiles of rows run together and share the weight in L2.

    Bytes, e per element: V D e + P D e from memory, 4 P (splits + 1) written. FLOPs: 2 P V D.
    """
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    real_M = row_M < rows
    hidden_M = hidden_ptr + row_M.to(tl.int64) * hidden_stride_p
    id_M = tl.load(ids_i64_ptr + row_M, mask=real_M, other=-1)
    largest_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    last = tl.minimum((split + 1) * blocks_each * BLOCK_N, vocabulary)
    for start in range(split * blocks_each * BLOCK_N, last, BLOCK_N):
        place_N = start + tl.arange(0, BLOCK_N)
        weight_N = weight_ptr + place_N.to(tl.int64) * weight_stride_v
        real_N = place_N < vocabulary
        logits_MN = _logits(hidden_M, weight_N, real_M, real_N, size, BLOCK_M, BLOCK_N, BLOCK_K, INTERPRETED)
        chosen_MN = place_N[None, :] == id_M[:, None]
        found_M = (id_M >= start) & (id_M < tl.minimum(start + BLOCK_N, vocabulary))
        tl.store(chosen_f32_ptr + row_M, tl.sum(tl.where(chosen_MN, logits_MN, 0.0), 1), mask=found_M)
        logits_MN = tl.where(chosen_MN | ~real_N[None, :], float("-inf"), logits_MN)
        new_M = tl.maximum(largest_M, tl.max(logits_MN, 1))
        # A tile may hold only the target; then the maximum is still -inf.
        base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        total_M = total_M * tl.exp(largest_M - base_M) + tl.sum(tl.exp(logits_MN - base_M[:, None]), 1)
        largest_M = new_M
    others_M = tl.where(total_M > 0.0, largest_M + tl.log(tl.where(total_M > 0.0, total_M, 1.0)), float("-inf"))
    tl.store(others_f32_ptr + split * rows + row_M, others_M, mask=real_M)


@triton.jit(do_not_specialize=COUNTS)
def head_probs_kernel(
    hidden_ptr,
    weight_ptr,
    ids_i64_ptr,
    others_f32_ptr,
    probs_ptr,
    hidden_stride_p,
    weight_stride_v,
    probs_stride_p,
    rows,
    size,
    first,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Compute exp(z - others) of one chunk of the vocabulary for one tile of rows, and 0 for the target itself.

    Bytes, e per element, N the chunk: N D e + P D e read, P N e written. FLOPs: 2 P N D.
    """
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_M = row_M < rows
    real_N = column_N < columns
    hidden_M = hidden_ptr + row_M.to(tl.int64) * hidden_stride_p
    weight_N = weight_ptr + (first + column_N).to(tl.int64) * weight_stride_v
    logits_MN = _logits(hidden_M, weight_N, real_M, real_N, size, BLOCK_M, BLOCK_N, BLOCK_K, INTERPRETED)
    id_M = tl.load(ids_i64_ptr + row_M, mask=real_M, other=-1)
    others_M = tl.load(others_f32_ptr + row_M, mask=real_M, other=0.0)
    probs_MN = tl.where((first + column_N)[None, :] == id_M[:, None], 0.0, tl.exp(logits_MN - others_M[:, None]))
    place_MN = row_M.to(tl.int64)[:, None] * probs_stride_p + column_N[None, :]
    mask_MN = real_M[:, None] & real_N[None, :]
    tl.store(probs_ptr + place_MN, probs_MN.to(probs_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit
def _logits(
    hidden_M,
    weight_N,
    real_M,
    real_N,
    size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return a tile of h W^T in float32, from pointers to its rows; rows out of range count as zeros."""
    logits_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_K):
        inner_K = start + tl.arange(0, BLOCK_K)
        real_K = (inner_K < size)[None, :]
        hidden_MK = tl.load(hidden_M[:, None] + inner_K[None, :], mask=real_M[:, None] & real_K, other=0.0)
        weight_NK = tl.load(weight_N[:, None] + inner_K[None, :], mask=real_N[:, None] & real_K, other=0.0)
        logits_MN += product(hidden_MK, tl.trans(weight_NK), INTERPRETED)
    return logits_MN


def log_odds_variants(arch: int) -> Iterator[Variant]:
    """Yield every variant in which the head's kernels are launched on an architecture."""
    for (table_arch, width), tile in TILES.items():
        if table_arch != arch:
            continue
        dtype = torch.float32 if width == 4 else torch.bfloat16
        for kernel in (head_forward_kernel, head_probs_kernel):
            yield Variant(kernel, dtype, _constants(tile, width, False), tile)
