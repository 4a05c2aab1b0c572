"""The expected value of a written score, under the model's distribution over other tokens in its place.

A number is read token by token along the number as written, where each token's distribution is known:

    E = m_1 + r_1 (m_2 + r_2 (m_3 + ...))        m_i = sum over tokens of p_i gain_i

p_i is the distribution of the number's i-th token given the text before it. At the first token it is normalised over
the tokens that differ from the written one only in their digits. gain_i is by how much a token increases the number
compared with ending before it (with 0 at the first token), and r_i is p_i of the written token. For example, let 10 be
the tokens "1" and "0". If the first token is "1" or "8" with probability 0.5 each and the second is certainly "0", then
E = 0.5 * 1 + 0.5 * 8 + 0.5 * (10 - 1) = 9. One more token is read where the number could have been longer: after a "1"
by itself, a "0" could follow.

Limits: what would follow a token that was not written is unknown, so the written continuation is assumed: its digits as
far as they keep the number on the scale, and the decimal part. The scale is from 0 to the smallest of 10, 100, 1000 and
10000 that holds both scores, so a judge that scores out of 100 but writes 9 and 7 is read on a scale of 10. A first
token that leaves the scale is left out; a later one counts as the end of the number.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

SCALES = (10, 100, 1000, 10_000)
_DIGITS_AND_TAIL = re.compile(rb"([0-9]+)(.*)", re.DOTALL)
_LONGEST_TAIL = 8  # most bytes after a token's digits that are compared with those of other tokens

Value = TypeVar("Value", bound=Any)
"""A float or a tensor."""


@dataclass(frozen=True)
class NumberToken:
    r"""A token at which a written number could have become another one.

    Attributes:
        piece: the token's bytes.
        mark: those before the number's first digit, such as " " or "{".
        tail: those after its digits, such as "," or "}".
        before: the number's digits in earlier tokens; empty for the number's first token.
        rest: the rest of the number after this token's digits, including the decimal part.
        after: the beginning of the text after this token's digits; empty for the number's first token.
        ended: the number if it ended before this token; 0 for its first token.
        reached: the number if it ended after this token.
        scale: the largest number of the scale.
    """

    piece: bytes
    mark: bytes
    tail: bytes
    before: bytes
    rest: bytes
    after: bytes
    ended: float
    reached: float
    scale: int

    @property
    def opens(self) -> bool:
        """Whether this is the number's first token."""
        return not self.before

    def gain(self, piece: bytes) -> float | None:
        """Return by how much a token in this place increases the number; None if it does not continue the number."""
        if piece == self.piece:
            return self.reached - self.ended
        if self.opens:
            digits = piece[len(self.mark) : len(piece) - len(self.tail)]
            rest = self.rest
            if piece != self.mark + digits + self.tail or not digits.isdigit():
                return None
        else:
            found = _DIGITS_AND_TAIL.fullmatch(piece)
            if found is None:
                return None
            digits = self.before + found[1]
            rest = self.rest if self.after.startswith(found[2]) else b""
        values = (float(digits + rest[:length]) for length in range(len(rest), -1, -1))
        value = next((value for value in values if value <= self.scale), None)
        return None if value is None else value - self.ended


def number_tokens(
    text: bytes, ends: Sequence[int], number: tuple[int, int], scale: int
) -> list[tuple[int, NumberToken]]:
    """Return the tokens at which a written number could have become another one, each with its index, in order.

    Args:
        text: the bytes of all tokens.
        ends: where each token ends in `text`.
        number: byte range of the number: ASCII digits, with or without a decimal part.
        scale: see `scale_of`.
    """
    start, end = number
    whole = text[start:end]
    point = start + len(whole.partition(b".")[0])
    found: list[tuple[int, NumberToken]] = []

    def add(index: int, first: int, last: int, ended: float, reached: float) -> None:
        opening, closing = (ends[index - 1] if index else 0), ends[index]
        token = NumberToken(
            text[opening:closing],
            text[opening:first],
            text[last:closing],
            text[start:first],
            text[last:end] if last > first else b"",
            text[last : last + _LONGEST_TAIL] if first > start else b"",
            ended,
            reached,
            scale,
        )
        found.append((index, token))

    index, first, ended = bisect_right(ends, start), start, 0.0
    while first < point:
        last = min(ends[index], point)
        reached = float(text[start:last] if last < point else whole)
        if last > first:
            add(index, first, last, ended, reached)
        index, first, ended = index + 1, last, reached
    can_be_longer = whole[:1] != b"0" and 10 * int(text[start:point]) <= scale
    if can_be_longer and index < len(ends) and ends[index - 1] == point:
        add(index, point, point, ended, ended)
    return found


def scale_of(numbers: Sequence[bytes]) -> int:
    """Return the smallest scale that holds all numbers, which have at most four digits before the decimal point."""
    return next(scale for scale in SCALES if all(float(number) <= scale for number in numbers))


def expected_number(means: Sequence[Value], written_ps: Sequence[Value]) -> Value:
    """Return the expected number, m_1 + r_1 (m_2 + r_2 (m_3 + ...)).

    Args:
        means: m_i, the mean gain at each of its tokens, one or more, in order.
        written_ps: r_i, the probability of each written token; the last is not read.
    """
    total = means[-1]
    for mean, written_p in zip(means[-2::-1], written_ps[-2::-1], strict=True):
        total = mean + written_p * total
    return total
