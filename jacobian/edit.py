"""What an edit of any length did to a reward: the blocks in which text and edit differ, and what each contributed.

Where every block has the same length in both, the gradient along the path between their embeddings spreads the change
of the reward over tokens (see `attribute_edit`). Where lengths differ there is no path, and where the reward jumps
along the path, the gradient misses the jump. In both cases the blocks are exchanged one after another, once from the
left and once from the right. A block's effect is the change of the reward when it is exchanged, mean of both orders.
Either way the effects add up to the whole change.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from cepo.jacobian.reward_model import rewards
from cepo.jacobian.scalar import attribute_edit

_MOST_NODES = 16  # of a path; where more are needed the path is steep, and exchanging blocks is exact
_MARKED = -1  # stands for every marked token while texts are aligned


@dataclass(frozen=True)
class Block:
    """A stretch of tokens of a text that an edit replaced, removed or inserted.

    Attributes:
        start: position of its first token in the text.
        end: position after its last token; equal to start if only the edit has tokens.
        edit_start: as `start`, in the edit.
        edit_end: as `end`, in the edit.
        marked: whether its tokens are marked.
    """

    start: int
    end: int
    edit_start: int
    edit_end: int
    marked: bool = False

    @property
    def size(self) -> int:
        """Number of tokens on its longer side: how many token edits it takes."""
        return max(self.end - self.start, self.edit_end - self.edit_start)


@dataclass(frozen=True)
class EditEffect:
    """The effect of an edit on a reward.

    Attributes:
        difference: r(text) - r(edit), from two forward passes.
        blocks: the blocks in which they differ, in the order of the text.
        effects: contribution of each block to the difference; their sum estimates it.
        sizes: per block, the sum of the absolute contributions of its tokens: at least |effect|.
        attribution_T: contribution of each token of the text, (T,), float64. If blocks were exchanged, each block's
            effect is spread evenly over its tokens; that of tokens which only the edit has counts at the text's next
            token.
        nodes: nodes of the quadrature along the path; 0 if blocks were exchanged.
    """

    difference: float
    blocks: tuple[Block, ...]
    effects: tuple[float, ...]
    sizes: tuple[float, ...]
    attribution_T: Tensor
    nodes: int

    @property
    def certificate(self) -> float:
        """The error of the attributions: |their sum - difference|."""
        return abs(float(self.attribution_T.sum()) - self.difference)

    @property
    def leak(self) -> float | None:
        """The share of the absolute changes that falls outside the marked tokens, in [0, 1]; None if all are 0."""
        whole = sum(self.sizes)
        outside = sum(size for block, size in zip(self.blocks, self.sizes, strict=True) if not block.marked)
        return outside / whole if whole > 0 else None


def differing_blocks(
    token_ids: Sequence[int],
    edit_ids: Sequence[int],
    marked: Collection[int] = (),
    edit_marked: Collection[int] = (),
) -> tuple[Block, ...]:
    """Return the blocks in which two texts differ; the tokens of a block are either all marked or all unmarked.

    Marked tokens are aligned with each other first, whatever their ids. So if "correct" became "wrong indeed" with the
    first word marked in both, the exchange of the marked words is one block, and "indeed" another.

    Args:
        token_ids: token ids of the text.
        edit_ids: token ids of the edit.
        marked: positions of marked tokens in the text.
        edit_marked: positions of marked tokens in the edit.
    """
    of_text, of_edit = set(marked), set(edit_marked)
    keys = [_MARKED if place in of_text else token for place, token in enumerate(token_ids)]
    edit_keys = [_MARKED if place in of_edit else token for place, token in enumerate(edit_ids)]
    found: list[Block] = []
    for tag, start, end, edit_start, edit_end in SequenceMatcher(None, keys, edit_keys, False).get_opcodes():
        if tag == "equal":  # marked tokens may differ
            pairs = zip(range(start, end), range(edit_start, edit_end), strict=True)
            changed = [(one, other) for one, other in pairs if token_ids[one] != edit_ids[other]]
            found += [Block(one, one + 1, other, other + 1, marked=True) for one, other in changed]
            continue
        sides = [_runs(start, end, of_text), _runs(edit_start, edit_end, of_edit)]
        if sum(map(len, sides)) == 2 and all(sides) and sides[0][0][2] == sides[1][0][2]:
            found.append(Block(start, end, edit_start, edit_end, sides[0][0][2]))
            continue
        found += [Block(first, last, edit_start, edit_start, kind) for first, last, kind in sides[0]]
        found += [Block(end, end, first, last, kind) for first, last, kind in sides[1]]
    return tuple(found)


def measure_edit(
    model: Any,
    token_ids: Sequence[int],
    edit_ids: Sequence[int],
    blocks: Sequence[Block],
    *,
    tolerance: float = 0.01,
    batch_size: int = 16,
) -> EditEffect:
    """Return the effect of an edit on the reward, block by block.

    Args:
        model: from `read_last_token`, in eval mode.
        token_ids: token ids of the text, without padding.
        edit_ids: token ids of the edit.
        blocks: from `differing_blocks`.
        tolerance: bound on the path's certificate, see `attribute_edit`; if 16 nodes do not reach it, blocks are
            exchanged.
        batch_size: texts per forward pass if blocks are exchanged.
    """
    if len(token_ids) == len(edit_ids) and all(block.start == block.edit_start for block in blocks):
        path = attribute_edit(model, token_ids, edit_ids, tolerance=tolerance, most_nodes=_MOST_NODES)
        if path.certificate <= tolerance * max(1.0, abs(path.difference)):
            parts = [path.attribution_T[block.start : block.end] for block in blocks]
            sums, sizes = [float(part.sum()) for part in parts], [float(part.abs().sum()) for part in parts]
            found = tuple(blocks), tuple(sums), tuple(sizes)
            return EditEffect(path.difference, *found, path.attribution_T, path.nodes)
    texts = [_exchanged(token_ids, edit_ids, blocks, range(count)) for count in range(len(blocks) + 1)]
    texts += [_exchanged(token_ids, edit_ids, blocks, range(count, len(blocks))) for count in range(len(blocks) + 1)]
    numbers_N = torch.tensor(rewards(model, texts, batch_size=batch_size), dtype=torch.float64)
    left_N, right_N = numbers_N.chunk(2)
    effects_N = (left_N.diff() - right_N.diff()) / 2
    attribution_T = torch.zeros(len(token_ids), dtype=torch.float64)
    for block, effect in zip(blocks, effects_N.tolist(), strict=True):
        start = min(block.start, len(token_ids) - 1)
        end = max(block.end, start + 1)
        attribution_T[start:end] += effect / (end - start)
    difference = float(left_N[-1] - left_N[0])
    exact = tuple(effects_N.tolist())
    return EditEffect(difference, tuple(blocks), exact, tuple(map(abs, exact)), attribution_T, nodes=0)


def _exchanged(
    token_ids: Sequence[int], edit_ids: Sequence[int], blocks: Sequence[Block], own: Collection[int]
) -> list[int]:
    """Return the edit with some of its blocks as the text has them."""
    found: list[int] = []
    place = 0
    for number, block in enumerate(blocks):
        found += edit_ids[place : block.edit_start]
        if number in own:
            found += token_ids[block.start : block.end]
        else:
            found += edit_ids[block.edit_start : block.edit_end]
        place = block.edit_end
    return found + list(edit_ids[place:])


def _runs(start: int, end: int, marked: Collection[int]) -> list[tuple[int, int, bool]]:
    """Return the runs of marked and of other positions in a stretch: start, end, and whether they are marked."""
    runs: list[tuple[int, int, bool]] = []
    for place in range(start, end):
        kind = place in marked
        if runs and runs[-1][2] == kind:
            runs[-1] = (runs[-1][0], place + 1, kind)
        else:
            runs.append((place, place + 1, kind))
    return runs
