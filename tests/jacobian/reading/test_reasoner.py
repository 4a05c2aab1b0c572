"""The reasoner's format as text: its final answer."""

import pytest

from cepo.jacobian.reading.reasoner import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>4?</think><answer> 5 </answer>", "5"),
        ("<answer>4</answer> or <answer>5</answer>", "5"),
        ("<answer>it is \\boxed{5} dollars</answer> \\boxed{4}", "5"),
        ("<answer>4</answer></think>so \\boxed{5}", "5"),
        ("\\boxed{4} \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{\\left\\{ 5 \\right.}", "\\left\\{ 5 \\right."),
        ("\\boxed{5} then \\boxed{6", "5"),
        ("one\n\n  five \n \n", "five"),
        ("<answer></answer> 5", ""),
        ("thoughts only</think>", ""),
        ("<think> cut off at <answer>5</answer>", ""),
    ],
)
def test_the_answer_is_tagged_else_boxed_else_last(text: str, answer: str) -> None:
    """Protects the order in which an answer is looked for, and that braces are matched."""
    assert extract_answer(text) == answer
