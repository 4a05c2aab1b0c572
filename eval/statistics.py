"""Estimates with bootstrap intervals: means, rank correlations, areas under the ROC curve.

A statistic is a function of columns and of weights (B, N): how often each of the N observations counts in each of B
samples. It returns B values, or B arrays of values. The bootstrap's weights are how often each observation was drawn,
so all resamples of a batch are computed at once and none is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, permutation_test
from scipy.stats import t as student_t

DRAWS = 1000
LEVEL = 0.95
_FEW = 30
_BATCH_NUMBERS = 2**22  # weights times columns held at once, which bounds memory


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample, with its percentile bootstrap interval.

    Attributes:
        value: the statistic; NaN where the sample does not determine it (a correlation with a constant, say).
        low: lower end of the interval; NaN where no resample determines it, or where there is one cluster.
        high: upper end.
        count: number of observations, not of clusters.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def interval(self) -> str:
        """The interval in words, or "none"."""
        return "none" if math.isnan(self.low) else f"{self.low:.3f} to {self.high:.3f}"

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undetermined"
        return f"{self.value:.3f}" + ("" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


UNDETERMINED = Estimate(math.nan, math.nan, math.nan, 0)
"""The estimate from no observations."""


def estimate(
    statistic: Callable[..., np.ndarray],
    *columns: ArrayLike,
    clusters: ArrayLike | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Return one statistic with its percentile bootstrap interval: `estimates` for columns of one number each.

    Args:
        statistic: of the columns and weights (B, N); returns B values, NaN where they are not determined.
        columns: N numbers each, at least one column.
        clusters: see `estimates`.
        draws: number of resamples, at least 1.
        level: of the interval, within (0, 1).
        seed: of the resamples.

    Raises:
        ValueError: for columns of different lengths, no columns, empty ones, or a number out of range.
    """
    shapes = [np.shape(column) for column in columns]
    if any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"columns have the shapes {shapes}; expected one dimension each")
    return estimates(statistic, *columns, clusters=clusters, draws=draws, level=level, seed=seed)[0]


