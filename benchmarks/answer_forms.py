"""The tables in docs/formats.md of how a reasoner's answers are read; written by `cepo.benchmarks.forms`."""

from __future__ import annotations

from cepo.jacobian.reading.layout import MalformedError
from cepo.jacobian.reading.reasoner import ReasonerLayout
from cepo.train.rewards.task import exact_match, math_verify_reward

_THOUGHT = "<think>\n3 x 6 = 18\n</think>\n"

AFTER_THOUGHT: tuple[str, ...] = (
    *("<answer>18</answer>", "<ANSWER>18</ANSWER>", "<answer>18</answer></answer>", "<answer>18", "<answer>18</ans"),
    *("18</answer>", "<answer>17</answer> No: <answer>18</answer>", "<answer>18</answer>, in <answer></answer> tags"),
    *("<answer></answer>", "<answer>17 < \\boxed{18}</answer>", "<answer>The answer is 18.</answer>"),
    *("<answer>$18$</answer>", "<answer>\n\\[18\\]\n</answer>", "<answer>\\(18\\)</answer>", "<answer>**18**</answer>"),
    *("<answer>18 jars</answer>", "<answer>18.0</answer>", "<answer>１８</answer>", "<answer>$5$ or $18$</answer>"),
    *(
        "\\boxed{18}",
        "$\\boxed {18}$.",
        "\\boxed 18",
        "\\fbox{18}",
        "\\boxed{\\boxed{18}}",
        "\\boxed{17} or \\boxed{18}",
    ),
    *("\\boxed{\\text{18}}", "\\boxed{}", "\\boxed{18", "<answer>17</answer> \\boxed{18}"),
    *(
        "#### 18",
        "#### 18 jars",
        "#### $18",
        "#### 18\n\nDone.",
        "#### Step 1\n6 + 12\n18",
        "#### x + 18",
        "#### 2 million",
    ),
    *("The answer is 18.", "Final Answer: 18", "**Answer:** 18", "A: 18", "Final Answer: $18$. I hope it is correct."),
    *("18", "We add.\n18", "So\n\\[\n18\n\\]", "They have 18 jars.", ""),
)
"""What a reasoner may write after its thought."""

OUTPUTS: dict[str, str] = {
    "a thought that recites `<answer> and </answer>`": "<think>In <answer> and </answer>.</think><answer>18</answer>",
    "a thought that drafts `<answer>17</answer>`": "<think>Is it <answer>17</answer>?</think>\n<answer>18</answer>",
    "a thought that is not closed": "<think>\nIt is <answer>18</answer>",
    "an empty thought, then prose": "<think>\n\n</think>\n3 x 6 is\nno more. So it is 18",
    "a tag without a thought": "3 x 6 = 18\n<answer>18</answer>",
    "`</think>` quoted after the answer": "3 x 6\n<answer>18</answer> Not </think>.",
    "the last of two sentences": "Three times six. So it is eighteen.",
    "the last of two sentences, in Chinese": "三乘六。所以答案是十八。",
    "the last of two sentences, in Hindi": "तीन गुणा छह। उत्तर अठारह है।",
    "one sentence": "18",
    "the answer and nothing before it": "<answer>18</answer>",
}
"""Whole outputs."""


def draw_answers() -> str:
    """Return the two tables in Markdown: each form's answer, how it was found, and its rewards when 18 is right."""
    head = "| answer | `found_by` | `exact_match` | `math_verify` |\n| --- | --- | --- | --- | --- |\n"
    after = "".join(f"| {show(form)} | {_read(_THOUGHT + form)} |\n" for form in AFTER_THOUGHT)
    whole = "".join(f"| {name} | {_read(output)} |\n" for name, output in OUTPUTS.items())
    return f"| after a thought {head}{after}\n| the output {head}{whole}"


def show(form: str) -> str:
    """Return a form as the text of a table cell."""
    signs = {"\n": "⏎", "\u00a0": "⍽", "\b": "␈", "|": "\\|"}
    named = "".join(signs.get(sign, sign) for sign in form)
    return f"`` {named} ``" if "`" in named else f"`{named}`" if named else "nothing"


def _read(output: str) -> str:
    layout, completion = ReasonerLayout(), output.encode()
    try:
        _, answer = layout.read(completion)
    except MalformedError as reason:
        return f"none: {str(reason).partition(':')[0].replace('<', '`<').replace('>', '>`')} | | 0 | 0"
    try:
        found_by = layout.find(completion).found_by
    except MalformedError as reason:
        found_by = f"no spans: {str(reason).partition(':')[0]}"
    earned = [reward([output], ["18"])[0] for reward in (exact_match, math_verify_reward)]
    written = completion[slice(*answer.content)].decode().strip()
    return f"{show(written)} | {found_by} | {earned[0]:.0f} | {earned[1]:.0f}"
