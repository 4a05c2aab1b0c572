"""The data sets to train on: preference pairs for a judge, questions with answers for a reasoner.

Every decision about a row depends on its own content and the seed, never on its position or the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset, Features, Value

from cepo.counterfactual.text.pairs import digest, side_of
from cepo.files import BrokenLine, Row, content_hash
from cepo.train.prompt_length import CheckPrompt
from cepo.train.prompts import judge_prompt, reasoning_prompt
from cepo.train.rows import (
    PAIR,
    TIE,
    TIES_OPTION,
    check_kept,
    is_storable,
    read_dialogue,
    read_id,
    read_pair,
    read_reference,
    read_tie,
)
from cepo.train.source import collect_rows

_TIES = "set data.ties: true to include ties"  # a recipe's key
_TEXT = Value("string")
_MESSAGES = [{"role": _TEXT, "content": _TEXT}]
_PREFERENCE_FEATURES = Features(
    {"prompt": _MESSAGES, "label": _TEXT, "query": _TEXT, "response_a": _TEXT, "response_b": _TEXT, "id": _TEXT}
)
_REASONING_FEATURES = Features({"prompt": _MESSAGES, "answer": _TEXT, "question": _TEXT, "id": _TEXT})


@dataclass(frozen=True)
class DataSplit:
    """Two data sets that share no prompt, and the rows that were left out of both.

    Attributes:
        train: rows to train on, in the order of the source.
        test: rows to test on, in the order of the source.
        skipped: number of the row (in a text file, of the line), counted from 1, and why it was left out; ascending.
    """

    train: Dataset
    test: Dataset
    skipped: tuple[BrokenLine, ...]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the rows of both sides, in their order."""
        return content_hash(*([content_hash(row) for row in side] for side in (self.train, self.test)))

    def preferences(self) -> Iterator[tuple[str, str, str]]:
        """Yield (query, chosen, rejected) of each judge's row that is not a tie; nothing for other data."""
        for side in (self.train, self.test):
            if "response_a" not in side.column_names:
                continue
            for query, a, b, label in zip(
                *(side[name] for name in ("query", "response_a", "response_b", "label")), strict=True
            ):
                if label != TIE:
                    yield (query, a, b) if label == "A" else (query, b, a)


def load_preferences(
    source: str | Path,
    *,
    split: str | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    max_characters: int | None = None,
    ties: bool = False,
    check_prompt: CheckPrompt | None = None,
) -> DataSplit:
    """Load preference pairs as prompts for a judge.

    A row needs prompt, chosen and rejected, see `read_preference`. Which response is shown first is drawn from the seed
    and the row's content. All rows with the same prompt, up to case and white space, fall on the same side of the
    split, except those whose own column `split` says train or test, as in pairs that were made of others.

    Args:
        source: A file, a folder or a hub data set, see `open_source`.
        split: Split of the hub data set; None means "train". A file has no splits.
        test_fraction: Share of the prompts that goes to the test side, in [0, 1], in expectation.
        seed: Seed of the responses' positions and of the split.
        limit: Number of usable rows to take from the start of the source, at least 1; None for all.
        columns: What the source calls prompt, chosen or rejected, e.g. {"prompt": "instruction"}.
        max_characters: Leave out rows whose whole prompt, instructions included, is longer; None for no limit.
        ties: Whether to include rows in which neither response is better, see `read_tie`, and let every prompt allow
            equal scores. Otherwise such rows are skipped.
        check_prompt: Refuses prompts that are too long for a model, see `prompt_check`; such rows are skipped.

    Returns:
        Data sets with the columns prompt (messages), label ("A" or "B", the position of the chosen response, or "tie"),
        query, response_a, response_b and id, and the rows that were skipped.

    Raises:
        ValueError: If an argument is out of range, the source can't be read, a column is missing or no row is usable.
    """
    if not isinstance(ties, bool):
        raise ValueError(f"ties is {ties!r}; expected true or false")
    names = _rename(tuple(PAIR), columns)
    _check_ranges(test_fraction, max_characters)
    fitting = partial(check_length, max_characters=max_characters, check_prompt=check_prompt)
    rows, skipped = collect_rows(
        source,
        lambda row, _: fitting(judge_row(row, seed, names, ties=ties, way_out=_TIES)),
        split=split,
        limit=limit,
        renames=() if columns else tuple(PAIR),
    )
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
    check_prompt: CheckPrompt | None = None,
) -> DataSplit:
    """Load questions with reference answers as prompts for a reasoner.

    All rows with the same question, up to case and white space, fall on the same side of the split.

    Args:
        source: A file, a folder or a hub data set, see `open_source`.
        split: Split of the hub data set; None means "train". A file has no splits.
        test_fraction: Share of the questions that goes to the test side, in [0, 1], in expectation.
        seed: Seed of the split.
        limit: Number of usable rows to take from the start of the source, at least 1; None for all.
        columns: What the source calls question or answer, e.g. {"question": "problem"}.
        max_characters: Leave out rows whose whole prompt, instructions included, is longer; None for no limit.
        check_prompt: Refuses prompts that are too long for a model, see `prompt_check`; such rows are skipped.

    Returns:
        Data sets with the columns prompt (messages), answer (text), question and id, and the rows that were skipped.

    Raises:
        ValueError: If an argument is out of range, the source can't be read, a column is missing or no row is usable.
    """
    names = _rename(("question", "answer"), columns)
    _check_ranges(test_fraction, max_characters)
    fitting = partial(check_length, max_characters=max_characters, check_prompt=check_prompt)
    rows, skipped = collect_rows(
        source,
        lambda row, _: fitting(_reasoning(row, names)),
        split=split,
        limit=limit,
        renames=() if columns else ("question", "answer"),
    )
    return _divide(rows, skipped, "question", _REASONING_FEATURES, test_fraction, seed)


