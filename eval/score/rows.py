"""Rows of rollouts to score: the forms that a line may have, what is wrong with it, and its rollout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from cepo.files import read_jsonl
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train.prompts import judged_prompt

FORMS = (
    "prompt_ids and completion_ids; or prompt (text, or a list of messages) and completion; "
    "or prompt, chosen, rejected and judge_output"
)


def read_input(path: Path) -> tuple[list[dict[str, Any] | str], list[tuple[int, str]]]:
    """Return the input's lines in order, good ones as rows, broken ones as their reason, and the broken ones again."""
    rows, broken = read_jsonl(path)
    if not rows and not broken:
        raise ValueError(f"input {str(path)!r} is empty; expected JSON objects, one a line, with {FORMS}")
    if not rows:
        raise ValueError(f"input {str(path)!r} has no usable line; line {broken[0][0]} is broken: {broken[0][1]}")
    complaints = [_missing(row) for _, row in rows]
    if all(complaints):
        raise ValueError(
            f"input {str(path)!r} lacks the column {complaints[0]}; expected rows with {FORMS}. "
            f"Its first row has {', '.join(sorted(map(str, rows[0][1]))) or 'no columns'}"
        )
    merged: list[tuple[int, dict[str, Any] | str]] = []
    for (number, row), complaint in zip(rows, complaints, strict=True):
        problem = f"lacks the column {complaint}" if complaint else _bad_value(row)
        merged.append((number, f"line {number} {problem}" if problem else row))
    merged += [(number, f"line {number} is broken: {reason}") for number, reason in broken]
    ordered = [line for _, line in sorted(merged, key=lambda pair: pair[0])]
    problems = [(number, line) for number, line in sorted(merged, key=lambda pair: pair[0]) if isinstance(line, str)]
    return ordered, problems


def read_row(
    row: Mapping[str, Any], tokenizer: Any, reader: SpanReader, *, raw: bool = False
) -> tuple[Rollout | None, str | None]:
    """Return the rollout of a row that `read_input` let pass, or None and the reason why there is none.

    Text is encoded once, here, and the spans are found on the ids that came of it. Lone surrogates, which no tokenizer
    encodes, become U+FFFD.
    """
    if "completion_ids" in row and "prompt_ids" in row:
        return _read(reader, row["prompt_ids"], row["completion_ids"], None)
    messages: Any = row.get("messages", row.get("prompt"))
    completion = row.get("completion", row.get("judge_output"))
    if "completion" not in row and "chosen" in row:
        messages = judged_prompt(row)
    if isinstance(completion, list):
        completion = completion[-1]["content"]
    if raw and isinstance(messages, str):
        prompt_ids = tokenizer(_encodable(messages))["input_ids"]
        return _read(reader, prompt_ids, _encode(tokenizer, completion), None)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    messages = [{**message, "content": _encodable(message["content"])} for message in messages]
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except (TemplateError, ValueError, TypeError) as error:
        return None, f"the chat template refuses the messages: {error}"
    return _read(reader, encoded["input_ids"], _encode(tokenizer, completion), messages)


def task_reward(row: Mapping[str, Any]) -> float | None:
    task = row.get("task_reward")
    return None if task is None else float(task)


def is_text(line: Any) -> bool:
    return isinstance(line, dict) and "prompt_ids" not in line


def _read(
    reader: SpanReader, prompt_ids: Sequence[int], completion_ids: Sequence[int], messages: Any
) -> tuple[Rollout | None, str | None]:
    if not prompt_ids:
        return None, "the prompt has no tokens"
    return reader.read(prompt_ids, completion_ids, messages), None


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
    sound = task is None or (number and math.isfinite(task) and 0.0 <= task <= 1.0)
    if not sound:
        return f"has the task_reward {task!r}; expected a number in [0, 1]"
    if row.get("label") not in ("A", "B", None):
        return f"has the label {row['label']!r}; expected 'A' or 'B'"
    names = _columns(row)
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


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(_encodable(text), add_special_tokens=False)["input_ids"])
