"""Read questions with candidate solutions, verify solutions that are not graded, and group them by their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cepo.files import BrokenLine, Row
from cepo.jacobian.reading.reasoner import extract_answer
from cepo.jacobian.reading.same_answer import same_text
from cepo.train.rewards.task import exact_match, math_verify_reward
from cepo.train.rows import (
    PAIR,
    check_kept,
    encodable,
    given,
    read_answer,
    read_dialogue,
    read_pair,
    read_reference,
    read_tie,
)
from cepo.train.source import collect_rows

Verifier = Literal["math", "exact"]
_VERIFIERS = {"math": math_verify_reward, "exact": exact_match}


@dataclass(frozen=True)
class Question:
    """A question with its candidate solutions, all different.

    Attributes:
        text: the question itself.
        candidates: the solutions.
        correct: whether each solution is right.
    """

    text: str
    candidates: tuple[str, ...]
    correct: tuple[bool, ...]


def read_questions(path: Path, *, verifier: Verifier = "math") -> tuple[list[Question], list[BrokenLine]]:
    """Read questions with candidate solutions.

    A row holds `question` (or `prompt`), `completions` (a list of texts), and either `correct` (a list of booleans) or
    `answer`, against which the completions are verified; or it is a pair of `prompt`, `chosen` (right) and `rejected`
    (wrong). Rows with the same question are merged, and equal texts count once.

    Args:
        path: see `open_source`.
        verifier: how completions are verified against `answer`: "math" (math-verify) or "exact".

    Returns:
        The questions in the order of the file, and (number, reason) of the rows that could not be used.

    Raises:
        ValueError: if the file cannot be read, or holds no question with two solutions.
    """
    if verifier not in _VERIFIERS:
        raise ValueError(f"verifier is {verifier!r}; expected math or exact")
    found: dict[str, dict[str, bool]] = {}

    def merge(row: Row, _: str) -> None:
        question, graded = _graded(row, verifier)
        known = found.setdefault(question, {})
        if any(known.get(text, grade) != grade for text, grade in graded.items()):
            raise ValueError("holds a solution that is right in this row and wrong in another")
        known.update(graded)

    _, broken = collect_rows(path, merge)
    questions = [Question(question, tuple(graded), tuple(graded.values())) for question, graded in found.items()]
    if all(len(question.candidates) < 2 for question in questions):
        raise ValueError(f"data {str(path)!r} holds no question with two solutions; expected more per question")
    return questions, broken


def answer_groups(candidates: Sequence[str]) -> list[int | None]:
    """Return a number for each candidate's answer, the same if `exact_match` equates them; None without an answer."""
    groups: list[int | None] = []
    known: list[str] = []
    for text in candidates:
        answer = extract_answer(text)
        if not answer:
            groups.append(None)
            continue
        same = [number for number, other in enumerate(known) if same_text(answer, other)]
        groups.append(same[0] if same else len(known))
        if not same:
            known.append(answer)
    return groups


def _graded(row: Row, verifier: Verifier) -> tuple[str, dict[str, bool]]:
    """Return a row's question, and whether each of its solutions is right."""
    check_kept(row)
    if given(row, "completions") is None:
        asked = "prompt" if given(row, "question") is None or given(row, "prompt") is not None else "question"
        read_tie(row, ties=None)
        question, chosen, rejected = read_pair(row, PAIR | {"prompt": asked})
        if chosen == rejected:
            raise ValueError("has the same text as chosen and as rejected")
        return question, {chosen: True, rejected: False}
    question = read_dialogue(row, "prompt" if given(row, "question") is None else "question")
    listed = row["completions"]
    if not isinstance(listed, list) or not listed:
        raise ValueError("has completions that are not a list of texts")
    completions = [encodable(read_answer({"completions": one}, "completions")[1]) for one in listed]
    if not all(text.strip() for text in completions):
        raise ValueError("has a blank text among its completions")
    if given(row, "correct") is not None:
        grades = row["correct"]
        if (
            not isinstance(grades, list)
            or len(grades) != len(completions)
            or any(grade not in (0, 1) for grade in grades)
        ):
            raise ValueError(f"has correct = {grades!r}; expected {len(completions)} booleans, one for each completion")
    elif given(row, "answer") is not None:
        grades = _VERIFIERS[verifier](completions, [read_reference(row, "answer")] * len(completions))
    else:
        raise ValueError("has neither correct nor answer")
    graded: dict[str, bool] = {}
    for text, grade in zip(completions, grades, strict=True):
        if graded.setdefault(text, bool(grade)) != bool(grade):
            raise ValueError("holds one solution twice, right and wrong")
    return question, graded
