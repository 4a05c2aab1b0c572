"""Protects what rewards know of a completion: its whole text, and whether its prompt had opened a thought."""

from typing import Any

import pytest

from cepo.train.rewards.completions import completion_text, read_completions
from cepo.train.rewards.task import argmax_reward, exact_match, format_reward
from tests.jacobian.reading.texts import GOOD

USER = {"role": "user", "content": "Why <think>"}


@pytest.mark.parametrize(
    ("columns", "opened"),
    [
        ({}, False),
        ({"prompts": None}, False),
        ({"prompts": ["Why?"]}, False),
        ({"prompts": ["Why?<think>\n"]}, True),
        ({"prompts": [[USER]]}, False),
        ({"prompts": [[USER, {"role": "assistant", "content": "<think>\n"}]]}, True),
        ({"prompts": [[USER, {"role": "assistant", "content": [{"type": "text", "text": "<think>"}]}]]}, True),
        ({"prompts": [[]]}, False),
        ({"prompts": [[USER]], "thought_opened": [True]}, True),
        ({"prompts": ["Why?<think>"], "thought_opened": [False], "label": ["A"]}, False),
    ],
)
def test_a_prompt_or_a_column_says_whether_a_thought_was_opened(columns: dict[str, Any], opened: bool) -> None:
    assert read_completions(["text"], **columns) == [("text", opened)]


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"thought_opened is \[True\]; expected a list of 2 values"):
        read_completions(["a", "b"], thought_opened=[True])


def test_a_thought_that_was_taken_out_of_the_content_is_put_back() -> None:
    """TRL parses the output of known families into `reasoning_content` and `content`; a thought stays a thought."""
    message = {"role": "assistant", "reasoning_content": GOOD, "content": GOOD.replace("9, 3", "2, 8")}
    for one in (message, {**message, "reasoning_content": None, "thinking": GOOD}):
        assert completion_text([one]) == f"<think>{GOOD}</think>\n{message['content']}"
        assert argmax_reward([[one]], ["B"], thought_opened=[True]) == [1.0]
        assert format_reward([[one]], thought_opened=[False]) == [0.2]
    quoting = {**message, "reasoning_content": f"B ends with </think>. {GOOD}"}
    assert argmax_reward([[quoting]], ["B"]) == [1.0]


def test_a_draft_in_a_thought_that_the_template_opened_earns_nothing() -> None:
    columns = {"prompts": [[USER]] * 2, "thought_opened": [True, True]}
    cut = [f"A draft: {GOOD} Wait,", f"so</think>{GOOD}"]
    assert argmax_reward(cut, ["A", "A"], **columns) == [0.0, 1.0]
    assert format_reward(cut, **columns) == [0.0, 0.2]
    answers = ["It may be <answer>4</answer>. Wait,", "so</think><answer>4</answer>"]
    assert exact_match(answers, ["4", "4"], **columns) == [0.0, 1.0]