def estimates(
    statistic: Callable[..., np.ndarray],
    *columns: ArrayLike,
    clusters: ArrayLike | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> list[Estimate]:
    """Return many statistics of one sample with their percentile bootstrap intervals, all from the same resamples.

    Args:
        statistic: of the columns and weights (B, N); returns (B, ...), NaN where an entry is not determined. Resamples
            that do not determine an entry are left out of its interval.
        columns: N rows each, (N,) or (N, M), at least one column.
        clusters: N labels; observations with the same label are drawn together, such as the rollouts of a prompt. None:
            each observation is drawn on its own.
        draws: number of resamples, at least 1.
        level: of the interval, within (0, 1).
        seed: of the resamples.

    Returns:
        One estimate for each entry of the statistic, in the order of its flattened array.

    Raises:
        ValueError: for columns of different lengths, no columns, empty ones, or a number out of range.

    Source:
        Efron and Tibshirani, An introduction to the bootstrap (1993), chapter 13 (percentile intervals).
    """
    arrays = [np.asarray(column, dtype=float) for column in columns]
    if not arrays or not len(arrays[0]) or any(len(array) != len(arrays[0]) for array in arrays):
        raise ValueError(f"columns have the shapes {[array.shape for array in arrays]}; expected equal lengths above 0")
    if draws < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"draws is {draws}, level {level}; expected at least 1, and within (0, 1)")
    count = len(arrays[0])
    labels_N = np.arange(count) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    if labels_N.shape != (count,):
        raise ValueError(f"clusters has the shape {labels_N.shape} for {count} observations; expected one label each")
    values = np.ravel(statistic(*arrays, np.ones((1, count))))
    groups = int(labels_N.max()) + 1
    if groups == 1:
        return [Estimate(float(value), math.nan, math.nan, count) for value in values]
    rng = np.random.default_rng(seed)
    batch = max(1, _BATCH_NUMBERS // sum(array.size for array in arrays))
    drawn = []
    for start in range(0, draws, batch):
        size = min(batch, draws - start)
        chosen_BG = rng.integers(groups, size=(size, groups)) + groups * np.arange(size)[:, None]
        counts_BG = np.bincount(chosen_BG.ravel(), minlength=size * groups).reshape(size, groups)
        drawn.append(np.reshape(statistic(*arrays, counts_BG[:, labels_N].astype(float)), (size, -1)))
    tail = (1.0 - level) / 2.0
    found = []
    for value, of_draws in zip(values, np.concatenate(drawn).T, strict=True):
        sound = of_draws[np.isfinite(of_draws)]
        low, high = np.quantile(sound, [tail, 1.0 - tail]) if len(sound) else (math.nan, math.nan)
        found.append(Estimate(float(value), float(low), float(high), count))
    return found


def proportion(values: ArrayLike) -> Estimate:
    """Return the mean of numbers in [0, 1], such as verdicts that are right or wrong, with its interval.

    No numbers give UNDETERMINED.
    """
    count = len(np.asarray(values))
    return widened(estimate(mean, values), count) if count else UNDETERMINED


def mean_of_few(values: ArrayLike) -> Estimate:
    """Return the mean of a few independent numbers, such as one per seed, with its Student t interval at LEVEL.

    From five numbers a percentile bootstrap is too narrow. One number has no interval, none give UNDETERMINED.

    Source:
        Student, The probable error of a mean (1908).
    """
    values_N = np.asarray(values, dtype=float)
    count = len(values_N)
    if not count:
        return UNDETERMINED
    middle = float(values_N.mean())
    if count == 1:
        return Estimate(middle, math.nan, math.nan, 1)
    error = float(values_N.std(ddof=1)) / math.sqrt(count)
    reach = error * float(student_t.ppf((1.0 + LEVEL) / 2.0, count - 1))
    return Estimate(middle, middle - reach, middle + reach, count)


def sign_flip_p(differences: ArrayLike) -> float:
    """Return the two-sided p-value of paired differences under flips of their signs; NaN for none.

    The probability that a mean at least as far from 0 comes about where each difference is as likely to have either
    sign: of all sign patterns up to 13 differences, of 10,000 drawn ones beyond that. With n differences it is at least
    2 / 2^n.

    Source:
        Fisher, The design of experiments (1935), section 21.
    """
    values_N = np.asarray(differences, dtype=float)
    if len(values_N) < 2:
        return 1.0 if len(values_N) else math.nan
    return float(permutation_test((values_N,), np.mean, permutation_type="samples", n_resamples=9999, rng=0).pvalue)


def widened(found: Estimate, independent: int, *, ends: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """Return a mean whose interval has a width even where all observations are at one end of their range.

    A bootstrap of ten right verdicts out of ten says [1, 1]. Wilson's interval, which replaces it there, says
    [0.72, 1]. Elsewhere the estimate is returned unchanged.

    Args:
        found: a mean of observations within `ends`, with the interval of `estimate` at the usual level.
        independent: number of observations, or of their clusters, at least 1.
        ends: the smallest and the largest value that an observation can have.

    Source:
        Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    low, high = ends
    if found.value not in ends or found.low < found.high:
        return found
    wilson = binomtest(independent if found.value == high else 0, independent).proportion_ci(LEVEL, method="wilson")
    return replace(found, low=low + (high - low) * float(wilson.low), high=low + (high - low) * float(wilson.high))


def warning_of_few(count: int, what: str) -> list[str]:
    """Return a paragraph for a page whose intervals rest on few independent observations, else nothing."""
    if count >= _FEW:
        return []
    return [
        f"Only {count} {what}: bootstrap intervals from fewer than {_FEW} are too narrow. Treat this as a first look."
    ]


def mean(values: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the means (B,) of values (N,), or (B, M) of values (N, M)."""
    totals_B = weights_BN.sum(1)
    means: np.ndarray = weights_BN @ values / totals_B.reshape(-1, *[1] * (values.ndim - 1))
    return means


def mean_difference(values: np.ndarray, others: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the means of the paired differences, values - others."""
    return mean(values - others, weights_BN)


def spearman(values_N: ArrayLike, others_N: ArrayLike) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; NaN where a column is constant."""
    values, others = np.asarray(values_N, dtype=float), np.asarray(others_N, dtype=float)
    return float(rank_correlations(values, others, np.ones((1, len(values)))).item())


def rank_correlations(values: np.ndarray, others: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation of each column with each of the others, in each of B samples.

    Copies of an observation share their mean rank, as ties do: this is the correlation of the sample written out.

    Args:
        values: (N,) or (N, M).
        others: (N,) or (N, K).
        weights_BN: how often each observation counts.

    Returns:
        (B, M, K), M or K being 1 for a single column; NaN where a column is constant.
    """
    units = [_unit_ranks(columns.reshape(len(columns), -1), weights_BN) for columns in (values, others)]
    found: np.ndarray = units[0] @ units[1].transpose(0, 2, 1)
    return found


def aucs(values: np.ndarray, positive_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the probability that a positive has a larger value than a negative, ties counted half.

    Args:
        values: the scores, (N,) or (N, M).
        positive_N: above 0.5 where the observation is a positive.
        weights_BN: how often each observation counts.

    Returns:
        (B, M) areas under the ROC curve, in [0, 1]; NaN where a sample lacks one of the classes.
    """
    ranks_BMN = _ranks(values.reshape(len(values), -1), weights_BN)
    chosen_BN = weights_BN * (positive_N > 0.5)
    positives_B1 = chosen_BN.sum(1, keepdims=True)
    pairs_B1 = positives_B1 * (weights_BN.sum(1, keepdims=True) - positives_B1)
    wins_BM = (ranks_BMN * chosen_BN[:, None]).sum(-1) - positives_B1 * (positives_B1 + 1) / 2
    found: np.ndarray = wins_BM / np.where(pairs_B1 > 0.0, pairs_B1, np.nan)
    return found


def _unit_ranks(columns_NM: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the ranks (B, M, N), centred, weighted and of length 1; NaN where a column is constant."""
    ranks_BMN = _ranks(columns_NM, weights_BN)
    # Ranks of a sample of n have the mean (n + 1) / 2, whatever its ties.
    centred_BMN = ranks_BMN - (weights_BN.sum(1)[:, None, None] + 1.0) / 2.0
    weighted_BMN = centred_BMN * np.sqrt(weights_BN)[:, None]
    length_BM1 = np.linalg.norm(weighted_BMN, axis=-1, keepdims=True)
    scaled: np.ndarray = weighted_BMN / np.where(length_BM1 > 0.0, length_BM1, np.nan)
    return scaled


def _ranks(columns_NM: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the ranks (B, M, N) of each column's values in each sample written out, from 1, ties at their mean."""
    ranks_BMN = np.empty((len(weights_BN), columns_NM.shape[1], len(columns_NM)))
    for at, values_N in enumerate(columns_NM.T):
        order_N = np.argsort(values_N, kind="stable")
        _, starts, tie_N = np.unique(values_N[order_N], return_index=True, return_inverse=True)
        counts_BU = np.add.reduceat(weights_BN[:, order_N], starts, axis=1)
        ranks_BMN[:, at, order_N] = (counts_BU.cumsum(1) - counts_BU / 2.0 + 0.5)[:, tie_N]
    return ranks_BMN
