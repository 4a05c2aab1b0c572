"""Preference items to judge: RewardBench, RewardBench 2, and any rows with prompt, chosen and rejected."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cepo.eval.judges.journal import JudgeTask
from cepo.eval.judges.settings import PLACES, Place
from cepo.files import BrokenLine, Row, content_hash, kind_of
from cepo.train.prompts import judge_prompt
from cepo.train.repeats import warn_of_repeats
from cepo.train.rows import check_kept, given, read_id, read_preference, read_tie
from cepo.train.source import collect_rows

REWARDBENCH = "allenai/reward-bench"
REWARDBENCH_2 = "allenai/reward-bench-2"
HUB_NAMES = {"rewardbench": REWARDBENCH, "rewardbench2": REWARDBENCH_2}
"""Short names of the hub data sets."""
_SPLITS = {REWARDBENCH: "filtered", REWARDBENCH_2: "test"}


@dataclass(frozen=True)
class PreferenceItem:
    """A row of preference data: every chosen response is better than every rejected one, unless it is a tie.

    Attributes:
        key: identifies the row's content and, among equal rows, its number.
        name: the row's id, or else its place, such as "line 3".
        subset: the row's subset, or "all".
        prompt: the prompt.
        chosen: at least one response.
        rejected: at least one response.
        tie: whether no response is better.
    """

    key: str
    name: str
    subset: str
    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    tie: bool = False

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Indices (chosen, rejected) of the responses to compare: each chosen with each rejected one."""
        return tuple((better, worse) for better in range(len(self.chosen)) for worse in range(len(self.rejected)))

    def task_key(self, better: int, worse: int, place: Place) -> str:
        """Return the key of the judge prompt for this pair with the chosen response at `place`."""
        return f"{self.key}/{better}/{worse}/{place}"


def load_items(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    subsets: Sequence[str] = (),
    seed: int = 0,
    ties: bool | None = None,
) -> tuple[list[PreferenceItem], list[BrokenLine]]:
    """Load preference items.

    A row needs prompt, chosen and rejected, see `read_preference`, and may have subset and id. RewardBench 2 has lists
    of texts: one chosen and several rejected responses; in its subset Ties, several chosen ones.

    Args:
        source: "rewardbench", "rewardbench2", or another source, see `open_source`.
        split: Split of the hub data set; None for the benchmark's own, or "train".
        limit: Number of items to draw at random, at least 1; None for all. A smaller draw is part of a larger one.
        subsets: Names of the subsets to keep; all if empty.
        seed: Seed of the draw.
        ties: Whether to include rows in which neither response is better; None as for `read_tie`.

    Returns:
        The items in the order of the source, and (number from 1, reason) of rows that cannot be used.

    Raises:
        ValueError: If an argument is out of range, the source can't be read, or no row is usable.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    name, split = _named(str(source), split)
    items, problems = collect_rows(name, partial(read_item, ties=ties), split=split)
    items = _numbered(items)
    if unknown := sorted(set(subsets) - {item.subset for item in items}):
        known = ", ".join(sorted({item.subset for item in items}))
        raise ValueError(f"subset names {', '.join(map(repr, unknown))}, which the data does not have; it has {known}")
    items = [item for item in items if not subsets or item.subset in subsets]
    if limit is not None:
        drawn = {item.key for item in sorted(items, key=lambda item: content_hash("draw", seed, item.key))[:limit]}
        items = [item for item in items if item.key in drawn]
    warn_of_repeats((item.prompt, item.chosen, item.rejected) for item in items if not item.tie)
    return items, problems


def read_item(row: Row, place: str, *, ties: bool | None = None) -> PreferenceItem:
    """Return the item of a row; `place` names a row without an id, `ties` as for `load_items`.

    Raises:
        ValueError: with the reason why the row cannot be used.
    """
    check_kept(row)
    found, tie = read_preference(row), read_tie(row, ties=ties)
    if same := set(found.chosen) & set(found.rejected):
        raise ValueError(f"a response is both chosen and rejected: {min(same)[:40]!r}")
    subset = given(row, "subset")
    if subset is not None and not isinstance(subset, str):
        raise ValueError(f"column 'subset' holds {kind_of(subset)}, not text")
    own = read_id(row)
    name, subset = "" if own is None else str(own), subset or "all"
    content = found.prompt, found.chosen, found.rejected
    # The key does not include the place, so that a row that moves within its file keeps its judgements.
    return PreferenceItem(content_hash(name, subset, *content), name or place, subset, *content, tie)


def judge_tasks(items: Iterable[PreferenceItem], *, ties: bool = False) -> list[JudgeTask]:
    """Return the judge prompts of all pairs of all items, each pair in both orders; `ties` as for `judge_prompt`."""
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
                ties=ties,
            ),
            {"id": item.name, "subset": item.subset, "pair": [better, worse], "chosen_at": place}
            | ({"tie": True} if item.tie else {}),
        )
        for item in items
        for better, worse in item.pairs
        for place in PLACES
    ]


def _numbered(items: Sequence[PreferenceItem]) -> list[PreferenceItem]:
    """Number rows of the same content, so that each has a unique key."""
    seen: Counter[str] = Counter()
    numbered = []
    for item in items:
        seen[item.key] += 1
        numbered.append(item if seen[item.key] == 1 else replace(item, key=f"{item.key}#{seen[item.key]}"))
    return numbered


def _named(source: str, split: str | None) -> tuple[str, str | None]:
    """Return the source and the split that a benchmark's short name stands for."""
    if Path(source).exists():
        return source, split
    if source not in HUB_NAMES and "/" not in source and (near := difflib.get_close_matches(source, HUB_NAMES)):
        raise ValueError(f"data is {source!r}; did you mean {near[0]}?")
    name = HUB_NAMES.get(source, source)
    return name, split or _SPLITS.get(name)
