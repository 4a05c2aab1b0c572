"""What completions look like, and where their spans stand: the judge's format and the reasoner's.

A layout looks at bytes alone; `cepo.jacobian.spans` maps what it finds to tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

ByteRange = tuple[int, int]
WHITE_SPACE = b" \t\r\n\f\v"
_NUMBER = rb"[0-9]{1,4}(?:\.[0-9]{1,4})?"
_SCORES = re.compile(rb"\\boxed\{\s*(" + _NUMBER + rb")\s*,\s*(" + _NUMBER + rb")\s*\}")
_SENTENCE_BREAK = re.compile(rb"(?<=[.!?])\s+|\s*\n\s*")


@dataclass(frozen=True)
class Found:
    """Where a layout found its spans in a completion: byte ranges by span name, and those of the scores' numbers."""

    ranges: Mapping[str, tuple[ByteRange, ...]]
    numbers: tuple[ByteRange, ...] = ()
    found_by: str = "tags"


class MalformedError(ValueError):
    """A completion in which the layout's spans cannot be found; the message is the reason that users see."""


class Layout(Protocol):
    """What a completion looks like: its spans' names in order, the roles Z, X, Y, its tags, and how to find them."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def roles(self) -> Mapping[str, str]: ...

    @property
    def tags(self) -> tuple[str, ...]: ...

    @property
    def instructions(self) -> tuple[str, ...]: ...

    def find(self, completion: bytes) -> Found: ...


@dataclass(frozen=True)
class JudgeLayout:
    """A judge's output: optional thought, then criteria, analysis and scores, each in its tag, exactly once.

    The thought (everything up to the first `</think>`, or the whole text where a `<think>` at its start is never
    closed) is not searched: thinking judges rehearse their tags there.

    Attributes:
        criteria_tag: tag around X.
        analysis_tag: tag around the analysis.
        scores_tag: tag around `\\boxed{a, b}`; the target Y is the tokens of the two numbers, nothing else.
        thought_tag: tag around the thought.
        instructions: the fixed pieces of the prompt, in order, which are not content (first and last are anchored at
            the two ends of the user's message); where a prompt does not have them, all of the message is content.
    """

    criteria_tag: str = "specific_criteria"
    analysis_tag: str = "analysis"
    scores_tag: str = "scores"
    thought_tag: str = "think"
    instructions: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return ("prompt", "criteria", "analysis", "scores")

    @property
    def roles(self) -> Mapping[str, str]:
        return {"Z": "prompt", "X": "criteria", "Y": "scores"}

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.thought_tag, self.criteria_tag, self.analysis_tag, self.scores_tag)

    def find(self, completion: bytes) -> Found:
        """Return the byte ranges of criteria, analysis and scores, or raise MalformedError with the reason."""
        start = _after_thought(completion, self.thought_tag)
        criteria = _tagged(completion, self.criteria_tag, start)
        analysis = _tagged(completion, self.analysis_tag, start)
        scores = _tagged(completion, self.scores_tag, start)
        for (left, left_tag), (right, right_tag) in pairwise(
            [(criteria, self.criteria_tag), (analysis, self.analysis_tag), (scores, self.scores_tag)]
        ):
            if right[0] - len(f"<{right_tag}>") < left[1] + len(f"</{left_tag}>"):
                raise MalformedError(f"out of order: <{right_tag}> opens before </{left_tag}>")
        for content, tag in ((criteria, self.criteria_tag), (analysis, self.analysis_tag), (scores, self.scores_tag)):
            if trim_range(completion, content) is None:
                raise MalformedError(f"empty <{tag}>")
        inside = completion[scores[0] : scores[1]]
        if inside.count(rb"\boxed") > 1:
            raise MalformedError(f"doubled \\boxed in <{self.scores_tag}>")
        boxed = _SCORES.search(inside)
        if boxed is None:
            shown = inside.strip()[:40].decode("utf-8", errors="replace")
            raise MalformedError(f"no \\boxed{{a, b}} with two numbers in <{self.scores_tag}>, which holds {shown!r}")
        numbers = tuple((scores[0] + boxed.start(group), scores[0] + boxed.end(group)) for group in (1, 2))
        return Found({"criteria": (criteria,), "analysis": (analysis,), "scores": numbers}, numbers)


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
                rationale = _tagged(completion, self.rationale_tag, 0)
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
            answer = _tagged(completion, self.answer_tag, 0)
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


def _after_thought(completion: bytes, tag: str) -> int:
    opened, closed = f"<{tag}>".encode(), f"</{tag}>".encode()
    end = completion.find(closed)
    if end >= 0:
        return end + len(closed)
    if completion.lstrip(WHITE_SPACE).startswith(opened):
        raise MalformedError(f"unclosed <{tag}>: the output ends inside its thought")
    return 0


def _tagged(text: bytes, tag: str, start: int) -> ByteRange:
    """Return the content range of a tag that must stand exactly once after `start`."""
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
    start, end = wanted
    core = text[start:end]
    left = len(core) - len(core.lstrip(WHITE_SPACE))
    core = core.strip(WHITE_SPACE)
    return (start + left, start + left + len(core)) if core else None


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
