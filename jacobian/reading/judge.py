"""The judge's format: criteria, analysis and scores, each in its tag, after an optional thought."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cepo.jacobian.reading.guard import Guard, check_guard, find_verdict
from cepo.jacobian.reading.layout import ByteRange, Found, MalformedError, ResponseMarks, as_bytes, as_text, check_tags
from cepo.jacobian.reading.sections import find_sections
from cepo.jacobian.reading.thought import THOUGHT, after_thought, find_thought
from cepo.jacobian.reading.verdict import STRICT, Verdicts, check_verdicts, find_last_pair, find_pair

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
"""How prompts delimit the two responses: j1's form (from DeepSeek-GRM), MT-Bench's, and lines that begin with a name,
where the second response extends to the end of the message."""


@dataclass(frozen=True)
class Reading:
    """The parts of a judgement, as byte ranges, and what is wrong with it.

    Attributes:
        criteria: content of the section, or None.
        analysis: the same.
        numbers: the digits of the scores of A and B, or None if the verdict is malformed.
        reasons: what is wrong; the first is shown. If `numbers` is given, they say only that criteria or analysis are
            missing or empty: such a verdict can be read, but nothing caused it.
    """

    criteria: ByteRange | None
    analysis: ByteRange | None
    numbers: tuple[ByteRange, ByteRange] | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class JudgeLayout:
    """A judge's output: optional thought, then criteria, analysis and scores, each in its tag, exactly once.

    This is the one reader of judgements. `read` returns the parts and what is wrong; `find` returns spans, or raises
    with the reason why there are none. Rewards and evaluations read the verdict with it, see `read_scores`. The thought
    (`cepo.jacobian.reading.thought`) is not searched, since thinking judges rehearse their tags in it.

    Attributes:
        criteria_tag: tag around X.
        analysis_tag: tag around the analysis.
        scores_tag: tag around `\\boxed{a, b}`; the target Y is the tokens of the two numbers, nothing else.
        thought_tag: tag around the thought.
        instructions: the fixed pieces of the prompt, in order, which are not content. The first and last are anchored
            at the ends of the user's message. If a prompt lacks them, the whole message is content.
        responses: the forms in which a prompt may delimit the two responses; the first that fits is used.
        guard: which verdicts before the scores make a judgement malformed. "standard": scores or a named winner in the
            criteria, and scores in the analysis, since honest analyses name a winner at their end; "strict": both in
            both; "criteria": both in the criteria only; "off". See `cepo.jacobian.reading.guard`.
        verdicts: "strict": only the form above, so that one form is rewarded. "lenient": also sections and scores in
            other forms that can mean only one pair. See `cepo.jacobian.reading.verdict`.
        ties: whether equal scores are allowed, so that for the guard a tie counts as a named winner.

    Raises:
        ValueError: for an unknown `guard` or `verdicts`, or a tag in brackets.
    """

    criteria_tag: str = CRITERIA
    analysis_tag: str = ANALYSIS
    scores_tag: str = SCORES
    thought_tag: str = THOUGHT
    instructions: tuple[str, ...] = ()
    responses: tuple[ResponseMarks, ...] = RESPONSE_FORMS
    guard: Guard = "standard"
    verdicts: Verdicts = STRICT
    ties: bool = False

    def __post_init__(self) -> None:
        names = ("criteria_tag", "analysis_tag", "scores_tag", "thought_tag")
        check_tags(**{name: getattr(self, name) for name in names})
        check_guard(self.guard)
        check_verdicts(self.verdicts)

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
    def sections(self) -> tuple[str, str, str]:
        """The tags of criteria, analysis and scores."""
        return (self.criteria_tag, self.analysis_tag, self.scores_tag)

    @property
    def tags(self) -> tuple[str, ...]:
        return (self.thought_tag, *self.sections)

    def find(self, completion: bytes, *, thought_opened: bool = False) -> Found:
        """Return the byte ranges of criteria, analysis and scores.

        Args:
            completion: what the judge wrote.
            thought_opened: whether the prompt ended inside a thought, see `find_thought`.

        Raises:
            MalformedError: if they cannot be found or the guard forbids a verdict in them, with the reason.
        """
        reading = self.read(completion, thought_opened=thought_opened)
        if reading.criteria is None or reading.analysis is None or reading.numbers is None or reading.reasons:
            raise MalformedError(reading.reasons[0])
        if self.guard != "off":
            self._refuse_verdict(completion[slice(*reading.criteria)], self.criteria_tag, winner=True)
        if self.guard in ("standard", "strict"):
            self._refuse_verdict(completion[slice(*reading.analysis)], self.analysis_tag, winner=self.guard == "strict")
        spans = {"criteria": (reading.criteria,), "analysis": (reading.analysis,), "scores": reading.numbers}
        return Found(spans, reading.numbers)

    def read(self, completion: bytes, *, thought_opened: bool = False) -> Reading:
        """Return the parts of a judgement and what is wrong with it; arguments as for `find`. Never raises."""
        try:
            start = after_thought(completion, self.thought_tag, opened=thought_opened, sections=self.sections)
        except MalformedError as reason:
            return Reading(None, None, None, (str(reason),))
        return self.read_from(completion, start)

    def read_from(self, completion: bytes, start: int) -> Reading:
        """Return the parts of a judgement after its thought, which ends at `start`."""
        found: dict[str, ByteRange] = {}
        reasons: list[str] = []
        numbers = None
        try:
            found, reasons = find_sections(completion, start, self.sections, self.verdicts)
            if self.scores_tag in found:
                numbers = find_pair(completion, found[self.scores_tag], self.scores_tag, self.verdicts)
        except MalformedError as reason:
            reasons.append(str(reason))
        return Reading(found.get(self.criteria_tag), found.get(self.analysis_tag), numbers, tuple(reasons))

    def _refuse_verdict(self, section: bytes, tag: str, *, winner: bool) -> None:
        verdict = find_verdict(section.decode("utf-8", errors="replace"), winner=winner, ties=self.ties)
        if verdict is not None:
            raise MalformedError(f"{verdict[0]} in <{tag}>: {verdict[1]!r}")


def read_scores(text: str, *, thought_opened: bool = False, verdicts: Verdicts = STRICT) -> tuple[float, float] | None:
    """Read the judge's verdict.

    Criteria and analysis may be missing: not all judges write them.

    Args:
        text: any text; never raises.
        thought_opened: whether the prompt ended inside a thought, see `find_thought`.
        verdicts: see `JudgeLayout`.

    Returns:
        The scores of A and B, both at least 0, or None if `JudgeLayout` finds the verdict malformed.
    """
    completion = as_bytes(text)
    return _values(completion, find_numbers(completion, thought_opened=thought_opened, verdicts=verdicts))


def after_judges_thought(text: str, *, thought_opened: bool = False) -> str:
    """Return what a judge wrote after its thought; "" if the thought is not closed."""
    completion = as_bytes(text)
    try:
        return as_text(completion[after_thought(completion, opened=thought_opened, sections=SECTIONS) :])
    except MalformedError:
        return ""


def close_thought(text: str) -> str:
    """Return a judgement as the continuation of a prompt that opened a thought: with its thought, or an empty one.

    Raises:
        MalformedError: for a judgement whose thought is never closed.
    """
    completion = as_bytes(text)
    thought = find_thought(completion, sections=SECTIONS)
    return as_text(completion[thought.contents[0][0] :]) if thought.contents else f"\n</{THOUGHT}>\n\n{text}"


def read_pair(text: str) -> tuple[float, float] | None:
    r"""Read the last `\boxed{a, b}` of a text, inside or outside of tags, which the testbed's judges may omit."""
    completion = as_bytes(text)
    return _values(completion, find_last_pair(completion))


