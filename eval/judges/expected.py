"""Expected scores: the mean over the numbers that a judge could have written in place of its scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from cepo.jacobian.reading.judge import find_numbers
from cepo.jacobian.reading.numbers import NumberToken, expected_number, number_tokens, scale_of
from cepo.jacobian.reading.verdict import STRICT, Verdicts

LARGEST_SCORE = 10
"""The largest score that a forced verdict may give."""


def expected_scores(
    pieces: Sequence[bytes], likely: Callable[[int], Mapping[bytes, float]], verdicts: Verdicts = STRICT
) -> tuple[float, float] | None:
    """Return the expected scores of A and B, as `cepo.jacobian.reading.numbers` defines them.

    Args:
        pieces: bytes of each token of the judgement, in order.
        likely: maps the index of a token to the probabilities of its alternatives, by their bytes. An alternative that
            is missing counts as impossible.
        verdicts: see `JudgeLayout`.

    Returns:
        The expected scores; None if `read_scores` reads no verdict, or no alternative is a number.
    """
    text = b"".join(pieces)
    numbers = find_numbers(text, verdicts=verdicts)
    if numbers is None:
        return None
    scale = scale_of([text[slice(*number)] for number in numbers])
    ends = list(accumulate(map(len, pieces)))
    first, second = (_expected(number_tokens(text, ends, number, scale), likely) for number in numbers)
    return None if first is None or second is None else (first, second)


def _expected(
    tokens: Sequence[tuple[int, NumberToken]], likely: Callable[[int], Mapping[bytes, float]]
) -> float | None:
    means, written_ps = [], []
    for index, token in tokens:
        weights = likely(index)
        gains = {piece: gain for piece in weights if (gain := token.gain(piece)) is not None}
        total = sum(weights[piece] for piece in gains) if token.opens else 1.0
        if not total > 0.0:
            return None
        means.append(sum(weights[piece] * gain for piece, gain in gains.items()) / total)
        written_ps.append(weights.get(token.piece, 0.0) / total)
    return expected_number(means, written_ps)
