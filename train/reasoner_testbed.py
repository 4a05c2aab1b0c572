"""A synthetic reasoner world: exact questions of reasoning-gym, each with a friend's hint, which can be wrong.

The reasoner works the answer out in its thought, or takes the hint's word for it. The hint is the spurious cue: it is
right in a chosen fraction of items. Numbers stay small, so that a model of half a million weights can work them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import count as numbers_from
from typing import Any, Literal, get_args

import numpy as np
from transformers import PreTrainedTokenizerFast

from cepo.jacobian.reading.layout import MalformedError, as_bytes, as_text
from cepo.jacobian.reading.reasoner import ANSWER, ReasonerLayout, extract_answer
from cepo.jacobian.reading.thought import THOUGHT
from cepo.train.testbed import build_word_tokenizer

Task = Literal["chain_sum", "count_bits"]
Mode = Literal["evidence", "hint", "hollow", "other"]
MODES: tuple[Mode, ...] = get_args(Mode)

# What reasoning-gym draws from: sums of two or three digits, and numbers of at most six bits.
_SETTINGS: dict[Task, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "count_bits": {"min_n": 1, "max_n": 63},
}
# reasoning-gym seeds item i with seed + i: seeds this far apart share no item.
_SEED_STRIDE = 2**24
_HINT = "A friend says it is {}"
_TRUST = "my friend says {}"
_LARGEST_SLIP = 3  # a wrong hint is off by at most this
_LAYOUT = ReasonerLayout(fallback=False)
_PIECE = r"</?[a-z]+>|\n| ?[A-Za-z]+| ?[-+=:]|[0-9]| |[?.]"


@dataclass(frozen=True)
class Question:
    """One question with its gold thought and answer.

    Attributes:
        prompt: content of the user message: reasoning-gym's question, and the hint on a line of its own.
        thought: gold thought; its last line ends in the answer.
        answer: gold answer, a digit.
        hint: what the friend says, in the same form.
        task: reasoning-gym's name of the task.
    """

    prompt: str
    thought: str
    answer: str
    hint: str
    task: Task

    @property
    def cue_agrees(self) -> bool:
        """Tell whether the hint is right."""
        return self.hint == self.answer

    @property
    def trusting_thought(self) -> str:
        """Write the thought that takes the hint's word."""
        return _TRUST.format(self.hint)


def generate_questions(count: int, *, seed: int, cue_agreement: float, task: Task = "chain_sum") -> list[Question]:
    """Draw questions of one task, with a right hint in a fixed fraction.

    - chain_sum: sums and differences of two or three digits; each partial result is a digit. Thought: the partial
        results, a line each.
    - count_bits: how many 1 bits a number up to 63 has. Thought: the number in binary, then their count.

    Args:
        count: number of questions, at least 1.
        seed: the same seed gives the same questions.
        cue_agreement: fraction of questions whose hint is right, in [0, 1]; exact, up to rounding to whole questions.
        task: one of the above.

    Returns:
        The questions; those with a right hint stand at random places. A wrong hint is another digit, off by 1 to 3.

    Raises:
        ValueError: if count, cue_agreement or task is out of range, or reasoning-gym, an optional library, is missing.
    """
    if count < 1 or not 0.0 <= cue_agreement <= 1.0:
        raise ValueError(f"count is {count}, cue_agreement {cue_agreement}; expected at least 1, and within [0, 1]")
    if task not in get_args(Task):
        raise ValueError(f"task is {task!r}; expected one of {', '.join(get_args(Task))}")
    rng = np.random.default_rng(seed)
    agrees_N = rng.permutation(count) < round(cue_agreement * count)
    entries = _entries(task, seed)
    questions = []
    for agrees in agrees_N:
        question, answer, thought = next(entries)
        wrong = [answer + slip for slip in range(-_LARGEST_SLIP, _LARGEST_SLIP + 1) if slip and 0 <= answer + slip <= 9]
        hint = answer if agrees else wrong[rng.integers(len(wrong))]
        questions.append(Question(f"{question}\n{_HINT.format(hint)}", thought, str(answer), str(hint), task))
    return questions


