"""The cotangents of a segment's outputs, collected from later segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cepo.jacobian.group.cuts import HeadRow


class Asked:
    """The cotangents of a segment's outputs, one per pass, summed as later segments add theirs.

    Args:
        passes: indices of the passes.

    Attributes:
        hidden_CBTD: those of its hidden states, or None if there are none.
        keys_values: those of its keys and values, (C, B, J, L, E) each; empty if there are none.
    """

    def __init__(self, passes: Sequence[int]) -> None:
        self.passes = tuple(passes)
        self.hidden_CBTD: Tensor | None = None
        self.keys_values: list[Tensor] = []

    def common(self, passes: Sequence[int]) -> list[int]:
        """Return the indices into `passes` of those that this segment has too."""
        return [place for place, key in enumerate(passes) if key in self.passes]

    def add_head(self, rows: Sequence[HeadRow], head_PD: Tensor, shape_BTD: Sequence[int]) -> None:
        """Set the hidden states' cotangents to those of the head's rows; a row's `job` is its index along B."""
        if not rows:
            return
        self.hidden_CBTD = head_PD.new_zeros(len(self.passes), *shape_BTD)
        at = [(self.passes.index(row.pass_index), row.job, row.row) for row in rows]
        passes_P, jobs_P, rows_P = torch.tensor(at, device=head_PD.device).unbind(1)
        self.hidden_CBTD.index_put_((passes_P, jobs_P, rows_P), head_PD, accumulate=True)

    def add_keys_values(self, passes: Sequence[int], sent: Sequence[Tensor]) -> None:
        """Add cotangents of the keys and values, (passes, B, J, L, E) each; passes not of this segment are dropped."""
        shared = self.common(passes)
        if not shared or not sent:
            return
        if not self.keys_values:
            self.keys_values = [tensor_C.new_zeros(len(self.passes), *tensor_C.shape[1:]) for tensor_C in sent]
        own = torch.tensor([self.passes.index(passes[place]) for place in shared], device=sent[0].device)
        for total_C, tensor_C in zip(self.keys_values, sent, strict=True):
            total_C.index_add_(0, own, tensor_C if len(shared) == len(passes) else tensor_C[shared])

    def of_outputs(self, keys_values: int) -> list[Tensor | None]:
        """Return the cotangents of the hidden states and of that many keys and values; None stands for zero."""
        given: list[Tensor | None] = [*self.keys_values] or [None] * keys_values
        return [self.hidden_CBTD, *given]
