"""What stages ask of each other: keys and values put behind one another, and their cotangents taken apart again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cepo.jacobian.group.cuts import Stage
from cepo.jacobian.group.run import Cotangents, KeyValues, Segment


def stacked(stage: Stage, segment: Segment, asked: dict[int, Cotangents]) -> Cotangents:
    """Return the cotangents of the stage's active passes, (C, *shape) each: what its head rows and later stages ask."""
    stacked: Cotangents = [None] * (1 + len(segment.keys_values))
    if stage.head:
        hidden_CBTD = segment.hidden_BTD.new_zeros(len(stage.active), *segment.hidden_BTD.shape)
        place_of = {key: place for place, key in enumerate(stage.active)}
        at = torch.tensor([[place_of[row.pass_index], row.owner, row.row] for row in stage.head]).to(hidden_CBTD.device)
        stacked[0] = hidden_CBTD.index_put((at[:, 0], at[:, 1], at[:, 2]), segment.head_PD[: len(at)], accumulate=True)
    if asked:
        for output, like in enumerate(segment.keys_values):
            parts = [asked[key][output + 1] if key in asked else None for key in stage.active]
            stacked[output + 1] = torch.stack([torch.zeros_like(like) if part is None else part for part in parts])
    return stacked


def append_stage(
    middle: KeyValues, lengths: Sequence[int], new: KeyValues, stage: Stage
) -> tuple[KeyValues, list[int]]:
    """Return keys and values with a ragged stage behind the ragged ones before it, and their lengths."""
    added = [end - start for start, end in zip(stage.starts, stage.ends, strict=True)]
    total = [length + more for length, more in zip(lengths, added, strict=True)]
    if not middle:
        return [tensor.detach() for tensor in new], total
    width = middle[0].shape[2]
    index_BL = torch.tensor(
        [
            [at if at < length else min(width + at - length, width + new[0].shape[2] - 1) for at in range(max(total))]
            for length in lengths
        ],
        device=new[0].device,
    )
    return [
        _gather(torch.cat([old, more.detach()], dim=2), index_BL) for old, more in zip(middle, new, strict=True)
    ], total


def slice_of_stage(cotangent_BJLE: Tensor, stage: Stage, stem_end: int) -> Tensor:
    """Return a stage's part of the cotangents of everything between the stem and a later stage; 0 at its padding."""
    length = stage.length
    offsets = [start - stem_end for start in stage.starts]
    if not any(offsets) and length == cotangent_BJLE.shape[2]:
        return cotangent_BJLE
    index_BT = torch.tensor(
        [[min(offset + at, cotangent_BJLE.shape[2] - 1) for at in range(length)] for offset in offsets],
        device=cotangent_BJLE.device,
    )
    real_BT = torch.tensor(
        [[at < end - start for at in range(length)] for start, end in zip(stage.starts, stage.ends, strict=True)],
        device=cotangent_BJLE.device,
    )
    return _gather(cotangent_BJLE, index_BT) * real_BT[:, None, :, None]


def _gather(tensor_BJLE: Tensor, index_BT: Tensor) -> Tensor:
    rollouts, heads, _, size = tensor_BJLE.shape
    return tensor_BJLE.gather(2, index_BT[:, None, :, None].expand(rollouts, heads, -1, size))


def add(left: Cotangents, right: Cotangents) -> Cotangents:
    """Return the sum of two cotangents of the same outputs, where None is nothing."""
    return [
        one if other is None else other if one is None else one + other for one, other in zip(left, right, strict=True)
    ]


def mix(signs_NB: Tensor, tensor_B: Tensor) -> Tensor:
    """Return N combinations of B rollouts' cotangents."""
    return torch.tensordot(signs_NB.to(tensor_B), tensor_B, dims=1)
