"""Pairs of responses for reward models: the record, which is one row of JSON, and the split of prompts."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from cepo.files import Row

Split = Literal["train", "test"]
ORIGINAL = "original"
"""Kind of a pair that was not edited."""
MECHANICAL = "mechanical"
"""Generator of the pairs that are made by rules."""


@dataclass(frozen=True)
class Source:
    """A preference from which pairs are made.

    Attributes:
        id: id of the preference.
        prompt: the prompt.
        chosen: the better response; if the cause is known, it holds the cause's positive word.
        rejected: the other response; if the cause is known, it holds the negative word.
        cause: the attribute that decides under the prompt; empty if unknown, as for real text.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    cause: str = ""


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt: the chosen one is better, or the pair is a tie.

    Attributes:
        id: id of the pair, unique in its file.
        prompt: the prompt.
        chosen: the better response; in a tie, either.
        rejected: the other response.
        tie: whether neither is better.
        kind: how the pair was made: original, or the name of a kind, such as degrade or irrelevant.
        split: the side of its source prompt, decided before any pairs are made; None without a split.
        attribute: what was edited, such as accuracy; None if nothing was.
        attribute_words: texts that show the attribute in either response; None if the kind does not know them.
        weight: weight of the attribute among those of its prompt, in [0, 1]; None without an attribute.
        direction: "down" if the rejected response is an edit of the chosen one, "up" for the reverse; else None.
        source_ids: ids of the preferences that it was made from; empty for an original.
        generator: what made it: mechanical, or a model's name; None for an original.
        checks: the result of each check, by name.
        base_difference: reward of chosen minus that of rejected by a filter's baseline model; None if not filtered.
        kept: whether to train on it.
        reason: why it is not kept; None if it is.

    Raises:
        ValueError: if `tie` or `kept` is not a bool, for an unknown split, or if a pair is not kept without a reason.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    tie: bool = False
    kind: str = ORIGINAL
    split: Split | None = None
    attribute: str | None = None
    attribute_words: tuple[str, ...] | None = None
    weight: float | None = None
    direction: Literal["down", "up"] | None = None
    source_ids: tuple[str, ...] = ()
    generator: str | None = None
    checks: Mapping[str, bool] = field(default_factory=dict)
    base_difference: float | None = None
    kept: bool = True
    reason: str | None = None

    def __post_init__(self) -> None:
        for name in ("tie", "kept"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected true or false")
        if self.split not in ("train", "test", None):
            raise ValueError(f"split is {self.split!r}; expected train or test")
        if not self.kept and not self.reason:
            raise ValueError(f"pair {self.id!r} is not kept, without a reason")

    def row(self) -> Row:
        """Return the pair as a row of JSON, with every field."""
        return asdict(self)


def side_of(prompt: str, test_fraction: float, seed: int) -> Split:
    """Return the side of a prompt, the same for all prompts that differ only in case and white space.

    Args:
        prompt: any text.
        test_fraction: expected share of the prompts on the test side, in [0, 1].
        seed: seed of the split.
    """
    return "test" if digest("split", seed, same_prompt(prompt)) < int(test_fraction * 2**64) else "train"


def same_prompt(prompt: str) -> str:
    """Return a normal form of a prompt, the same for all prompts that differ only in case and white space."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def distinct(name: str, given: Counter[str]) -> str:
    """Return a name as it is if it was not given before, else with a number ("x#2"), and count it as given."""
    found = name
    while found in given:
        given[name] += 1
        found = f"{name}#{given[name]}"
    given[found] = 1
    return found


def digest(*parts: str | int) -> int:
    """Hash the parts to 64 bits, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest())
