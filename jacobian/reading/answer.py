r"""Find the answer of a text: in a tag, a `\boxed{}`, after `####` or "the answer is", or else at its end.

Each kind of mark is searched for in one pass, so that the time is linear even for a model that repeats one in a loop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cepo.jacobian.reading.layout import WHITE_SPACE
from cepo.jacobian.reading.sentences import sentence_ends

Unmarked = Literal["after rationale", "last sentence", "whole", "nothing"]
"""The answer of a text without any mark: its last line, the last sentence of that line, all of it, or nothing. With
"nothing", only tags and boxes are marks."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[-+]?\d[^\s$\\{}]*|[A-Z](?![A-Za-z])))|\\[{}]|[{}]", re.ASCII)
_HASHES = "####"
_STATED = re.compile(
    r"(?:\b(?:so|thus|hence|therefore),?\s+)?(?:\bthe\s+)?(?:\b(?:final|correct|right)\s+)?"
    r"(?<!\ban )(?<!\bno )(?<!\bany )\banswers?[*_]*(?:\s+(?:is|are)\b|\s*[:：=])[\s:：*_]*|^[*_]*A[:：][\s*_]*",
    re.IGNORECASE | re.MULTILINE,
)
_CURRENCY = "[$€£¥￥₹₩₽₺₫₱₪฿]?"
_UNIT = re.compile(
    rf"\s*{_CURRENCY}(?P<number>[-+−]?\d[\d,]*(?:\.\d+)?)(?:\s*{_CURRENCY}[%.!]?\s*|\s+\(?(?!(?:dozen|hundred|"
    r"thousand|[mbtr]+illion|percent|half|halves|pi|times|squared|cubed|factorial|root|or|and|to|over|by|plus|minus|of)"
    r"\b)[^\W\d_]{2}(?:[^\d+*/^=<>\\]|/(?=[^\W\d_]))*+)",
    re.IGNORECASE,
)
_WRAPPERS = (
    *(("**", "**"), ("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"), ("$", "$")),
    *(("\\text{", "}"), ("\\textbf{", "}"), ("\\mathrm{", "}")),
)


@dataclass(frozen=True)
class Answer:
    """The position of a text's answer, in characters.

    Attributes:
        start: start of its mark.
        content: start and end of the answer, possibly with ASCII white space at its ends.
        found_by: "tags", "boxed", "hashes" (`####`), "stated" ("the answer is"), or the rule for text without a mark.
    """

    start: int
    content: tuple[int, int]
    found_by: str


def find_answer(text: str, *, tag: str, boxed: bool, unmarked: Unmarked) -> Answer | None:
    r"""Return the answer of a text that follows a thought, or None if there is none; it may be blank.

    Of several answer sections, boxes or statements the last one counts, since it may be a correction; blank sections
    and boxes count only if all are blank. A section is narrowed to a mark inside it. docs/formats.md describes each
    form.

    Args:
        text: any text.
        tag: name of the answer's tag, in any case.
        boxed: whether `\boxed{}` is read.
        unmarked: what the answer is without any mark.
    """
    section, end = _find_section(text, tag)
    begin = section.content[0] if section else 0
    narrow = unmarked != "nothing" or section is not None
    found = (
        (find_box(text, begin, end if section else len(text)) if boxed else None)
        or (_find_hashes(text, begin, end) or _find_statement(text, begin, end) if narrow else None)
        or section
        or _find_end(text, end, unmarked)
    )
    if found is None:
        return None
    content = _trim(text, *_unwrap(text, *found.content))
    return Answer(section.start, content, section.found_by) if section else Answer(found.start, content, found.found_by)


def read_number(text: str) -> str | None:
    """Return the number if the text is a number, alone or with a unit ("18 jars", "$18"); None otherwise.

    A percentage gives None, since 5% is not 5.
    """
    found = _UNIT.fullmatch(text)
    return found["number"] if found and "%" not in text else None


def find_box(text: str, start: int, end: int) -> Answer | None:
    r"""Return the last box, of nested ones the innermost. Escaped braces are text; `\boxed 5` needs no braces."""
    boxes: list[Answer] = []
    openings: list[re.Match[str] | None] = []
    for brace in _BRACES.finditer(text, start, end):
        if brace["bare"]:
            bare = brace.start("bare") + len(brace["bare"].rstrip(".,;:!?)"))
            boxes.append(Answer(brace.start(), (brace.start("bare"), bare), "boxed"))
        elif brace[0] == "}":
            opening = openings.pop() if openings else None
            if opening:
                boxes.append(Answer(opening.start(), (opening.end(), brace.start()), "boxed"))
        elif not brace[0].startswith("\\") or len(brace[0]) > 2:
            openings.append(brace if len(brace[0]) > 1 else None)
    boxes.sort(key=lambda box: box.start)
    return _last_written(text, boxes) or (boxes[-1] if boxes else None)


