"""Preference items to judge: RewardBench, RewardBench 2, and any rows with prompt, chosen and rejected."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cepo.eval.judges.journal import JudgeTask
from cepo.eval.judges.settings import PLACES, Place
from cepo.files import BrokenLine, Row, content_hash, is_file_name, read_jsonl
from cepo.train.data import read_dialogue, read_response
from cepo.train.prompts import judge_prompt

REWARDBENCH = "allenai/reward-bench"
REWARDBENCH_2 = "allenai/reward-bench-2"
HUB_NAMES = {"rewardbench": REWARDBENCH, "rewardbench2": REWARDBENCH_2}
"""Short names of the hub data sets."""
_SPLITS = {REWARDBENCH: "filtered", REWARDBENCH_2: "test"}


@dataclass(frozen=True)
class PreferenceItem:
    """A row of preference data: every chosen response is better than every rejected one.

    Attributes:
        key: stands for the row's content and, among equal rows, its number.
        name: the row's id, or "".
        subset: the row's subset, or "all".
        prompt: what was asked.
        chosen: at least one.
        rejected: at least one.
    """

    key: str
    name: str
    subset: str
    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Indices (chosen, rejected) of the responses to compare: each chosen with each rejected one."""
        return tuple((better, worse) for better in range(len(self.chosen)) for worse in range(len(self.rejected)))

    def task_key(self, better: int, worse: int, place: Place) -> str:
        """Return the key of the judge prompt that shows this pair with the chosen response at `place`."""
        return f"{self.key}/{better}/{worse}/{place}"


def load_items(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    subsets: Sequence[str] = (),
    seed: int = 0,
) -> tuple[list[PreferenceItem], list[BrokenLine]]:
    """Load preference items.

    A row needs prompt, chosen and rejected, and may have subset and id. chosen and rejected are text, a list of
    messages (the last one by the assistant is the response), or a list of texts (RewardBench 2: one chosen, several
    rejected; in its subset Ties several chosen).

    Args:
        source: A .jsonl file, "rewardbench", "rewardbench2", or a hub data set "owner/name" or
            "owner/name:configuration".
        split: Split of the hub data set; None for the benchmark's own, or "train".
        limit: Number of items to draw at random, at least 1; None for all. A smaller draw is part of a larger one.
        subsets: Names to keep; all where empty.
        seed: Of the draw.

    Returns:
        The items in the order of the source, and (line number from 1, reason) of rows that cannot be used.

    Raises:
        ValueError: If an argument is out of range, the source can't be read, or no row is usable.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1, or None for all items")
    rows, problems = _open(str(source), split)
    items: list[PreferenceItem] = []
    for number, row in rows:
        try:
            items.append(read_item(row))
        except ValueError as reason:
            problems.append((number, str(reason)))
    if not items:
        reasons = [f"{reason} ({count}x)" for reason, count in Counter(text for _, text in problems).most_common(3)]
        raise ValueError(f"data {str(source)!r} has no usable row: {'; '.join(reasons) or 'it is empty'}")
    items = _numbered(items)
    if unknown := sorted(set(subsets) - {item.subset for item in items}):
        known = ", ".join(sorted({item.subset for item in items}))
        raise ValueError(f"subset names {', '.join(map(repr, unknown))}, which the data does not have; it has {known}")
    items = [item for item in items if not subsets or item.subset in subsets]
    if limit is not None:
        drawn = {item.key for item in sorted(items, key=lambda item: content_hash("draw", seed, item.key))[:limit]}
        items = [item for item in items if item.key in drawn]
    return items, sorted(problems)


def read_item(row: Row) -> PreferenceItem:
    """Return the item of a row.

    Raises:
        ValueError: with the reason why the row cannot be used.
    """
    chosen, before = _responses(row, "chosen")
    rejected, before_rejected = _responses(row, "rejected")
    if before != before_rejected:
        raise ValueError("columns 'chosen' and 'rejected' answer different conversations")
    prompt = before if before and "prompt" not in row else read_dialogue(row, "prompt")
    if same := set(chosen) & set(rejected):
        raise ValueError(f"a response is both chosen and rejected: {min(same)[:40]!r}")
    subset = row.get("subset")
    if subset is not None and not isinstance(subset, str):
        raise ValueError(f"column 'subset' holds a {type(subset).__name__}, not text")
    name = "" if row.get("id") is None else str(row["id"])
    subset = subset or "all"
    return PreferenceItem(content_hash(name, subset, prompt, chosen, rejected), name, subset, prompt, chosen, rejected)


def judge_tasks(items: Iterable[PreferenceItem]) -> list[JudgeTask]:
    """Return the judge prompts of all pairs of all items, each pair in both orders."""
    return [
        JudgeTask(
            item.task_key(better, worse, place),
            judge_prompt(
                item.prompt,
                *(
                    (item.chosen[better], item.rejected[worse])
                    if place == "A"
                    else (item.rejected[worse], item.chosen[better])
                ),
            ),
            {"id": item.name, "subset": item.subset, "pair": [better, worse], "chosen_at": place},
        )
        for item in items
        for better, worse in item.pairs
        for place in PLACES
    ]


def _responses(row: Row, column: str) -> tuple[tuple[str, ...], str]:
    """Return the responses of a column and the conversation before them, or ""."""
    value = row.get(column)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        if blank := [text for text in value if not text.strip()]:
            raise ValueError(f"column {column!r} holds {len(blank)} blank response(s) among {len(value)}")
        return tuple(read_response({column: text}, column)[1] for text in value), ""
    before, text = read_response(row, column)
    return (text,), before


def _numbered(items: Sequence[PreferenceItem]) -> list[PreferenceItem]:
    """Number rows of the same content, so that each has a key of its own."""
    seen: Counter[str] = Counter()
    numbered = []
    for item in items:
        seen[item.key] += 1
        numbered.append(item if seen[item.key] == 1 else replace(item, key=f"{item.key}#{seen[item.key]}"))
    return numbered


def _open(source: str, split: str | None) -> tuple[Iterable[tuple[int, Row]], list[BrokenLine]]:
    if is_file_name(source):
        if split is not None:
            raise ValueError(f"split is {split!r}, but data {source!r} is a file, which has no splits")
        return read_jsonl(source)
    import datasets

    if source not in HUB_NAMES and "/" not in source and (near := difflib.get_close_matches(source, HUB_NAMES)):
        raise ValueError(f"data is {source!r}; did you mean {near[0]}?")
    name, _, configuration = HUB_NAMES.get(source, source).partition(":")
    try:
        rows: Any = datasets.load_dataset(name, configuration or None, split=split or _SPLITS.get(name, "train"))
    except (OSError, ValueError) as error:
        raise ValueError(f"data {source!r} is not a .jsonl file and cannot be loaded from the hub: {error}") from error
    return enumerate(rows, start=1), []
