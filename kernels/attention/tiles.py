"""What the attention kernels have in common: tiles of rows, their scores, the layout of outputs, compiled variants.

The G = H / J query heads that read one key head are folded into the rows of a tile (row = token * G + head in group),
so a key or value is loaded once for all of them, and a suffix of a few tokens still fills a tile.
Scores are kept in base 2, since the hardware's exponential is exp2.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cepo.kernels.launch import Tile, Variant
from cepo.kernels.product import product


def padded_size(size: int) -> int:
    """Return the width of the tile that holds a head of this size."""
    return max(64, triton.next_power_of_2(size))


def token_major(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised (..., heads, tokens, E) tensor that is stored as (..., tokens, heads, E)."""
    *batch, heads, tokens, size = shape
    return torch.empty((*batch, tokens, heads, size), dtype=like.dtype, device=like.device).transpose(-3, -2)


def strides(*tensors: Tensor) -> list[int]:
    """Return the strides of all tensors in elements, without those of their last axes (which are 1)."""
    return [stride for tensor in tensors for stride in tensor.stride()[:-1]]


@triton.jit
def load_rows(base, stride_h, stride_t, row_M, rows, GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Load folded rows of the heads that start at `base`; rows and columns out of range are zeros."""
    column_E = tl.arange(0, BLOCK_E)
    mask_ME = (row_M < rows)[:, None] & (column_E < SIZE)[None, :]
    place_M = row_M % GROUP * stride_h + row_M // GROUP * stride_t
    return tl.load((base + place_M)[:, None] + column_E[None, :], mask=mask_ME, other=0.0)


@triton.jit
def store_rows(base, heads, row_M, rows, value_ME, GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Store folded rows into a `token_major` tensor of this many heads; `base` is the address of the first row."""
    column_E = tl.arange(0, BLOCK_E)
    mask_ME = (row_M < rows)[:, None] & (column_E < SIZE)[None, :]
    place_M = (row_M % GROUP + row_M // GROUP * heads) * SIZE
    tl.store(base + place_M[:, None] + column_E[None, :], value_ME.to(base.dtype.element_ty), mask=mask_ME)


@triton.jit
def seen(token_M, place_N, length, CAUSAL: tl.constexpr):
    """Tell which keys a row sees: of its own segment (CAUSAL) those up to its token, else those within the length."""
    return place_N[None, :] <= token_M[:, None] if CAUSAL else (place_N < length)[None, :]


@triton.jit
def base2_scores(query_ME, key_NE, scale, softcap, SOFTCAP: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the scores times log2 e, and d score / d (uncapped score), which is 1 without a cap."""
    scores_MN = product(query_ME, tl.trans(key_NE), INTERPRETED) * scale
    if SOFTCAP:
        # tanh x = 1 - 2 / (1 + e^2x) needs no library call and is accurate for large |x|.
        tanh_MN = 1.0 - 2.0 / (1.0 + tl.exp2(scores_MN * (2.0 * 1.4426950408889634 / softcap)))
        slope_MN = 1.0 - tanh_MN * tanh_MN
        scores_MN = tanh_MN * (softcap * 1.4426950408889634)
    else:
        slope_MN = 1.0
        scores_MN = scores_MN * 1.4426950408889634
    return scores_MN, slope_MN


def attention_variants(
    kernel: object, width: int, padded: int, tile: Tile, constants: dict[str, Any], capped_tile: Tile | None = None
) -> Iterator[Variant]:
    """Yield variants of one attention kernel: full heads, masked heads, and capped scores.

    Full heads are those of SmolLM2 (64) and Qwen3 (128). In float32 tiles are small and far from every limit, so one
    variant per size is enough (at 128 a masked and capped one).
    """
    dtype = torch.float32 if width == 4 else torch.bfloat16
    if padded == 64:
        forms = [(64, 3, False)] if width == 4 else [(64, 3, False), (64, 1, True)]
    else:
        forms = [(96, 3, True)] if width == 4 else [(128, 2, False), (96, 3, False), (128, 1, True)]
    for size, group, capped in forms:
        used = capped_tile if capped and capped_tile else tile
        shape = {"GROUP": group, "SIZE": size, "BLOCK_E": padded, "BLOCK_M": used.rows, "BLOCK_N": used.columns}
        yield Variant(kernel, dtype, {**shape, "SOFTCAP": capped, "INTERPRETED": False, **constants}, used)
