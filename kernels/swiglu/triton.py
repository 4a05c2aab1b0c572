"""Triton kernels of the gated activation, forward and VJP; the definition is `plain_swiglu`.

Gate and up are read once and kept in registers while a program walks its C cotangents.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.launch import COUNTS, Tile, Variant, architecture, unit_last

SWIGLU_TILES = {80: Tile(1, 1024, 4, 1), 90: Tile(1, 1024, 4, 1)}


def swiglu_forward(gate_ND: Tensor, up_ND: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Launch the forward kernel; see `swiglu`.

    Returns:
        The output, of the inputs' shape; and the inputs, which `swiglu_vjp` reads.
    """
    gate, up = _rows(gate_ND), _rows(up_ND)
    output_ND = torch.empty(gate_ND.shape, dtype=gate_ND.dtype, device=gate_ND.device)
    tile = SWIGLU_TILES[architecture(gate.device)]
    swiglu_forward_kernel[(triton.cdiv(gate.numel(), tile.columns),)](
        gate,
        up,
        output_ND,
        gate.stride(0),
        up.stride(0),
        gate.shape[1],
        gate.numel(),
        BLOCK=tile.columns,
        **tile.options,
    )
    return output_ND, (gate_ND, up_ND)


def swiglu_vjp(cotangent_CND: Tensor, gate_ND: Tensor, up_ND: Tensor) -> tuple[Tensor, ...]:
    """Launch the VJP kernel: gradients (C, ..., D) of gate and up from C cotangents."""
    gate, up = _rows(gate_ND), _rows(up_ND)
    cotangents = unit_last(cotangent_CND.reshape(-1, *gate.shape))
    gate_gradient, up_gradient = (
        torch.empty(cotangent_CND.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)
    )
    tile = SWIGLU_TILES[architecture(gate.device)]
    swiglu_vjp_kernel[(triton.cdiv(gate.numel(), tile.columns),)](
        cotangents,
        gate,
        up,
        gate_gradient,
        up_gradient,
        *cotangents.stride()[:2],
        gate.stride(0),
        up.stride(0),
        cotangents.shape[0],
        gate.shape[1],
        gate.numel(),
        BLOCK=tile.columns,
        **tile.options,
    )
    return gate_gradient, up_gradient


def _rows(tensor: Tensor) -> Tensor:
    """Return (rows, D), a view where strides allow it, with stride 1 along D."""
    return unit_last(tensor.reshape(-1, tensor.shape[-1]))


@triton.jit(do_not_specialize=COUNTS)
def swiglu_forward_kernel(
    gate_ptr, up_ptr, output_ptr, gate_stride_n, up_stride_n, size, elements, BLOCK: tl.constexpr
):
    """Form silu(gate) * up for one block of the flattened elements.

    Bytes, e per element, N rows: 2 N D e read, N D e written. FLOPs: 5 N D.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < elements
    row, column = place // size, place % size
    gate = tl.load(gate_ptr + row * gate_stride_n + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride_n + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + place, (gate * tl.sigmoid(gate) * up).to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def swiglu_vjp_kernel(
    cotangent_ptr,
    gate_ptr,
    up_ptr,
    gate_gradient_ptr,
    up_gradient_ptr,
    cotangent_stride_c,
    cotangent_stride_n,
    gate_stride_n,
    up_stride_n,
    count,
    size,
    elements,
    BLOCK: tl.constexpr,
):
    """Form both gradients of one block under all cotangents: g up silu'(gate) and g silu(gate).

    Bytes, e per element, N rows: 2 N D e read once for all cotangents, C N D e read and 2 C N D e written.
    FLOPs: (9 + 2 C) N D.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < elements
    row, column = place // size, place % size
    gate = tl.load(gate_ptr + row * gate_stride_n + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride_n + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    to_up = gate * sigmoid
    to_gate = up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    cotangents = cotangent_ptr + row * cotangent_stride_n + column
    for which in range(0, count):
        cotangent = tl.load(cotangents, mask=mask, other=0.0).to(tl.float32)
        out = which * tl.cast(elements, tl.int64) + place
        tl.store(gate_gradient_ptr + out, (cotangent * to_gate).to(gate_gradient_ptr.dtype.element_ty), mask=mask)
        tl.store(up_gradient_ptr + out, (cotangent * to_up).to(up_gradient_ptr.dtype.element_ty), mask=mask)
        cotangents += cotangent_stride_c


def swiglu_variants(arch: int) -> Iterator[Variant]:
    """Yield every variant in which these kernels are launched on an architecture."""
    tile = SWIGLU_TILES[arch]
    for dtype in (torch.float32, torch.bfloat16):
        for kernel in (swiglu_forward_kernel, swiglu_vjp_kernel):
            yield Variant(kernel, dtype, {"BLOCK": tile.columns}, tile)
