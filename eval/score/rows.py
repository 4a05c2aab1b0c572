"""Rows of rollouts to score: the forms that a line may have, what is wrong with it, and its rollout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import TemplateError

from cepo.files import BrokenLine, Row, read_jsonl
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train.prompts import judged_prompt

Line: TypeAlias = Row | str
"""A row, or the reason why a line cannot be used."""
FORMS = (
    "prompt_ids and completion_ids; or prompt (text, or a list of messages) and completion; "
    "or prompt, chosen, rejected and judge_output"
)


def read_input(path: Path) -> tuple[list[Line], list[BrokenLine]]:
    """Return the lines of the input in order, and the number and the reason of each that cannot be used.

    Raises:
        ValueError: for a file that is not there, is empty or has no usable line.
    """
    rows, broken = read_jsonl(path)
    if not rows and not broken:
        raise ValueError(f"input {str(path)!r} is empty; expected one JSON object per line, with {FORMS}")
    if not rows:
        raise ValueError(f"input {str(path)!r} has no usable line; line {broken[0][0]} is broken: {broken[0][1]}")
    missing = {number: _missing(row) for number, row in rows}
    if all(missing.values()):
        first, names = rows[0]
        raise ValueError(
            f"input {str(path)!r} lacks the column {missing[first]}; expected rows with {FORMS}. "
            f"Its first row has {', '.join(sorted(map(str, names))) or 'no columns'}"
        )
    lines: dict[int, Line] = {number: f"line {number} is broken: {reason}" for number, reason in broken}
    for number, row in rows:
        problem = f"lacks the column {missing[number]}" if missing[number] else _bad_value(row)
        lines[number] = f"line {number} {problem}" if problem else row
    ordered = sorted(lines.items(), key=lambda pair: pair[0])
    return [line for _, line in ordered], [(number, line) for number, line in ordered if isinstance(line, str)]


def read_rollout(line: Line, reader: SpanReader, *, raw: bool = False) -> Rollout:
    """Return the rollout of a line of `read_input`; malformed, with the reason, where there is none.

    Text is encoded once, here, and the spans are found on the resulting ids. Lone surrogates, which no tokenizer
    encodes, become U+FFFD.

    Args:
        line: from `read_input`.
        reader: finds the spans, with the model's tokenizer.
        raw: take prompt text as it is, without the chat template.
    """
    if isinstance(line, str):
        return Rollout((), (), malformed=line)
    tokenizer, messages = reader.tokenizer, None
    if "completion_ids" in line and "prompt_ids" in line:
        prompt_ids, completion_ids = line["prompt_ids"], line["completion_ids"]
    else:
        prompt: Any = line.get("messages", line.get("prompt"))
        completion: Any = line.get("completion", line.get("judge_output"))
        if "completion" not in line and "chosen" in line:
            prompt = judged_prompt(line)
        if isinstance(completion, list):
            completion = completion[-1]["content"]
        completion_ids = tokenizer(_encodable(completion), add_special_tokens=False)["input_ids"]
        if raw and isinstance(prompt, str):
            prompt_ids = tokenizer(_encodable(prompt))["input_ids"]
        else:
            given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages = [{**message, "content": _encodable(message["content"])} for message in given]
            try:
                prompt_ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=True
                )["input_ids"]
            except (TemplateError, ValueError, TypeError) as error:
                return Rollout((), (), malformed=f"the chat template refuses the messages: {error}")
    if not prompt_ids:
        return Rollout((), (), malformed="the prompt has no tokens")
    return reader.read(prompt_ids, completion_ids, messages)


def task_reward(line: Line) -> float | None:
    """Return the task reward that a line carries, or None."""
    task = line.get("task_reward") if isinstance(line, dict) else None
    return None if task is None else float(task)


def is_text(line: Line) -> bool:
    """Return whether the line is a row whose prompt is text or messages."""
    return isinstance(line, dict) and "prompt_ids" not in line


def _columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns that a row of its form has."""
    if "prompt_ids" in row or "completion_ids" in row:
        return "prompt_ids", "completion_ids"
    if "completion" not in row and ("chosen" in row or "rejected" in row):
        return "prompt", "chosen", "rejected", "judge_output"
    return "messages" if "messages" in row else "prompt", "completion"


def _missing(row: Mapping[str, Any]) -> str | None:
    return next((name for name in _columns(row) if name not in row), None)


def _bad_value(row: Mapping[str, Any]) -> str | None:
    task = row.get("task_reward")
    number = isinstance(task, int | float) and not isinstance(task, bool)
    if task is not None and not (number and math.isfinite(task) and 0.0 <= task <= 1.0):
        return f"has the task_reward {task!r}; expected a number in [0, 1]"
    if row.get("label") not in ("A", "B", None):
        return f"has the label {row['label']!r}; expected 'A' or 'B'"
    names = _columns(row)
    fits: Callable[[Any], bool]
    if "prompt_ids" in names:
        fits, expected = _is_ids, "a list of integers"
    elif "judge_output" in names:
        fits, expected = _is_text, "text"
    else:
        fits, expected = _is_text_or_messages, "text, or messages with role and content"
    bad = next((name for name in names if not fits(row[name])), None)
    return None if bad is None else f"has the {bad} {_shortened(row[bad])}; expected {expected}"


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_messages(value: Any) -> bool:
    if not isinstance(value, list):
        return isinstance(value, str)
    return bool(value) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str) and isinstance(message.get("role"), str)
        for message in value
    )


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _encodable(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode() if not text.isascii() else text
