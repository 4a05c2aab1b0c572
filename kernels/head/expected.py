"""The Triton kernel of the head for a few candidates, and the VJP of its expected values; see `head_expected_value`."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.launch import Tile, Variant, architecture

TILES = {80: Tile(1, 128, 4, 1), 90: Tile(1, 128, 4, 1)}


def expected_forward(
    hidden_PD: Tensor, weight_VD: Tensor, candidate_ids_PN: Tensor, values_PN: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Launch the expected value's kernel.

    Args:
        hidden_PD: rows, last axis of stride 1.
        weight_VD: head, of the same dtype, last axis of stride 1.
        candidate_ids_PN: int64, contiguous.
        values_PN: float32, contiguous.

    Returns:
        The expected values (P,), float32; and what `expected_vjp` reads: the weight, the candidates, and the expected
        values' derivatives by the candidates' logits (P, N), float32.
    """
    rows, size = hidden_PD.shape
    candidates = candidate_ids_PN.shape[1]
    expected_P = torch.empty((rows,), dtype=torch.float32, device=hidden_PD.device)
    slopes_PN = torch.empty((rows, candidates), dtype=torch.float32, device=hidden_PD.device)
    tile = TILES[architecture(hidden_PD.device)]
    head_expected_kernel[(rows,)](
        hidden_PD,
        weight_VD,
        candidate_ids_PN,
        values_PN,
        expected_P,
        slopes_PN,
        hidden_PD.stride(0),
        weight_VD.stride(0),
        size,
        weight_VD.shape[0],
        candidates,
        BLOCK_N=max(2, triton.next_power_of_2(candidates)),
        BLOCK_K=tile.columns,
        **tile.options,
    )
    return expected_P, (weight_VD, candidate_ids_PN, slopes_PN)


def expected_vjp(
    cotangent_CP: Tensor, weight_VD: Tensor, candidate_ids_PN: Tensor, slopes_PN: Tensor
) -> tuple[Tensor, ...]:
    """Return the rows' gradient (C, P, D), of the weight's dtype, from C cotangents.

    A row's direction, sum_n slope_n W_n, is formed once for all cotangents, by PyTorch: the few rows of the weight that
    it reads are gathered. Bytes, e per element: P N D (e + 8), then C P D e written. FLOPs: (2 N + C) P D.
    """
    known_PN = candidate_ids_PN.clamp(0, weight_VD.shape[0] - 1)  # of an id outside the slope is NaN
    direction_PD = torch.einsum("pn,pnd->pd", slopes_PN, weight_VD[known_PN].float())
    return ((cotangent_CP[..., None] * direction_PD).to(weight_VD.dtype),)


@triton.jit
def head_expected_kernel(
    hidden_ptr,
    weight_ptr,
    candidates_i64_ptr,
    values_f32_ptr,
    expected_f32_ptr,
    slopes_f32_ptr,
    hidden_stride_p,
    weight_stride_v,
    size,
    vocabulary,
    candidates,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Form one row's expected value over its N candidates, and its derivative by their logits.

    Bytes, e per element: P D e + P N D e (from L2 where rows share candidates), 16 P N of ids, values, slopes.
    FLOPs: 2 P N D.
    """
    row = tl.program_id(0).to(tl.int64)
    slot_N = tl.arange(0, BLOCK_N)
    real_N = slot_N < candidates
    id_N = tl.load(candidates_i64_ptr + row * candidates + slot_N, mask=real_N, other=0)
    known_N = (id_N >= 0) & (id_N < vocabulary)
    logits_N = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, size, BLOCK_K):
        inner_K = start + tl.arange(0, BLOCK_K)
        hidden_K = tl.load(hidden_ptr + row * hidden_stride_p + inner_K, mask=inner_K < size, other=0.0).to(tl.float32)
        place_NK = id_N[:, None] * weight_stride_v + inner_K[None, :]
        mask_NK = (real_N & known_N)[:, None] & (inner_K < size)[None, :]
        weight_NK = tl.load(weight_ptr + place_NK, mask=mask_NK, other=0.0).to(tl.float32)
        logits_N += tl.sum(weight_NK * hidden_K[None, :], 1)
    logits_N = tl.where(known_N, logits_N, float("nan"))
    logits_N = tl.where(real_N, logits_N, float("-inf"))
    shares_N = tl.exp(logits_N - tl.max(logits_N, 0))
    shares_N = shares_N / tl.sum(shares_N, 0)
    values_N = tl.load(values_f32_ptr + row * candidates + slot_N, mask=real_N, other=0.0)
    expected = tl.sum(shares_N * values_N, 0)
    tl.store(expected_f32_ptr + row, expected)
    tl.store(slopes_f32_ptr + row * candidates + slot_N, shares_N * (values_N - expected), mask=real_N)


def expected_variants(arch: int) -> Iterator[Variant]:
    """Yield every form in which the kernel is launched on an architecture, by the number of candidates."""
    tile = TILES[arch]
    for dtype in (torch.float32, torch.bfloat16):
        for slots in (2, 16, 64):
            yield Variant(head_expected_kernel, dtype, {"BLOCK_N": slots, "BLOCK_K": tile.columns}, tile)
