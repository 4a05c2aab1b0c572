"""Load and encode the pairs to train a reward model on: rows of a file or a hub data set, or the testbed's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cepo.counterfactual.text.mechanical import Rule, Ties, make_pairs
from cepo.counterfactual.text.pairs import Pair, side_of
from cepo.files import Row, content_hash
from cepo.fusion.settings import check_settings
from cepo.train.config import TESTBED
from cepo.train.pair_encoding import PairEncoder
from cepo.train.recipe import source_and_options
from cepo.train.rows import PAIR, given, read_flag, read_id, read_pair, read_tie
from cepo.train.source import collect_rows

LeftOut = tuple[str, str]
"""The id of a pair (of an unreadable row, its number), and why it is left out."""


@dataclass(frozen=True)
class PairSplit:
    """Pairs to train on and to test on, which share no source prompt, and the pairs left out of both.

    Attributes:
        train: pairs in the order of the source.
        test: likewise.
        left_out: rows that cannot be read, and pairs that are not kept.
    """

    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as token ids, and those that could not be encoded.

    Attributes:
        rows: `chosen_ids` and `rejected_ids` (int32) and `tie` of each pair, see `PairEncoder.encode`.
        left_out: pairs that are too long, or whose texts are equal after encoding.
    """

    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the rows, in their order."""
        texts = (f"{row['chosen_ids'].tolist()} {row['rejected_ids'].tolist()} {row['tie']}" for row in self.rows)
        return content_hash([content_hash(text) for text in texts])


def load_pairs(settings: Mapping[str, Any], *, seed: int) -> PairSplit:
    """Return the pairs that a recipe's `data` describes.

    A row needs prompt, chosen and rejected, see `read_pair`. Four other columns of `Pair` are read as well: `tie`,
    `split` (made before synthesis), `kept` and its `reason`. Rows without a split are assigned to a side by their
    prompt.

    Args:
        settings: `source`: a file, a folder or a hub data set (see `open_source`), or "testbed". For rows also split
            (of a hub data set), test_fraction, limit and columns (what the source calls prompt, chosen or rejected);
            for the testbed count, cue_agreement, kinds, ties and test_fraction, see `make_pairs`.
        seed: seed of the split and of the testbed.

    Raises:
        ValueError: as `check_pairs`, or for data without a usable pair.
    """
    check_pairs(settings)
    source, options = source_and_options(settings)
    load: Callable[..., tuple[list[Pair], list[LeftOut]]] = _made if source == TESTBED else _read
    pairs, unreadable = load(source, seed=seed, **options)
    kept = [pair for pair in pairs if pair.kept]
    dropped = [(pair.id, f"not kept: {pair.reason}") for pair in pairs if not pair.kept]
    train, test = (tuple(pair for pair in kept if pair.split == side) for side in ("train", "test"))
    if not train:
        raise ValueError(f"data.source {source} leaves no pair to train on: {told(unreadable + dropped) or 'all test'}")
    return PairSplit(train, test, tuple(unreadable + dropped))


def check_pairs(settings: Any) -> None:
    """Raise ValueError for settings of `load_pairs` that do not exist, or of the wrong type or out of range."""
    source, options = source_and_options(settings)
    taker = _made if source == TESTBED else _read
    check_settings("data", options, taker, but=("source", "seed"), others=("source",))
    fraction = options.get("test_fraction", 0.0)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"data.test_fraction is {fraction}; expected a fraction in [0, 1]")


def encode_pairs(pairs: Sequence[Pair], encoder: PairEncoder) -> EncodedPairs:
    """Return the pairs as token ids, and those that cannot be encoded with the reason."""
    rows, left_out = [], []
    for pair in pairs:
        try:
            chosen, rejected = encoder.encode(pair.prompt, pair.chosen, pair.rejected)
        except ValueError as reason:
            left_out.append((pair.id, str(reason)))
        else:
            chosen_T, rejected_T = np.array(chosen, dtype=np.int32), np.array(rejected, dtype=np.int32)
            rows.append({"chosen_ids": chosen_T, "rejected_ids": rejected_T, "tie": pair.tie})
    return EncodedPairs(tuple(rows), tuple(left_out))


def told(left_out: Sequence[LeftOut]) -> str:
    """Return how many pairs were left out for each kind of reason, which is the part before its colon."""
    kinds = Counter(reason.partition(":")[0] for _, reason in left_out)
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())


def _made(
    source: str,
    *,
    seed: int,
    test_fraction: float = 0.0,
    count: int = 300,
    cue_agreement: float = 0.9,
    kinds: Sequence[Rule] = ("original",),
    ties: Ties = "true",
) -> tuple[list[Pair], list[LeftOut]]:
    """Return the testbed's pairs, and nothing left out."""
    from cepo.train.reward_testbed import WORDS, generate_sources  # imports torch, which the checks do not wait for

    sources = generate_sources(count, seed=seed, cue_agreement=cue_agreement)
    return list(make_pairs(sources, WORDS, kinds=kinds, seed=seed, ties=ties, test_fraction=test_fraction)), []


def _read(
    source: str,
    *,
    seed: int,
    test_fraction: float = 0.02,
    split: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[list[Pair], list[LeftOut]]:
    """Return the pairs of a file or a data set, and the rows that cannot be read."""
    names = PAIR | dict(columns or {})
    if len(names) > len(PAIR):
        raise ValueError(f"data.columns renames {', '.join(names)}; expected only {', '.join(PAIR)}")

    def convert(row: Row, _: str) -> Pair:
        prompt, chosen, rejected = read_pair(row, names)
        identity = read_id(row)
        return Pair(
            content_hash(prompt, chosen, rejected) if identity is None else str(identity),
            prompt,
            chosen,
            rejected,
            tie=read_tie(row, ties=True),
            split=given(row, "split") or side_of(prompt, test_fraction, seed),
            kept=read_flag(row, "kept", default=True),
            reason=given(row, "reason"),
        )

    pairs, skipped = collect_rows(source, convert, split=split, limit=limit, renames=() if columns else tuple(PAIR))
    return pairs, [(f"row {number}", reason) for number, reason in skipped]
