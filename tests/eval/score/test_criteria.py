"""Protects the table of criteria: its parts are the reader's, cover every token once, and add up to the effect."""

from __future__ import annotations

import pytest
import torch

from cepo.eval.score.criteria import criteria_of, parts_of
from cepo.jacobian.links import Link
from cepo.jacobian.records import LinkPath, Span

LINK = Link("criteria->analysis", "criteria", "analysis", "total", (), "log_likelihood")


def span_of(texts: list[str], sentences: list[int], fixed: tuple[int, ...] = ()) -> Span:
    """Return a span of all tokens; those at the places `fixed` also carry a piece of a tag."""
    movable = [place for place in range(len(texts)) if place not in fixed]
    text = "".join(texts).removeprefix(">").removesuffix("</")
    return Span("criteria", tuple(range(len(texts))), tuple(movable), tuple(sentences), text)


@pytest.mark.parametrize(
    ("texts", "sentences", "expected"),
    [
        (["Be", " brief", ".", " Be", " right", "."], [0, 0, 0, 1, 1, 1], ["Be brief.", "Be right."]),
        (
            ["1", ".", " Brief", ".", " Short", ".", "\n", "2", ".", " Right", "."],
            [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4],
            ["1. Brief. Short.", "2. Right."],
        ),
        (["-", " Brief", "\n", "-", " Right"], [0, 0, 0, 1, 1], ["- Brief", "- Right"]),
        (["Names", " 2", ".", "5", " kg", "."], [0, 0, 0, 1, 1, 1], ["Names 2.5 kg."]),
        (["Be", " brief", ".", " ", "."], [0, 0, 0, 1, 1], ["Be brief. ."]),
        (["答", "案", "。", "四", "。"], [0, 0, 0, 1, 1], ["答案。", "四。"]),
        (["Whatever", " it", " takes"], [0, 0, 0], ["Whatever it takes"]),
    ],
)
def test_parts_are_list_items_or_sentences(texts: list[str], sentences: list[int], expected: list[str]) -> None:
    """A list is cut at its lines, other text where white space follows a full stop; numbers stay whole."""
    parts = parts_of(span_of(texts, sentences), texts)
    assert [text for text, _ in parts] == expected
    assert [position for _, places in parts for position in places] == list(range(len(texts)))


def test_what_a_token_carries_of_a_tag_is_not_shown() -> None:
    texts = [">Be", " brief", ".", " Be", " right", ".</"]
    parts = parts_of(span_of(texts, [0, 0, 1, 1], fixed=(0, 5)), texts)
    assert parts == [("Be brief.", (0, 1, 2)), ("Be right.", (3, 4, 5))]


def test_nats_add_up_and_shares_are_of_the_exact_effect() -> None:
    texts = ["Be", " brief", ".", " Be", " right", "."]
    span = span_of(texts, [0, 0, 0, 1, 1, 1])
    attribution_S = torch.tensor([1.0, 0.5, 0.0, -0.25, -0.25, 0.0])
    path = LinkPath(LINK, -1.0, (-3.0,), (1.0,), attribution_S, span.positions, (8,), 1)
    found = criteria_of(path, span, texts)
    assert [(one.text, one.nats, one.share) for one in found] == [("Be brief.", 1.5, 0.75), ("Be right.", -0.5, -0.25)]
    level = LinkPath(LINK, -1.0, (-1.0,), (1.0,), attribution_S, span.positions, (8,), 1)
    assert [one.share for one in criteria_of(level, span, texts)] == [None, None]
    with pytest.raises(ValueError, match="path has no attribution"):
        criteria_of(LinkPath(LINK, -1.0, (-3.0,), (), None, span.positions, (8,), 0), span, texts)
