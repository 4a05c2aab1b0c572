"""Find where a thought ends, for judges and reasoners alike, and sections after it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cepo.jacobian.reading.layout import WHITE_SPACE, ByteRange, MalformedError, as_bytes, as_text

THOUGHT = "think"
# How models open and close a thought.
_SPELLINGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    # gpt-oss, whose answer has a header of its own
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)
# Left and right quotation marks, and the spaces that French puts inside its own; English puts a comma or point there.
_MARKS = ["``", "''", '""', "“”", "‘’", "„“", "‚‘", "«»", "‹›", "「」", "『』", "《》"]
_MARKS += [f"«{space}{space}»" for space in (" ", "\u00a0", "\u202f")]
_QUOTES = [
    (pair[: len(pair) // 2].encode(), tuple(f"{stop}{pair[len(pair) // 2 :]}".encode() for stop in ("", ",", ".")))
    for pair in _MARKS
]
_ENDS_A_LINE = re.compile(rb"[ \t]*(?:[\r\n<]|\Z)")


@dataclass(frozen=True)
class Thought:
    """The thought at the beginning of a completion.

    Attributes:
        contents: the byte range between its tags, one for each of several consecutive thoughts; () without a thought.
        end: where the completion continues after it; 0 without a thought.
    """

    contents: tuple[ByteRange, ...] = ()
    end: int = 0


def find_thought(
    completion: bytes, tag: str = THOUGHT, *, opened: bool = False, sections: Sequence[str] = ()
) -> Thought:
    """Return the thought of a completion.

    There is one if the prompt opened it, or if the completion itself begins with the opening tag; consecutive thoughts
    count as one. Models spell the tag in several ways, which docs/formats.md lists. Anywhere else a tag is text, with
    one exception, for texts whose prompt is unknown or was rendered by another template: a closing tag that nothing
    opened ends a thought, unless a section of the format opens before it and does not open again after it. By this rule
    a `</think>` that is quoted in or after a judgement is text.

    The thought ends at its first closing tag. Two kinds of quoted tags inside it are text: a closing tag in quotation
    marks or backticks, and one that follows an opening tag on the same line ("I reason inside <think> and </think>"),
    unless it is the last one and ends its line.

    Args:
        completion: any bytes.
        tag: name of the thought's tag.
        opened: whether the prompt ended inside a thought, see `thought_opened`.
        sections: names of the tags that may follow the thought.

    Raises:
        MalformedError: for a thought that is never closed.
    """
    marks = spellings(tag)
    openings = re.compile(rb"\s*(?:(?:" + _any_of(marks) + rb")\s*)+")
    found = openings.match(completion)
    if found is None and not opened and not _was_opened(completion, marks, sections):
        return Thought()
    contents: list[ByteRange] = []
    end = 0
    while found is not None or not contents:
        begin = 0 if found is None else found.end()
        closing = _find_closing(completion, begin, marks)
        if closing is None:
            raise MalformedError(f"unclosed <{tag}>: the output ends inside its thought")
        contents.append((begin, closing[0]))
        end = closing[1]
        found = openings.match(completion, end)
    return Thought(tuple(contents), end)


def after_thought(completion: bytes, tag: str = THOUGHT, *, opened: bool = False, sections: Sequence[str] = ()) -> int:
    """Return where a completion continues after its thought, 0 without one; arguments and errors as `find_thought`."""
    return find_thought(completion, tag, opened=opened, sections=sections).end


def thought_opened(prompt: bytes | str, tag: str = THOUGHT) -> bool:
    """Return whether a prompt, as the model sees it, ends inside a thought: in the opening tag and white space.

    Chat templates that open a thought end this way. A tag that is quoted in a question is followed by the end of the
    turn.
    """
    written = as_bytes(prompt) if isinstance(prompt, str) else prompt
    return written.rstrip(WHITE_SPACE).endswith(tuple(spellings(tag)))


def without_opening(completion: str, prompt: bytes, tag: str = THOUGHT) -> str:
    """Return a completion without the opening tag of its thought if the prompt, as the model sees it, ends in one.

    Judgements of thinking models are often stored with the tag that the template wrote. The model saw it once.
    """
    ending = re.search(rb"(?:" + _any_of(spellings(tag)) + rb")\s*\Z", prompt)
    opened = "" if ending is None else as_text(ending[0])
    text = completion.lstrip()
    shared = next((start for start in (opened, opened.rstrip()) if start and text.startswith(start)), None)
    return completion if shared is None else text.removeprefix(shared)


def template_opens_thought(tokenizer: Any, **options: Any) -> bool:
    """Return whether the chat template itself opens a thought at the start of each answer.

    Args:
        tokenizer: with or without a chat template.
        **options: the template's options, such as enable_thinking.

    Raises:
        TemplateError, ValueError, TypeError: as the template raises them for a lone user message.
    """
    if not getattr(tokenizer, "chat_template", None):
        return False
    probe = [{"role": "user", "content": "?"}]
    return thought_opened(tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True, **options))


def read_section(text: str, tag: str) -> str | None:
    """Return the content of the last closed `tag` after the thought, untrimmed, or None; never raises."""
    completion = as_bytes(text)
    try:
        start = after_thought(completion)
    except MalformedError:
        return None
    opening = f"<{tag}>".encode()
    end = completion.rfind(f"</{tag}>".encode(), start)
    begin = completion.rfind(opening, start, end) if end >= 0 else -1
    return as_text(completion[begin + len(opening) : end]) if begin >= 0 else None


def open_thought(thought: str) -> str:
    r"""Return a thought that is stored by itself after its opening tag, with closing tags in it as text: `<\/think>`.

    Where it ends is known, so a closing tag that is quoted in it must not end it.
    """
    for _, closing in _SPELLINGS:
        thought = thought.replace(closing, f"{closing[0]}\\{closing[1:]}")
    return f"<{THOUGHT}>{thought}"


def spellings(tag: str) -> dict[bytes, bytes]:
    """Return the opening marks of a tag, each with its closing mark; a thought's has several."""
    pairs = _SPELLINGS if tag == THOUGHT else ((f"<{tag}>", f"</{tag}>"),)
    return {opening.encode(): closing.encode() for opening, closing in pairs}


