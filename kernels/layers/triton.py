"""Triton kernels of the memory-bound parts of a layer; the definitions are in `layers`.

Saved activations are read once and kept in registers while a program walks its C cotangents.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.launch import Tile, Variant, architecture, unit_last

# (architecture, row size rounded up to a power of two, at least 64) -> tile: whole rows, several where they are short.
NORM_TILES = {
    (arch, width): Tile(max(1, 2048 // width), width, 4 if width <= 2048 else 8 if width <= 4096 else 16, 1)
    for arch in (80, 90)
    for width in (64, 128, 256, 512, 1024, 2048, 4096, 8192)
}
SWIGLU_TILES = {80: Tile(1, 1024, 4, 1), 90: Tile(1, 1024, 4, 1)}
# (architecture, half of the head size rounded up to a power of two) -> tile.
ROTATE_TILES = {
    (arch, width): Tile(max(8, 2048 // width), width, 4, 1) for arch in (80, 90) for width in (16, 32, 64, 128)
}


def norm_forward(
    hidden_ND: Tensor, residual_ND: Tensor | None, weight_D: Tensor, epsilon: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the norm's forward kernel; see `layers.add_rms_norm`.

    Returns:
        The normed rows, the rows that were normed (the sum, or the hidden rows themselves), and 1 / rms of each row,
        float32, in the order of the flattened leading axes.
    """
    size = hidden_ND.shape[-1]
    hidden = _rows(hidden_ND)
    residual = hidden if residual_ND is None else _rows(residual_ND)
    rows = hidden.shape[0]
    normed_ND = torch.empty(hidden_ND.shape, dtype=hidden_ND.dtype, device=hidden_ND.device)
    sum_ND = hidden_ND if residual_ND is None else torch.empty_like(normed_ND)
    scale_N = torch.empty((rows,), dtype=torch.float32, device=hidden_ND.device)
    tile = _norm_tile(hidden)
    norm_forward_kernel[(triton.cdiv(rows, tile.rows),)](
        hidden,
        residual,
        weight_D.float().contiguous(),
        normed_ND,
        sum_ND,
        scale_N,
        hidden.stride(0),
        residual.stride(0),
        rows,
        size,
        epsilon,
        offset,
        ADD=residual_ND is not None,
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return normed_ND, sum_ND, scale_N


def norm_vjp(
    normed_CND: Tensor | None, sum_CND: Tensor | None, sum_ND: Tensor, scale_N: Tensor, weight_D: Tensor, offset: float
) -> Tensor:
    """Launch the norm's VJP kernel: the gradient (C, ..., D) of the sum, which is each summand's.

    Args:
        normed_CND: C cotangents of the normed rows, or None where only the sum has some.
        sum_CND: C cotangents of the sum that reach it from elsewhere, or None.
        sum_ND: what `norm_forward` returned, and so the next.
        scale_N: as there.
        weight_D: as given to it, and so the next.
        offset: as there.
    """
    if normed_CND is None:
        assert sum_CND is not None
        return sum_CND.clone()
    count = normed_CND.shape[0]
    normed = _rows_of_each(normed_CND)
    extra = normed if sum_CND is None else _rows_of_each(sum_CND)
    values = _rows(sum_ND)
    rows, size = values.shape
    gradient_CND = torch.empty((count, *sum_ND.shape), dtype=sum_ND.dtype, device=sum_ND.device)
    tile = _norm_tile(values)
    norm_vjp_kernel[(triton.cdiv(rows, tile.rows),)](
        normed,
        extra,
        values,
        weight_D.float().contiguous(),
        scale_N,
        gradient_CND,
        *normed.stride()[:2],
        *extra.stride()[:2],
        values.stride(0),
        count,
        rows,
        size,
        offset,
        ADD=sum_CND is not None,
        BLOCK_M=tile.rows,
        BLOCK_D=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return gradient_CND


def swiglu_forward(gate_ND: Tensor, up_ND: Tensor) -> Tensor:
    """Launch the gated activation's forward kernel; see `layers.swiglu`."""
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
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return output_ND


def swiglu_vjp(cotangent_CND: Tensor, gate_ND: Tensor, up_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the gated activation's VJP kernel: gradients (C, ..., D) of gate and up from C cotangents."""
    gate, up, cotangent = _rows(gate_ND), _rows(up_ND), _rows_of_each(cotangent_CND)
    shape = (cotangent.shape[0], *gate_ND.shape)
    gate_gradient = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    up_gradient = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    tile = SWIGLU_TILES[architecture(gate.device)]
    swiglu_vjp_kernel[(triton.cdiv(gate.numel(), tile.columns),)](
        cotangent,
        gate,
        up,
        gate_gradient,
        up_gradient,
        *cotangent.stride()[:2],
        gate.stride(0),
        up.stride(0),
        cotangent.shape[0],
        gate.shape[1],
        gate.numel(),
        BLOCK=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return gate_gradient, up_gradient


def rotate_heads(heads_CBHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, *, transposed: bool) -> Tensor:
    """Launch the rotary kernel: `layers.rotate` of C tensors, or its transposed map.

    Returns:
        Tensor (C, B, H, T, E), whose memory is laid out (C, B, T, H, E) as projections and attention read it.
    """
    heads = unit_last(heads_CBHTE)
    count, rollouts, number, tokens, size = heads.shape
    output = torch.empty((count, rollouts, tokens, number, size), dtype=heads.dtype, device=heads.device)
    output = output.transpose(2, 3)
    width = max(16, triton.next_power_of_2(size // 2))
    if width > 128:
        raise ValueError(f"the Triton rotary kernel takes head sizes up to 256, got {size}; use 'torch'")
    tile = ROTATE_TILES[architecture(heads.device), width]
    rotate_kernel[triton.cdiv(tokens, tile.rows), number, count * rollouts](
        heads,
        cos_BTE.float(),
        sin_BTE.float(),
        output,
        *heads.stride()[:4],
        *cos_BTE.float().stride()[:2],
        *sin_BTE.float().stride()[:2],
        *output.stride()[:4],
        rollouts,
        tokens,
        size // 2,
        TRANSPOSED=transposed,
        BLOCK_M=tile.rows,
        BLOCK_E=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return output


def _rows(tensor: Tensor) -> Tensor:
    """Return (rows, D), a view where strides allow it, with stride 1 along D."""
    return unit_last(tensor.reshape(-1, tensor.shape[-1]))


def _rows_of_each(tensor: Tensor) -> Tensor:
    """Return (C, rows, D), a view where strides allow it, with stride 1 along D."""
    return unit_last(tensor.reshape(tensor.shape[0], -1, tensor.shape[-1]))


def _norm_tile(rows_ND: Tensor) -> Tile:
    return NORM_TILES[architecture(rows_ND.device), max(64, triton.next_power_of_2(rows_ND.shape[1]))]


@triton.jit
def norm_forward_kernel(
    hidden_ptr,
    residual_ptr,
    weight_f32_ptr,
    normed_ptr,
    sum_ptr,
    scale_f32_ptr,
    hidden_stride_n,
    residual_stride_n,
    rows,
    size,
    epsilon_f32,
    offset_f32,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norm whole rows, after adding the residual where there is one.

    Bytes, e per element, N rows: N D e read and written, twice that with the residual; 4 N. FLOPs: 4 N D.
    """
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_D = tl.arange(0, BLOCK_D)
    mask_MD = (row_M < rows)[:, None] & (column_D < size)[None, :]
    out_MD = row_M[:, None] * size + column_D[None, :]
    sum_MD = tl.load(hidden_ptr + row_M[:, None] * hidden_stride_n + column_D[None, :], mask=mask_MD, other=0.0)
    if ADD:
        place_MD = row_M[:, None] * residual_stride_n + column_D[None, :]
        wide_MD = sum_MD.to(tl.float32) + tl.load(residual_ptr + place_MD, mask=mask_MD, other=0.0).to(tl.float32)
        sum_MD = wide_MD.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out_MD, sum_MD, mask=mask_MD)
    sum_MD = sum_MD.to(tl.float32)
    scale_M = tl.rsqrt(tl.sum(sum_MD * sum_MD, 1) / size + epsilon_f32)
    tl.store(scale_f32_ptr + row_M, scale_M, mask=row_M < rows)
    weight_D = tl.load(weight_f32_ptr + column_D, mask=column_D < size, other=0.0) + offset_f32
    normed_MD = sum_MD * scale_M[:, None] * weight_D[None, :]
    tl.store(normed_ptr + out_MD, normed_MD.to(normed_ptr.dtype.element_ty), mask=mask_MD)


@triton.jit
def norm_vjp_kernel(
    normed_ptr,
    extra_ptr,
    sum_ptr,
    weight_f32_ptr,
    scale_f32_ptr,
    gradient_ptr,
    normed_stride_c,
    normed_stride_n,
    extra_stride_c,
    extra_stride_n,
    sum_stride_n,
    count,
    rows,
    size,
    offset_f32,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Form the gradients of whole rows under all cotangents: r (w g - x mean(x w g)) + extra, x = sum r, r = 1 / rms.

    Bytes, e per element, N rows: N D e of rows and 4 N of scales read once for all cotangents; C N D e of cotangents
    (twice that with those of the sum) read and C N D e written. FLOPs: 6 C N D.
    """
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column_D = tl.arange(0, BLOCK_D)
    mask_MD = (row_M < rows)[:, None] & (column_D < size)[None, :]
    sum_MD = tl.load(sum_ptr + row_M[:, None] * sum_stride_n + column_D[None, :], mask=mask_MD, other=0.0)
    scale_M = tl.load(scale_f32_ptr + row_M, mask=row_M < rows, other=0.0)
    unit_MD = sum_MD.to(tl.float32) * scale_M[:, None]
    weight_D = tl.load(weight_f32_ptr + column_D, mask=column_D < size, other=0.0) + offset_f32
    normed_MD = normed_ptr + row_M[:, None] * normed_stride_n + column_D[None, :]
    extra_MD = extra_ptr + row_M[:, None] * extra_stride_n + column_D[None, :]
    out_MD = gradient_ptr + row_M[:, None] * size + column_D[None, :]
    step = tl.cast(rows, tl.int64) * size
    for _ in range(0, count):
        pull_MD = tl.load(normed_MD, mask=mask_MD, other=0.0).to(tl.float32) * weight_D[None, :]
        mean_M = tl.sum(pull_MD * unit_MD, 1) / size
        gradient_MD = (pull_MD - unit_MD * mean_M[:, None]) * scale_M[:, None]
        if ADD:
            gradient_MD += tl.load(extra_MD, mask=mask_MD, other=0.0).to(tl.float32)
            extra_MD += extra_stride_c
        tl.store(out_MD, gradient_MD.to(gradient_ptr.dtype.element_ty), mask=mask_MD)
        normed_MD += normed_stride_c
        out_MD += step


@triton.jit
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


@triton.jit
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
    opening = tl.sigmoid(gate)
    to_up = gate * opening
    to_gate = up * opening * (1.0 + gate * (1.0 - opening))
    pulls = cotangent_ptr + row * cotangent_stride_n + column
    for which in range(0, count):
        pull = tl.load(pulls, mask=mask, other=0.0).to(tl.float32)
        out = which * tl.cast(elements, tl.int64) + place
        tl.store(gate_gradient_ptr + out, (pull * to_gate).to(gate_gradient_ptr.dtype.element_ty), mask=mask)
        tl.store(up_gradient_ptr + out, (pull * to_up).to(up_gradient_ptr.dtype.element_ty), mask=mask)
        pulls += cotangent_stride_c


@triton.jit
def rotate_kernel(
    heads_ptr,
    cos_f32_ptr,
    sin_f32_ptr,
    output_ptr,
    heads_stride_c,
    heads_stride_b,
    heads_stride_h,
    heads_stride_t,
    cos_stride_b,
    cos_stride_t,
    sin_stride_b,
    sin_stride_t,
    output_stride_c,
    output_stride_b,
    output_stride_h,
    output_stride_t,
    rollouts,
    tokens,
    half,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Rotate one tile of tokens of one head: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; or the transposed map.

    Bytes, e per element: C B H T E e read and written, 8 B T E of angles once for all heads and cotangents (from
    L2 after the first). FLOPs: 3 C B H T E.
    """
    head = tl.program_id(1)
    which = (tl.program_id(2) // rollouts).to(tl.int64)
    rollout = (tl.program_id(2) % rollouts).to(tl.int64)
    token_M = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column_E = tl.arange(0, BLOCK_E)[None, :]
    mask_ME = (token_M < tokens) & (column_E < half)
    heads_ME = heads_ptr + which * heads_stride_c + rollout * heads_stride_b + head * heads_stride_h
    heads_ME += token_M * heads_stride_t + column_E
    first_ME = tl.load(heads_ME, mask=mask_ME, other=0.0).to(tl.float32)
    second_ME = tl.load(heads_ME + half, mask=mask_ME, other=0.0).to(tl.float32)
    cos_ME = cos_f32_ptr + rollout * cos_stride_b + token_M * cos_stride_t + column_E
    sin_ME = sin_f32_ptr + rollout * sin_stride_b + token_M * sin_stride_t + column_E
    first_cos_ME = tl.load(cos_ME, mask=mask_ME, other=0.0)
    second_cos_ME = tl.load(cos_ME + half, mask=mask_ME, other=0.0)
    first_sin_ME = tl.load(sin_ME, mask=mask_ME, other=0.0)
    second_sin_ME = tl.load(sin_ME + half, mask=mask_ME, other=0.0)
    if TRANSPOSED:
        first_out_ME = first_ME * first_cos_ME + second_ME * second_sin_ME
        second_out_ME = second_ME * second_cos_ME - first_ME * first_sin_ME
    else:
        first_out_ME = first_ME * first_cos_ME - second_ME * first_sin_ME
        second_out_ME = second_ME * second_cos_ME + first_ME * second_sin_ME
    output_ME = output_ptr + which * output_stride_c + rollout * output_stride_b + head * output_stride_h
    output_ME += token_M * output_stride_t + column_E
    tl.store(output_ME, first_out_ME.to(output_ptr.dtype.element_ty), mask=mask_ME)
    tl.store(output_ME + half, second_out_ME.to(output_ptr.dtype.element_ty), mask=mask_ME)


def layer_variants(arch: int) -> Iterator[Variant]:
    """Yield every form in which these kernels are launched on an architecture."""
    for dtype in (torch.float32, torch.bfloat16):
        for (table_arch, _), tile in NORM_TILES.items():
            if table_arch == arch:
                # ADD does all that its absence does, and more.
                meta = {"ADD": True, "BLOCK_M": tile.rows, "BLOCK_D": tile.columns}
                yield Variant(norm_forward_kernel, dtype, meta, tile)
                yield Variant(norm_vjp_kernel, dtype, meta, tile)
        tile = SWIGLU_TILES[arch]
        yield Variant(swiglu_forward_kernel, dtype, {"BLOCK": tile.columns}, tile)
        yield Variant(swiglu_vjp_kernel, dtype, {"BLOCK": tile.columns}, tile)
        for (table_arch, _), tile in ROTATE_TILES.items():
            if table_arch == arch:
                for transposed in (False, True):
                    meta = {"TRANSPOSED": transposed, "BLOCK_M": tile.rows, "BLOCK_E": tile.columns}
                    yield Variant(rotate_kernel, dtype, meta, tile)
