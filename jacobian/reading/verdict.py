r"""Find the two numbers of a verdict in the forms that are read.

Strict reads one form, `\boxed{8, 6}`, so that a policy is rewarded for one form only. Lenient, for judges that were
trained elsewhere, also reads other forms that can mean only one pair.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Literal, get_args

from cepo.jacobian.reading.layout import ByteRange, MalformedError

Verdicts = Literal["strict", "lenient"]
STRICT: Verdicts = "strict"
_SHOWN = 40  # most bytes of a quotation

# Longer numbers are not scores; the targets of links hold numbers of a few tokens.
_NUMBER = rb"([0-9]{1,4}(?:\.[0-9]{1,6})?)(?![0-9])"
_STRICT_PAIR = re.compile(rb"\\boxed\{\s*" + _NUMBER + rb"\s*,\s*" + _NUMBER + rb"\s*\}")
_BOX = re.compile(rb"(?:\\b|b|\x08)oxed\s*+\{")  # JSON reads the \b of an unescaped \boxed as a backspace
_BRACE = re.compile(rb"\\[{}]|[{}]")
# Spaces of all kinds (including LaTeX's), brackets and emphasis, which may surround a score without meaning.
_AROUND = (
    rb"(?:[\s{}\[\]()*$~`]|\xc2\xa0|\xe2\x80[\x80-\x8b\xaf]|\xe3\x80\x80|"
    rb"\\(?:[,;:! ]|(?:text|textbf|mathrm|mathbf|quad)(?![a-z])))*+"
)
_COMMA = rb"(?:[,;]|\xef\xbc[\x8c\x9b]|\xe3\x80\x81)"  # the full-width and ideographic ones too


def _named(letter: bytes) -> bytes:
    return rb"(?:(?:(?i:Response|Assistant|Answer|Score)\s++)?+" + letter + _AROUND + rb"[:=])?+" + _AROUND


def _score(letter: bytes) -> bytes:
    of_ten = rb"(?:\s*+(?:/|out of)\s*+10(?![0-9.]))?+"
    return _AROUND + _named(letter) + _NUMBER + of_ten + _AROUND


_LENIENT_PAIR = re.compile(_score(b"A") + _COMMA + _score(b"B"))
_LENIENT_A, _LENIENT_B = re.compile(_score(b"A")), re.compile(_score(b"B"))
_BETWEEN_BOXES = re.compile(_AROUND + rb"(?:" + _COMMA + rb"|and|&)?+" + _AROUND + _named(b"B"))


def check_verdicts(verdicts: str) -> None:
    """Raise ValueError unless `verdicts` names a way of reading."""
    if verdicts not in get_args(Verdicts):
        raise ValueError(f"verdicts is {verdicts!r}; expected one of {', '.join(get_args(Verdicts))}")


def find_pair(completion: bytes, section: ByteRange, tag: str, verdicts: Verdicts) -> tuple[ByteRange, ByteRange]:
    r"""Return the byte ranges of the two numbers of a scores section.

    A number is one to four ASCII digits with up to six decimals; as in j1, no range is enforced.

    Args:
        completion: any bytes.
        section: the content of the section.
        tag: its name, for the reason.
        verdicts: "strict": the section holds one `\boxed`, and it is `\boxed{a, b}`. "lenient": the pair in the last
            box, the two numbers of two boxes, or, without a box, the pair that is the whole section; brackets,
            emphasis, spaces of all kinds, names of the responses and "/10" may surround a number.

    Raises:
        MalformedError: if the section holds no such pair.
    """
    inside = completion[slice(*section)]
    if verdicts == "strict" and inside.count(rb"\boxed") > 1:
        raise MalformedError(f"doubled \\boxed in <{tag}>")
    found = _strict(inside) if verdicts == "strict" else _lenient(inside)
    if found is None:
        shown = inside.strip()[:_SHOWN].decode("utf-8", errors="replace")
        raise MalformedError(f"no \\boxed{{a, b}} with two numbers in <{tag}>, which holds {shown!r}")
    first, second = found
    return (section[0] + first[0], section[0] + first[1]), (section[0] + second[0], section[0] + second[1])


def find_last_pair(completion: bytes) -> tuple[ByteRange, ByteRange] | None:
    r"""Return the ranges of the numbers of the last `\boxed{a, b}`, inside or outside of a section, or None."""
    pair = next(iter(deque(_STRICT_PAIR.finditer(completion), maxlen=1)), None)
    return pair and (pair.span(1), pair.span(2))


def _strict(inside: bytes) -> tuple[ByteRange, ByteRange] | None:
    pair = _STRICT_PAIR.search(inside)
    return pair and (pair.span(1), pair.span(2))


def _lenient(inside: bytes) -> tuple[ByteRange, ByteRange] | None:
    boxes = deque(_BOX.finditer(inside), maxlen=3)  # a policy in a loop may write thousands
    contents = [_content(inside, box.end()) for box in boxes][-2:] or [(0, len(inside))]
    pair = _LENIENT_PAIR.fullmatch(inside, *contents[-1])
    if pair is not None:
        return pair.span(1), pair.span(2)
    if len(boxes) != 2 or _BETWEEN_BOXES.fullmatch(inside, contents[0][1] + 1, boxes[1].start()) is None:
        return None
    first, second = _LENIENT_A.fullmatch(inside, *contents[0]), _LENIENT_B.fullmatch(inside, *contents[1])
    return None if first is None or second is None else (first.span(1), second.span(1))


def _content(inside: bytes, begin: int) -> ByteRange:
    """Return the content of the box that opens at `begin`, up to its closing brace; empty if it has none."""
    depth = 1
    for brace in _BRACE.finditer(inside, begin):
        depth += {b"{": 1, b"}": -1}.get(brace[0], 0)
        if not depth:
            return begin, brace.start()
    return begin, begin
