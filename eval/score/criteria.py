"""The contribution of each criterion, a list item or sentence of a source span, to a link's effect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from cepo.jacobian.records import LinkPath, Span

_LIST_ITEM = re.compile(r"^\s*(?:[-*+•‣–]|\(?(?:\d{1,3}|[A-Za-z])[.)])\s", re.MULTILINE)
_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Criterion:
    """A part of a source span, and its contribution to the link's effect.

    Attributes:
        text: the list item or sentence, without white space around it.
        nats: sum of its tokens' attributions, mean over the donors; negative if the part made the target less likely.
        share: nats over delta, the exact effect; None if delta is 0. Shares add up to 1 up to the path's error.
    """

    text: str
    nats: float
    share: float | None


def criteria_of(path: LinkPath, span: Span, texts: Sequence[str]) -> list[Criterion]:
    """Return the parts of a link's source with their contributions, which sum to the path's estimate.

    Args:
        path: the link's path, with attributions.
        span: the link's source.
        texts: the text of every token of the rollout.

    Raises:
        ValueError: if the path has no attribution.
    """
    if path.attribution_S is None:
        raise ValueError("path has no attribution; expected one with nodes, and at least one counterfactual")
    nats_of = dict(zip(path.source_positions, path.attribution_S.double().tolist(), strict=True))
    delta = path.delta
    sums = [(text, sum(nats_of[position] for position in places)) for text, places in parts_of(span, texts)]
    return [Criterion(text, nats, nats / delta if delta else None) for text, nats in sums]


def parts_of(span: Span, texts: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Return text and positions of each list item of a span, or of each sentence if it holds no list.

    A text holds a list if one of its lines starts with a bullet, a number or a letter; then each line is a part. A
    sentence ends in punctuation followed by white space, or in that of a script that puts none there.

    Args:
        span: any span of a rollout.
        texts: the text of every token of the rollout.
    """
    has_list = _LIST_ITEM.search(span.text) is not None
    sentence_of = dict(zip(span.movable, span.sentences, strict=True))
    # A token that overlaps a tag has no sentence number; it counts with the sentence before it, or else the first.
    numbers: list[int] = []
    for position in span.positions:
        numbers.append(sentence_of.get(position, numbers[-1] if numbers else 0))
    parts: list[list[int]] = []
    for _, run in groupby(range(len(numbers)), key=numbers.__getitem__):
        before = texts[parts[-1][-1]] if parts else ""
        positions = [span.positions[place] for place in run]
        apart = before[-1:].isspace() or texts[positions[0]][:1].isspace() or not before[-1:].isascii()
        ends = before.endswith("\n") if has_list else apart
        if parts and (not ends or not _has_words(parts[-1], texts)):
            parts[-1] += positions
        else:
            parts.append(positions)
    if len(parts) > 1 and not _has_words(parts[-1], texts):
        parts[-2:] = [parts[-2] + parts[-1]]
    # If the content is one contiguous text, the characters of adjacent tags are cut off the tokens that overlap them.
    whole = "".join(texts[position] for position in span.positions)
    start = whole.find(span.text)
    start, end = (start, start + len(span.text)) if start >= 0 else (0, len(whole))
    found, cursor = [], 0
    for positions in parts:
        text = "".join(texts[position] for position in positions)
        shown = text[max(0, start - cursor) : max(0, end - cursor)].strip()
        found.append((shown, tuple(positions)))
        cursor += len(text)
    return found


def _has_words(positions: Sequence[int], texts: Sequence[str]) -> bool:
    return _WORD.search("".join(texts[position] for position in positions)) is not None
