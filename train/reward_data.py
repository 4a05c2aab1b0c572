"""The pairs that a reward model is trained on: rows of a file or a hub data set, or the testbed's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cepo.counterfactual.text.mechanical import make_pairs
from cepo.counterfactual.text.pairs import ORIGINAL, Pair, side_of
from cepo.files import Row, content_hash
from cepo.train.pair_encoding import PairEncoder
from cepo.train.policy import TESTBED, source_and_options
from cepo.train.reward_testbed import WORDS, generate_sources
from cepo.train.rows import PAIR, given, read_flag, read_id, read_pair, read_tie
from cepo.train.source import collect_rows

LeftOut = tuple[str, str]
"""The id of a pair (of an unreadable row, its number), and why it is left out."""


@dataclass(frozen=True)
class PairSplit:
    """Pairs to train on and to test on, which share no source prompt, and what is left out of both.

    Attributes:
        train: in the order of the source.
        test: likewise.
        left_out: rows that cannot be read and pairs that are not kept.
    """

    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class EncodedPairs:
    """Pairs as token ids, and those that have none.

    Attributes:
        rows: `chosen_ids` and `rejected_ids`, int32, and `tie` of each, see `PairEncoder.encode`.
        left_out: pairs that are too long, or equal after encoding.
    """

    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that identify the rows, in their order."""
        texts = (f"{row['chosen_ids'].tolist()} {row['rejected_ids'].tolist()} {row['tie']}" for row in self.rows)
        return content_hash([content_hash(text) for text in texts])


def load_pairs(settings: Mapping[str, Any], *, seed: int) -> PairSplit:
    """Return the pairs that a recipe's `data` describes.

    A row needs prompt, chosen and rejected, see `read_pair`. Of what else it may carry, four columns of `Pair` are
    read: `tie`, `split` (made before synthesis), `kept` and its `reason`. Rows without a split fall to a side by their
    prompt.

    Args:
        settings: `source`, a file, a folder or a hub data set (see `open_source`), or "testbed". For rows also split
            (of a hub data set), test_fraction, limit and columns (what the source calls prompt, chosen or rejected);
            for the testbed count, cue_agreement, kinds, ties and test_fraction, see `make_pairs`.
        seed: of the split and of the testbed.

    Raises:
        ValueError: for an unknown option, or data without a usable pair.
    """
    source, options = source_and_options(settings)
    known: dict[str, Any] = {"test_fraction": 0.0}
    if source == TESTBED:
        known |= {"count": 300, "cue_agreement": 0.9, "kinds": (ORIGINAL,), "ties": "true"}
    else:
        known |= {"test_fraction": 0.02, "split": None, "limit": None, "columns": None}
    unknown = sorted(set(options) - set(known))
    if unknown:
        of = "the testbed's pairs" if source == TESTBED else "pairs that are read"
        raise ValueError(
            f"data.source is {str(source)!r}, and data holds {', '.join(unknown)}, which {of} do not take; expected "
            f"some of {', '.join(known)}. Recipes for both: train/recipes/reward-model-*.yaml"
        )
    values = {**known, **options}
    if not 0.0 <= values["test_fraction"] <= 1.0:
        raise ValueError(f"data.test_fraction is {values['test_fraction']}; expected a fraction in [0, 1]")
    unreadable: list[LeftOut] = []
    if source == TESTBED:
        sources = generate_sources(values["count"], seed=seed, cue_agreement=values["cue_agreement"])
        rules = {name: values[name] for name in ("kinds", "ties", "test_fraction")}
        pairs = list(make_pairs(sources, WORDS, seed=seed, **rules))
    else:
        pairs, unreadable = _read(str(source), values, seed)
    kept = [pair for pair in pairs if pair.kept]
    dropped = [(pair.id, f"not kept: {pair.reason}") for pair in pairs if not pair.kept]
    train, test = (tuple(pair for pair in kept if pair.split == side) for side in ("train", "test"))
    if not train:
        raise ValueError(f"data.source {source} leaves no pair to train on: {told(unreadable + dropped) or 'all test'}")
    return PairSplit(train, test, tuple(unreadable + dropped))


def encode_pairs(pairs: Sequence[Pair], encoder: PairEncoder) -> EncodedPairs:
    """Return the pairs as token ids; those without are named with the reason."""
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
    """Return how many pairs were left out for each kind of reason; a reason's kind is what precedes its colon."""
    kinds = Counter(reason.partition(":")[0] for _, reason in left_out)
    return ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())


def _read(source: str, values: Mapping[str, Any], seed: int) -> tuple[list[Pair], list[LeftOut]]:
    names = PAIR | dict(values["columns"] or {})
    if len(names) > len(PAIR):
        raise ValueError(f"data.columns renames {', '.join(names)}; expected only {', '.join(PAIR)}")

    def convert(row: Row) -> Pair:
        prompt, chosen, rejected = read_pair(row, names)
        identity = read_id(row)
        return Pair(
            content_hash(prompt, chosen, rejected) if identity is None else str(identity),
            prompt,
            chosen,
            rejected,
            tie=read_tie(row, ties=True),
            split=given(row, "split") or side_of(prompt, values["test_fraction"], seed),
            kept=read_flag(row, "kept", default=True),
            reason=given(row, "reason"),
        )

    pairs, skipped = collect_rows(source, convert, split=values["split"], limit=values["limit"])
    return pairs, [(f"row {number}", reason) for number, reason in skipped]
