"""Drop pairs that a baseline reward model already gets right, from which nothing is learned.

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
    """Yield the pairs with their `base_difference`; those that the baseline gets right are marked as not kept.

    Pairs that are already not kept are not scored. Originals stay, since they were not synthesised. So do pairs of the
    test side, since a test set that the baseline chose would favour models that differ from it. A pair that the
    baseline cannot read stays, without a difference.

    Args:
        pairs: in any order, which is preserved.
        difference: gives D of each pair by the baseline model.
        at_once: number of pairs that are scored together.
    """
    waiting = iter(pairs)
    while batch := list(itertools.islice(waiting, at_once)):
        places = [place for place, pair in enumerate(batch) if pair.kept]
        found = dict(zip(places, difference([batch[place] for place in places]), strict=True)) if places else {}
        yield from (_filtered(pair, found.get(place, math.nan)) for place, pair in enumerate(batch))


def certainty(difference: float) -> float:
    """Return p = sigma(D), a reward model's probability that the chosen response is better, in [0, 1]."""
    return (1 + math.tanh(difference / 2)) / 2


def _filtered(pair: Pair, difference: float) -> Pair:
    if math.isnan(difference):
        return pair
    pair, p = replace(pair, base_difference=difference), certainty(difference)
    teaches = abs(p - 0.5) > TAU if pair.tie else p < 1 - TAU
    if teaches or pair.kind == ORIGINAL or pair.split == "test":
        return pair
    return replace(pair, kept=False, reason=f"baseline is right: p is {p:.2f}")
