"""The judge's format: criteria, analysis and scores, each in its tag, after an optional thought."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from cepo.jacobian.reading.guard import Guard, check_guard, find_verdict
from cepo.jacobian.reading.layout import ByteRange, Found, MalformedError, ResponseMarks, as_bytes, tagged, trim_range
from cepo.jacobian.reading.thought import THOUGHT, after_thought, find_section

CRITERIA, ANALYSIS, SCORES = SECTIONS = ("specific_criteria", "analysis", "scores")
"""Names of the judge's tags, in the order in which they are written."""

SCORES_OPENING = f"\n<{SCORES}>\n\\boxed{{"
"""What is appended to a judgement without a verdict, for the model to continue with two numbers."""
SCORES_CLOSING = f"\n</{SCORES}>"
"""What is appended after these numbers."""

RESPONSE_FORMS: tuple[ResponseMarks, ...] = (
    (
        "[The Begin of Response A]\n",
        "\n[The End of Response A]\n[The Begin of Response B]\n",
        "\n[The End of Response B]",
    ),
    (
        "[The Start of Assistant A's Answer]\n",
        "\n[The End of Assistant A's Answer]\n\n[The Start of Assistant B's Answer]\n",
        "\n[The End of Assistant B's Answer]",
    ),
    ("\nResponse A: ", "\nResponse B: ", ""),
)
"""How prompts mark two responses: j1's (of DeepSeek-GRM), MT-Bench's, and lines that open with a name, the second to
the end of the message."""

_PAIR = re.compile(rb"\\boxed\{\s*([0-9]+(?:\.[0-9]+)?)\s*,\s*([0-9]+(?:\.[0-9]+)?)\s*\}")
# A longer number is not a score: the targets of links hold numbers of a few tokens.
_SCORE = re.compile(rb"[0-9]{1,4}(?:\.[0-9]{1,4})?")


@dataclass(frozen=True)
class JudgeLayout:
    """A judge's output: optional thought, then criteria, analysis and scores, each in its tag, exactly once.

    The thought, see `cepo.jacobian.reading.thought`, is not searched: thinking judges rehearse their tags there.

    Attributes:
        criteria_tag: tag around X.
        analysis_tag: tag around the analysis.
        scores_tag: tag around `\\boxed{a, b}`; the target Y is the tokens of the two numbers, nothing else.
        thought_tag: tag around the thought.
        instructions: the fixed pieces of the prompt, in order, which are not content (first and last are anchored at
            the two ends of the user's message); where a prompt does not have them, all of the message is content.
        responses: the ways in which a prompt may mark the two responses, of which the first that fits is taken.
        guard: where a verdict makes a judgement malformed. "standard": in the criteria scores or a named winner, in the
            analysis scores, since honest analyses end with a winner; "strict": both in both; "criteria": both in the
            criteria alone; "off". See `cepo.jacobian.reading.guard`.

    Raises:
        ValueError: for an unknown guard.
    """

    criteria_tag: str = CRITERIA
    analysis_tag: str = ANALYSIS
    scores_tag: str = SCORES
    thought_tag: str = THOUGHT
    instructions: tuple[str, ...] = ()
    responses: tuple[ResponseMarks, ...] = RESPONSE_FORMS
    guard: Guard = "standard"

    def __post_init__(self) -> None:
        check_guard(self.guard)

    @property
    def names(self) -> tuple[str, ...]:
        return ("prompt", "criteria", "analysis", "scores")

    @property
    def roles(self) -> Mapping[str, str]:
        return {"Z": "prompt", "X": "criteria", "Y": "scores"}

    @property
    def chain(self) -> str:
        return "criteria->analysis->scores"

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.thought_tag, self.criteria_tag, self.analysis_tag, self.scores_tag)

    def find(self, completion: bytes, *, thought_opened: bool = False) -> Found:
        """Return the byte ranges of criteria, analysis and scores, or raise MalformedError with the reason.

        Args:
            completion: what the judge wrote.
            thought_opened: whether the prompt ended inside a thought, see `find_thought`.
        """
        sections = (self.criteria_tag, self.analysis_tag, self.scores_tag)
        start = after_thought(completion, self.thought_tag, opened=thought_opened, sections=sections)
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
        boxed = _PAIR.search(inside)
        if boxed is None or not all(map(_SCORE.fullmatch, boxed.groups())):
            shown = inside.strip()[:40].decode("utf-8", errors="replace")
            raise MalformedError(f"no \\boxed{{a, b}} with two numbers in <{self.scores_tag}>, which holds {shown!r}")
        if self.guard != "off":
            self._refuse_verdict(completion[slice(*criteria)], self.criteria_tag, winner=True)
        if self.guard in ("standard", "strict"):
            self._refuse_verdict(completion[slice(*analysis)], self.analysis_tag, winner=self.guard == "strict")
        numbers = tuple((scores[0] + boxed.start(group), scores[0] + boxed.end(group)) for group in (1, 2))
        return Found({"criteria": (criteria,), "analysis": (analysis,), "scores": numbers}, numbers)

    def _refuse_verdict(self, section: bytes, tag: str, *, winner: bool) -> None:
        verdict = find_verdict(section.decode("utf-8", errors="replace"), winner=winner)
        if verdict is not None:
            raise MalformedError(f"{verdict[0]} in <{tag}>: {verdict[1]!r}")


