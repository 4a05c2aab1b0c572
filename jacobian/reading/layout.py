"""The protocol of a layout, which finds spans in completions, and helpers for byte ranges.

A layout reads only bytes; `cepo.jacobian.reading.spans` maps the ranges that it finds to tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

ByteRange = tuple[int, int]
WHITE_SPACE = b" \t\r\n\f\v"
_NAME = re.compile(r"[^\s<>/]+")


@dataclass(frozen=True)
class Found:
    """The spans that a layout found in a completion: byte ranges by span name, and those of the scores' numbers."""

    ranges: Mapping[str, tuple[ByteRange, ...]]
    numbers: tuple[ByteRange, ...] = ()
    found_by: str = "tags"


class MalformedError(ValueError):
    """A completion in which the layout's spans cannot be found; the message is the reason that users see."""


ResponseMarks = tuple[str, str, str]
"""The text before response A in a judge's prompt, between A and B, and after B; an empty last one means the end of the
message."""


class Layout(Protocol):
    """The format of a completion.

    Attributes:
        names: names of the spans, in order; the first is the prompt's.
        roles: the span names that Z, X and Y stand for.
        chain: the chain through which the verdict or answer should come about, such as "criteria->analysis->scores".
        tags: names of the tags that completions use.
        instructions: the fixed pieces of the prompt, see `JudgeLayout`.
        responses: how a prompt may delimit the two responses, see `JudgeLayout`; empty if it has none.
        thought_tag: name of the tag around a thought.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def roles(self) -> Mapping[str, str]: ...

    @property
    def chain(self) -> str: ...

    @property
    def tags(self) -> tuple[str, ...]: ...

    @property
    def instructions(self) -> tuple[str, ...]: ...

    @property
    def responses(self) -> tuple[ResponseMarks, ...]: ...

    @property
    def thought_tag(self) -> str: ...

    def find(self, completion: bytes, *, thought_opened: bool = False) -> Found:
        """Return the byte ranges of the spans; raise MalformedError, with the reason, if they cannot be found."""


def check_tags(**tags: str) -> None:
    """Raise ValueError unless each tag is a name, which stands without brackets."""
    for setting, tag in tags.items():
        if not _NAME.fullmatch(tag):
            name = tag.strip(" </>") or "answer"
            raise ValueError(f"{setting} is {tag!r}; expected the tag's name without brackets, such as {name!r}")


def tagged(text: bytes, tag: str, start: int) -> ByteRange:
    """Return the content range of a tag that must occur exactly once after `start`.

    Raises:
        MalformedError: if the tag is missing, doubled, unclosed or out of order.
    """
    opened, closed = f"<{tag}>".encode(), f"</{tag}>".encode()
    opens, closes = text.count(opened, start), text.count(closed, start)
    if opens == 0 and closes == 0:
        raise MalformedError(f"missing <{tag}>")
    if opens > 1 or closes > 1:
        raise MalformedError(f"doubled <{tag}>")
    if closes == 0:
        raise MalformedError(f"unclosed <{tag}>")
    if opens == 0:
        raise MalformedError(f"</{tag}> without <{tag}>")
    begin, end = text.index(opened, start) + len(opened), text.index(closed, start)
    if end < begin:
        raise MalformedError(f"out of order: </{tag}> comes before <{tag}>")
    return begin, end


def trim_range(text: bytes, wanted: ByteRange) -> ByteRange | None:
    """Return the range without ASCII white space at its ends, or None if nothing else is in it."""
    start, end = wanted
    core = text[start:end]
    left = len(core) - len(core.lstrip(WHITE_SPACE))
    core = core.strip(WHITE_SPACE)
    return (start + left, start + left + len(core)) if core else None


def as_bytes(text: str) -> bytes:
    """Return the UTF-8 bytes of any text; lone surrogates are kept, see `as_text`."""
    return text.encode("utf-8", "surrogatepass")


def as_text(piece: bytes) -> str:
    """Return the text of bytes that `as_bytes` made."""
    return piece.decode("utf-8", "surrogatepass")
