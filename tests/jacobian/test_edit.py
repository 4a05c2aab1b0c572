"""Protects what an edit of any length did to a reward: blocks that add up, and marked tokens kept apart from others."""

from typing import Any

import pytest
import torch

from cepo.jacobian.edit import Block, differing_blocks, measure_edit
from cepo.jacobian.reward_model import new_head, read_last_token, rewards
from cepo.jacobian.scalar import attribute_edit
from tests.models import InDouble, tiny_model

TEXT = [1, 5, 9, 14, 3, 22, 2]


def reward_model() -> Any:
    return read_last_token(new_head(tiny_model("llama"), seed=1))


@pytest.mark.parametrize(
    ("edit", "marked", "edit_marked", "blocks"),
    [
        ([1, 5, 31, 14, 3, 22, 2], [2], [2], [Block(2, 3, 2, 3, True)]),
        ([1, 5, 31, 14, 3, 22, 2], [], [], [Block(2, 3, 2, 3)]),
        # The marked word is exchanged and another one is written after it: two blocks, not one.
        ([1, 5, 31, 35, 14, 3, 22, 2], [2], [2], [Block(2, 3, 2, 3, True), Block(3, 3, 3, 4)]),
        ([1, 5, 14, 3, 22, 2], [2], [], [Block(2, 3, 2, 2, True)]),
        ([1, 5, 9, 14, 3, 22, 35, 36, 2], [2], [2], [Block(6, 6, 6, 8)]),
        # A marked word has others in its place: what was there and what is there now are apart.
        ([1, 5, 35, 36, 14, 3, 22, 2], [2], [], [Block(2, 3, 2, 2, True), Block(3, 3, 2, 4)]),
        (TEXT, [2], [2], []),
    ],
)
def test_blocks_hold_marked_or_other_tokens_alone(
    edit: list[int], marked: list[int], edit_marked: list[int], blocks: list[Block]
) -> None:
    assert list(differing_blocks(TEXT, edit, marked, edit_marked)) == blocks


def test_an_edit_with_as_many_tokens_is_a_path() -> None:
    """The tokens' attributions are those of `attribute_edit`, and a block's are its own."""
    with InDouble():
        model, edit = reward_model(), [1, 5, 31, 14, 3, 8, 2]
        found = measure_edit(model, TEXT, edit, differing_blocks(TEXT, edit, [2], [2]))
        path = attribute_edit(model, TEXT, edit)
        assert torch.equal(found.attribution_T, path.attribution_T)
        assert found.effects == (float(path.attribution_T[2]), float(path.attribution_T[5]))
        assert found.nodes == path.nodes > 0
        sizes = [abs(effect) for effect in found.effects]
        assert found.leak == pytest.approx(sizes[1] / sum(sizes))
        assert found.certificate <= 0.01 * max(1.0, abs(found.difference))


def test_a_path_that_does_not_add_up_is_not_taken() -> None:
    """A cured reward model is steep between two words: its path can miss half of the change with 64 nodes."""
    with InDouble():
        model, edit = reward_model(), [1, 5, 31, 14, 3, 8, 2]
        found = measure_edit(model, TEXT, edit, differing_blocks(TEXT, edit, [2], [2]), tolerance=1e-13)
        assert found.nodes == 0
        assert found.certificate < 1e-12
        assert found.attribution_T.nonzero().flatten().tolist() == [2, 5]


def test_blocks_of_other_lengths_are_exchanged_from_both_sides_and_add_up() -> None:
    with InDouble():
        model, edit = reward_model(), [1, 5, 31, 35, 36, 14, 22, 2]
        blocks = differing_blocks(TEXT, edit, [2], [2])
        assert [(block.start, block.edit_start, block.size) for block in blocks] == [(2, 2, 1), (3, 3, 2), (4, 6, 1)]
        found = measure_edit(model, TEXT, edit, blocks)
        assert found.nodes == 0
        ends = rewards(model, [TEXT, edit])
        assert found.difference == pytest.approx(ends[0] - ends[1], abs=1e-12)
        assert found.certificate < 1e-12
        # The first block by hand: alone in the edit, and last in the text.
        first = rewards(model, [[1, 5, 9, *edit[3:]], edit, TEXT, [1, 5, 31, *TEXT[3:]]])
        assert found.effects[0] == pytest.approx((first[0] - first[1] + first[2] - first[3]) / 2, abs=1e-12)
        assert found.attribution_T[2] == pytest.approx(found.effects[0])
        assert found.attribution_T[3] == pytest.approx(found.effects[1]), "what only the edit has"
        assert found.leak == pytest.approx(1 - abs(found.effects[0]) / sum(map(abs, found.effects)))
        assert measure_edit(model, TEXT, TEXT, ()).leak is None