def read_scores(text: str, *, thought_opened: bool = False) -> tuple[float, float] | None:
    r"""Read the judge's verdict: the last `\boxed{a, b}` of the last closed scores section after the thought.

    The numbers are ASCII digits with an optional decimal part. As in j1 no range is enforced, but both must be finite.

    Args:
        text: Any text; never raises.
        thought_opened: whether the prompt ended inside a thought, see `find_thought`.

    Returns:
        The scores of A and B, both at least 0, or None where there is no such pair.
    """
    completion = as_bytes(text)
    return _finite(completion, find_numbers(completion, thought_opened=thought_opened))


def read_pair(text: str) -> tuple[float, float] | None:
    r"""Read the last `\boxed{a, b}` of a text, wherever it stands; see `read_scores` for the numbers."""
    completion = as_bytes(text)
    return _finite(completion, _last_pair(completion, (0, len(completion))))


def find_numbers(completion: bytes, *, thought_opened: bool = False) -> tuple[ByteRange, ByteRange] | None:
    """Return where the two numbers stand that `read_scores` reads, or None."""
    section = find_section(completion, SCORES, opened=thought_opened, sections=SECTIONS)
    return None if section is None else _last_pair(completion, section)


def find_verdict_end(completion: bytes) -> int | None:
    """Return where the first scores section that `read_scores` can read ends, its closing tag included, or None."""
    closed = f"</{SCORES}>".encode()
    at = completion.find(closed)
    while at >= 0:
        end = at + len(closed)
        if _finite(completion, find_numbers(completion[:end])) is not None:
            return end
        at = completion.find(closed, end)
    return None


def forced_opening(text: str) -> str:
    """Return what to append to a judgement without a verdict: an unclosed thought's end, then `SCORES_OPENING`."""
    try:
        after_thought(as_bytes(text))
    except MalformedError:
        return f"\n</{THOUGHT}>{SCORES_OPENING}"
    return SCORES_OPENING


def write_section(tag: str, content: str) -> str:
    """Return a section as judges write it: opening tag, content and closing tag, one per line."""
    return f"<{tag}>\n{content}\n</{tag}>"


def write_judgement(criteria: str, analysis: str, scores: tuple[int, int]) -> str:
    """Return a whole judgement in the format."""
    contents = (criteria, analysis, f"\\boxed{{{scores[0]}, {scores[1]}}}")
    return "\n".join(write_section(tag, content) for tag, content in zip(SECTIONS, contents, strict=True))


def _last_pair(completion: bytes, within: ByteRange) -> tuple[ByteRange, ByteRange] | None:
    pairs = list(_PAIR.finditer(completion, *within))
    return (pairs[-1].span(1), pairs[-1].span(2)) if pairs else None


def _finite(completion: bytes, numbers: tuple[ByteRange, ByteRange] | None) -> tuple[float, float] | None:
    if numbers is None:
        return None
    score_a, score_b = (float(completion[slice(*number)]) for number in numbers)
    return (score_a, score_b) if math.isfinite(score_a) and math.isfinite(score_b) else None