def _find_section(text: str, tag: str) -> tuple[Answer | None, int]:
    """Return the answer's section, and where it ends; without a section, where the text ends.

    A section ends at the first closing tag. An unclosed last section counts if no closed one has content, since a stop
    string removes the closing tag. A tag without a partner at the end of the text is dropped: the output was cut there,
    or the prompt had opened the section.
    """
    sections: list[Answer] = []
    alone: list[re.Match[str]] = []
    opening: re.Match[str] | None = None
    for mark in re.finditer(rf"<\s*+(/?)\s*+{re.escape(tag)}\s*+>", text, re.IGNORECASE):
        if opening and mark[1]:
            sections.append(Answer(opening.start(), (opening.end(), mark.start()), "tags"))
        elif mark[1]:
            alone.append(mark)
        opening = None if mark[1] else mark
    if opening and not _last_written(text, sections):
        cut = Answer(opening.start(), (opening.end(), _without_cut_tag(text, tag)), "tags")
        if text[slice(*cut.content)].strip():
            sections.append(cut)
        else:
            alone.append(opening)
    end = len(text)
    for mark in reversed(alone):
        if text[mark.end() : end].strip():
            break
        end = mark.start()
    section = _last_written(text, sections) or (sections[-1] if sections else None)
    return section, section.content[1] if section else end


def _without_cut_tag(text: str, tag: str) -> int:
    """Return where a text ends, not counting a truncated closing tag."""
    closed = f"</{tag}>"
    cut = next((cut for cut in range(len(closed), 0, -1) if text[-cut:].casefold() == closed[:cut].casefold()), 0)
    return len(text) - cut


def _find_hashes(text: str, start: int, end: int) -> Answer | None:
    """Return what follows the last `####`: a number without its unit, or, on the last line, the whole line.

    If other lines follow, anything but a number is a heading.
    """
    at = text.rfind(_HASHES, start, end)
    if at < 0 or text[max(at - 1, start) : at] == "#":
        return None
    begin = at + len(_HASHES)
    line_end = text.find("\n", begin, end)
    line_end = end if line_end < 0 else line_end
    number = _UNIT.fullmatch(text, begin, line_end)
    if number:
        return Answer(at, number.span("number"), "hashes")
    if not text[begin:line_end].strip() or text[line_end:end].strip():
        return None
    stated = _find_statement(text, begin, line_end)
    return Answer(at, stated.content if stated else (begin, line_end), "hashes")


def _find_statement(text: str, start: int, end: int) -> Answer | None:
    """Return the answer that the last line states: what follows "the answer is" or "Answer:", to the sentence's end."""
    end = start + len(text[start:end].rstrip())
    line = max(text.rfind("\n", start, end) + 1, start)
    statements = list(_STATED.finditer(text, line, end))
    if not statements:
        return None
    begin = statements[-1].end()
    stop = next(sentence_ends(text, begin, end), end)
    stop = begin + len(text[begin:stop].rstrip("*_ .。"))
    return Answer(statements[-1].start(), (begin, stop), "stated") if text[begin:stop].strip() else None


def _find_end(text: str, end: int, unmarked: Unmarked) -> Answer | None:
    """Return the answer of a text without a mark, whose last line may be a formula over several lines."""
    end = len(text[:end].rstrip())
    if not end or unmarked == "nothing":
        return None
    if unmarked == "whole":
        return Answer(0, (0, end), unmarked)
    begin = text.rfind("\n", 0, end) + 1
    formula = text[:end].rstrip(".。")
    for opening, closing in (("\\[", "\\]"), ("$$", "$$")):
        if formula.endswith(closing):
            begin = max(text.rfind(opening, 0, len(formula) - len(closing)), 0)
            return Answer(begin, (begin, end), unmarked)
    if unmarked == "last sentence":
        words = next((at for at in range(end - 1, begin, -1) if text[at].isalnum()), begin)
        begin = max((at for at in sentence_ends(text, begin, end) if at < words), default=begin)
    begin += len(text[begin:end]) - len(text[begin:end].lstrip())
    return Answer(begin, (begin, end), unmarked)


def _unwrap(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the range without emphasis and math delimiters around it."""
    for opening, closing in _WRAPPERS:
        core = text[start:end].strip()
        whole = core[:-1] if core[-1:] in (".", "。") else core
        inner = whole[len(opening) : -len(closing)]
        wraps = whole.startswith(opening) and whole.endswith(closing) and len(whole) >= len(opening) + len(closing)
        if wraps and inner.strip() and opening not in inner and closing not in inner:
            start = text.index(opening, start) + len(opening)
            end = start + len(inner)
    return start, end


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the range without non-ASCII white space at its ends and whatever lies outside of that."""
    space = WHITE_SPACE.decode()
    written = text[start:end]
    left, right = len(written) - len(written.lstrip()), len(written.rstrip())
    if left >= right:
        return start, start
    return start + len(written[:left].rstrip(space)), end - len(written[right:].lstrip(space))


def _last_written(text: str, found: list[Answer]) -> Answer | None:
    return next((one for one in reversed(found) if text[slice(*one.content)].strip()), None)
