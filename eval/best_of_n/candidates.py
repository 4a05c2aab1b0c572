"""Questions with candidate solutions: read, verified if they are not graded, and grouped by their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cepo.files import BrokenLine, read_jsonl
from cepo.jacobian.reading.reasoner import extract_answer
from cepo.train.rewards.task import exact_match, math_verify_reward

Verifier = Literal["math", "exact"]
_VERIFIERS = {"math": math_verify_reward, "exact": exact_match}


@dataclass(frozen=True)
class Question:
    """A question with its candidate solutions, at least two, all different.

    Attributes:
        text: the question itself.
        candidates: the solutions.
        correct: whether each is right.
    """

    text: str
    candidates: tuple[str, ...]
    correct: tuple[bool, ...]


def read_questions(path: Path, *, verifier: Verifier = "math") -> tuple[list[Question], list[BrokenLine]]:
    """Read questions with candidate solutions.

    A row holds `question` (or `prompt`), `completions` (a list of texts), and `correct` (a list of booleans) or
    `answer`, against which the completions are then verified; or it is a pair of `prompt`, `chosen` (right) and
    `rejected` (wrong). Rows with the same question are merged, and equal texts count once.

    Args:
        path: a JSONL file.
        verifier: how completions are verified against `answer`: "math" (math-verify) or "exact".

    Returns:
        The questions with at least two candidates, in the order of the file, and (line number, reason) of the lines
        that could not be used.

    Raises:
        ValueError: if the file cannot be read, or holds no usable question.
    """
    if verifier not in _VERIFIERS:
        raise ValueError(f"verifier is {verifier!r}; expected math or exact")
    rows, broken = read_jsonl(path)
    found: dict[str, dict[str, bool]] = {}
    for number, row in rows:
        try:
            question, graded = _graded(row, verifier)
            known = found.setdefault(question, {})
            both = [text for text in graded if known.get(text, graded[text]) != graded[text]]
            if both:
                raise ValueError("holds a solution that is right here and wrong elsewhere")
            known |= graded
        except ValueError as reason:
            broken.append((number, str(reason)))
    questions = [
        Question(question, tuple(graded), tuple(graded.values()))
        for question, graded in found.items()
        if len(graded) > 1
    ]
    if not questions:
        first = f"; line {broken[0][0]} {broken[0][1]}" if broken else ""
        raise ValueError(
            f"data {str(path)!r} holds no question with two solutions{first}; expected rows with question, "
            "completions, and correct or answer, or rows with prompt, chosen and rejected"
        )
    return questions, sorted(broken)


def answer_groups(candidates: Sequence[str]) -> list[int | None]:
    """Return the number of each candidate's answer, equal for answers that `exact_match` equates; None without one."""
    groups: list[int | None] = []
    known: list[str] = []
    for text in candidates:
        answer = extract_answer(text)
        if not answer:
            groups.append(None)
            continue
        # Wrapped, so that both sides are read as the answer and not searched for one again.
        same = exact_match([f"<answer>{answer}</answer>"] * len(known), known)
        groups.append(same.index(1.0) if 1.0 in same else len(known))
        if 1.0 not in same:
            known.append(answer)
    return groups


def _graded(row: Mapping[str, Any], verifier: Verifier) -> tuple[str, dict[str, bool]]:
    """Return a row's question, and whether each of its solutions is right."""
    question = _text(row, "question" if "question" in row else "prompt")
    if "completions" not in row:
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
        if chosen == rejected:
            raise ValueError("has the same text as chosen and as rejected")
        return question, {chosen: True, rejected: False}
    completions = row["completions"]
    if not isinstance(completions, list) or not completions or not all(_is_text(text) for text in completions):
        raise ValueError("has completions that are not a list of texts")
    if "correct" in row:
        grades = row["correct"]
        if (
            not isinstance(grades, list)
            or len(grades) != len(completions)
            or any(grade not in (0, 1) for grade in grades)
        ):
            raise ValueError(f"has correct = {grades!r}; expected {len(completions)} booleans, one for each completion")
    elif isinstance(row.get("answer"), str | int | float) and str(row["answer"]).strip():
        grades = _VERIFIERS[verifier](completions, [row["answer"]] * len(completions))
    else:
        raise ValueError("has neither correct nor answer")
    graded: dict[str, bool] = {}
    for text, grade in zip(completions, grades, strict=True):
        if graded.setdefault(text, bool(grade)) != bool(grade):
            raise ValueError("holds one solution twice, right and wrong")
    return question, graded


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not _is_text(value):
        raise ValueError(f"has no text in the column {column!r}")
    assert isinstance(value, str)
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
