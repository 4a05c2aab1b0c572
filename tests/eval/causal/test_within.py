"""Protects agreement within prompts: hand-made rows, ties, prompts that say nothing, and intervals over prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from cepo.eval.causal.within import areas_by_chance, areas_within, correlations_within


def test_the_area_counts_pairs_of_one_prompt_alone() -> None:
    """Three prompts by hand: one pair ranked right, two wrong, one tied; a prompt without a pair, and neither mode."""
    nan = math.nan
    prompts = [0, 0, 1, 1, 1, 2, 2, 3, 3]
    positive_N = np.array([1, 0, 1, 0, 0, 1, 0, 1, nan])
    values_N1 = np.array([0.2, 0.1, 0.5, 0.9, 0.8, 0.3, 0.3, 0.0, 9.0])[:, None]
    (found,) = areas_within(values_N1, positive_N, prompts)
    assert found.value == pytest.approx((1 + 0 + 0 + 0.5) / 4)
    assert found.count == 4
    # Across prompts the order would be another: that must play no part.
    (shifted,) = areas_within(values_N1 + 10.0 * np.array(prompts)[:, None], positive_N, prompts)
    assert shifted == found
    (none,) = areas_within(values_N1[:2], np.array([1.0, 1.0]), [0, 0])
    assert str(none) == "undetermined: no prompt has completions both with evidence and without"


def test_chance_is_a_half_and_as_wide_as_the_pairs_are_few() -> None:
    """A perfect score lies far outside of what shuffled modes reach over 30 prompts, and not over two."""
    widths = []
    for count in (2, 30):
        prompts = np.repeat(np.arange(count), 3).tolist()
        positive_N = np.tile([1.0, 0.0, math.nan], count)
        (found,) = areas_by_chance((positive_N == 1.0).astype(float)[:, None], positive_N, prompts, deals=300, seed=0)
        assert found.value == pytest.approx(0.5, abs=0.05)
        assert found.count == count
        widths.append(found.high)
    assert widths[0] == 1.0
    assert widths[1] < 0.75
    (none,) = areas_by_chance(np.ones((2, 1)), np.ones(2), [0, 0], deals=3, seed=0)
    assert math.isnan(none.value)


def test_a_perfect_score_has_an_interval() -> None:
    """All pairs right in five prompts is not certainty: the interval is Clopper and Pearson's over prompts."""
    prompts = np.repeat(np.arange(5), 2)
    positive_N = np.tile([1.0, 0.0], 5)
    (found,) = areas_within(positive_N[:, None], positive_N, prompts.tolist())
    assert found.value == 1.0
    assert found.low == pytest.approx(0.025**0.2)


def test_the_correlation_is_of_ranks_within_prompts() -> None:
    """One prompt gives Spearman's own; what differs between prompts plays no part; a constant score finds nothing."""
    rng = np.random.default_rng(0)
    truth_N, values_N = rng.random(7), rng.random(7)
    (alone,) = correlations_within(values_N[:, None], truth_N, [0] * 7)
    assert alone.value == pytest.approx(spearmanr(values_N, truth_N).statistic)
    assert alone.why == "1 prompt"
    prompts = [0, 0, 0, 1, 1, 1]
    truth_N = np.array([1.0, 2.0, 3.0, 30.0, 20.0, 10.0])
    values_NM = np.array([[1, 5, 0], [2, 6, 0], [3, 7, 0], [9, 3, 0], [8, 2, 0], [7, 1, 0]], dtype=float)
    same, mixed, constant = correlations_within(values_NM, truth_N, prompts)
    assert same.value == pytest.approx(1.0)
    assert mixed.value == pytest.approx(1.0)  # over all rows it would be negative
    assert math.isnan(constant.value)
    assert same.count == 6


def test_prompts_with_one_completion_are_compared_with_each_other() -> None:
    truth_N, values_N = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 3.0, 4.0, 2.0])
    (found,) = correlations_within(values_N[:, None], truth_N, [0, 1, 2, 3])
    assert found.value == pytest.approx(spearmanr(values_N, truth_N).statistic)
    (few,) = correlations_within(values_N[:2, None], truth_N[:2], [0, 1])
    assert str(few) == "undetermined: 2 judgements have no order to compare"


def test_intervals_are_over_prompts() -> None:
    """Completions of a prompt rise and fall together, so more of them make the interval no narrower."""
    rng = np.random.default_rng(1)
    right_P = rng.random(40) < 0.7
    widths = []
    for copies in (1, 5):
        prompts = np.repeat(np.arange(40), 2 * copies)
        positive_N = np.tile(np.repeat([1.0, 0.0], copies), 40)
        values_N1 = np.where(right_P[prompts], positive_N, 1.0 - positive_N)[:, None]
        (found,) = areas_within(values_N1, positive_N, prompts.tolist())
        assert found.value == pytest.approx(right_P.mean())
        widths.append(found.high - found.low)
    assert widths[0] == pytest.approx(widths[1])
