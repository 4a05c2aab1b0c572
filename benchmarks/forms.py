"""Write the tables of docs/formats.md that show how outputs are read: `python -m cepo.benchmarks.forms`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cepo.benchmarks.answer_forms import draw_answers, show
from cepo.files import write_text
from cepo.jacobian.reading.judge import JudgeLayout, write_judgement
from cepo.jacobian.reading.verdict import Verdicts

_PAGE = Path(__file__).resolve().parent.parent / "docs" / "formats.md"
_END = "<!-- end of forms -->"
_SOUND = write_judgement("Right facts.", "A is right; B is not.", (8, 6))
_BOX = r"\boxed{8, 6}"

IN_SCORES: tuple[str, ...] = (
    *(
        _BOX,
        r"\boxed{ 8 , 6 }",
        r"They get \boxed{8, 6}.",
        r"$\boxed{8, 6}$",
        r"**\boxed{8, 6}**",
        "```\n\\boxed{8, 6}\n```",
    ),
    *(
        r"\boxed{8.5, 6.25}",
        r"\boxed{7.66667, 6.33333}",
        r"\boxed{7.6666667, 6}",
        r"\boxed{1000, 2}",
        r"\boxed{10000, 2}",
    ),
    *("\\boxed{8, 6}\n\\boxed{8, 6}", "\\boxed{8, 6}\nOn reflection \\boxed{7, 6}", r"\boxed{a, b} = \boxed{8, 6}"),
    *(r"\boxed{8}, \boxed{6}", "A: \\boxed{8}\nB: \\boxed{6}", r"\boxed{8}, \boxed{6}, \boxed{7}"),
    *(r"\boxed {8, 6}", r"\boxed{{8, 6}}", r"\boxed{\boxed{8, 6}}", r"\boxed{(8, 6)}", r"\boxed{[8, 6]}"),
    *(r"\boxed{8; 6}", r"\boxed{8，6}", "\\boxed{8,\u00a06}", r"\boxed{8,\, 6}", r"\boxed{8 6}", r"\boxed{8 / 6}"),
    *(r"\boxed{8/10, 6/10}", r"\boxed{8 out of 10, 6 out of 10}", r"\boxed{8/10}", r"\boxed{8/10, 3/5}"),
    *(r"\boxed{A: 8, B: 6}", r"\boxed{B: 6, A: 8}", r"\boxed{\text{8}, \text{6}}", r"\boxed{\text{A: 8, B: 6}}"),
    *(
        r"\boxed{**8**, **6**}",
        r"\boxed{８, ６}",
        r"\boxed{٨, ٦}",
        r"\boxed{-8, 6}",
        r"\boxed{+8, 6}",
        r"\boxed{8e0, 6}",
    ),
    *(r"\boxed{8-9, 6}", r"\boxed{8,5, 6,0}", r"\boxed{8, 6, 3}", r"\boxed{8}", r"\boxed{a, b}", r"\boxed{eight, six}"),
    *(r"\boxed{8, 6", r"boxed{8, 6}", "\boxed{8, 6}", r"\fbox{8, 6}", "8, 6", "A: 8, B: 6", "**A:** 8/10, **B:** 6/10"),
    *("[[8]], [[6]]", "[[A]]", "A > B"),
)
"""What a judge may write between `<scores>` and `</scores>`."""

JUDGEMENTS: dict[str, str] = {
    "the whole, then the whole with 7, 6": _SOUND + "\n" + _SOUND.replace("8, 6", "7, 6"),
    "analysis not closed": _SOUND.replace("</analysis>\n", ""),
    "criteria not closed": _SOUND.replace("</specific_criteria>\n", ""),
    "scores not closed": _SOUND.replace("\n</scores>", ""),
    "no tags around the scores": _SOUND.replace("<scores>\n", "").replace("\n</scores>", ""),
    "the analysis names `<scores>`": _SOUND.replace("B is not.", "B writes `<scores>` into its text."),
    "`</think>` quoted in the analysis": _SOUND.replace("B is not.", "B ends with a stray </think>."),
    "a note with `</think>` after the scores": _SOUND + "\nNote: B left a </think> behind.",
    "no criteria": _SOUND.partition("</specific_criteria>\n")[2],
    "scores alone": _SOUND[_SOUND.index("<scores>") :],
    "scores first": "<scores>\n\\boxed{8, 6}\n</scores>\n" + _SOUND[: _SOUND.index("<scores>")],
    "a draft with 3, 9 in `<think>`": f"<think>{_SOUND.replace('8, 6', '3, 9')}</think>\n{_SOUND}",
    "the same in `<thinking>`": f"<thinking>{_SOUND.replace('8, 6', '3, 9')}</thinking>\n{_SOUND}",
    "two thoughts, then the judgement": f"<think>1</think>\n<think>{_SOUND.replace('8, 6', '3, 9')}</think>\n{_SOUND}",
    "a thought that is not closed": f"<think>{_SOUND}",
}
"""Whole judgements."""


def draw_forms() -> str:
    """Return the two tables of judgements in Markdown."""
    lines = ["| between `<scores>` and `</scores>` | strict, the default | lenient |", "| --- | --- | --- |"]
    lines += [_row(show(form), _SOUND.replace(_BOX, form)) for form in IN_SCORES]
    lines += ["", "| the judgement | strict, the default | lenient |", "| --- | --- | --- |"]
    lines += [_row(name, text) for name, text in JUDGEMENTS.items()]
    return "\n".join(lines) + "\n"


def write_forms(page: Path = _PAGE) -> None:
    """Write the tables of verdicts and answers into a page, each between its two marks.

    Raises:
        ValueError: for a page without the marks.
    """
    text = page.read_text(encoding="utf-8")
    for name, tables in (("forms", draw_forms()), ("answers", draw_answers())):
        mark = f"<!-- {name}: drawn by make forms -->\n"
        before, begin, rest = text.partition(mark)
        _, end, after = rest.partition(_END)
        if not begin or not end:
            raise ValueError(f"{page} lacks the marks {mark.strip()!r} and {_END!r}, between which the tables go")
        text = f"{before}{begin}\n{tables}\n{end}{after}"
    write_text(page, text)


def _row(name: str, judgement: str) -> str:
    return f"| {name} | {_read(judgement, 'strict')} | {_read(judgement, 'lenient')} |"


def _read(judgement: str, verdicts: Verdicts) -> str:
    """Return the scores and the reason why a judgement is malformed, without the text that the reason quotes."""
    completion = judgement.encode()
    reading = JudgeLayout(verdicts=verdicts).read(completion)
    reason = reading.reasons[0].partition(" with two numbers")[0].partition(":")[0] if reading.reasons else ""
    pair = ", ".join(completion[slice(*number)].decode() for number in reading.numbers or ())
    reason = re.sub(r"<\w+>|\\boxed(?:\{a, b\})?", lambda code: f"`{code[0]}`", reason)
    return "; ".join(part for part in (pair and f"**{pair}**", reason) if part)


if __name__ == "__main__":
    write_forms(*map(Path, sys.argv[1:]))
