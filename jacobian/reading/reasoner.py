"""The reasoner's format: a rationale, then an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cepo.jacobian.reading.layout import (
    ByteRange,
    Found,
    MalformedError,
    ResponseMarks,
    as_bytes,
    as_text,
    tagged,
    trim_range,
)
from cepo.jacobian.reading.thought import THOUGHT, after_thought, find_section

ANSWER = "answer"
_BOXED = rb"\boxed{"
_BRACES = re.compile(rb"\\boxed\{|\\[{}]|[{}]")
_SENTENCE_BREAK = re.compile(rb"(?<=[.!?])\s+|\s*\n\s*")


@dataclass(frozen=True)
class ReasonerLayout:
    """A reasoner's output: a rationale X, then an answer Y.

    The answer is the content of the answer tag; without one, the inside of the last `\\boxed{}`; without either, and
    only with `fallback`, the last sentence or line. An answer tag that holds a `\\boxed{}` is narrowed to it. The
    rationale is the content of its tag; without one, everything before the answer. `found_by` of the rollout says
    which of these served. A prompt that already opened the rationale's tag leaves only its end in the completion,
    which is understood.

    Attributes:
        rationale_tag: tag around X.
        answer_tag: tag around Y.
        boxed: whether `\\boxed{}` is read.
        fallback: whether text without any marker is split at its last sentence instead of being malformed.
        instructions: as in JudgeLayout.
    """

    rationale_tag: str = THOUGHT
    answer_tag: str = ANSWER
    boxed: bool = True
    fallback: bool = True
    instructions: tuple[str, ...] = ()

    @property
    def responses(self) -> tuple[ResponseMarks, ...]:
        return ()

    @property
    def names(self) -> tuple[str, ...]:
        return ("prompt", "rationale", "answer")

    @property
    def roles(self) -> Mapping[str, str]:
        return {"Z": "prompt", "X": "rationale", "Y": "answer"}

    @property
    def chain(self) -> str:
        return "prompt->rationale->answer"

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.rationale_tag, self.answer_tag)

    @property
    def thought_tag(self) -> str:
        return self.rationale_tag

    def find(self, completion: bytes, *, thought_opened: bool = False) -> Found:
        """Return the byte ranges of rationale and answer, or raise MalformedError with the reason.

        Args:
            completion: what the reasoner wrote.
            thought_opened: whether the prompt ended inside a thought, see `find_thought`.
        """
        opened, closed = f"<{self.rationale_tag}>".encode(), f"</{self.rationale_tag}>".encode()
        has_rationale_tag = opened in completion or closed in completion
        rationale_end = 0
        rationale: ByteRange | None = None
        if has_rationale_tag:
            if opened not in completion:  # the prompt opened it
                completion_with_opening = completion.count(closed)
                if completion_with_opening > 1:
                    raise MalformedError(f"doubled </{self.rationale_tag}>")
                rationale = (0, completion.index(closed))
            else:
                rationale = tagged(completion, self.rationale_tag, 0)
            rationale_end = rationale[1] + len(closed)
        answer, answer_start, found_by = self._answer(completion, rationale_end)
        if rationale is None:
            rationale = (0, answer_start)
        if trim_range(completion, answer) is None:
            raise MalformedError("empty answer")
        if trim_range(completion, rationale) is None:
            raise MalformedError("empty rationale")
        return Found({"rationale": (rationale,), "answer": (answer,)}, (), found_by)

    def _answer(self, completion: bytes, start: int) -> tuple[ByteRange, int, str]:
        """Return the answer's range, where the answer's marker starts, and what marked it."""
        opened, closed = f"<{self.answer_tag}>".encode(), f"</{self.answer_tag}>".encode()
        if opened in completion or closed in completion:
            answer = tagged(completion, self.answer_tag, 0)
            if answer[0] - len(opened) < start:
                raise MalformedError(f"out of order: <{self.answer_tag}> opens before </{self.rationale_tag}>")
            inner = find_last_boxed(completion, answer) if self.boxed else None
            return inner or answer, answer[0] - len(opened), "tags"
        boxed = find_last_boxed(completion, (start, len(completion))) if self.boxed else None
        if boxed is not None:
            return boxed, boxed[0] - len(_BOXED), "boxed"
        rest = trim_range(completion, (start, len(completion)))
        if start and rest is None:
            raise MalformedError(f"empty answer: nothing stands after </{self.rationale_tag}>")
        if not self.fallback or rest is None:
            raise MalformedError(f"missing <{self.answer_tag}>")
        if start:  # the rationale was tagged, so what follows it is the answer
            return rest, rest[0], "after rationale"
        breaks = list(_SENTENCE_BREAK.finditer(completion, rest[0], rest[1]))
        if not breaks:
            raise MalformedError("no tags and only one sentence: nothing tells the rationale from the answer")
        return (breaks[-1].end(), rest[1]), breaks[-1].start(), "last sentence"


def extract_answer(text: str, *, thought_opened: bool = False) -> str:
    r"""Find the final answer: the answer section, else what stands after the thought.

    Of the section, the last complete `\boxed{}` counts, else all of it; without a section, the last complete
    `\boxed{}`, else the last line that is not blank.

    Args:
        text: Any text; never raises.
        thought_opened: whether the prompt ended inside a thought, see `find_thought`.

    Returns:
        The answer without surrounding white space, "" where there is none.
    """
    completion = as_bytes(text)
    section = find_section(completion, ANSWER, opened=thought_opened)
    try:
        within = section or (after_thought(completion, opened=thought_opened), len(completion))
    except MalformedError:
        return ""
    boxed = find_last_boxed(completion, within)
    found = as_text(completion[slice(*(boxed or within))]).strip()
    return found if boxed or section else found.rpartition("\n")[2].strip()


def find_last_boxed(text: bytes, within: ByteRange) -> ByteRange | None:
    r"""Return the inside of the last `\boxed{...}` with balanced braces, or None; escaped braces are text."""
    boxes: list[ByteRange] = []
    openings: list[int | None] = []
    for brace in _BRACES.finditer(text, *within):
        if brace[0] == b"}":
            begin = openings.pop() if openings else None
            if begin is not None:
                boxes.append((begin, brace.start()))
        elif brace[0] == b"{" or brace[0] == _BOXED:
            openings.append(None if brace[0] == b"{" else brace.end())
    return max(boxes, default=None)