def judge_row(row: Row, seed: int, names: Mapping[str, str] = PAIR, *, ties: bool, way_out: str = TIES_OPTION) -> Row:
    """Return a row of `load_preferences`.

    Args:
        row: a row of the source.
        seed: seed of the responses' positions.
        names: what the row calls prompt, chosen and rejected.
        ties: whether ties are included.
        way_out: how to include ties, for the error.

    Raises:
        ValueError: with the reason, for a row without a pair of responses, for a tie if they are not included (see
            `read_tie`), or for a row that `cepo augment` did not keep.
    """
    check_kept(row)
    query, chosen, rejected = read_pair(row, names)
    tie = read_tie(row, ties=ties, way_out=way_out)
    if chosen == rejected:
        raise ValueError(f"columns {names['chosen']!r} and {names['rejected']!r} are the same")
    chosen_first = digest("position", seed, query, chosen, rejected) % 2 == 0
    response_a, response_b = (chosen, rejected) if chosen_first else (rejected, chosen)
    return {
        "prompt": judge_prompt(query, response_a, response_b, ties=ties),
        "label": TIE if tie else "A" if chosen_first else "B",
        "query": query,
        "response_a": response_a,
        "response_b": response_b,
        "id": _identify(row, query, chosen, rejected),
        "split": row.get("split") if row.get("split") in ("train", "test") else None,
    }


def check_length(row: Row, max_characters: int | None, check_prompt: CheckPrompt | None = None) -> Row:
    """Return the row; raise ValueError if its prompt (messages) has more characters, or does not pass the check."""
    length = sum(len(message["content"]) for message in row["prompt"])
    if max_characters is not None and length > max_characters:
        raise ValueError(f"the prompt has over {max_characters} characters")
    if check_prompt is not None:
        check_prompt(row["prompt"])
    return row


def _check_ranges(test_fraction: float, max_characters: int | None) -> None:
    if not 0.0 <= test_fraction <= 1.0:
        raise ValueError(f"test_fraction is {test_fraction}; expected a fraction in [0, 1]")
    if max_characters is not None and max_characters < 1:
        raise ValueError(f"max_characters is {max_characters}; expected at least 1")


def _rename(needed: tuple[str, ...], columns: Mapping[str, str] | None) -> dict[str, str]:
    unknown = sorted(set(columns or ()) - set(needed))
    if unknown:
        raise ValueError(f"columns renames {', '.join(unknown)}; expected only {', '.join(needed)}")
    return {name: name for name in needed} | dict(columns or {})


def _divide(
    rows: list[Row], skipped: list[BrokenLine], key: str, features: Features, test_fraction: float, seed: int
) -> DataSplit:
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[(row.get("split") or side_of(row[key], test_fraction, seed)) == "test"].append(row)
    # By column, since an empty list of rows has no columns.
    train, test = (
        Dataset.from_dict({name: [row[name] for row in side] for name in features}, features=features) for side in sides
    )
    return DataSplit(train, test, tuple(sorted(skipped)))


def _reasoning(row: Row, names: Mapping[str, str]) -> Row:
    question = read_dialogue(row, names["question"])
    answer = read_reference(row, names["answer"])
    return {
        "prompt": reasoning_prompt(question),
        "answer": answer,
        "question": question,
        "id": _identify(row, question, answer),
    }


def _identify(row: Row, *content: str) -> str:
    own = read_id(row)
    usable = own is not None and is_storable(str(own))
    return str(own) if usable else f"{digest('id', *content):016x}"
