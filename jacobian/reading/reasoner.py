"""The reasoner's format: a rationale, then an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cepo.jacobian.reading.answer import Answer, Unmarked, find_answer
from cepo.jacobian.reading.layout import Found, MalformedError, ResponseMarks, as_bytes, as_text, check_tags, trim_range
from cepo.jacobian.reading.thought import THOUGHT, Thought, find_thought

ANSWER = "answer"


@dataclass(frozen=True)
class ReasonerLayout:
    """A reasoner's output: a rationale X, then an answer Y.

    The answer is given by a mark: an answer tag, the last `\\boxed{}`, `####` or "the answer is". Without a mark, and
    only with `fallback`, it is the last line after a thought, or else the last sentence; see `find_answer`. The
    rationale is the thought; without one, everything before the answer's mark. `found_by` of the rollout names the mark
    that was found.

    Attributes:
        rationale_tag: tag around X.
        answer_tag: tag around Y.
        boxed: whether `\\boxed{}` is read.
        fallback: whether answers without a tag or box are read; if not, such text is malformed.
        instructions: as in JudgeLayout.

    Raises:
        ValueError: for a tag in brackets.
    """

    rationale_tag: str = THOUGHT
    answer_tag: str = ANSWER
    boxed: bool = True
    fallback: bool = True
    instructions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_tags(rationale_tag=self.rationale_tag, answer_tag=self.answer_tag)

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
        """Return the byte ranges of rationale and answer.

        Args:
            completion: what the reasoner wrote.
            thought_opened: whether the prompt ended inside a thought, see `find_thought`.

        Raises:
            MalformedError: if they cannot be found, with the reason.
        """
        thought, answer = self.read(completion, thought_opened=thought_opened)
        rationale = tuple(part for part in thought.contents if trim_range(completion, part))
        if not rationale and trim_range(completion, (thought.end, answer.start)):
            rationale = ((thought.end, answer.start),)
        if not rationale and answer.found_by == "last sentence":
            raise MalformedError("no tags and only one sentence: nothing tells the rationale from the answer")
        if not rationale:
            raise MalformedError("empty rationale")
        return Found({"rationale": rationale, "answer": (answer.content,)}, (), answer.found_by)

    def read(self, completion: bytes, *, thought_opened: bool = False) -> tuple[Thought, Answer]:
        """Return the thought of a completion, and its answer in bytes; arguments and errors as `find`.

        Rewards, which need only the answer, call this too, so that they read the same bytes as the spans. A completion
        without a rationale has an answer, but no spans.
        """
        thought = find_thought(completion, self.rationale_tag, opened=thought_opened, sections=(self.answer_tag,))
        rest = completion[thought.end :].decode("utf-8", "surrogateescape")
        thinks = any(trim_range(completion, part) for part in thought.contents)
        unmarked: Unmarked = "nothing" if not self.fallback else "after rationale" if thinks else "last sentence"
        found = find_answer(rest, tag=self.answer_tag, boxed=self.boxed, unmarked=unmarked)
        if found is None and thought.end and not rest.strip():
            raise MalformedError(f"empty answer: nothing stands after </{self.rationale_tag}>")
        if found is None:
            raise MalformedError(f"missing <{self.answer_tag}>")
        if not rest[slice(*found.content)].strip():
            raise MalformedError("empty answer")
        start, *content = (
            thought.end + len(rest[:at].encode("utf-8", "surrogateescape")) for at in (found.start, *found.content)
        )
        return thought, Answer(start, (content[0], content[1]), found.found_by)


def extract_answer(text: str, *, thought_opened: bool = False) -> str:
    r"""Return the final answer of a completion in the reasoner's format, as `ReasonerLayout` finds it.

    Args:
        text: any text; never raises.
        thought_opened: whether the prompt ended inside a thought, see `find_thought`.

    Returns:
        The answer without surrounding white space; "" if there is none.
    """
    completion = as_bytes(text)
    try:
        _, answer = ReasonerLayout().read(completion, thought_opened=thought_opened)
    except MalformedError:
        return ""
    return as_text(completion[slice(*answer.content)]).strip()


def reference_answer(text: str) -> str:
    r"""Return the final answer of a data set's reference, which may use the same marks as a completion.

    Args:
        text: an answer, or a solution that ends in one: MATH's with `\boxed{}`, GSM8K's with `####`.

    Returns:
        The answer without surrounding white space; the whole text if no mark is found.
    """
    found = find_answer(text, tag=ANSWER, boxed=True, unmarked="whole")
    return (text[slice(*found.content)] if found else "").strip() or text.strip()
