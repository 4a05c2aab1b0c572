"""Triton kernel of Gram matrices and of their repeated squaring; the definition is `spectral.spectral_shares`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.attention.forward import product
from cepo.kernels.launch import Tile, Variant, architecture, interpreted

# By architecture. float32 products are exact (no tf32): bounds of seven digits are made of them.
TILES = {80: Tile(64, 64, 8, 1), 90: Tile(64, 64, 8, 1)}
INNER = 16


def share_bounds(matrix_NSD: Tensor, tolerance: float, max_squarings: int) -> tuple[Tensor, Tensor]:
    """Return lower and upper bounds of phi by repeated squaring; see `projection.spectral_bounds`.

    One launch forms all Gram matrices, and one more squares them: a symmetric matrix's Gram matrix is its square. The
    division by the trace rides on the loads. The device is asked once a squaring whether all intervals are narrow.
    """
    rows, size = matrix_NSD.shape[1:]
    power = matrix_NSD if rows <= size else matrix_NSD.mT.contiguous()
    largest_N = matrix_NSD.abs().amax((1, 2))
    scale_N = 1.0 / largest_N.clamp_min(torch.finfo(torch.float32).tiny)  # entries of at most 1: squares stay finite
    lower_N = torch.zeros(len(matrix_NSD), dtype=torch.float64, device=matrix_NSD.device)
    upper_N = lower_N.clone()
    log_scale_N = lower_N.clone()  # M^p = exp(log_scale) * power / tr power
    open_N = largest_N != 0
    for squarings in range(max_squarings + 1):
        power, trace_N, energy_N = gram(power, scale_N)
        p = 2.0**squarings
        log_scale_N = 2.0 * log_scale_N + trace_N.log() if squarings else log_scale_N
        log_norm_N = 0.5 * energy_N.log() - trace_N.log()
        upper_now_N = ((log_scale_N + log_norm_N) / p).exp().clamp_max(1.0)
        lower_now_N = torch.minimum(upper_now_N, ((log_scale_N + 2.0 * log_norm_N) / p).exp())
        # A matrix keeps the interval that was narrow first: its result does not depend on the others.
        upper_N = torch.where(open_N, upper_now_N, upper_N)
        lower_N = torch.where(open_N, lower_now_N, lower_N)
        open_N = open_N & (upper_now_N - lower_now_N > tolerance * upper_now_N)
        if not bool(open_N.any()):
            break
        scale_N = (1.0 / trace_N).float()
    return lower_N, upper_N


def gram(matrix_NSD: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel.

    Args:
        matrix_NSD: matrices, float32, last axis of stride 1.
        scale_N: a factor of each, float32.

    Returns:
        G = (s A)(s A)^T of each, (N, S, S) float32, its trace and its squared Frobenius norm, (N,) float64.
    """
    number, rows, size = matrix_NSD.shape
    tile = TILES[architecture(matrix_NSD.device)]
    blocks = triton.cdiv(rows, tile.rows)
    gram_NSS = torch.empty((number, rows, rows), dtype=torch.float32, device=matrix_NSD.device)
    # Zeros, since tiles under the diagonal are left to their mirror images.
    sums_NMM2 = torch.zeros((number, blocks, blocks, 2), dtype=torch.float32, device=matrix_NSD.device)
    gram_kernel[blocks, blocks, number](
        matrix_NSD,
        scale_N,
        gram_NSS,
        sums_NMM2,
        *matrix_NSD.stride()[:2],
        rows,
        size,
        BLOCK_M=tile.rows,
        BLOCK_K=INNER,
        INTERPRETED=interpreted(matrix_NSD),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    sums_N2 = sums_NMM2.double().sum((1, 2))
    return gram_NSS, sums_N2[:, 0], sums_N2[:, 1]


@triton.jit
def gram_kernel(
    matrix_f32_ptr,
    scale_f32_ptr,
    gram_f32_ptr,
    sums_f32_ptr,
    matrix_stride_n,
    matrix_stride_s,
    rows,
    size,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Form one tile of one Gram matrix on or over the diagonal, write it and its mirror image, and sum it up.

    Bytes: 4 N S D read from memory (every tile reads its two rows of tiles, from L2), 4 N S^2 written.
    FLOPs: N S^2 D, half of a full product's.
    """
    above, beside = tl.program_id(0), tl.program_id(1)
    number = tl.program_id(2).to(tl.int64)
    if beside < above:
        return
    row_M = above * BLOCK_M + tl.arange(0, BLOCK_M)
    row_N = beside * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = tl.load(scale_f32_ptr + number)
    matrix = matrix_f32_ptr + number * matrix_stride_n
    left_M = matrix + row_M.to(tl.int64)[:, None] * matrix_stride_s
    right_N = matrix + row_N.to(tl.int64)[:, None] * matrix_stride_s
    gram_MN = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in range(0, size, BLOCK_K):
        inner_K = start + tl.arange(0, BLOCK_K)
        real_K = (inner_K < size)[None, :]
        left_MK = tl.load(left_M + inner_K[None, :], mask=(row_M < rows)[:, None] & real_K, other=0.0)
        right_NK = tl.load(right_N + inner_K[None, :], mask=(row_N < rows)[:, None] & real_K, other=0.0)
        gram_MN += product(left_MK * scale, tl.trans(right_NK * scale), INTERPRETED)
    out = gram_f32_ptr + number * rows * rows
    mask_MN = (row_M < rows)[:, None] & (row_N < rows)[None, :]
    tl.store(out + row_M[:, None] * rows + row_N[None, :], gram_MN, mask=mask_MN)
    tl.store(out + row_N[None, :] * rows + row_M[:, None], gram_MN, mask=mask_MN)
    times = tl.where(above == beside, 1.0, 2.0)
    sums = sums_f32_ptr + ((number * tl.num_programs(0) + above) * tl.num_programs(0) + beside) * 2
    tl.store(sums, tl.sum(tl.sum(tl.where(row_M[:, None] == row_N[None, :], gram_MN, 0.0), 1), 0))
    tl.store(sums + 1, tl.sum(tl.sum(gram_MN * gram_MN, 1), 0) * times)


def gram_variants(arch: int) -> Iterator[Variant]:
    """Yield the form in which the kernel is launched on an architecture."""
    tile = TILES[arch]
    meta = {"BLOCK_M": tile.rows, "BLOCK_K": INNER, "INTERPRETED": False}
    yield Variant(gram_kernel, torch.float32, meta, tile)
