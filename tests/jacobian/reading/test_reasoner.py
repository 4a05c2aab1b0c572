r"""The reasoner's format as text: one reader finds the answer, for rewards, spans and references alike."""

import random
import re
import time

import pytest

from cepo.jacobian.reading.layout import MalformedError
from cepo.jacobian.reading.reasoner import ReasonerLayout, extract_answer, reference_answer
from cepo.train.rewards.task import exact_match, math_verify_reward

THOUGHT = "<think>\n3 x 6 is 18.\n</think>\n"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>4?</think><answer> 5 </answer>", "5"),
        ("<answer>4</answer> or <answer>5</answer>", "5"),
        ("<answer>it is \\boxed{5} dollars</answer> \\boxed{4}", "5"),
        ("so <answer>4</answer>?</think>\n<answer>5</answer>", "5"),
        ("<answer>4</answer> Done.</think>", "4"),
        ("\\boxed{4} \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{\\left\\{ 5 \\right.}", "\\left\\{ 5 \\right."),
        ("\\boxed{5} then \\boxed{6", "5"),
        ("one\n\n  five \n \n", "five"),
        ("<answer></answer> 5", ""),
        ("<answer> \u3000 </answer>", ""),
        ("thoughts only</think>", ""),
        ("<think> cut off at <answer>5</answer>", ""),
        ("", ""),
    ],
)
def test_the_answer_is_tagged_else_boxed_else_last(text: str, answer: str) -> None:
    """Protects the order in which an answer is looked for, and that braces are matched."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "#### 18",
        "#### 18 jars",
        "#### $18",
        "#### 18%",
        "#### 18 €",
        "#### ¥18",
        "#### 18 km/h",
        "#### 18 (jars)",
        "####18.\n",
        "We get it. #### 18",
        "#### 18\n\nLet me know!",
        "#### Answer: 18",
        "<answer>#### 18</answer>",
        "<answer>18</answer></answer>",
        "<answer><answer>18</answer></answer>",
        "<answer>18",
        "<answer>18</ans",
        "18</answer>",
        "<ANSWER>18</ANSWER>",
        "<Answer>18</answer >",
        "<answer>18</answer> as <answer> asks",
        "<answer>18</answer> <answer></answer>",
        "<answer>\n\\[18\\]\n</answer>",
        "<answer>\\(18\\)</answer>",
        "<answer>$18$.</answer>",
        "<answer>$$18$$</answer>",
        "<answer>**18**</answer>",
        "<answer>\u300018\u00a0</answer>",
        "<answer>The answer is 18.</answer>",
        "<answer>3 x 6\n\\boxed{18}</answer>",
        "So:\n\\[\n18\n\\]",
        "\\boxed{18}",
        "\\boxed {18}",
        "$\\boxed 18$",
        "\\boxed 18.",
        "\\fbox{18}",
        "\\boxed{\\text{18}}",
        "\\boxed{\\fbox{18}}",
        "So $\\boxed{18}$.\n<answer>",
        "</answer>\\boxed{18}",
        "The answer is 18.</answer>",
        "\\boxed{18} is what goes in \\boxed{}.",
        "The answer is 18.",
        "**Answer:** 18",
        "A: 18",
        "Final Answer: 18",
        "Final Answer: The final answer is $18$. I hope it is correct.",
        "Therefore the correct answer is: **18**.",
        "18",
        "We add.\n18\n",
    ],
)
def test_written_forms_hold_the_answer(text: str) -> None:
    """Protects right answers from being lost by their form, with a thought and (but for a lone line) without one."""
    for written in (THOUGHT + text, "3 x 6 is.\n" + text, text):
        assert extract_answer(written) == "18"
        assert exact_match([written], ["18"]) == math_verify_reward([written], ["18"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### Step 1\n3 x 6\n18", "18"),
        ("#### 1. Multiply\nso 18", "so 18"),
        ("##### 17\n18", "18"),
        ("#### 2 million", "2 million"),
        ("#### 12 - 5", "12 - 5"),
        ("#### x + 1", "x + 1"),
        ("#### 18 km/2", "18 km/2"),
        ("####\n18", "18"),
        ("Is the answer: 5? No.\n18", "18"),
        ("Then no answer is right.", "Then no answer is right."),
        ("That is what the answer is.", "That is what the answer is."),
        ("<answer>18 jars</answer>", "18 jars"),
        ("<answer>$5$ or $6$</answer>", "$5$ or $6$"),
        ("<answer>(B)</answer>", "(B)"),
        ("<answer>１８</answer>", "１８"),
        ("I write \\boxed as told. 18 it is", "18 it is"),
        ("\\boxed{18", "\\boxed{18"),
        ("so</answer>\n18", "18"),
        ("We add. So it is four. :)", "So it is four. :)"),
        ("Two and two make four. So it is four.", "So it is four."),
        ("二加二等于四。所以答案是四。", "所以答案是四。"),
        ("नमस्ते। उत्तर चार है।", "उत्तर चार है।"),
    ],
)
def test_what_looks_like_a_mark_is_text(text: str, answer: str) -> None:
    """Protects headings, prose about marks and whole phrases from being taken for a mark or its number."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 x 6 = <<3*6=18>>18\n#### 18", "18"),
        ("so $x = \\boxed{4{,}2}$. #### 7", "4{,}2"),
        (" 18 ", "18"),
        ("1. One. Two.", "1. One. Two."),
        ("x = 1\ny = 2", "x = 1\ny = 2"),
        ("<answer>18</answer>", "18"),
        ("\\boxed{}", "\\boxed{}"),
    ],
)
def test_references_have_the_marks_of_completions(text: str, answer: str) -> None:
    """Protects that a data set's reference is read as a completion is, and whole where nothing marks an answer."""
    assert reference_answer(text) == answer


