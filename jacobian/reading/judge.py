"""The judge's format: criteria, analysis and scores, each in its tag, after an optional thought."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from cepo.jacobian.reading.layout import Found, MalformedError, tagged, trim_range
from cepo.jacobian.reading.thought import after_thought

_NUMBER = rb"[0-9]{1,4}(?:\.[0-9]{1,4})?"
_SCORES = re.compile(rb"\\boxed\{\s*(" + _NUMBER + rb")\s*,\s*(" + _NUMBER + rb")\s*\}")


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
        start = after_thought(completion, self.thought_tag)
        criteria = tagged(completion, self.criteria_tag, start)
        analysis = tagged(completion, self.analysis_tag, start)
        scores = tagged(completion, self.scores_tag, start)
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
