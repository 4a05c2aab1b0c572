"""The data sets to train on: preference pairs for a judge, questions with answers for a reasoner.

Every decision about a row depends on its own content and the seed, never on its position or the other rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value

from cepo.files import BrokenLine, Row, content_hash, is_file_name, read_jsonl
from cepo.train.prompts import judge_prompt, reasoning_prompt

_TEXT = Value("string")
_MESSAGES = [{"role": _TEXT, "content": _TEXT}]
_PREFERENCE_FEATURES = Features(
    {"prompt": _MESSAGES, "label": _TEXT, "query": _TEXT, "response_a": _TEXT, "response_b": _TEXT, "id": _TEXT}
)
_REASONING_FEATURES = Features({"prompt": _MESSAGES, "answer": _TEXT, "question": _TEXT, "id": _TEXT})


@dataclass(frozen=True)
class DataSplit:
    """Two data sets that share no prompt, and what was left out of both.

    Attributes:
        train: Rows to train on, in the order of the source.
        test: Rows to test on, in the order of the source.
        skipped: Number of the line (of the row, in a hub data set) from 1, and why it was left out; ascending.
    """

    train: Dataset
    test: Dataset
    skipped: tuple[BrokenLine, ...]

    @property
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that stand for the rows of both sides, in their order."""
        return content_hash(*([content_hash(row) for row in side] for side in (self.train, self.test)))


def load_preferences(
    source: str | Path,
    *,
    split: str | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    max_characters: int | None = None,
) -> DataSplit:
    """Load preference pairs as prompts for a judge.

    A row needs prompt, chosen and rejected, as text or as lists of messages. In a list of messages the last one by the
    assistant is the response. What stands before it is the prompt if the row has none: one turn as it is, several turns
    with their roles. Which response is shown first is drawn from the seed and the row's content. All rows with the same
    prompt, up to case and white space, fall on the same side of the split.

    Args:
        source: A .jsonl file, or a hub data set "owner/name" or "owner/name:configuration".
        split: Split of the hub data set; None means "train". A file has no splits.
        test_fraction: Share of the prompts that goes to the test side, in [0, 1], in expectation.
        seed: Of the positions and of the split.
        limit: Number of usable rows to take from the start of the source, at least 1; None for all.
        columns: What the source calls prompt, chosen or rejected, e.g. {"prompt": "instruction"}.
        max_characters: Leave out rows whose whole prompt, instructions included, is longer; None for no limit.

    Returns:
        Data sets with the columns prompt (messages), label ("A" or "B", where the chosen one stands), query,
        response_a, response_b and id, and the rows that were skipped.

    Raises:
        ValueError: If an argument is out of range, the source can't be read, a column is missing or no row is usable.
    """
    names = _rename(("prompt", "chosen", "rejected"), columns)
    _check_ranges(test_fraction, limit, max_characters)
    rows, skipped = _collect(source, split, limit, lambda row: _short(_preference(row, names, seed), max_characters))
    return _divide(rows, skipped, "query", _PREFERENCE_FEATURES, test_fraction, seed)


def load_reasoning(
    source: str | Path,
    *,
    split: str | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    max_characters: int | None = None,
) -> DataSplit:
    """Load questions with reference answers as prompts for a reasoner.

    All rows with the same question, up to case and white space, fall on the same side of the split.

    Args:
        source: A .jsonl file, or a hub data set "owner/name" or "owner/name:configuration".
        split: Split of the hub data set; None means "train". A file has no splits.
        test_fraction: Share of the questions that goes to the test side, in [0, 1], in expectation.
        seed: Of the split.
        limit: Number of usable rows to take from the start of the source, at least 1; None for all.
        columns: What the source calls question or answer, e.g. {"question": "problem"}.
        max_characters: Leave out rows whose whole prompt, instructions included, is longer; None for no limit.

    Returns:
        Data sets with the columns prompt (messages), answer (text), question and id, and the rows that were skipped.

    Raises:
        ValueError: If an argument is out of range, the source can't be read, a column is missing or no row is usable.
    """
    names = _rename(("question", "answer"), columns)
    _check_ranges(test_fraction, limit, max_characters)
    rows, skipped = _collect(source, split, limit, lambda row: _short(_reasoning(row, names), max_characters))
    return _divide(rows, skipped, "question", _REASONING_FEATURES, test_fraction, seed)


def _check_ranges(test_fraction: float, limit: int | None, max_characters: int | None) -> None:
    if not 0.0 <= test_fraction <= 1.0:
        raise ValueError(f"test_fraction is {test_fraction}; expected a fraction in [0, 1]")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1, or None for all rows")
    if max_characters is not None and max_characters < 1:
        raise ValueError(f"max_characters is {max_characters}; expected at least 1, or None for no limit")


def _short(row: Row, max_characters: int | None) -> Row:
    """Return the row; ValueError if its prompt is too long."""
    length = sum(len(message["content"]) for message in row["prompt"])
    if max_characters is not None and length > max_characters:
        raise ValueError(f"the prompt has over {max_characters} characters")
    return row


def _rename(needed: tuple[str, ...], columns: Mapping[str, str] | None) -> dict[str, str]:
    unknown = sorted(set(columns or ()) - set(needed))
    if unknown:
        raise ValueError(f"columns renames {', '.join(unknown)}; expected only {', '.join(needed)}")
    return {name: name for name in needed} | dict(columns or {})