def _any_of(marks: Iterable[bytes]) -> bytes:
    return b"|".join(map(re.escape, marks))


def _find_closing(completion: bytes, begin: int, marks: Mapping[bytes, bytes]) -> ByteRange | None:
    """Return the range of the closing tag that ends a thought whose content begins at `begin`, or None."""
    closing = None
    for closing, is_quoted in _closings(completion, begin, marks):
        if not is_quoted:
            return closing
    return closing if closing is not None and _ENDS_A_LINE.match(completion, closing[1]) else None


def _closings(completion: bytes, begin: int, marks: Mapping[bytes, bytes]) -> Iterator[tuple[ByteRange, bool]]:
    """Yield the range of each closing tag, and whether it is quoted."""
    before = begin
    opening_of = {closing: opening for opening, closing in marks.items()}
    for closing in re.compile(_any_of(opening_of)).finditer(completion, begin):
        start, end = closing.span()
        line = completion.rfind(b"\n", before, start) + 1 or before
        in_quotes = any(
            completion.endswith(left, before, start) and completion.startswith(right, end) for left, right in _QUOTES
        )
        yield (start, end), in_quotes or opening_of[closing[0]] in completion[line:start]
        before = end


def _was_opened(completion: bytes, marks: Mapping[bytes, bytes], sections: Sequence[str]) -> bool:
    """Return whether a completion closes a thought that it did not open itself."""
    closing = _find_closing(completion, 0, marks)
    if closing is None:
        return False
    opened, closed = (len(re.findall(_any_of(each), completion[: closing[0]])) for each in (marks, marks.values()))
    tags = [f"<{name}>".encode() for name in sections]
    return opened <= closed and all(
        completion.find(tag, closing[1]) >= 0 for tag in tags if completion.find(tag, 0, closing[0]) >= 0
    )
