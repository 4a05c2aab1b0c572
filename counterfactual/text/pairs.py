"""Pairs of responses for reward models: one record, one row of JSON, and the side of the split a prompt falls to."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from cepo.files import Row

Split = Literal["train", "test"]
ORIGINAL = "original"
"""Kind of a pair that nobody edited."""
MECHANICAL = "mechanical"
"""Generator of the pairs that rules make."""


@dataclass(frozen=True)
class Source:
    """A preference to make pairs of.

    Attributes:
        id: of the pair.
        prompt: what was asked.
        chosen: the better response; shows the cause, where it is known, by its positive word.
        rejected: the other; shows it by the negative word.
        cause: the attribute that decides under the prompt; empty where unknown, as on real text.
    """

    id: str
    prompt: str
    chosen: str
    rejected: str
    cause: str = ""


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, of which the chosen one is better, or neither is.

    Attributes:
        id: of the pair, unique in its file.
        prompt: what was asked.
        chosen: the better response; of a tie, either.
        rejected: the other response.
        tie: whether neither is better.
        kind: how the pair was made: original, or the name of a kind, such as degrade or irrelevant.
        split: the side of its source prompt, decided before anything was made of it; None where nothing was split.
        attribute: what was edited, such as accuracy; None where nothing was.
        attribute_words: texts that show the attribute in either response; None where the kind does not know them.
        weight: of the attribute among those of its prompt, in [0, 1]; None without an attribute.
        direction: "down" where the rejected response is an edit of the chosen, "up" for the reverse; None for others.
        source_ids: ids of the pairs that it was made of; empty for an original.
        generator: what made it, such as mechanical, or a model's name; None for an original.
        checks: what was checked, and what came out.
        base_difference: reward of chosen minus that of rejected by the baseline model of a filter; None before one.
        kept: whether to train on it.
        reason: why not, where it is not kept.

    Raises:
        ValueError: for a tie or kept that is not true or false, another split, or a pair dropped without a reason.
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
    """Return the side of a prompt, the same for all prompts that differ in case and white space alone.

    Args:
        prompt: any text.
        test_fraction: share of the prompts that goes to the test side, in [0, 1], in expectation.
        seed: of the split.
    """
    return "test" if digest("split", seed, same_prompt(prompt)) < int(test_fraction * 2**64) else "train"


def same_prompt(prompt: str) -> str:
    """Return what all prompts that differ in case and white space alone have in common."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def digest(*parts: str | int) -> int:
    """Hash the parts to 64 bits, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest())