def _collect(
    source: str | Path, split: str | None, limit: int | None, convert: Callable[[Row], Row]
) -> tuple[list[Row], list[BrokenLine]]:
    """Convert rows until there are enough; those that raise a ValueError are skipped with its message as the reason."""
    rows, skipped = _open(source, split)
    collected: list[Row] = []
    found: dict[str, None] = {}
    for number, row in rows:
        found.update(dict.fromkeys(row))
        try:
            collected.append(convert(row))
        except ValueError as reason:
            skipped.append((number, str(reason)))
        if len(collected) == limit:
            break
    if not collected:
        reasons = [f"{reason} ({count}x)" for reason, count in Counter(text for _, text in skipped).most_common(3)]
        raise ValueError(
            f"source {source} holds no usable row: {'; '.join(reasons) or 'it is empty'}; "
            f"columns found: {', '.join(found) or 'none'}"
        )
    return collected, skipped


def _open(source: str | Path, split: str | None) -> tuple[Iterable[tuple[int, Row]], list[BrokenLine]]:
    if is_file_name(source):
        if split is not None:
            raise ValueError(f"split is {split!r}, but source {source} is a file; expected None, files have no splits")
        return read_jsonl(source)
    name, _, configuration = str(source).partition(":")
    try:
        rows = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"source {source} is neither a .jsonl file nor a hub data set that can be loaded: {error}"
        ) from error
    return enumerate(rows, start=1), []


def _divide(
    rows: list[Row], skipped: list[BrokenLine], key: str, features: Features, test_fraction: float, seed: int
) -> DataSplit:
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[_falls_to_test(row[key], test_fraction, seed)].append(row)
    # By column, for an empty list of rows has none.
    train, test = (
        Dataset.from_dict({name: [row[name] for row in side] for name in features}, features=features) for side in sides
    )
    return DataSplit(train, test, tuple(sorted(skipped)))


def _preference(row: Row, names: Mapping[str, str], seed: int) -> Row:
    before_chosen, chosen = read_response(row, names["chosen"])
    before_rejected, rejected = read_response(row, names["rejected"])
    if before_chosen != before_rejected:
        raise ValueError(f"columns {names['chosen']!r} and {names['rejected']!r} answer different conversations")
    if chosen == rejected:
        raise ValueError(f"columns {names['chosen']!r} and {names['rejected']!r} are the same")
    query = before_chosen if before_chosen and names["prompt"] not in row else read_dialogue(row, names["prompt"])
    chosen_first = _digest("position", seed, query, chosen, rejected) % 2 == 0
    response_a, response_b = (chosen, rejected) if chosen_first else (rejected, chosen)
    return {
        "prompt": judge_prompt(query, response_a, response_b),
        "label": "A" if chosen_first else "B",
        "query": query,
        "response_a": response_a,
        "response_b": response_b,
        "id": _identify(row, query, chosen, rejected),
    }


def _reasoning(row: Row, names: Mapping[str, str]) -> Row:
    question = read_dialogue(row, names["question"])
    answer = _column(row, names["answer"])
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        # 18.0 is what a table makes of 18.
        answer = f"{answer:.15g}" if isinstance(answer, float) else str(answer)
    answer = _checked_text(answer, names["answer"])
    return {
        "prompt": reasoning_prompt(question),
        "answer": answer,
        "question": question,
        "id": _identify(row, question, answer),
    }


def read_response(row: Row, column: str) -> tuple[str, str]:
    """Return the conversation before a response, "" where the column is plain text, and the response."""
    value = _column(row, column)
    if not isinstance(value, list):
        return "", _checked_text(value, column)
    turns = _turns(value, column)
    spoken = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
    if not spoken:
        raise ValueError(f"column {column!r} holds no message by the assistant")
    return _join(turns[: spoken[-1]]), turns[spoken[-1]][1]


def read_dialogue(row: Row, column: str) -> str:
    """Return a prompt: text or a single message as it is, several messages with their roles."""
    value = _column(row, column)
    return _join(_turns(value, column)) if isinstance(value, list) else _checked_text(value, column)


def _turns(messages: list[Any], column: str) -> list[tuple[str, str]]:
    if not messages or not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in messages):
        raise ValueError(f"column {column!r} is a list, but not one of messages with role and content")
    return [(message["role"], _checked_text(message.get("content"), column)) for message in messages]


def _join(turns: list[tuple[str, str]]) -> str:
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in turns)


def _column(row: Row, column: str) -> Any:
    if column not in row:
        raise ValueError(f"column {column!r} is missing")
    return row[column]


def _checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds a {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"column {column!r} is blank")
    if not _is_storable(value):
        raise ValueError(f"column {column!r} holds a lone surrogate; expected valid Unicode text")
    return value


def _identify(row: Row, *content: str) -> str:
    given = row.get("id")
    usable = isinstance(given, str | int) and str(given) and _is_storable(str(given))
    return str(given) if usable else f"{_digest('id', *content):016x}"


def _is_storable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _falls_to_test(prompt: str, test_fraction: float, seed: int) -> bool:
    normalized = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return _digest("split", seed, normalized) < int(test_fraction * 2**64)


def _digest(*parts: str | int) -> int:
    """Hash the parts to 64 bits, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest())
