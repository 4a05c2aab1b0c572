"""Estimates with 95% intervals whose coverage holds at the sample sizes met here: seeds, items, prompts.

Over seeds: Student's t (`mean_over_seeds`), and a p-value by sign flips (`sign_flip_p`). Over items, or groups of items
such as a prompt's: a jackknife that leaves out one unit at a time (`estimates`). For statistics with bounds, such as
rates, drops, areas and correlations, it uses Student's t with a pseudo-unit at each bound (Clopper and Pearson's
interval if every unit is at a bound); for others, Student's t corrected for skewness.

A statistic is a function of columns and of weights (B, N), which say how often each of the N observations counts in
each of B samples. It returns B values, or B arrays of values. The jackknife needs no random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, permutation_test
from scipy.stats import t as student_t

from cepo.eval.rank_statistics import aucs, rank_correlations
from cepo.eval.report.numbers import numbers
from cepo.files import counted

LEVEL = 0.95
_FEWEST_OF_A_CLASS = 10
_BATCH_NUMBERS = 2**22  # most entries of weights times columns at once, to bound memory
SHARE = (0.0, 1.0)
"""The bounds of a rate, an accuracy, or an area under the ROC curve."""
DIFFERENCE = (-1.0, 1.0)
"""The bounds of a difference of two rates, or a correlation."""
AT_LEAST_0 = (0.0, math.inf)
"""The range of a size: an error, a distance, a ratio of rates."""
ANYWHERE = (-math.inf, math.inf)


@dataclass(frozen=True)
class Estimate:
    """A statistic of a sample, with its 95% interval.

    Attributes:
        value: the statistic; NaN if the sample does not determine it (for example, a correlation with a constant).
        low: lower end of the interval; NaN if there is none.
        high: upper end of the interval.
        count: number of observations, not of independent units.
        why: why there is no value or no interval; empty if there is one, or none was asked for.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    count: int = 0
    why: str = ""

    @property
    def interval(self) -> str:
        """The interval as text, or why there is none."""
        if math.isnan(self.low):
            return f"undetermined: {self.why}" if self.why else "none"
        _, low, high = numbers(self.value, self.low, self.high)
        return f"{low} to {high}"

    @property
    def number(self) -> str:
        """The value, with as many decimals as its interval."""
        return numbers(self.value, self.low, self.high)[0]

    def __str__(self) -> str:
        why = f"undetermined: {self.why}" if self.why else ""
        value, low, high = numbers(self.value, self.low, self.high)
        if math.isnan(self.value):
            return why or "undetermined"
        interval = why if math.isnan(self.low) else f"{low}, {high}"
        return value + (f" [{interval}]" if interval else "")


def undetermined(why: str) -> Estimate:
    """Return an estimate without a value, with the reason."""
    return Estimate(math.nan, why=why)


def estimate(
    statistic: Callable[..., np.ndarray],
    *columns: ArrayLike,
    clusters: Iterable[Hashable] | None = None,
    ends: tuple[float, float] | None = None,
    within: tuple[float, float] = ANYWHERE,
    unit: str = "item",
    lacking: str = "no spread",
) -> Estimate:
    """Return one statistic with its interval: `estimates` for columns of one number each.

    Args:
        statistic: function of the columns and weights (B, N); returns B values, NaN where undetermined.
        columns: N numbers each, at least one column.
        clusters: see `estimates`.
        ends: see `estimates`.
        within: see `estimates`.
        unit: see `estimates`.
        lacking: see `estimates`.

    Raises:
        ValueError: for columns of different lengths, no columns, or empty ones.
    """
    shapes = [np.shape(column) for column in columns]
    if any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"columns have the shapes {shapes}; expected one dimension each")
    return estimates(statistic, *columns, clusters=clusters, ends=ends, within=within, unit=unit, lacking=lacking)[0]


