"""Estimates with bootstrap intervals: means, rank correlations, areas under the ROC curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, rankdata

DRAWS = 1000
LEVEL = 0.95
_FEW = 30


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample, with its percentile bootstrap interval.

    Attributes:
        value: the statistic; NaN where the sample does not determine it (a correlation with a constant, say).
        low: lower end of the interval; NaN where no resample determines it.
        high: upper end.
        count: observations, not clusters.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "undetermined"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(
    statistic: Callable[..., float],
    *columns: ArrayLike,
    clusters: ArrayLike | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """Return a statistic with its percentile bootstrap interval.

    Args:
        statistic: of the columns, one array (N,) each; NaN where they do not determine it.
        columns: N numbers each, at least one column; a resample takes the same observations from all.
        clusters: N labels; observations with one label are drawn together, such as the rollouts of a prompt. None:
            each on its own.
        draws: resamples, at least 1.
        level: of the interval, within (0, 1).
        seed: of the resamples.

    Raises:
        ValueError: for columns of different lengths, none or empty ones, or a number out of range.

    Source:
        Efron and Tibshirani, An introduction to the bootstrap (1993), chapter 13 (percentile intervals).
    """
    arrays = [np.asarray(column, dtype=float) for column in columns]
    if not arrays or not len(arrays[0]) or any(array.shape != (len(arrays[0]),) for array in arrays):
        shapes = [array.shape for array in arrays]
        raise ValueError(f"columns have the shapes {shapes}; expected one-dimensional ones, equally long, not empty")

    def one(*held: np.ndarray) -> np.ndarray:
        return np.array([statistic(*held)])

    return estimates(one, *arrays, clusters=clusters, draws=draws, level=level, seed=seed)[0]


def estimates(
    statistic: Callable[..., np.ndarray],
    *columns: ArrayLike,
    clusters: ArrayLike | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> list[Estimate]:
    """Return many statistics of one sample with their intervals, all from the same resamples.

    Args:
        statistic: of the columns; an array, NaN where they do not determine an entry.
        columns: N rows each, (N,) or (N, M), at least one column; a resample takes the same observations from all.
        clusters: see `estimate`.
        draws: resamples, at least 1.
        level: of the interval, within (0, 1).
        seed: of the resamples.

    Returns:
        One estimate for each entry of the statistic, in the order of its flattened array.

    Raises:
        ValueError: for columns of different lengths, none or empty ones, or a number out of range.
    """
    arrays = [np.asarray(column, dtype=float) for column in columns]
    if not arrays or not len(arrays[0]) or any(len(array) != len(arrays[0]) for array in arrays):
        raise ValueError(
            f"columns have the shapes {[array.shape for array in arrays]}; expected equally long, not empty"
        )
    if draws < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"draws is {draws}, level {level}; expected at least 1, and within (0, 1)")
    count = len(arrays[0])
    labels = np.arange(count) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    if labels.shape != (count,):
        raise ValueError(f"clusters has the shape {labels.shape} for {count} observations; expected one label each")
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        labels_drawn = rng.integers(len(members), size=len(members))
        rows = labels_drawn if clusters is None else np.concatenate([members[label] for label in labels_drawn])
        drawn.append(np.ravel(statistic(*(array[rows] for array in arrays))))
    tail = (1.0 - level) / 2.0
    found = []
    for value, of_draws in zip(np.ravel(statistic(*arrays)), np.stack(drawn, axis=1), strict=True):
        sound = of_draws[np.isfinite(of_draws)]
        low, high = np.quantile(sound, [tail, 1.0 - tail]) if len(sound) else (np.nan, np.nan)
        found.append(Estimate(float(value), float(low), float(high), count))
    return found


def proportion(values: ArrayLike) -> Estimate:
    """Return the mean of numbers in [0, 1], such as verdicts that are right or wrong, with its interval.

    Raises:
        ValueError: as `estimate`.
    """
    return widened(estimate(mean, values), len(np.asarray(values)))


def widened(found: Estimate, independent: int, *, ends: tuple[float, float] = (0.0, 1.0)) -> Estimate:
    """Return a mean whose interval has a width also where every observation stands at an end of their range.

    A bootstrap of ten right verdicts out of ten says [1, 1]; Wilson's interval, which is given in its place there, says
    [0.72, 1]. Elsewhere the estimate is returned as it came.

    Args:
        found: a mean of observations within `ends`, with the interval of `estimate` at the usual level.
        independent: observations, or clusters of them, at least 1.
        ends: the least and the greatest value that an observation can have.

    Source:
        Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    low, high = ends
    if found.value not in ends or not found.low == found.high == found.value:
        return found
    wilson = binomtest(independent if found.value == high else 0, independent).proportion_ci(LEVEL, method="wilson")
    return replace(found, low=low + (high - low) * float(wilson.low), high=low + (high - low) * float(wilson.high))


