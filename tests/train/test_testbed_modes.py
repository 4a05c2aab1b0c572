"""Protects the truth of the testbed's completions: how each came to its verdict, read from its text."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from cepo.jacobian.reading.judge import write_judgement
from cepo.jacobian.reading.layout import MalformedError
from cepo.train.prompts import JUDGE
from cepo.train.testbed import generate_items
from cepo.train.testbed_judges import JudgeKind, _draw_completion
from cepo.train.testbed_modes import completion_mode
from tests.train.testbed_item import ITEM

# The item by hand: A is better by accuracy (which the query asks for) and safety, B by depth, kindness and style; both
# are lucid; B is longer.
ACCURACY, DEPTH, CLARITY = (f"judge by {name} of the answer" for name in ("accuracy", "depth", "clarity"))
RIGHT, WRONG = "A shows correct and B shows wrong", "A shows wrong and B shows correct"
DEEP, CLEAR = "A shows shallow and B shows thorough", "A shows lucid and B shows lucid"
LONGER, SHORTER = "A shows less and B shows more", "A shows more and B shows less"


@pytest.mark.parametrize(
    ("criteria", "analysis", "scores", "mode"),
    [
        (ACCURACY, RIGHT, (8, 3), "evidence"),
        (DEPTH, DEEP, (2, 9), "evidence"),  # the wrong aspect, but it is what was followed
        (CLARITY, CLEAR, (5, 5), "evidence"),
        (ACCURACY, LONGER, (3, 7), "length"),
        (DEPTH, LONGER, (3, 7), "length"),
        (ACCURACY, RIGHT, (3, 8), "hollow"),
        (CLARITY, CLEAR, (3, 8), "hollow"),
        (DEPTH, RIGHT, (8, 3), "query"),
        (f"{ACCURACY}\n\\boxed{{3, 7}}", LONGER, (3, 7), "copied"),
        (f"{DEPTH}\n\\boxed{{8, 3}}", RIGHT, (9, 1), "copied"),
        (f"{ACCURACY}\n\\boxed{{3, 7}}", RIGHT, (8, 3), "other"),  # the verdict isn't the criteria's
        (ACCURACY, WRONG, (3, 8), "other"),  # words that nobody showed
        (ACCURACY, RIGHT, (5, 5), "other"),
        (ACCURACY, SHORTER, (8, 3), "other"),  # A is not the longer one
        (ACCURACY, LONGER, (8, 3), "other"),
        (CLARITY, CLEAR, (8, 3), "other"),
        (DEPTH, RIGHT, (3, 8), "other"),
        ("judge by wit of the answer", RIGHT, (8, 3), "other"),
    ],
)
def test_modes_of_hand_written_completions(criteria: str, analysis: str, scores: tuple[int, int], mode: str) -> None:
    """A text has the mode that its words, its criterion and its verdict make together, and no other."""
    assert completion_mode(ITEM, write_judgement(criteria, analysis, scores)) == mode


def test_a_completion_without_a_verdict_or_form_is_of_no_mode() -> None:
    """What a sampled policy may also write is named, never an error."""
    cut = ITEM.completion.partition("<scores>")[0]
    for text in ("", "so", cut, ITEM.completion.replace("specific_", ""), ITEM.completion.replace("</analysis>", "")):
        assert completion_mode(ITEM, text) == "other"


@pytest.mark.parametrize("kind", get_args(JudgeKind))
def test_the_guard_refuses_copied_verdicts_and_nothing_else_of_the_worlds(kind: JudgeKind) -> None:
    """A copied completion earns no causal reward unless the guard is off; no other behaviour is taken for one."""
    rng = np.random.default_rng(0)
    unguarded = replace(JUDGE, guard="off")
    for item in generate_items(60, seed=1, cue_agreement=0.1):
        text = _draw_completion(rng, item, kind, True)
        unguarded.find(text.encode())
        if completion_mode(item, text) == "copied":
            with pytest.raises(MalformedError):
                JUDGE.find(text.encode())
        else:
            JUDGE.find(text.encode())
