"""The expectation of a written score, over the numbers that other tokens in its place would have made.

A number is read token by token along the number as written, where each next token's distribution is known:

    E = m_1 + r_1 (m_2 + r_2 (m_3 + ...))        m_i = sum over tokens of p_i gain_i

p_i is the distribution of the number's i-th token given the text before it. At the first it is normalised over the
tokens that differ from the written one in their digits alone. gain_i is by how much the number is larger with a token
than if it ended before it (0 at the first), and r_i is p_i of the token that was written. Where 10 is the tokens "1"
and "0", half "1" and half "8" at the first and "0" for sure at the second give 0.5 * 1 + 0.5 * 8 + 0.5 * (10 - 1) = 9.
One more token is read where the number could have become longer: after a "1" that stands alone, a "0".

Limits. What follows a token that was not written is not known, so it is taken as written: the digits as far as they
keep the number on the scale, and the decimal part, which always counts as written. The scale is from 0 to the smallest
of 10, 100, 1000 and 10000 that holds both scores, so a judge that scores out of 100 but writes 9 and 7 is read on 10.
At the first token what leaves the scale does not count; later it counts as the end of the number.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

SCALES = (10, 100, 1000, 10_000)
_DIGITS_AND_TAIL = re.compile(rb"([0-9]+)(.*)", re.DOTALL)
_LONGEST_TAIL = 8  # bytes of the text after a token's digits with which other tokens' are compared

Value = TypeVar("Value", bound=Any)
"""A float, or a tensor: whatever adds and multiplies."""


@dataclass(frozen=True)
class NumberToken:
    r"""A token at which a written number could have become another one.

    Attributes:
        piece: its bytes.
        mark: what stands in it before the number's first digit, such as " " or "{".
        tail: what stands in it after its digits, such as "," or "}".
        before: the number's digits before it; none for the token that opens the number.
        rest: what the number continues with after the digits that it holds, the decimal part included.
        after: the start of the text from there on; none for the token that opens the number.
        ended: the number if it had ended before the token; 0 for the token that opens it.
        reached: the number if it ends after the token.
        scale: the largest number.
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
        """Whether the number begins in it."""
        return not self.before

    def gain(self, piece: bytes) -> float | None:
        """Return by how much a token here makes the number larger than if it had ended; None if it adds no digit."""
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
        ends: where each token ends in them.
        number: where the number stands: ASCII digits, with or without a decimal part.
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


def expected_number(means: Sequence[Value], shares: Sequence[Value]) -> Value:
    """Return the expected number, m_1 + r_1 (m_2 + r_2 (m_3 + ...)).

    Args:
        means: m_i, the mean gain at each of its tokens, one or more, in order.
        shares: r_i, the probability of the token that was written; the last is not read.
    """
    total = means[-1]
    for mean, share in zip(means[-2::-1], shares[-2::-1], strict=True):
        total = mean + share * total
    return total