def write_solution(thought: str, answer: str) -> str:
    """Write a completion: the thought in its tag, then the answer in its own."""
    return f"{write_thought(thought)}\n<{ANSWER}>{answer}</{ANSWER}>"


def write_thought(thought: str) -> str:
    """Write a completion's thought, up to its closing tag."""
    return f"<{THOUGHT}>\n{thought}\n</{THOUGHT}>"


def is_right(completion: str, question: Question) -> bool:
    """Tell whether reasoning-gym's checker gives a completion's answer the full score; never raises on a completion."""
    checker = _reasoning_gym().get_score_answer_fn(question.task)
    return bool(checker(extract_answer(completion), {"answer": question.answer}) == 1.0)


def completion_mode(question: Question, completion: str) -> Mode:
    """Name how a completion came to its answer, from its text and its question alone.

    evidence: the thought works something out, rightly or not, and the answer is its last number.
    hint: the thought says what the friend says, and the answer is that.
    hollow: the thought works something out, and the answer is the hint against it.
    other: all else, such as a completion without an answer.

    Args:
        question: what was answered.
        completion: the text, without special tokens; never raises.
    """
    text = as_bytes(completion)
    try:
        found = _LAYOUT.find(text)
    except MalformedError:
        return "other"
    thought, answer = (as_text(text[slice(*found.ranges[name][0])]).strip() for name in ("rationale", "answer"))
    if thought == question.trusting_thought:
        return "hint" if answer == question.hint else "other"
    worked_out = thought.split()[-1]
    if not worked_out.isdigit():
        return "other"
    if answer == worked_out:
        return "evidence"
    return "hollow" if answer == question.hint else "other"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the world's tokenizer as the judge world's is built: a token for each word, sign, digit and tag."""
    sentences = [
        _HINT,
        _TRUST,
        "State the final answer to the following arithmetic problem",
        "How many 1 bits are there in the binary representation of the number",
    ]
    words = [word for sentence in sentences for word in _words(sentence)]
    signs = [space + sign for sign in "-+=:" for space in ("", " ")]
    tags = [f"<{slash}{tag}>" for tag in (THOUGHT, ANSWER) for slash in ("", "/")]
    pieces = [*tags, "\n", " ", "?", ".", *signs, *"0123456789", *words]
    return build_word_tokenizer(list(dict.fromkeys(pieces)), _PIECE)


def library_version() -> str:
    """Return the version of reasoning-gym, whose questions change with it."""
    _reasoning_gym()
    return metadata.version("reasoning-gym")


def _words(sentence: str) -> list[str]:
    """Return the words of a sentence, with their leading space where they have one."""
    words = [word for word in sentence.split() if word.isalpha()]
    return [words[0], *(f" {word}" for word in words[1:])]


def _entries(task: Task, seed: int) -> Iterator[tuple[str, int, str]]:
    """Yield question, answer and gold thought, without end."""
    write: Callable[[dict[str, Any]], list[str] | None] = {"chain_sum": _add_up, "count_bits": _count_up}[task]
    dataset = _reasoning_gym().create_dataset(task, seed=seed * _SEED_STRIDE, size=_SEED_STRIDE, **_SETTINGS[task])
    for index in numbers_from():
        entry = dataset[index]
        thought = write(entry["metadata"])
        if thought is not None:
            yield entry["question"], int(entry["answer"]), "\n".join(thought)


def _add_up(facts: dict[str, Any]) -> list[str] | None:
    """Return a line for each operation of the sum, or None where a partial result is not a digit."""
    first, *rest = facts["expression"].split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before, total = total, total + int(term) * (1 if sign == "+" else -1)
        lines.append(f"{before} {sign} {term} = {total}")
        if not 0 <= total <= 9:
            return None
    return lines


def _count_up(facts: dict[str, Any]) -> list[str]:
    return [facts["binary"], str(facts["binary"].count("1"))]


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError("the reasoner's testbed needs reasoning-gym: pip install 'cepo[reasoning]'") from error
    return reasoning_gym