def estimates(
    statistic: Callable[..., np.ndarray],
    *columns: ArrayLike,
    clusters: Iterable[Hashable] | None = None,
    ends: tuple[float, float] | None = None,
    within: tuple[float, float] = ANYWHERE,
    unit: str = "item",
    lacking: str = "no spread",
) -> list[Estimate]:
    """Return many statistics of one sample with their intervals.

    The pseudo-value of a unit is the statistic plus the unit's contribution to it. Their spread gives the interval of
    any smooth statistic: a mean, a ratio of sums, a rank correlation, an area under the ROC curve.

    Args:
        statistic: function of the columns and weights (B, N); returns (B, ...), NaN where an entry is undetermined.
        columns: N rows each, (N,) or (N, M), at least one column.
        clusters: N labels; observations with the same label are one unit, such as the rollouts of a prompt. None: each
            observation is a unit.
        ends: the bounds of the statistic; None if it has none, or the units' values stay far from them.
        within: without `ends`, the range of the statistic, to which the interval is clipped. Since the true value is in
            the range, clipping does not change the coverage.
        unit: name of a unit, in the singular, for `Estimate.why`.
        lacking: the reason to give if the sample does not determine the value.

    Returns:
        One estimate for each entry of the statistic, in the order of its flattened array.

    Raises:
        ValueError: for columns of different lengths, no columns, or empty ones.

    Source:
        Tukey, Bias and confidence in not-quite large samples (1958), for pseudo-values. MacKinnon, Nielsen and Webb,
        Fast and reliable jackknife and bootstrap methods for cluster-robust inference (2023), for clusters.
    """
    arrays = [np.asarray(column, dtype=float) for column in columns]
    if not arrays or not len(arrays[0]) or any(len(array) != len(arrays[0]) for array in arrays):
        raise ValueError(f"columns have the shapes {[array.shape for array in arrays]}; expected equal lengths above 0")
    count = len(arrays[0])
    labels_N = np.arange(count) if clusters is None else _numbered(clusters)
    if labels_N.shape != (count,):
        raise ValueError(f"clusters has the shape {labels_N.shape} for {count} observations; expected one label each")
    values_M = np.ravel(statistic(*arrays, np.ones((1, count))))
    units = int(labels_N.max()) + 1
    left_UM = np.empty((0, len(values_M)))
    if units > 1:
        batch = max(1, _BATCH_NUMBERS // sum(array.size for array in arrays))
        parts = [range(start, min(start + batch, units)) for start in range(0, units, batch)]
        of_parts = [statistic(*arrays, (labels_N != np.array(part)[:, None]).astype(float)) for part in parts]
        left_UM = np.concatenate(
            [np.reshape(found, (len(part), -1)) for found, part in zip(of_parts, parts, strict=True)]
        )
    found = []
    for value, left_U in zip(values_M.tolist(), left_UM.T, strict=True):
        low, high, why = math.nan, math.nan, ""
        if math.isnan(value):
            why = lacking
        elif units == 1:
            why = f"1 {unit}"
        elif not np.isfinite(left_U).all():
            why = f"rests on 1 {unit} of {units}"
        else:
            added_U = (units - 1) * (left_U.mean() - left_U)  # what each unit adds, with mean 0
            low, high = _cut(*_interval(value + added_U, value, ends), within)
            if math.isnan(low):
                why = f"{units} equal {unit}s"
        found.append(Estimate(value, low, high, count, why))
    return found


def proportion(values: ArrayLike, *, clusters: Iterable[Hashable] | None = None, unit: str = "item") -> Estimate:
    """Return the mean of numbers in [0, 1], such as whether verdicts are right, with its interval.

    Args:
        values: any number of values.
        clusters: see `estimates`.
        unit: see `estimates`.
    """
    if not len(np.asarray(values)):
        return undetermined(f"no {unit}")
    return estimate(mean, values, clusters=clusters, ends=SHARE, unit=unit)


def areas(
    values: ArrayLike, positive_N: ArrayLike, *, clusters: Iterable[Hashable] | None = None, unit: str = "item"
) -> list[Estimate]:
    """Return the area under the ROC curve of each score, see `aucs`, with its interval.

    There is none with fewer than ten observations of a class: among many of the other, intervals are then too short.

    Args:
        values: (N,) or (N, M), M scores.
        positive_N: above 0.5 if the observation is a positive.
        clusters: see `estimates`.
        unit: see `estimates`.
    """
    found = estimates(aucs, values, positive_N, clusters=clusters, ends=SHARE, unit=unit, lacking="one class alone")
    positives = int((np.asarray(positive_N) > 0.5).sum())
    fewer, name = min((positives, "positive"), (np.size(positive_N) - positives, "negative"))
    if 0 < fewer < _FEWEST_OF_A_CLASS:
        found = [replace(one, low=math.nan, high=math.nan, why=counted(fewer, name)) for one in found]
    return found


def mean_over_seeds(values: ArrayLike, *, within: tuple[float, float] = ANYWHERE) -> Estimate:
    """Return the mean of independent numbers, one per seed, with its Student t interval.

    There is no interval for one seed, or for seeds with equal values, which do not show how far others could be. Values
    that differ by rounding alone are equal.

    Args:
        values: any number of values.
        within: see `estimates`.

    Source:
        Student, The probable error of a mean (1908).
    """
    values_N = np.asarray(values, dtype=float)
    count = len(values_N)
    if not count:
        return undetermined("no seed")
    middle = float(values_N.mean())
    if math.isnan(middle):
        return undetermined("a seed has no value")
    error = float(values_N.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    if not _is_spread(error, middle):
        return Estimate(middle, count=count, why="1 seed" if count == 1 else f"{count} equal seeds")
    reach = error * _t(count - 1)
    return Estimate(middle, *_cut(middle - reach, middle + reach, within), count)


def sign_flip_p(differences: ArrayLike) -> float:
    """Return the two-sided p-value of paired differences under sign flips; NaN without differences, or if one is NaN.

    It is the probability of a mean at least as far from 0 if each difference is equally likely to have either sign. Up
    to 13 differences all sign patterns are counted, beyond that 10,000 random ones. With n differences the p-value is
    at least 2 / 2^n.

    Source:
        Fisher, The design of experiments (1935), section 21.
    """
    values_N = np.asarray(differences, dtype=float)
    if not len(values_N) or np.isnan(values_N).any():
        return math.nan
    if len(values_N) < 2:
        return 1.0
    return float(permutation_test((values_N,), np.mean, permutation_type="samples", n_resamples=9999, rng=0).pvalue)


def mean(values: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the means (B,) of values (N,), or (B, M) of values (N, M)."""
    totals_B = weights_BN.sum(1)
    means: np.ndarray = weights_BN @ values / totals_B.reshape(-1, *[1] * (values.ndim - 1))
    return means


def ratio(sums: np.ndarray, counts: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the ratio of the sums of two columns, (B,) for (N,) or (B, M) for (N, M); NaN if the second sum is 0."""
    totals = weights_BN @ counts
    found: np.ndarray = weights_BN @ sums / np.where(totals > 0.0, totals, np.nan)
    return found


def mean_difference(values: np.ndarray, others: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
    """Return the means (B,) of the paired differences, values - others."""
    return mean(values - others, weights_BN)


def spearman(values_N: ArrayLike, others_N: ArrayLike) -> float:
    """Return Spearman's rank correlation, with mean ranks for ties; NaN if a column is constant."""
    values, others = np.asarray(values_N, dtype=float), np.asarray(others_N, dtype=float)
    return float(rank_correlations(values, others, np.ones((1, len(values)))).item())


def _numbered(labels: Iterable[Hashable]) -> np.ndarray:
    """Return the number of each label, by first appearance.

    An array of the labels themselves would take as much memory for each as for the longest: labels can be prompts.
    """
    numbers_of: dict[Hashable, int] = {}
    return np.array([numbers_of.setdefault(label, len(numbers_of)) for label in labels], dtype=int)


def _interval(values_U: np.ndarray, middle: float, ends: tuple[float, float] | None) -> tuple[float, float]:
    """Return the interval of the mean of at least two units; NaN if they show no spread.

    With `ends`, one unit is added at each of them, since five units that agree do not prove that all would.

    Source:
        Clopper and Pearson, The use of confidence or fiducial limits illustrated in the case of the binomial (1934).
        Agresti and Caffo, Simple and effective confidence intervals for proportions and differences of proportions
        result from adding two successes and two failures (2000), for added units; with Student's t, one at each end is
        enough.
    """
    units, quantile = len(values_U), _t(len(values_U) - 1)
    if ends is None:
        return _skewed_interval(values_U, middle, quantile)
    low, high = ends
    at_end_U = np.isclose(values_U, high, rtol=0.0, atol=1e-9 * (high - low))
    if (at_end_U | np.isclose(values_U, low, rtol=0.0, atol=1e-9 * (high - low))).all():
        first, last = _exact(int(at_end_U.sum()), units)
        return low + (high - low) * first, low + (high - low) * last
    padded = np.append(values_U, ends)
    reach = quantile * float(padded.std(ddof=1)) / math.sqrt(len(padded))
    return max(low, float(padded.mean()) - reach), min(high, float(padded.mean()) + reach)


def _cut(low: float, high: float, within: tuple[float, float]) -> tuple[float, float]:
    """Return an interval clipped to the range of its statistic; NaN stays NaN."""
    return max(low, within[0]), min(high, within[1])


def _skewed_interval(values_U: np.ndarray, middle: float, quantile: float) -> tuple[float, float]:
    """Return a t interval corrected for the skewness of the values; NaN if they do not vary.

    Source:
        Hall, On the removal of skewness by transformation (1992), the cubic transformation.
    """
    units, spread = len(values_U), float(values_U.std())
    if not _is_spread(spread, middle):
        return math.nan, math.nan
    skewness = float(((values_U - values_U.mean()) ** 3).mean()) / spread**3
    error = float(values_U.std(ddof=1))

    def corrected(t: float) -> float:
        straight = t / math.sqrt(units) - skewness / (6 * units)
        if abs(skewness) < 1e-6:
            return straight
        return (float(np.cbrt(1.0 + skewness * straight)) - 1.0) / (skewness / 3.0)

    return middle - error * corrected(quantile), middle - error * corrected(-quantile)


def _is_spread(spread: float, middle: float) -> bool:
    """Tell whether values around `middle` vary by more than rounding."""
    return spread > 1e-12 * max(1.0, abs(middle))


@cache
def _exact(hits: int, units: int) -> tuple[float, float]:
    exact = binomtest(hits, units).proportion_ci(LEVEL, method="exact")
    return float(exact.low), float(exact.high)


@cache
def _t(degrees: int) -> float:
    """Return the quantile of Student's t at (1 + LEVEL) / 2."""
    return float(student_t.ppf((1.0 + LEVEL) / 2.0, degrees))