def test_a_recited_instruction_costs_nothing() -> None:
    """Protects a right answer whose thought names the format's own tags: it earned 0 where the plain one earned 1."""
    plain = read("<think>\nTwo and two make four.\n</think>\n<answer>4</answer>")
    for thought in (
        "My reply goes inside <answer> and </answer>. Four.",
        "I end with an <answer> tag. Four.",
        "Perhaps <answer>5</answer>? No, four.",
        "I reason inside <think> as told. Four.",
    ):
        assert read(f"<think>\n{thought}\n</think>\n<answer>4</answer>") == (thought, *plain[1:])
        assert read(f"{thought}\n</think>\n<answer>4</answer>", opened=True) == (thought, *plain[1:])
    assert extract_answer("I write <answer>5</answer> there.", thought_opened=True) == ""


PIECES = (
    *("<think>", "</think>", "<answer>", "</answer>", "<ANSWER>", "</answer", "`</think>`", "\\boxed{", "}", "{"),
    *("\\}", "\\boxed 5", "\\fbox{", "####", "#### 18", "#### 18 jars", "#", "The answer is ", "Answer:", "\nA:"),
    *(". ", "18", "5", "(B)", "so it is", "\udc80", "\u3000", "\n", " ", "\\[", "\\]", "$", "$$", "**", "。", "؟ "),
)


def test_rewards_and_spans_read_the_same_answer() -> None:
    """Protects the one reader: on mutated completions both find the same text, or both refuse."""
    draws = random.Random("answers")
    whole = [
        f"{THOUGHT}<answer>18</answer>",
        f"{THOUGHT}#### 18",
        "3 x 6. So it is \\boxed{18}.",
        "We add. The answer is 18.",
    ]
    seen: dict[str, int] = {}
    for _ in range(4000):
        parts = re.split(r"(?<=[>}. \n])", draws.choice(whole)) if draws.random() < 0.5 else []
        for _ in range(draws.randint(1, 8)):
            at = draws.randint(0, len(parts))
            parts[at : at + draws.randint(0, 1)] = [draws.choice(PIECES)]
        text, opened = "".join(parts), draws.random() < 0.3
        answer = extract_answer(text, thought_opened=opened)
        try:
            _, found, _ = read(text, opened=opened)
        except MalformedError as reason:
            found = ""
            # A sound answer that nothing led to is an answer, but no pair of spans.
            if "empty rationale" in str(reason) or "only one sentence" in str(reason):
                assert answer, text
                continue
        assert found == answer, text
        seen["read" if found else "refused"] = seen.get("read" if found else "refused", 0) + 1
    assert min(seen["read"], seen["refused"]) > 400


@pytest.mark.parametrize(
    "unit",
    [
        *("It is \\boxed{", "{", "\\boxed{}", "\\boxed  ", "\\boxed 5", "<answer>", "</answer>", "<answer></answer>"),
        *("#", "#### ", "#### 5 ab ", "$$", "**", "\\[", "the answer is ", "so the ", "answer  ", ". ", ".)", "。"),
        *("`</think>`", "<think>", "< ", " ", " \n", "Dr. ", "9,"),
    ],
)
def test_reading_is_linear(unit: str) -> None:
    """Protects training from a model that has fallen into a loop: sixteen times the text is not 256 times the work."""
    for frame in ("<think>a</think>{} 9", "<answer>{} 9</answer>"):
        small, large = (seconds(frame.replace("{}", unit * (size // len(unit)))) for size in (2_000, 32_000))
        assert large < 64 * small


def seconds(text: str) -> float:
    """Return the processor's seconds to read an answer, the least of three."""
    taken = []
    for _ in range(3):
        started = time.process_time()
        extract_answer(text)
        taken.append(time.process_time() - started)
    return min(taken)


def read(text: str, *, opened: bool = False) -> tuple[str, str, str]:
    """Return rationale, answer and mark as the layout finds them."""
    completion = text.encode("utf-8", "surrogatepass")
    found = ReasonerLayout().find(completion, thought_opened=opened)
    rationale, answer = (
        b" ".join(completion[slice(*part)] for part in found.ranges[name]).decode("utf-8", "surrogatepass").strip()
        for name in ("rationale", "answer")
    )
    return rationale, answer, found.found_by
