"""The judge's format as text: the verdict, its sections, and what is appended or written."""

import pytest
from hypothesis import given

from cepo.jacobian.reading.judge import (
    SECTIONS,
    JudgeLayout,
    find_verdict_end,
    read_pair,
    read_scores,
    write_judgement,
)
from cepo.jacobian.reading.thought import read_section
from tests.jacobian.reading.texts import ANY_TEXT, FUZZ, GOOD


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        (GOOD, (9.0, 3.0)),
        ("<scores>\\boxed{ 7.5 ,\n10 }</scores>", (7.5, 10.0)),
        ("<scores>\\boxed{1, 2} no: \\boxed{3, 4}</scores>", None),
        ("<scores>\\boxed{1, 2}</scores><scores>\\boxed{3, 4}</scores>", None),
        ("<scores>\\boxed{1, 2}</scores> <scores>\\boxed{3, ", None),
        (GOOD.replace("</analysis>", ""), None),
        (GOOD.replace("<specific_criteria>\nright\n</specific_criteria>", ""), (9.0, 3.0)),
        ("<scores>\\boxed{1, 2}</scores></think>" + GOOD, (9.0, 3.0)),
        (GOOD + "</think>", (9.0, 3.0)),
        ("<think>" + GOOD + "</think>" + GOOD.replace("9, 3", "2, 8") + "</think>", (2.0, 8.0)),
        ("\n<think>" + GOOD, None),
        (GOOD.replace("right", "<think>"), (9.0, 3.0)),
        ("\\boxed{9, 3}", None),
        ("<scores>\\boxed{9, 3}", None),
        ("</scores>\\boxed{9, 3}<scores>", None),
        ("<scores>\\boxed{9}</scores>", None),
        ("<scores>\\boxed{9, 3, 4}</scores>", None),
        ("<scores>\\boxed{-9, 3}</scores>", None),
        ("<scores>\\boxed{NaN, 3}</scores>", None),
        ("<scores>\\boxed{inf, 3}</scores>", None),
        ("<scores>\\boxed{٩, ٣}</scores>", None),
        ("<scores>\\boxed{9\u00a0, 3}</scores>", None),
        ("<scores>\\boxed{\ud800, 3}</scores>", None),
        ("<scores>\\boxed{" + "9" * 10_000 + ", 3}</scores>", None),
        ("<scores>\\boxed{" + "0" * 10_000 + "9, 3}</scores>", None),
        ("<scores>\\boxed{7.66667, 3}</scores>", (7.66667, 3.0)),
        ("", None),
    ],
)
def test_scores_are_read_from_the_one_section(text: str, scores: tuple[float, float] | None) -> None:
    """Protects the verdict: the one box of the one scores section after the thought, in a few ASCII digits."""
    assert read_scores(text) == scores


@FUZZ
@given(body=ANY_TEXT)
def test_a_section_is_found_whatever_it_holds(body: str) -> None:
    """Protects the reading of sections: tags of other sections inside do not cut it short."""
    assert read_section(f"<think></think><note>{body}</note>", "note") == body


def test_the_thought_ends_at_the_first_closing_tag_for_the_spans_too() -> None:
    """Protects one reading of a thought: a closing tag quoted after the judgement starts no second thought."""
    text = f"<think>{GOOD}</think>{GOOD.replace('9, 3', '2, 8')}</think>"
    found = JudgeLayout().find(text.encode())
    assert [text.encode()[start:end] for start, end in found.numbers] == [b"2", b"8"]
    assert read_scores(text) == (2.0, 8.0)


def test_a_verdict_ends_where_scores_can_first_be_read() -> None:
    """Protects generation's stop: unreadable scores, and those of a thought, end nothing."""
    unread, thought = "<scores>none</scores>", f"<think>{GOOD}"
    assert find_verdict_end(f"{GOOD}{GOOD}".encode()) == len(GOOD)
    assert find_verdict_end(f"{unread}{GOOD}".encode()) is None  # its scores would be doubled
    assert find_verdict_end(f"{unread}{GOOD}{GOOD}".encode(), verdicts="lenient") == len(unread + GOOD)
    assert find_verdict_end(thought.encode()) is None
    assert find_verdict_end(f"so {GOOD}".encode(), thought_opened=True) is None
    assert find_verdict_end(f"{thought}</think>{GOOD} and more".encode()) == len(f"{thought}</think>{GOOD}")


def test_a_written_judgement_is_read_back() -> None:
    """Protects writer and readers of the format against each other."""
    text = write_judgement("right", "A is", (9, 3))
    assert text == GOOD
    assert [read_section(text, name) for name in SECTIONS] == ["\nright\n", "\nA is\n", "\n\\boxed{9, 3}\n"]
    assert read_scores(text) == read_pair(text) == (9.0, 3.0)


@pytest.mark.parametrize(
    ("text", "scores"), [("\\boxed{1, 9} no, \\boxed{9, 1}", (9.0, 1.0)), ("\\boxed{8}", None), ("", None)]
)
def test_a_pair_without_sections_is_the_last_one(text: str, scores: tuple[float, float] | None) -> None:
    """Protects the reading of the testbed's verdicts, which need no section."""
    assert read_pair(text) == scores
