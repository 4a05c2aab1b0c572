"""Effects of transformations: accuracies before and after on the same pairs, and those of simple rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from cepo.eval.statistics import AT_LEAST_0, DIFFERENCE, Estimate, estimate, mean_difference, proportion, ratio

ORIGINAL = "original"
"""Name of the untransformed pairs, where the others have the name of a transformation."""
ALL = "all"
"""Name of the effect over all transformations."""
BeforeAfter: TypeAlias = tuple[Mapping[str, Any], Mapping[str, Any]]
"""The records of an original and of its transformed pair."""


@dataclass(frozen=True)
class TransformationEffect:
    """The effect of a transformation on the pairs that it applies to, except those with a failed judgement.

    Attributes:
        pairs: number of pairs.
        before: accuracy on the originals of these pairs; ties and verdicts that cannot be read count as wrong.
        after: accuracy on the transformed pairs.
        drop: before - after, paired.
        ratio: after / before; NaN if before is 0.
        changed: share of the pairs whose verdict (A, B, tie, unreadable) changed.
        unreadable_before: share of the originals whose verdict cannot be read.
        unreadable_after: share of the transformed pairs whose verdict cannot be read.
        forced_before: share of the originals whose scores were forced, since the judge gave none.
        forced_after: share of the transformed pairs whose scores were forced.
    """

    pairs: int
    before: Estimate
    after: Estimate
    drop: Estimate
    ratio: Estimate
    changed: Estimate
    unreadable_before: float
    unreadable_after: float
    forced_before: float
    forced_after: float


def compare(records: Sequence[Mapping[str, Any]]) -> dict[str, TransformationEffect]:
    """Compare the verdicts on transformed pairs with those on their originals.

    Args:
        records: with row, question, transformation (or ORIGINAL), label, winner, forced and error; one original for
            every row.

    Returns:
        The effect of each transformation in order of first appearance, and that of all together under `ALL`. The
        confidence intervals are clustered by question.
    """
    by_name = paired(records)
    effects = {name: _effect(pairs) for name, pairs in by_name.items()}
    if by_name:
        effects[ALL] = _effect([pair for pairs in by_name.values() for pair in pairs])
    return effects


def paired(records: Sequence[Mapping[str, Any]]) -> dict[str, list[BeforeAfter]]:
    """Return the (original, transformed) records by transformation, except those with a failed judgement."""
    originals = {record["row"]: record for record in records if record["transformation"] == ORIGINAL}
    found: dict[str, list[BeforeAfter]] = {}
    for record in records:
        before = originals[record["row"]]
        if record["transformation"] != ORIGINAL and record["error"] is None and before["error"] is None:
            found.setdefault(record["transformation"], []).append((before, record))
    return found


def worst_case(records: Sequence[Mapping[str, Any]]) -> tuple[Estimate, Estimate]:
    """Return the accuracy on the originals, and the rate of being right on an original and all its transformations.

    Both are over the pairs that some transformation applies to and that have no failed judgement.

    Args:
        records: as for `compare`.
    """
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_row.setdefault(record["row"], []).append(record)
    complete = [
        group for group in by_row.values() if len(group) > 1 and all(record["error"] is None for record in group)
    ]
    originals = [is_right(record) for group in complete for record in group if record["transformation"] == ORIGINAL]
    of_prompts: dict[str, Any] = {"clusters": [group[0]["question"] for group in complete], "unit": "question"}
    return proportion(originals, **of_prompts), proportion(
        [min(map(is_right, group)) for group in complete], **of_prompts
    )


def follow_rules(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Estimate, Estimate]]:
    """Return the accuracies of simple rules on the originals and on the transformed pairs.

    The rules are: the judge with ties as half, always the longer response, always the shorter one, and the judge on
    the pairs whose better response is the longer, or the shorter, one. An original counts once per transformation.

    Args:
        records: as for `compare`, with `longer`: length of the better response minus that of the other, in characters.
    """
    pairs = [pair for of_name in paired(records).values() for pair in of_name]

    def over(rule: Callable[[Mapping[str, Any]], float], kept: Callable[[int], bool]) -> tuple[Estimate, Estimate]:
        found = []
        for place in (0, 1):
            chosen = [pair[place] for pair in pairs if kept(pair[0]["longer"])]
            clusters = [record["question"] for record in chosen]
            found.append(proportion([rule(record) for record in chosen], clusters=clusters, unit="question"))
        return found[0], found[1]

    return {
        "right, ties as half": over(
            lambda record: 0.5 if record["winner"] == "tie" else is_right(record), lambda _: True
        ),
        "the longer response wins": over(lambda record: _step(record["longer"]), lambda _: True),
        "the shorter response wins": over(lambda record: _step(-record["longer"]), lambda _: True),
        "right where the better response is longer": over(is_right, lambda longer: longer > 0),
        "right where the better response is shorter": over(is_right, lambda longer: longer < 0),
    }


def _step(difference: float) -> float:
    """Return 1 if a difference is above 0, 1/2 if it is 0, else 0."""
    return (difference > 0) + 0.5 * (difference == 0)


def _effect(pairs: Sequence[BeforeAfter]) -> TransformationEffect:
    before, after, turned = np.array(
        [(is_right(one), is_right(other), float(one["winner"] != other["winner"])) for one, other in pairs]
    ).T
    of_prompts: dict[str, Any] = {"clusters": [original["question"] for original, _ in pairs], "unit": "question"}
    return TransformationEffect(
        len(pairs),
        proportion(before, **of_prompts),
        proportion(after, **of_prompts),
        estimate(mean_difference, before, after, ends=DIFFERENCE, **of_prompts),
        estimate(ratio, after, before, within=AT_LEAST_0, lacking="nothing is right before", **of_prompts),
        proportion(turned, **of_prompts),
        *(float(np.mean([pair[place]["winner"] is None for pair in pairs])) for place in (0, 1)),
        *(float(np.mean([pair[place]["forced"] for pair in pairs])) for place in (0, 1)),
    )


def is_right(record: Mapping[str, Any]) -> float:
    """Return 1.0 if a record's verdict is right, else 0.0."""
    return float(record["winner"] == record["label"])
