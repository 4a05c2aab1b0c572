"""Expected scores: the mean over the numbers that a judge could have written where it wrote its scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from cepo.jacobian.reading.judge import find_numbers
from cepo.jacobian.reading.verdict import STRICT, Verdicts

LARGEST_SCORE = 10


def expected_scores(
    pieces: Sequence[bytes], likely: Callable[[int], Mapping[bytes, float]], verdicts: Verdicts = STRICT
) -> tuple[float, float] | None:
    r"""Return the expected scores of A and B over the digits that could have stood where it wrote its scores.

    At the token that opens a number, the expectation is over the numbers from 0 to 10 with their probabilities,
    normalised to one. Where 10 is two tokens, "1" stands for both 1 and 10: where 1 or 10 was written, its probability
    is split by the probability of a "0" after it, which is known there; where another number was written, it counts as
    1. A decimal part counts as it was written.

    Args:
        pieces: bytes of each token of the judgement, in order.
        likely: maps the index of a token to the probabilities of its alternatives, by their bytes. An alternative that
            is missing counts as impossible.
        verdicts: see `JudgeLayout`.

    Returns:
        None where `read_scores` reads no verdict, a number is greater than 10, or no alternative is a number.
    """
    text = b"".join(pieces)
    numbers = find_numbers(text, verdicts=verdicts)
    if numbers is None or max(float(text[slice(*number)]) for number in numbers) > LARGEST_SCORE:
        return None
    ends = list(accumulate(len(piece) for piece in pieces))
    expected = [_expected_number(number, pieces, ends, likely) for number in numbers]
    return None if expected[0] is None or expected[1] is None else (expected[0], expected[1])


def _expected_number(
    number: tuple[int, int],
    pieces: Sequence[bytes],
    ends: Sequence[int],
    likely: Callable[[int], Mapping[bytes, float]],
) -> float | None:
    text = b"".join(pieces)[number[0] : number[1]]
    first = next(index for index, end in enumerate(ends) if end > number[0])
    start = ends[first] - len(pieces[first])
    written = text[: ends[first] - number[0]]
    if not written.isdigit():  # a token that holds the decimal point too
        return None
    before, after = pieces[first][: number[0] - start], pieces[first][number[0] + len(written) - start :]
    weights: dict[int, float] = {}
    for piece, probability in likely(first).items():
        middle = piece[len(before) : len(piece) - len(after)]
        if middle.isdigit() and piece == before + middle + after and int(middle) <= LARGEST_SCORE:
            weights[int(middle)] = weights.get(int(middle), 0.0) + probability
    total = sum(weights.values())
    if not total > 0.0:
        return None
    values = {value: float(value) for value in weights}
    if written == b"1" and not after and first + 1 < len(pieces):
        values[1] = 1.0 + 9.0 * min(1.0, likely(first + 1).get(b"0", 0.0))
    fraction = float(text) - int(float(text))
    return sum(weight * values[value] for value, weight in weights.items()) / total + fraction
