"""Triton kernels of RMS norm, forward and VJP; the definition is `plain_rms_norm`.

The saved rows are read once and kept in registers while a program walks its C cotangents.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.launch import COUNTS, Tile, Variant, architecture, unit_last

# (architecture, row size rounded up to a power of two, at least 64) -> tile of whole rows, several if they are short.
NORM_TILES = {
    (arch, width): Tile(max(1, 2048 // width), width, 4 if width <= 2048 else 8 if width <= 4096 else 16, 1)
    for arch in (80, 90)
    for width in (64, 128, 256, 512, 1024, 2048, 4096, 8192)
}


def norm_forward(
    hidden_ND: Tensor, weight_D: Tensor, *, epsilon: float, offset: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Launch the norm's forward kernel; see `rms_norm`.

    Returns:
        The normalised rows; and what `norm_vjp` reads: the arguments, and 1 / rms of each row (float32, leading axes
        flattened).
    """
    rows_ND = unit_last(hidden_ND.reshape(-1, hidden_ND.shape[-1]))
    rows, size = rows_ND.shape
    normed_ND = torch.empty(hidden_ND.shape, dtype=hidden_ND.dtype, device=hidden_ND.device)
    scale_N = torch.empty((rows,), dtype=torch.float32, device=hidden_ND.device)
    tile = _tile(rows_ND)
    norm_forward_kernel[(triton.cdiv(rows, tile.rows),)](
        rows_ND,
        weight_D.contiguous(),
        normed_ND,
        scale_N,
        rows_ND.stride(0),
        rows,
        size,
        epsilon,
        offset,
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        **tile.options,
    )
    return normed_ND, (hidden_ND, weight_D, scale_N)


def norm_vjp(
    cotangent_CND: Tensor, hidden_ND: Tensor, weight_D: Tensor, scale_N: Tensor, *, offset: float
) -> tuple[Tensor, ...]:
    """Launch the norm's VJP kernel: the rows' gradient (C, ..., D) from C cotangents."""
    rows_ND = unit_last(hidden_ND.reshape(-1, hidden_ND.shape[-1]))
    rows, size = rows_ND.shape
    count = cotangent_CND.shape[0]
    cotangents_CND = unit_last(cotangent_CND.reshape(count, rows, size))
    gradient_CND = torch.empty(cotangent_CND.shape, dtype=hidden_ND.dtype, device=hidden_ND.device)
    tile = _tile(rows_ND)
    norm_vjp_kernel[(triton.cdiv(rows, tile.rows),)](
        cotangents_CND,
        rows_ND,
        weight_D.contiguous(),
        scale_N,
        gradient_CND,
        *cotangents_CND.stride()[:2],
        rows_ND.stride(0),
        count,
        rows,
        size,
        offset,
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        **tile.options,
    )
    return (gradient_CND,)


def _tile(rows_ND: Tensor) -> Tile:
    return NORM_TILES[architecture(rows_ND.device), max(64, triton.next_power_of_2(rows_ND.shape[1]))]


@triton.jit(do_not_specialize=COUNTS)
def norm_forward_kernel(
    hidden_ptr,
    weight_ptr,
    normed_ptr,
    scale_f32_ptr,
    hidden_stride_n,
    rows,
    size,
    epsilon_f32,
    offset_f32,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Normalise whole rows.

    Bytes, e per element, N rows: N D e read and written; 4 N. FLOPs: 4 N D.
    """
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_D = tl.arange(0, BLOCK_D)
    mask_MD = (row_M < rows)[:, None] & (column_D < size)[None, :]
    hidden_MD = tl.load(hidden_ptr + row_M[:, None] * hidden_stride_n + column_D[None, :], mask=mask_MD, other=0.0)
    hidden_MD = hidden_MD.to(tl.float32)
    scale_M = tl.rsqrt(tl.sum(hidden_MD * hidden_MD, 1) / size + epsilon_f32)
    tl.store(scale_f32_ptr + row_M, scale_M, mask=row_M < rows)
    weight_D = tl.load(weight_ptr + column_D, mask=column_D < size, other=0.0).to(tl.float32) + offset_f32
    normed_MD = hidden_MD * scale_M[:, None] * weight_D[None, :]
    place_MD = row_M[:, None] * size + column_D[None, :]
    tl.store(normed_ptr + place_MD, normed_MD.to(normed_ptr.dtype.element_ty), mask=mask_MD)


@triton.jit(do_not_specialize=COUNTS)
def norm_vjp_kernel(
    cotangent_ptr,
    hidden_ptr,
    weight_ptr,
    scale_f32_ptr,
    gradient_ptr,
    cotangent_stride_c,
    cotangent_stride_n,
    hidden_stride_n,
    count,
    rows,
    size,
    offset_f32,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Form the gradients of whole rows under all cotangents: r (w g - x mean(x w g)), x = h r, r = 1 / rms.

    Bytes, e per element, N rows: N D e of rows and 4 N of scales read once for all cotangents; C N D e of cotangents
    read and C N D e written. FLOPs: 6 C N D.
    """
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_D = tl.arange(0, BLOCK_D)
    mask_MD = (row_M < rows)[:, None] & (column_D < size)[None, :]
    hidden_MD = tl.load(hidden_ptr + row_M[:, None] * hidden_stride_n + column_D[None, :], mask=mask_MD, other=0.0)
    scale_M = tl.load(scale_f32_ptr + row_M, mask=row_M < rows, other=0.0)
    unit_MD = hidden_MD.to(tl.float32) * scale_M[:, None]
    weight_D = tl.load(weight_ptr + column_D, mask=column_D < size, other=0.0).to(tl.float32) + offset_f32
    cotangent_MD = cotangent_ptr + row_M[:, None] * cotangent_stride_n + column_D[None, :]
    out_MD = gradient_ptr + row_M[:, None] * size + column_D[None, :]
    step = tl.cast(rows, tl.int64) * size
    for _ in range(0, count):
        weighted_MD = tl.load(cotangent_MD, mask=mask_MD, other=0.0).to(tl.float32) * weight_D[None, :]
        mean_M = tl.sum(weighted_MD * unit_MD, 1) / size
        gradient_MD = (weighted_MD - unit_MD * mean_M[:, None]) * scale_M[:, None]
        tl.store(out_MD, gradient_MD.to(gradient_ptr.dtype.element_ty), mask=mask_MD)
        cotangent_MD += cotangent_stride_c
        out_MD += step


def norm_variants(arch: int) -> Iterator[Variant]:
    """Yield every variant in which these kernels are launched on an architecture."""
    for dtype in (torch.float32, torch.bfloat16):
        for (table_arch, _), tile in NORM_TILES.items():
            if table_arch == arch:
                constants = {"BLOCK_M": tile.rows, "BLOCK_D": tile.columns}
                yield Variant(norm_forward_kernel, dtype, constants, tile)
                yield Variant(norm_vjp_kernel, dtype, constants, tile)