def find_numbers(
    completion: bytes, *, thought_opened: bool = False, verdicts: Verdicts = STRICT
) -> tuple[ByteRange, ByteRange] | None:
    """Return the byte ranges of the two numbers that `read_scores` reads, or None."""
    return JudgeLayout(verdicts=verdicts).read(completion, thought_opened=thought_opened).numbers


def find_verdict_end(completion: bytes, *, thought_opened: bool = False, verdicts: Verdicts = STRICT) -> int | None:
    """Return where the first scores section that `read_scores` can read ends, after its closing tag, or None."""
    layout, closing = JudgeLayout(verdicts=verdicts), f"</{SCORES}>".encode()
    try:
        start = after_thought(completion, opened=thought_opened, sections=SECTIONS)
    except MalformedError:
        return None
    end = completion.find(closing, start)
    while end >= 0:
        end += len(closing)
        if layout.read_from(completion[start:end], 0).numbers is not None:
            return end
        if verdicts == "strict":  # a second section would make the judgement malformed
            return None
        start, end = end, completion.find(closing, end)
    return None


def forced_opening(text: str) -> str:
    """Return what to append to a judgement without a verdict: `SCORES_OPENING`, after closing an open thought."""
    try:
        after_thought(as_bytes(text))
    except MalformedError:
        return f"\n</{THOUGHT}>{SCORES_OPENING}"
    return SCORES_OPENING


def write_section(tag: str, content: str) -> str:
    """Return a section as judges write it: opening tag, content and closing tag, one per line."""
    return f"<{tag}>\n{content}\n</{tag}>"


def write_judgement(criteria: str, analysis: str, scores: tuple[int, int]) -> str:
    """Return a whole judgement in the judge's format."""
    contents = (criteria, analysis, f"\\boxed{{{scores[0]}, {scores[1]}}}")
    return "\n".join(write_section(tag, content) for tag, content in zip(SECTIONS, contents, strict=True))


def _values(completion: bytes, numbers: tuple[ByteRange, ByteRange] | None) -> tuple[float, float] | None:
    return None if numbers is None else (float(completion[slice(*numbers[0])]), float(completion[slice(*numbers[1])]))
