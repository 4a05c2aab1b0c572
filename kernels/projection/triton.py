"""Triton kernel that removes a subspace from a batch of matrices; the definition is `projection.project_out_batch`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.attention.forward import product
from cepo.kernels.launch import Tile, Variant, architecture, interpreted

# (architecture, rank rounded up to a power of two, at least 16) -> tile. float32 products are exact (no tf32): the
# residual of a matrix that lies almost inside the subspace is all rounding otherwise.
TILES = {
    (80, 16): Tile(16, 64, 8, 1),
    (80, 32): Tile(16, 64, 4, 1),
    (80, 64): Tile(16, 64, 8, 1),
    (90, 16): Tile(16, 64, 8, 1),
    (90, 32): Tile(16, 64, 4, 1),
    (90, 64): Tile(16, 64, 8, 1),
}


def project_out_energies(jac_NSD: Tensor, basis_NRD: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel; last axes of stride 1, the basis in float32.

    Returns:
        The residual (N, S, D) float32, and ||J||_F^2 and ||residual||_F^2 of each matrix, (N, 2) float64.
    """
    number, rows, size = jac_NSD.shape
    rank = basis_NRD.shape[1]
    padded = max(16, triton.next_power_of_2(rank))
    tile = TILES[architecture(jac_NSD.device), padded]
    blocks = triton.cdiv(rows, tile.rows)
    residual_NSD = torch.empty((number, rows, size), dtype=torch.float32, device=jac_NSD.device)
    energies_NM2 = torch.empty((number, blocks, 2), dtype=torch.float32, device=jac_NSD.device)
    project_out_kernel[blocks, number](
        jac_NSD,
        basis_NRD,
        residual_NSD,
        energies_NM2,
        *jac_NSD.stride()[:2],
        *basis_NRD.stride()[:2],
        rows,
        size,
        rank,
        BLOCK_M=tile.rows,
        BLOCK_R=padded,
        BLOCK_D=tile.columns,
        INTERPRETED=interpreted(jac_NSD),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return residual_NSD, energies_NM2.double().sum(1)


@triton.jit
def project_out_kernel(
    jac_ptr,
    basis_f32_ptr,
    residual_f32_ptr,
    energies_f32_ptr,
    jac_stride_n,
    jac_stride_s,
    basis_stride_n,
    basis_stride_r,
    rows,
    size,
    rank,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Project one tile of rows of one matrix: coefficients, their correction from what is left, residual and energies.

    Bytes, e per element of J: N S D e read from memory (three times by a program, twice from L2), 4 N S D written,
    4 N R D of the basis once (every tile of rows reads it again, from L2).
    FLOPs: 8 N S D R for the four products, 4 N S D for the energies.
    """
    tile = tl.program_id(0)
    number = tl.program_id(1).to(tl.int64)
    row_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rank_R = tl.arange(0, BLOCK_R)
    jac_M = jac_ptr + number * jac_stride_n + row_M.to(tl.int64)[:, None] * jac_stride_s
    basis_R = basis_f32_ptr + number * basis_stride_n + rank_R[:, None] * basis_stride_r
    share_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, size, BLOCK_D):
        column_D = start + tl.arange(0, BLOCK_D)
        real_D = (column_D < size)[None, :]
        jac_MD = tl.load(jac_M + column_D[None, :], mask=(row_M < rows)[:, None] & real_D, other=0.0).to(tl.float32)
        basis_RD = tl.load(basis_R + column_D[None, :], mask=(rank_R < rank)[:, None] & real_D, other=0.0)
        share_MR += product(jac_MD, tl.trans(basis_RD), INTERPRETED)
    left_MR = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, size, BLOCK_D):
        column_D = start + tl.arange(0, BLOCK_D)
        real_D = (column_D < size)[None, :]
        jac_MD = tl.load(jac_M + column_D[None, :], mask=(row_M < rows)[:, None] & real_D, other=0.0).to(tl.float32)
        basis_RD = tl.load(basis_R + column_D[None, :], mask=(rank_R < rank)[:, None] & real_D, other=0.0)
        left_MR += product(jac_MD - product(share_MR, basis_RD, INTERPRETED), tl.trans(basis_RD), INTERPRETED)
    share_MR += left_MR
    energy_M = tl.zeros((BLOCK_M,), tl.float32)
    residual_energy_M = tl.zeros((BLOCK_M,), tl.float32)
    residual_M = residual_f32_ptr + (number * rows + row_M)[:, None] * size
    for start in range(0, size, BLOCK_D):
        column_D = start + tl.arange(0, BLOCK_D)
        real_MD = (row_M < rows)[:, None] & (column_D < size)[None, :]
        jac_MD = tl.load(jac_M + column_D[None, :], mask=real_MD, other=0.0).to(tl.float32)
        real_RD = (rank_R < rank)[:, None] & (column_D < size)[None, :]
        basis_RD = tl.load(basis_R + column_D[None, :], mask=real_RD, other=0.0)
        residual_MD = jac_MD - product(share_MR, basis_RD, INTERPRETED)
        tl.store(residual_M + column_D[None, :], residual_MD, mask=real_MD)
        energy_M += tl.sum(jac_MD * jac_MD, 1)
        residual_energy_M += tl.sum(residual_MD * residual_MD, 1)
    energies = energies_f32_ptr + (number * tl.num_programs(0) + tile) * 2
    tl.store(energies, tl.sum(energy_M, 0))
    tl.store(energies + 1, tl.sum(residual_energy_M, 0))


def projection_variants(arch: int) -> Iterator[Variant]:
    """Yield every form in which the kernel is launched on an architecture."""
    for (table_arch, padded), tile in TILES.items():
        if table_arch == arch:
            for dtype in (torch.float32, torch.bfloat16):
                meta = {"BLOCK_M": tile.rows, "BLOCK_R": padded, "BLOCK_D": tile.columns, "INTERPRETED": False}
                yield Variant(project_out_kernel, dtype, meta, tile)
