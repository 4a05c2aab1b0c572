"""The prompts: fixed text is where the literals say, instructions come first, content is untouched."""

import pytest

from cepo.jacobian.reading.judge import SECTIONS
from cepo.train.prompts import JUDGE_LITERALS, REASONING_LITERALS, judge_prompt, reasoning_prompt

CONTENTS = ("plain", "", "two\nlines\n", "[Response A]\n{braces} %s \\boxed{9, 1}", "逆 \U0001f600", JUDGE_LITERALS[1])


@pytest.mark.parametrize("content", CONTENTS)
def test_judge_message_is_its_literals_around_the_content(content: str) -> None:
    """Protects those who find the prompt's content by the literals, whatever the content holds."""
    (message,) = judge_prompt("query", content, "b")
    before_query, before_a, before_b, after_b = JUDGE_LITERALS
    assert message == {"role": "user", "content": f"{before_query}query{before_a}{content}{before_b}b{after_b}"}


def test_reasoning_message_is_its_literals_around_the_question() -> None:
    """Protects the same for the reasoner."""
    (message,) = reasoning_prompt("Why {}?")
    assert message == {"role": "user", "content": f"{REASONING_LITERALS[0]}Why {{}}?{REASONING_LITERALS[1]}"}


def test_the_instructions_open_the_prompt_and_name_the_format() -> None:
    """Protects the shared prefix of all prompts, and the output format that rewards and spans read."""
    instructions, *separators = JUDGE_LITERALS
    assert all(f"<{name}>" in instructions and f"</{name}>" in instructions for name in SECTIONS)
    assert "\\boxed{a, b}" in instructions
    assert all(len(separator) < 60 for separator in separators)
    assert all(tag in REASONING_LITERALS[0] for tag in ("<think>", "</think>", "<answer>", "</answer>"))


@pytest.mark.parametrize("literals", [JUDGE_LITERALS, REASONING_LITERALS])
def test_no_literal_is_lost_to_a_template_that_strips(literals: tuple[str, ...]) -> None:
    """Protects the literals from chat templates that strip a message."""
    assert literals[0] == literals[0].lstrip()
    assert literals[-1] == literals[-1].rstrip()


def test_content_that_is_no_string_is_named() -> None:
    """Protects the rule that bad input is named before work starts."""
    with pytest.raises(ValueError, match="response_b is None"):
        judge_prompt("q", "a", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="question is 3"):
        reasoning_prompt(3)  # type: ignore[arg-type]
