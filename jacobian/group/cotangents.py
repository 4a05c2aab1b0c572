"""What later segments ask of a segment's outputs, and the keys and values of ragged stages put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cepo.jacobian.group.cuts import HeadRow, Segment
from cepo.jacobian.group.run import KeyValues


class Asked:
    """The cotangents of a segment's outputs, one per pass, summed up as later segments send them.

    Args:
        passes: indices of the passes.
        stage: the segment, where it is a stage.

    Attributes:
        hidden_CBTD: of its hidden states, or None where they are not asked for.
        keys_values: of its keys and values, (C, B, J, L, E) each; empty where they are not asked for.
    """

    def __init__(self, passes: Sequence[int], stage: Segment | None = None) -> None:
        self.passes, self.stage = tuple(passes), stage
        self.hidden_CBTD: Tensor | None = None
        self.keys_values: list[Tensor] = []

    def shares(self, passes: Sequence[int]) -> list[int]:
        """Return the places, among these passes, of those that this segment has too."""
        return [place for place, key in enumerate(passes) if key in self.passes]

    def add_head(self, rows: Sequence[HeadRow], head_PD: Tensor, shape_BTD: Sequence[int]) -> None:
        """Add the cotangents of the head's rows; `job` of a row is the index along B."""
        if not rows:
            return
        self.hidden_CBTD = head_PD.new_zeros(len(self.passes), *shape_BTD)
        at = [(self.passes.index(row.pass_index), row.job, row.row) for row in rows]
        passes_P, jobs_P, rows_P = torch.tensor(at, device=head_PD.device).unbind(1)
        self.hidden_CBTD.index_put_((passes_P, jobs_P, rows_P), head_PD, accumulate=True)

    def add_keys_values(self, passes: Sequence[int], sent: Sequence[Tensor]) -> None:
        """Add cotangents of the keys and values, (passes, B, J, L, E) each; a pass not of this segment is dropped."""
        shared = self.shares(passes)
        if not shared or not sent:
            return
        if not self.keys_values:
            self.keys_values = [tensor_C.new_zeros(len(self.passes), *tensor_C.shape[1:]) for tensor_C in sent]
        own = torch.tensor([self.passes.index(passes[place]) for place in shared], device=sent[0].device)
        for total_C, tensor_C in zip(self.keys_values, sent, strict=True):
            total_C.index_add_(0, own, tensor_C if len(shared) == len(passes) else tensor_C[shared])

    def of_outputs(self, keys_values: int) -> list[Tensor | None]:
        """Return the cotangents of hidden states and of that many keys and values; None is zero."""
        given: list[Tensor | None] = [*self.keys_values] or [None] * keys_values
        return [self.hidden_CBTD, *given]


def append_stage(
    middle: KeyValues, lengths: Sequence[int], new: KeyValues, stage: Segment
) -> tuple[KeyValues, list[int]]:
    """Return the keys and values of ragged stages with a ragged stage after them, and their lengths."""
    total = [length + len(ids) for length, ids in zip(lengths, stage.ids, strict=True)]
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


def slice_of_stage(cotangent_CBJLE: Tensor, stage: Segment, stem_end: int) -> Tensor:
    """Return a stage's part of the cotangents of everything between the stem and a later stage; 0 at its padding."""
    width = cotangent_CBJLE.shape[3]
    offsets = [start - stem_end for start in stage.starts]
    if not any(offsets) and stage.length == width:
        return cotangent_CBJLE
    columns = range(stage.length)
    index_BT = torch.tensor([[min(offset + at, width - 1) for at in columns] for offset in offsets])
    real_BT = torch.tensor([[at < len(ids) for at in columns] for ids in stage.ids])
    cotangents, rollouts = cotangent_CBJLE.shape[:2]
    index_NT = index_BT.repeat(cotangents, 1).to(cotangent_CBJLE.device)
    part = _gather(cotangent_CBJLE.flatten(0, 1), index_NT).unflatten(0, (cotangents, rollouts))
    return part * real_BT[:, None, :, None].to(part.device)


def _gather(tensor_BJLE: Tensor, index_BT: Tensor) -> Tensor:
    rollouts, heads, _, size = tensor_BJLE.shape
    return tensor_BJLE.gather(2, index_BT[:, None, :, None].expand(rollouts, heads, -1, size))