def warning_of_few(count: int, what: str) -> list[str]:
    """Return a paragraph for a page where the intervals rest on few independent observations; nothing elsewhere."""
    if count >= _FEW:
        return []
    return [
        f"Only {count} {what}: bootstrap intervals from fewer than {_FEW} are too narrow. Take this as a first look."
    ]


def mean(values_N: np.ndarray) -> float:
    """Return the mean."""
    return float(np.mean(values_N))


def mean_difference(values_N: np.ndarray, others_N: np.ndarray) -> float:
    """Return the mean of the paired differences, values - others."""
    return float(np.mean(values_N - others_N))


def spearman(values_N: np.ndarray, others_N: np.ndarray) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; NaN where a column is constant."""
    ranks = [rankdata(column) for column in (values_N, others_N)]
    centred = [column - column.mean() for column in ranks]
    scale = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    return float(centred[0] @ centred[1] / scale) if scale > 0.0 else float("nan")


def rank_correlations(values_NM: np.ndarray, others_NM: np.ndarray) -> np.ndarray:
    """Return `spearman` of each column of the first with each column of the second, one row a column of the first."""
    ranks = [_unit_ranks(columns) for columns in (values_NM, others_NM)]
    found: np.ndarray = ranks[0].T @ ranks[1]
    return found


def auc(values_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Return the probability that a positive has a greater value than a negative, ties counted half.

    Args:
        values_N: the scores.
        positive_N: above 0.5 where the observation is a positive.

    Returns:
        The area under the ROC curve, in [0, 1]; NaN where one of the classes is empty.
    """
    chosen_N = np.asarray(positive_N) > 0.5
    positives, negatives = int(chosen_N.sum()), int((~chosen_N).sum())
    if not positives or not negatives:
        return float("nan")
    wins = rankdata(values_N)[chosen_N].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))


def aucs(values_NM: np.ndarray, positive_N: np.ndarray) -> np.ndarray:
    """Return `auc` of each column of the values."""
    chosen_N = np.asarray(positive_N) > 0.5
    positives, negatives = int(chosen_N.sum()), int((~chosen_N).sum())
    if not positives or not negatives:
        return np.full(values_NM.shape[1], np.nan)
    wins_M = rankdata(values_NM, axis=0)[chosen_N].sum(0) - positives * (positives + 1) / 2
    found: np.ndarray = wins_M / (positives * negatives)
    return found


def within(statistic: Callable[..., float], *columns: Sequence[float], clusters: Sequence[int]) -> float:
    """Return the mean over clusters of a statistic within each, leaving out clusters that do not determine it.

    What is left when the differences between prompts are taken away; NaN where no cluster determines it.
    """
    labels_N = np.asarray(clusters)
    arrays = [np.asarray(column, dtype=float) for column in columns]
    found = [statistic(*(array[labels_N == label] for array in arrays)) for label in np.unique(labels_N)]
    sound = [value for value in found if np.isfinite(value)]
    return float(np.mean(sound)) if sound else float("nan")


def _unit_ranks(columns_NM: np.ndarray) -> np.ndarray:
    """Return the ranks of each column, centred and of length 1; NaN where a column is constant."""
    ranks_NM = rankdata(columns_NM, axis=0)
    centred_NM = ranks_NM - ranks_NM.mean(0)
    length_M = np.linalg.norm(centred_NM, axis=0)
    scaled: np.ndarray = centred_NM / np.where(length_M > 0.0, length_M, np.nan)
    return scaled
