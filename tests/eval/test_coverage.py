"""Protects the level of every interval, by simulation: the truth lies within 95% of them.

Or within more, where what is sampled is coarse. The bound leaves three standard errors of 400 samples to chance.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats

from cepo.eval.rank_statistics import aucs, rank_correlations
from cepo.eval.rewardbench.metrics import SECTIONS, mean_of_weighted, why_uneven
from cepo.eval.statistics import (
    SHARE,
    Estimate,
    areas,
    estimate,
    mean,
    mean_difference,
    mean_over_seeds,
    proportion,
)

SAMPLES, LEAST = 400, 0.92
SHAPES: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "normal": (lambda rng, count: rng.normal(size=count), 0.0),
    "accuracies of 24 items": (lambda rng, count: rng.binomial(24, rng.beta(8, 2, count)) / 24, 0.8),
    "differences of accuracies": (
        lambda rng, count: (rng.binomial(24, rng.beta(9, 1, count)) - rng.binomial(24, rng.beta(4, 4, count))) / 24,
        0.4,
    ),
    "nats": (lambda rng, count: rng.gamma(1.5, size=count), 1.5),
    "influences": (lambda rng, count: 0.003 * rng.gamma(1.5, size=count), 0.0045),
}


def coverage(interval: Callable[[np.random.Generator], Estimate], truth: float) -> float:
    rng = np.random.default_rng(7)
    found = [interval(rng) for _ in range(SAMPLES)]
    known = [one for one in found if not math.isnan(one.low)]
    assert len(known) > 0.6 * SAMPLES
    return sum(one.low - 1e-9 <= truth <= one.high + 1e-9 for one in known) / len(known)


@pytest.mark.parametrize("count", [2, 5, 10])
@pytest.mark.parametrize("shape", ["normal", "accuracies of 24 items", "differences of accuracies"])
def test_the_interval_over_seeds_holds_its_level(shape: str, count: int) -> None:
    """The percentile bootstrap, which it replaced, covers 83% at five seeds: see that this test tells them apart."""
    draw, truth = SHAPES[shape]
    assert coverage(lambda rng: mean_over_seeds(draw(rng, count)), truth) >= LEAST
    if count == 5:

        def percentile(rng: np.random.Generator) -> Estimate:
            values_N = draw(rng, count)
            means = values_N[rng.integers(count, size=(200, count))].mean(1)
            return Estimate(0.0, *np.quantile(means, [0.025, 0.975]).tolist())

        assert coverage(percentile, truth) < 0.89


@pytest.mark.parametrize("count", [8, 24])
@pytest.mark.parametrize("shape", ["normal", "nats"])
def test_the_interval_of_a_mean_over_prompts_holds_its_level(shape: str, count: int) -> None:
    """Four values of a prompt that move together, and a skewed kind: errors and effects in nats."""
    draw, truth = SHAPES[shape]
    labels = np.repeat(np.arange(count), 4)

    def interval(rng: np.random.Generator) -> Estimate:
        return estimate(mean, np.repeat(draw(rng, count), 4) + 0.3 * rng.normal(size=4 * count), clusters=labels)

    assert coverage(interval, truth) >= LEAST


@pytest.mark.parametrize("count", [4, 8, 24])
def test_an_interval_that_is_cut_at_its_range_holds_its_level(count: int) -> None:
    """Means of S in `cepo ablate`: a few thousandths. With pseudo-units at 0 and 1 the interval would say nothing."""
    draw, truth = SHAPES["influences"]
    found = [estimate(mean, draw(np.random.default_rng(seed), count), within=(0.0, 1.0)) for seed in range(200)]
    assert all(0.0 <= one.low <= one.value <= one.high <= 1.0 for one in found)
    assert coverage(lambda rng: estimate(mean, draw(rng, count), within=(0.0, 1.0)), truth) >= LEAST - 0.02
    padded = [estimate(mean, draw(np.random.default_rng(seed), count), ends=(0.0, 1.0)) for seed in range(20)]
    assert min(one.high for one in padded) > 10 * truth


@pytest.mark.parametrize("count", [4, 12, 40])
@pytest.mark.parametrize(
    ("values", "odds"),
    [
        ([0.0, 1.0], [0.5, 0.5]),
        ([0.0, 1.0], [0.04, 0.96]),
        ([0.0, 0.5, 1.0], [0.1, 0.8, 0.1]),
        ([0.0, 0.5, 1.0], [0.02, 0.08, 0.9]),
        ([0.0, 0.25, 1.0], [0.6, 0.3, 0.1]),
    ],
)
def test_the_interval_of_a_rate_holds_its_level(values: list[float], odds: list[float], count: int) -> None:
    """Rates near an end, and the mean of both orders, which takes three values."""
    found = coverage(lambda rng: proportion(rng.choice(values, size=count, p=odds)), float(np.dot(values, odds)))
    assert found >= LEAST


@pytest.mark.parametrize("count", [4, 30])
def test_the_interval_of_a_paired_drop_holds_its_level(count: int) -> None:
    """Most pairs keep their verdict; a sample where all do must not say that none can change."""

    def interval(rng: np.random.Generator) -> Estimate:
        before = (rng.random(count) < 0.9).astype(float)
        turned = rng.random(count) < 0.1
        return estimate(mean_difference, before, np.where(turned, 1.0 - before, before), ends=(-1.0, 1.0))

    assert coverage(interval, 0.08) >= LEAST


@pytest.mark.parametrize("count", [6, 24])
@pytest.mark.parametrize(("strength", "truth"), [(0.0, 0.0), (0.8, 0.7859), (0.0, None)])
def test_the_interval_of_a_rank_correlation_holds_its_level(count: int, strength: float, truth: float | None) -> None:
    """Skewed columns, whose ranks are those of normal ones: 6 / pi asin(r / 2); and coarse ones, with many ties."""

    def interval(rng: np.random.Generator) -> Estimate:
        one = rng.normal(size=count)
        other = strength * one + math.sqrt(1.0 - strength**2) * rng.normal(size=count)
        columns = (np.round(one), np.round(other)) if truth is None else (np.exp(one), np.exp(2.0 * other))
        return estimate(rank_correlations, *columns, ends=(-1.0, 1.0))

    assert coverage(interval, truth or 0.0) >= LEAST


@pytest.mark.parametrize("prompts", [4, 24])
@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_the_interval_of_an_area_holds_its_level(prompts: int, shift: float) -> None:
    """Positives and negatives of a prompt share its level, and some prompts have more of them."""
    labels = np.repeat(np.arange(prompts), 6)

    def interval(rng: np.random.Generator) -> Estimate:
        positive = (rng.permuted(np.tile([0, 0, 0, 1, 1, 1], (prompts, 1)), axis=1)).ravel()
        values = rng.normal(size=6 * prompts) + shift * positive + 0.7 * rng.normal(size=prompts)[labels]
        return estimate(aucs, values, positive, clusters=labels, ends=(0.0, 1.0), unit="prompt")

    truth = float(scipy.stats.norm.cdf(shift / math.sqrt(2.0 * (1.0 + 0.49))))
    assert coverage(interval, truth) >= LEAST


@pytest.mark.parametrize("limit", [100, 300])
@pytest.mark.parametrize("chosen", [["Chat"], ["Reasoning"], list(SECTIONS)], ids=str)
def test_the_interval_of_a_section_holds_its_level(chosen: list[str], limit: int) -> None:
    """RewardBench's sections and their mean, of items drawn at random, with the benchmark's own shares of subsets."""
    subsets = [subset for weights in SECTIONS.values() for subset in weights]
    counts = [447 if subset == "math-prm" else weights[subset] for weights in SECTIONS.values() for subset in weights]
    accuracies_S = np.random.default_rng(1).beta(9.0, 1.5, len(subsets))
    weights_GS = np.array([[SECTIONS[section].get(subset, 0.0) for subset in subsets] for section in chosen])
    truth = float((weights_GS @ accuracies_S / weights_GS.sum(1)).mean())
    statistic, population = mean_of_weighted(weights_GS.tolist()), np.repeat(np.arange(len(subsets)), counts)

    def interval(rng: np.random.Generator) -> Estimate:
        codes = rng.choice(population, limit, replace=False)
        codes = codes[weights_GS.sum(0)[codes] > 0.0]
        return estimate(statistic, rng.random(len(codes)) < accuracies_S[codes], codes, ends=SHARE)

    assert coverage(interval, truth) >= LEAST


@pytest.mark.parametrize("accuracy", [0.85, 0.95])
@pytest.mark.parametrize(
    ("few", "why"), [(3, "3 items of math-prm counts as 20.5"), (8, "8 items of"), (24, ""), (40, "")]
)
def test_a_section_has_no_interval_where_few_items_have_much_of_its_weight(few: int, why: str, accuracy: float) -> None:
    """math-prm is half of Reasoning; beside 120 items of the other subsets, eight of its items are too few."""
    weights = SECTIONS["Reasoning"]
    names, counts = list(weights), [few if name == "math-prm" else 20 for name in weights]
    codes, statistic = np.repeat(np.arange(len(names)), counts), mean_of_weighted([list(weights.values())])

    def interval(rng: np.random.Generator) -> Estimate:
        return estimate(statistic, rng.random(len(codes)) < accuracy, codes, ends=SHARE)

    found = why_uneven(codes.tolist(), [weights], names)
    assert why in found
    assert bool(found) == bool(why)
    assert (coverage(interval, accuracy) < LEAST - 0.03) == bool(why)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_an_area_has_no_interval_with_few_of_a_class(shift: float) -> None:
    """Among 60 negatives; `aucs` by itself shows that three positives are too few."""
    truth = float(scipy.stats.norm.cdf(shift / math.sqrt(2.0)))

    def covered(positives: int, of: Callable[[np.ndarray, np.ndarray], Estimate]) -> float:
        positive = np.arange(60 + positives) < positives
        return coverage(lambda rng: of(rng.normal(size=60 + positives) + shift * positive, positive), truth)

    assert covered(3, lambda values, positive: estimate(aucs, values, positive, ends=SHARE)) < 0.9
    assert covered(12, lambda values, positive: areas(values, positive)[0]) >= LEAST
    (found,) = areas(shift + np.arange(63.0), np.arange(63) > 59)
    assert (found.value, found.interval) == (1.0, "undetermined: 3 positives")
