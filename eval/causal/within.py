"""Agreement within prompts: areas under the ROC curve and rank correlations.

GRPO compares completions of one prompt, so only that comparison counts. An estimate is a ratio of sums over prompts,
which are the units of its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.stats import rankdata

from cepo.eval.rank_statistics import rank_correlations
from cepo.eval.statistics import DIFFERENCE, SHARE, Estimate, estimates, ratio, undetermined

_CONSTANT = "the score or the truth is the same everywhere"
_NO_PAIR = undetermined("no prompt has completions both with evidence and without")


def areas_within(values_NM: np.ndarray, positive_N: np.ndarray, prompts: Sequence[int]) -> list[Estimate]:
    """Return the probability that the positive of a prompt has a larger value than a negative of that prompt.

    Every pair of a positive and a negative of one prompt has the same weight; ties count half.

    Args:
        values_NM: M scores of N completions.
        positive_N: 1 for a positive, 0 for a negative, NaN for neither.
        prompts: the prompt of each completion.

    Returns:
        One estimate per score, with the number of pairs as its count; undetermined if no prompt has a pair.
    """
    wins, pairs = _wins(values_NM, positive_N, _members(prompts))
    if not pairs:
        return [_NO_PAIR] * values_NM.shape[1]
    wins_PM = np.stack(wins)
    pairs_PM = np.repeat(np.array(pairs)[:, None], wins_PM.shape[1], axis=1)
    found = estimates(ratio, wins_PM, pairs_PM, ends=SHARE, unit="prompt with a pair")
    return [replace(one, count=int(sum(pairs))) for one in found]


def areas_by_chance(
    values_NM: np.ndarray, positive_N: np.ndarray, prompts: Sequence[int], *, deals: int, seed: int
) -> list[Estimate]:
    """Return the areas of `areas_within` with the labels shuffled within each prompt.

    Args:
        values_NM: M scores of N completions.
        positive_N: as in `areas_within`.
        prompts: the prompt of each completion.
        deals: number of shuffles, at least 1.
        seed: seed of the shuffles.

    Returns:
        For each score the mean over shuffles, near 0.5, and the range of 95% of them, which chance alone reaches.
    """
    rng = np.random.default_rng(seed)
    members = _members(prompts)
    areas = []
    for _ in range(deals):
        dealt_N = positive_N.copy()
        for places in members:
            dealt_N[places] = rng.permutation(positive_N[places])
        wins, pairs = _wins(values_NM, dealt_N, members)
        if not pairs:
            return [_NO_PAIR] * values_NM.shape[1]
        areas.append(np.sum(wins, axis=0) / sum(pairs))
    low_M, high_M = np.quantile(areas, [0.025, 0.975], axis=0)
    return [
        Estimate(float(value), float(low), float(high), int(sum(pairs)))
        for value, low, high in zip(np.mean(areas, axis=0), low_M, high_M, strict=True)
    ]


def correlations_within(values_NM: np.ndarray, truth_N: np.ndarray, prompts: Sequence[int]) -> list[Estimate]:
    """Return the rank correlation of each score with the truth within prompts, pooled.

    Ranks are taken within each prompt. The correlation is the sum over prompts of their covariances, divided by the
    root of the product of the summed variances. A prompt in which a score is constant adds only to the truth's
    variance, so a score that distinguishes nothing is near 0. If every prompt has one completion, ranks are over all
    rows.

    Args:
        values_NM: M scores of N completions.
        truth_N: the truth, finite.
        prompts: the prompt of each completion.

    Returns:
        One estimate per score, with the number of compared completions as its count.
    """
    groups = [members for members in _members(prompts) if len(members) > 1]
    if not groups:
        if len(truth_N) < 3:
            return [undetermined(f"{len(truth_N)} judgements have no order to compare")] * values_NM.shape[1]
        return estimates(rank_correlations, values_NM, truth_N, ends=DIFFERENCE, unit="judgement", lacking=_CONSTANT)
    sums = []
    for members in groups:
        ranks_NM = rankdata(values_NM[members], axis=0) - (len(members) + 1) / 2
        ranks_N = rankdata(truth_N[members]) - (len(members) + 1) / 2
        variances_M = (ranks_NM**2).sum(0)
        sums.append(np.stack([ranks_N @ ranks_NM, variances_M, np.full(len(variances_M), (ranks_N**2).sum())]))
    columns = np.stack(sums)
    found = estimates(
        *(_correlation, columns[:, 0], columns[:, 1], columns[:, 2]), ends=DIFFERENCE, unit="prompt", lacking=_CONSTANT
    )
    return [replace(one, count=sum(map(len, groups))) for one in found]


def _wins(
    values_NM: np.ndarray, positive_N: np.ndarray, members: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[float]]:
    """Return, for each prompt with a pair, the number of pairs that each score orders correctly, and of all pairs."""
    wins, pairs = [], []
    for places in members:
        positives_PM = values_NM[places[positive_N[places] == 1.0]]
        negatives_QM = values_NM[places[positive_N[places] == 0.0]]
        count = len(positives_PM) * len(negatives_QM)
        if count:
            differences_PQM = np.sign(positives_PM[:, None] - negatives_QM[None])
            wins.append((0.5 + 0.5 * differences_PQM).sum((0, 1)))
            pairs.append(float(count))
    return wins, pairs


def _members(prompts: Sequence[int]) -> list[np.ndarray]:
    """Return the indices of each prompt's completions."""
    prompts_N = np.asarray(prompts)
    return [np.flatnonzero(prompts_N == prompt) for prompt in dict.fromkeys(prompts)]


def _correlation(
    products_PM: np.ndarray, variances_PM: np.ndarray, truths_PM: np.ndarray, weights_BP: np.ndarray
) -> np.ndarray:
    squares_BM = (weights_BP @ variances_PM) * (weights_BP @ truths_PM)
    found: np.ndarray = (weights_BP @ products_PM) / np.sqrt(np.where(squares_BM > 0.0, squares_BM, np.nan))
    return found
