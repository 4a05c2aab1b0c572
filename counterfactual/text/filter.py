"""The filter: pairs that a baseline reward model already gets right teach nothing and are dropped.

With p = sigma(D), D the reward of the chosen response minus that of the rejected one, a preference stays if p < 1 - tau
and a tie if |p - 0.5| > tau.

Source: Srivastava et al., Robust Reward Modeling via Causal Rubrics (arXiv 2506.16507), with tau = 0.2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

from cepo.counterfactual.text.pairs import ORIGINAL, Pair

TAU = 0.2
Difference: TypeAlias = Callable[[Sequence[Pair]], Sequence[float]]
"""Any reward model: D of each pair; NaN for a pair that it cannot read, such as one that is too long."""


def filter_pairs(pairs: Iterable[Pair], difference: Difference, *, at_once: int = 256) -> Iterator[Pair]:
    """Yield the pairs with their `base_difference`; those that the baseline gets right are not kept.

    Pairs that are not kept already are not scored. Of the others, originals stay, since they were not synthesised, and
    so do pairs of the test side, since a test set chosen by the baseline would favour whatever differs from it; a pair
    that the baseline cannot read stays, without a difference.

    Args:
        pairs: in any order, which they keep.
        difference: of the baseline model.
        at_once: pairs that are scored together.
    """
    waiting = iter(pairs)
    while batch := list(itertools.islice(waiting, at_once)):
        to_score = [pair for pair in batch if pair.kept]
        found = dict(zip([pair.id for pair in to_score], difference(to_score), strict=True)) if to_score else {}
        yield from (_filtered(pair, found.get(pair.id, math.nan)) for pair in batch)


def certainty(difference: float) -> float:
    """Return p = sigma(D), how surely a reward model prefers the chosen response, in [0, 1]."""
    return (1 + math.tanh(difference / 2)) / 2


def _filtered(pair: Pair, difference: float) -> Pair:
    if math.isnan(difference):
        return pair
    pair, p = replace(pair, base_difference=difference), certainty(difference)
    teaches = abs(p - 0.5) > TAU if pair.tie else p < 1 - TAU
    if teaches or pair.kind == ORIGINAL or pair.split == "test":
        return pair
    return replace(pair, kept=False, reason=f"baseline is right: p is {p:.2f}")
