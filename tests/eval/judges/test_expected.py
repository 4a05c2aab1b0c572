"""Protects expected scores, read from the probabilities of the digits, and the winner that scores name."""

from collections.abc import Mapping, Sequence

import pytest

from cepo.eval.judges.expected import expected_scores
from cepo.eval.judges.settings import winner
from cepo.jacobian.reading.judge import forced_opening, read_scores


def expect(pieces: Sequence[bytes], likely: Mapping[int, Mapping[bytes, float]]) -> tuple[float, float] | None:
    return expected_scores(pieces, lambda at: likely.get(at, {}))


def test_expected_scores_are_the_means_of_the_digits_normalised_to_one() -> None:
    pieces = [b"so <scores>", b"\\boxed{", b"8", b", ", b"6", b"}", b"</scores>"]
    likely = {2: {b"8": 0.3, b"4": 0.1, b"the": 0.6}, 4: {b"6": 0.5, b"7": 0.5}}
    assert expect(pieces, likely) == pytest.approx((7.0, 6.5))


def test_a_number_inside_a_longer_token_is_compared_with_tokens_of_the_same_frame() -> None:
    pieces = [b"<scores>\\boxed", b"{8,", b" 6}", b"</scores>"]
    likely = {1: {b"{8,": 0.5, b"{2,": 0.5, b"9": 0.9, b"{9": 0.9}, 2: {b" 6}": 0.25, b" 10}": 0.75, b"6": 0.9}}
    assert expect(pieces, likely) == pytest.approx((5.0, 0.25 * 6 + 0.75 * 10))


@pytest.mark.parametrize("written", [[b"1", b"0"], [b"1"]])
def test_where_10_is_two_tokens_the_mass_of_1_is_split_by_the_zero_behind_it(written: list[bytes]) -> None:
    pieces = [b"<scores>\\boxed{", *written, b", ", b"6", b"}</scores>"]
    likely = {1: {b"1": 0.5, b"8": 0.5}, 2: {b"0": 0.8, b", ": 0.2}, len(written) + 2: {b"6": 1.0}}
    assert expect(pieces, likely) == pytest.approx((0.5 * 8 + 0.5 * (0.8 * 10 + 0.2 * 1), 6.0))


def test_a_zero_that_carries_a_mark_makes_10_of_1_too() -> None:
    pieces = [b"<scores>\\boxed{", b"1", b"0, ", b"6", b"}</scores>"]
    likely = {1: {b"1": 0.5, b"8": 0.5}, 2: {b"0, ": 0.6, b"0": 0.2, b"5": 0.1, b", ": 0.1}, 3: {b"6": 1.0}}
    assert expect(pieces, likely) == pytest.approx((0.5 * 8 + 0.5 * (0.8 * 10 + 0.2 * 1), 6.0))


@pytest.mark.parametrize(
    ("written", "first", "second", "expected"),
    [
        ("85", {b"8": 0.5, b"7": 0.5}, {b"5": 0.5, b"9": 0.25, b", ": 0.25}, 0.5 * 75 + 0.5 * (42.5 + 22.25 + 2.0)),
        ("100", {b"1": 0.5, b"9": 0.5}, {b"0": 1.0}, 0.5 * 90 + 0.5 * 100),
        ("62", {b"62": 1.0}, {}, 62.0),
    ],
)
def test_a_score_above_10_is_read_on_a_scale_to_100(
    written: str, first: dict[bytes, float], second: dict[bytes, float], expected: float
) -> None:
    """A digit that was not written is followed by those that were, as far as they stay on the scale."""
    digits = [written.encode()] if written == "62" else [bytes([byte]) for byte in written.encode()]
    pieces = [b"<scores>\\boxed{", *digits, b", ", b"6", b"}</scores>"]
    likely = {1: first, 2: second, 3: {b"0": 1.0} if len(digits) == 3 else {}, len(digits) + 2: {b"6": 1.0}}
    found = expect(pieces, likely)
    assert found is not None
    assert found[0] == pytest.approx(expected)


def test_where_another_number_was_written_1_counts_as_one() -> None:
    pieces = [b"<scores>\\boxed{", b"8", b", ", b"6", b"}</scores>"]
    assert expect(pieces, {1: {b"1": 0.5, b"8": 0.5}, 2: {b"0": 0.9}, 3: {b"6": 1.0}}) == pytest.approx((4.5, 6.0))


def test_10_as_one_token_counts_as_ten_and_a_decimal_part_as_written() -> None:
    pieces = [b"<scores>\\boxed{", b"10", b", ", b"7", b".", b"5", b"}</scores>"]
    likely = {1: {b"10": 0.5, b"1": 0.0, b"9": 0.5}, 3: {b"7": 0.5, b"6": 0.5}}
    assert expect(pieces, likely) == pytest.approx((9.5, 7.0))


def test_bytes_that_are_no_text_shift_nothing() -> None:
    pieces = [b"\xf0\x9f<scores>{1, 2}\\boxed{", b"9", b", ", b"3", b"}", b"</scores>"]
    assert expect(pieces, {1: {b"9": 1.0}, 3: {b"3": 0.5, b"5": 0.5}}) == pytest.approx((9.0, 4.0))


@pytest.mark.parametrize(
    "text",
    ["", "<scores>\\boxed{8}</scores>", "<scores>\\boxed{80000, 6}</scores>", "<think><scores>\\boxed{8, 6}</scores>"],
)
def test_without_a_verdict_on_a_scale_there_are_no_expected_scores(text: str) -> None:
    pieces = [bytes([byte]) for byte in text.encode()]
    assert expected_scores(pieces, lambda at: {b"8": 0.5, b"6": 0.5}) is None


def test_a_distribution_without_a_number_gives_no_expected_scores() -> None:
    assert expect([b"<scores>\\boxed{", b"8", b", ", b"6", b"}</scores>"], {1: {b"8": 1.0}, 3: {b"x": 1.0}}) is None


def test_winner_reads_ties_and_nothing() -> None:
    assert [winner(scores) for scores in ((8, 6), (2, 9), (5, 5), None)] == ["A", "B", "tie", None]


def test_a_forced_opening_closes_a_thought_that_is_still_open() -> None:
    """Scores inside an unclosed thought would never be read."""
    for text in ("", "<think>hm", "<think>hm</think>so"):
        assert read_scores(text + forced_opening(text) + "7, 3}\n</scores>") == (7.0, 3.0)
