"""Triton VJP of the shared-prefix attention for C cotangents: how its kernels are launched, and with what tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from cepo.kernels.attention.tiles import attention_variants, padded_size, strides, token_major
from cepo.kernels.attention.vjp_kernels import (
    attention_delta_kernel,
    attention_key_vjp_kernel,
    attention_query_vjp_kernel,
)
from cepo.kernels.launch import Tile, Variant, architecture, interpreted, unit_last

# Keys as in FORWARD_TILES. The architectures differ where registers would spill: on the A100 with SmolLM2's three heads
# of 64 per key head, and in float32 with heads of 128.
QUERY_TILES = {
    **{(arch, 2, 64): Tile(128, 64, 8, 2) for arch in (80, 90)},
    **{(arch, 2, 128): Tile(64, 64, 8, 2) for arch in (80, 90)},
    **{(80, 4, 64): Tile(32, 16, 8, 1), (90, 4, 64): Tile(32, 32, 8, 1)},
    **{(80, 4, 128): Tile(32, 16, 8, 1), (90, 4, 128): Tile(16, 16, 8, 1)},
}
KEY_TILES = {
    **{(80, 2, 64): Tile(64, 32, 8, 2), (90, 2, 64): Tile(64, 64, 8, 2)},
    **{(arch, 2, 128): Tile(64, 64, 8, 2) for arch in (80, 90)},
    **{(arch, 4, 64): Tile(32, 32, 8, 1) for arch in (80, 90)},
    **{(80, 4, 128): Tile(32, 32, 8, 1), (90, 4, 128): Tile(16, 32, 8, 1)},
}
# Capped scores keep their slope in registers too. Where that spills, tiles have half the rows; on Hopper, whose tensor
# cores take at least 64 rows, loads are not pipelined instead (`Compiled.mixes_products` says what 32 rows did there).
CAPPED_KEY_TILES = {(80, 2, 128): Tile(32, 64, 8, 2), (90, 2, 128): Tile(64, 64, 8, 1)}
DELTA_TILE = Tile(32, 0, 4, 1)


def attention_vjp(
    cotangent_CBHTE: Tensor,
    *saved: Tensor,
    scale: float,
    softcap: float | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Launch the VJP kernels.

    Args:
        cotangent_CBHTE: C cotangents of the output.
        saved: what `attention_forward` saved: its tensors, the output, and the logsumexp.
        scale: as for `attention_forward`.
        softcap: likewise.
        wanted: whether to compute gradients of the query, of the past's keys and values, of the segment's.

    Returns:
        dQ (C, B, H, T, E), dK and dV of the past (C, B, J, L, E), dK and dV of the segment (C, B, J, T, E), of the
        inputs' dtypes; None for those not wanted.
    """
    query_BHTE, past_key_BJLE, past_value_BJLE, key_BJTE, value_BJTE, past_lengths_B, output_BHTE, lse_BHT = saved
    cotangent_CBHTE = unit_last(cotangent_CBHTE)
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
        *strides(cotangent_CBHTE),
        count,
        tokens,
        **shape,
        BLOCK_M=DELTA_TILE.rows,
        **DELTA_TILE.options,
    )
    shape |= {"SOFTCAP": softcap is not None, "INTERPRETED": interpreted(query_BHTE)}
    gradients: list[Tensor | None] = [None]
    if wanted[0]:
        gradients[0] = token_major((count, rollouts, heads, tokens, size), query_BHTE)
        tile = QUERY_TILES[key]
        attention_query_vjp_kernel[count * triton.cdiv(tokens * group, tile.rows), key_heads, rollouts](
            cotangent_CBHTE,
            *saved[:6],
            lse_BHT,
            delta_CBHT,
            gradients[0],
            *strides(cotangent_CBHTE, *saved[:5]),
            count,
            tokens,
            scale,
            softcap or 0.0,
            **shape,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            **tile.options,
        )
    tile = KEY_TILES[key] if softcap is None else CAPPED_KEY_TILES.get(key, KEY_TILES[key])
    for is_past, asked, keys, values in (
        (True, wanted[1], past_key_BJLE, past_value_BJLE),
        (False, wanted[2], key_BJTE, value_BJTE),
    ):
        if not asked:
            gradients += [None, None]
            continue
        length = past if is_past else tokens
        key_gradient, value_gradient = (
            token_major((count, rollouts, key_heads, length, size), like) for like in (keys, values)
        )
        gradients += [key_gradient, value_gradient]
        if length == 0:
            continue
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
            *strides(cotangent_CBHTE, query_BHTE, keys, values),
            count,
            tokens,
            length,
            scale,
            softcap or 0.0,
            **shape,
            PAST=is_past,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            **tile.options,
        )
    return tuple(gradients)


def vjp_variants(arch: int) -> Iterator[Variant]:
    """Yield the variants of the VJP kernels that represent all their launches on an architecture."""
    for (table_arch, width, padded), tile in QUERY_TILES.items():
        if table_arch != arch:
            continue
        shape = {"GROUP": 3 if padded == 64 else 2, "SIZE": padded, "BLOCK_E": padded, "BLOCK_M": DELTA_TILE.rows}
        dtype = torch.float32 if width == 4 else torch.bfloat16
        yield Variant(attention_delta_kernel, dtype, shape, DELTA_TILE)
        yield from attention_variants(attention_query_vjp_kernel, width, padded, tile, {})
        key = table_arch, width, padded
        for past in (True, False):
            constants = {"PAST": past}
            yield from attention_variants(
                attention_key_vjp_kernel, width, padded, KEY_TILES[key], constants, CAPPED_KEY_TILES.get(key)
            )
