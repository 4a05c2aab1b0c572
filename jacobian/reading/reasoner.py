"""The reasoner's format: a rationale, then an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cepo.jacobian.reading.layout import ByteRange, Found, MalformedError, tagged, trim_range

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

    rationale_tag: str = "think"
    answer_tag: str = "answer"
    boxed: bool = True
    fallback: bool = True
    instructions: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return ("prompt", "rationale", "answer")

    @property
    def roles(self) -> Mapping[str, str]:
        return {"Z": "prompt", "X": "rationale", "Y": "answer"}

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.rationale_tag, self.answer_tag)

    def find(self, completion: bytes) -> Found:
        """Return the byte ranges of rationale and answer, or raise MalformedError with the reason."""
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
            inner = _last_boxed(completion, answer) if self.boxed else None
            return inner or answer, answer[0] - len(opened), "tags"
        boxed = _last_boxed(completion, (start, len(completion))) if self.boxed else None
        if boxed is not None:
            return boxed, boxed[0] - len(rb"\boxed{"), "boxed"
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


def _last_boxed(text: bytes, within: ByteRange) -> ByteRange | None:
    """Return the inside of the last `\\boxed{...}` with balanced braces."""
    marker = rb"\boxed{"
    at = text.rfind(marker, *within)
    while at >= 0:
        depth, begin = 1, at + len(marker)
        for index in range(begin, within[1]):
            depth += (text[index] == ord("{")) - (text[index] == ord("}"))
            if depth == 0:
                return begin, index
        at = text.rfind(marker, within[0], at)
    return None
