"""Protects the numbers that every evaluation reports, and the figures and pages that show them."""

import base64
import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from cepo.eval.rank_statistics import aucs, rank_correlations
from cepo.eval.report.figures import curves, forest, grid, picture, reliability
from cepo.eval.report.heat_maps import HeatMap
from cepo.eval.report.page import write_report
from cepo.eval.statistics import (
    Estimate,
    estimate,
    estimates,
    mean,
    mean_difference,
    mean_over_seeds,
    proportion,
    sign_flip_p,
    spearman,
)

RNG = np.random.default_rng(5)
VALUES = RNG.normal(size=60)
OTHERS = 0.5 * VALUES + RNG.normal(size=60)
COARSE = np.round(OTHERS)  # many ties
HALF = Estimate(0.5, 0.4, 0.6, 10)
UNKNOWN = Estimate(math.nan, math.nan, math.nan, 1)


# Statistics


def test_rates_of_nothing_or_all_are_clopper_pearsons() -> None:
    """Protects small samples: ten right of ten do not prove a judge that is always right.

    By hand: the lower bound for n of n is 0.025 to the power of 1 / n.
    """
    assert proportion([1.0] * 10).low == pytest.approx(0.025**0.1)
    assert proportion([1.0] * 10).high == 1.0
    none = proportion([0.0] * 4)
    assert (none.value, none.low, none.count) == (0.0, 0.0, 4)
    assert none.high == pytest.approx(1.0 - 0.025**0.25)
    some = scipy.stats.binomtest(2, 3).proportion_ci(0.95, method="exact")
    assert (proportion([0.0, 1.0, 1.0]).low, proportion([0.0, 1.0, 1.0]).high) == pytest.approx((some.low, some.high))
    biased = estimate(mean, [-1.0] * 4, ends=(-1.0, 1.0))
    assert (biased.low, biased.high) == (-1.0, pytest.approx(2.0 * none.high - 1.0))


def test_shares_of_units_are_padded_by_a_unit_at_each_end() -> None:
    """By hand: four halves, 0 and 1 have the standard deviation sqrt(0.1); t with three degrees is 3.182."""
    found = proportion([0.5] * 4)
    reach = 3.182446 * math.sqrt(0.1) / math.sqrt(6)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - reach, 0.5 + reach), abs=1e-6)


def test_the_mean_over_seeds_has_students_interval() -> None:
    """scipy's own t interval; by hand for two numbers, where t is 12.706: 0.2 within 1.2706."""
    few = VALUES[:5]
    theirs = scipy.stats.ttest_1samp(few, 0.0).confidence_interval(0.95)
    found = mean_over_seeds(few)
    assert (found.value, found.low, found.high) == pytest.approx((few.mean(), theirs.low, theirs.high))
    two = mean_over_seeds([0.1, 0.3])
    assert (two.low, two.high, two.count) == (pytest.approx(0.2 - 1.2706, abs=1e-4), pytest.approx(1.4706, abs=1e-4), 2)


def test_where_there_is_no_interval_the_reason_is_said() -> None:
    """A reader of "undetermined" must not have to guess what was lacking."""
    assert str(mean_over_seeds([0.5])) == "0.500 [undetermined: 1 seed]"
    assert str(mean_over_seeds([1.0, 1.0])) == "1.000 [undetermined: 2 equal seeds]"
    assert str(mean_over_seeds([])) == "undetermined: no seed"
    assert str(mean_over_seeds([0.1] * 3)) == "0.100 [undetermined: 3 equal seeds]"  # their deviation rounds to 1.7e-17
    assert str(mean_over_seeds([0.9 - 0.8, 0.8 - 0.7])) == "0.100 [undetermined: 2 equal seeds]"
    assert str(mean_over_seeds([0.5, math.nan, 0.7])) == "undetermined: a seed has no value"
    assert str(proportion([])) == "undetermined: no item"
    assert str(proportion([1.0], unit="question")) == "1.000 [undetermined: 1 question]"
    alone = estimate(mean, VALUES, clusters=np.zeros(60), unit="prompt")
    assert str(alone) == f"{VALUES.mean():.3f} [undetermined: 1 prompt]"
    assert (alone.interval, HALF.interval, str(HALF)) == (
        "undetermined: 1 prompt",
        "0.400 to 0.600",
        "0.500 [0.400, 0.600]",
    )
    assert str(estimate(mean, [2.0] * 5)) == "2.000 [undetermined: 5 equal items]"
    constant = estimate(rank_correlations, [1.0] * 3, [1.0, 2.0, 3.0], lacking="a constant")
    assert str(constant) == "undetermined: a constant"
    one_side = estimate(aucs, [0.0, 1.0, 2.0], [0.0, 0.0, 1.0], ends=(0.0, 1.0))
    assert str(one_side) == "1.000 [undetermined: rests on 1 item of 3]"
    assert str(Estimate(0.5)) == "0.500"


def test_the_interval_of_a_mean_is_scipys() -> None:
    """Without skewness it is Student's t interval."""
    mirrored = np.concatenate([VALUES, -VALUES])
    theirs = scipy.stats.ttest_1samp(mirrored, 0.0).confidence_interval(0.95)
    found = estimate(mean, mirrored)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.count == 120


def test_a_skewed_mean_reaches_further_to_its_long_side() -> None:
    found = estimate(mean, np.exp(VALUES))
    assert found.high - found.value > 1.2 * (found.value - found.low)


def test_an_interval_stays_in_the_range_of_its_statistic() -> None:
    """Nothing is lost: the truth is in the range. A size is cut at 0 alone, and what has no interval still has none."""
    small = [0.001, 0.002, 0.04, 0.001]
    whole, cut = estimate(mean, small), estimate(mean, small, within=(0.0, 1.0))
    assert whole.low < 0.0 == cut.low
    assert cut.high == whole.high
    large = estimates(mean, 1.0 - np.array([small, small]).T, within=(0.0, 1.0))
    assert [one.high for one in large] == [1.0, 1.0]
    assert estimate(mean, [0.5] * 3, within=(0.0, 1.0)).why == "3 equal items"
    seeds = [0.9, 1.0, 1.0]
    assert mean_over_seeds(seeds).high > 1.0 == mean_over_seeds(seeds, within=(0.0, 1.0)).high


def test_paired_columns_are_compared_unit_by_unit() -> None:
    """Of paired columns whose difference is constant, no spread is left."""
    found = estimate(mean_difference, VALUES + 2.0, VALUES)
    assert (found.value, found.why) == (pytest.approx(2.0), "60 equal items")


def test_clusters_are_left_out_whole() -> None:
    """Six copies of each of ten numbers know no more than the ten: the interval is theirs, not that of sixty."""
    copies, labels = np.repeat(VALUES[:10], 6), np.repeat(np.arange(10), 6)
    whole, copied = estimate(mean, VALUES[:10]), estimate(mean, copies, clusters=labels)
    assert (copied.low, copied.high) == pytest.approx((whole.low, whole.high))
    assert copied.count == 60
    apart = estimate(mean, copies)
    assert apart.high - apart.low < 0.7 * (copied.high - copied.low)


def test_the_jackknife_of_an_area_is_delongs() -> None:
    """Another derivation of the same variance: placements of each class; equal to 6% at sixty, skewness included."""
    positive = OTHERS > 0.0
    wins_PN = (np.sign(VALUES[positive][:, None] - VALUES[~positive][None]) + 1.0) / 2.0
    variance = wins_PN.mean(1).var(ddof=1) / positive.sum() + wins_PN.mean(0).var(ddof=1) / (~positive).sum()
    found = estimate(aucs, VALUES, positive)  # without ends
    reach = scipy.stats.t.ppf(0.975, 59) * math.sqrt(variance)
    assert found.high - found.low == pytest.approx(2.0 * reach, rel=0.06)


def test_clusters_of_unlike_size_and_order_are_kept_together() -> None:
    sums: list[float] = []

    def record(values_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
        sums.extend((weights_BN @ values_N).tolist())
        return mean(values_N, weights_BN)

    estimate(record, [1.0, 10.0, 1.0, 100.0, 1.0], clusters=["b", "a", "b", "c", "b"])
    assert sums == [113.0, 110.0, 103.0, 13.0]


def test_labels_may_be_long_texts() -> None:
    """One long prompt among many made an array of 4 bytes per character of it for each: 500 MB here."""
    labels = ["long document " * 5000, *(f"prompt {number}" for number in range(499))]
    tracemalloc.start()
    found = proportion([1.0] * 500, clusters=labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.low == pytest.approx(0.025 ** (1 / 500))
    assert peak < 1e8


def test_many_statistics_of_one_sample_are_those_of_each_alone() -> None:
    columns = np.stack([VALUES, COARSE], axis=1)
    for together, column in zip(estimates(mean, columns), columns.T, strict=True):
        alone = estimate(mean, column)
        assert (together.low, together.value, together.high) == pytest.approx((alone.low, alone.value, alone.high))


@pytest.mark.parametrize(
    ("columns", "options", "named"),
    [
        ((), {}, "columns"),
        (([],), {}, "columns"),
        (([1.0], [1.0, 2.0]), {}, "columns"),
        (([[1.0], [2.0]],), {}, "columns"),
        (([1.0, 2.0],), {"clusters": [1]}, "clusters"),
    ],
)
def test_what_cannot_be_estimated_is_named(columns: tuple[list[float], ...], options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        estimate(mean, *columns, **options)


@pytest.mark.parametrize("others", [OTHERS, COARSE])
def test_spearman_is_scipys(others: np.ndarray) -> None:
    assert spearman(VALUES, others) == pytest.approx(scipy.stats.spearmanr(VALUES, others).statistic)


def test_rank_correlations_are_spearmans_of_all_pairs() -> None:
    left = np.stack([VALUES, np.ones(60)], axis=1)
    right = np.stack([OTHERS, COARSE, -VALUES], axis=1)
    found = rank_correlations(left, right, np.ones((1, 60)))
    assert found.shape == (1, 2, 3)
    assert found[0, 0] == pytest.approx([spearman(VALUES, column) for column in right.T])
    assert np.isnan(found[0, 1]).all()


def test_rank_correlations_by_hand_and_on_resamples() -> None:
    """Ranks (1, 2.5, 2.5, 4) against (2, 1, 3, 4): covariance 3, variances 4.5 and 5. Weights stand for copies."""
    x_N, y_N = np.array([10.0, 20.0, 20.0, 30.0]), np.array([0.2, 0.1, 0.3, 0.9])
    assert spearman(x_N, y_N) == pytest.approx(3.0 / np.sqrt(4.5 * 5.0))
    assert np.isnan(spearman(x_N, np.ones(4)))
    drawn_BN = np.array([[2.0, 0.0, 1.0, 3.0], [1.0, 1.0, 5.0, 0.0]])
    for weights_N, ours in zip(drawn_BN, rank_correlations(x_N, y_N, drawn_BN)[:, 0, 0], strict=True):
        copies = np.repeat(np.arange(4), weights_N.astype(int))
        assert ours == pytest.approx(scipy.stats.spearmanr(x_N[copies], y_N[copies]).statistic)


def test_weights_stand_for_copies() -> None:
    """Every statistic of a weighted sample is that of the sample written out, ties and copies among it."""
    drawn_BN = RNG.integers(3, size=(5, 60)).astype(float)
    positive = (OTHERS > 0.3).astype(float)
    columns = np.stack([VALUES, COARSE], axis=1)
    means = mean(columns, drawn_BN)
    correlations, areas = rank_correlations(VALUES, COARSE, drawn_BN), aucs(columns, positive, drawn_BN)
    for draw, weights_N in enumerate(drawn_BN):
        copies = np.repeat(np.arange(60), weights_N.astype(int))
        assert means[draw] == pytest.approx(columns[copies].mean(0))
        own = scipy.stats.spearmanr(VALUES[copies], COARSE[copies]).statistic
        assert correlations[draw, 0, 0] == pytest.approx(own)
        assert areas[draw] == pytest.approx(aucs(columns[copies], positive[copies], np.ones((1, len(copies))))[0])


def test_batches_of_samples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = estimate(rank_correlations, VALUES, OTHERS)
    monkeypatch.setattr("cepo.eval.statistics._BATCH_NUMBERS", 7 * 120)
    batched = estimate(rank_correlations, VALUES, OTHERS)
    assert (batched.low, batched.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


@pytest.mark.parametrize("values", [VALUES, COARSE])
def test_auc_is_the_mann_whitney_statistic(values: np.ndarray) -> None:
    positive = OTHERS > 0.3
    theirs = scipy.stats.mannwhitneyu(values[positive], values[~positive]).statistic
    area = theirs / (positive.sum() * (~positive).sum())
    found = aucs(np.stack([values, -values], axis=1), positive, np.ones((1, 60)))
    assert found[0] == pytest.approx([area, 1.0 - area])


def test_auc_counts_ties_half_and_needs_both_classes() -> None:
    found = aucs(np.array([1.0, 2.0, 2.0, 3.0]), np.array([0, 0, 1, 1]), np.ones((1, 4)))
    assert found[0, 0] == (1 + 0.5 + 1 + 1) / 4
    assert np.isnan(aucs(VALUES, np.ones(60), np.ones((1, 60)))).all()
    assert np.isnan(aucs(VALUES, np.zeros(60), np.ones((1, 60)))).all()


# Figures


def test_a_forest_draws_each_estimate_from_top_to_bottom_also_one_that_is_undetermined() -> None:
    figure = forest([("first", HALF), ("second", UNKNOWN)], axis="accuracy", reference=0.5)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    places = dict(zip((label.get_text() for label in axes.get_yticklabels()), axes.get_yticks(), strict=True))
    assert places["first"] > places["second"]
    assert list(axes.lines[0].get_xdata()) == [0.4, 0.6]
    assert "svg" in picture(figure)
    assert "svg" in picture(forest([], axis="nothing"))


def test_curves_reliability_and_grid_show_their_numbers() -> None:
    drawn = curves({"a": [(1.0, HALF), (4.0, HALF)]}, across="N", up="accuracy", logarithmic=True)
    assert list(drawn.axes[0].lines[0].get_xdata()) == [1.0, 4.0]
    # With a point for every eighth of the scores, whose mean is the mean of its effects.
    effects = (OTHERS > 0.0).astype(float)
    (axes,) = reliability(VALUES, effects, across="score", up="effect").axes
    assert len(axes.containers[0].lines[0].get_xdata()) == 8
    parts = np.array_split(np.argsort(VALUES, kind="stable"), 8)
    assert list(axes.containers[0].lines[0].get_ydata()) == pytest.approx([effects[part].mean() for part in parts])
    shown = grid([[0.25, math.nan]], ["row"], ["one", "two"], label="share")
    assert [text.get_text() for text in shown.axes[0].texts] == ["0.250"]


@pytest.mark.parametrize("count", [1, 3])
def test_reliability_of_few_observations_is_drawn(count: int) -> None:
    assert picture(reliability(VALUES[:count], np.ones(count), across="score", up="effect"))


def test_a_grid_of_nothing_known_is_drawn() -> None:
    assert picture(grid([[math.nan]], ["row"], ["column"], label="share"))


def test_a_picture_is_an_image_in_the_page_and_the_same_each_time() -> None:
    drawn = [picture(forest([("a", HALF)], axis="x")) for _ in range(2)]
    assert drawn[0] == drawn[1]
    head, _, body = drawn[0].partition(",")
    assert head == "data:image/svg+xml;base64"
    assert base64.b64decode(body).lstrip().startswith(b"<?xml")


# The page


def write_page(path: Path) -> str:
    write_report(
        path,
        title="a <b>title</b>",
        summary={"rows": "3"},
        figures={"Accuracy": forest([("x", HALF)], axis="accuracy")},
        tables={"By subset": (["subset", "value"], [["<script>alert(1)</script>", "0.5"]])},
        heat_maps={"Wrong": [HeatMap("one", ("prompt", "<img src=x>"), 1, facts={"verdict": "A"})]},
        notes=["a note"],
    )
    return path.read_text(encoding="utf-8")


def test_the_page_holds_all_that_it_shows_and_lets_nothing_in(tmp_path: Path) -> None:
    page = write_page(tmp_path / "page.html")
    assert "<script" not in page
    assert "<img src=x>" not in page
    assert "a &lt;b&gt;title" in page
    assert "a note" in page
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)


def test_the_page_is_the_same_each_time_and_replaces_the_one_that_is_there(tmp_path: Path) -> None:
    first = write_page(tmp_path / "page.html")
    assert write_page(tmp_path / "page.html") == first
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_table_with_a_row_that_is_too_short_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="By subset"):
        write_report(
            tmp_path / "page.html", title="t", summary={}, figures={}, tables={"By subset": (["a", "b"], [["x"]])}
        )
    assert not list(tmp_path.iterdir())


def test_sign_flips_by_hand() -> None:
    """Of the eight patterns of three differences of one sign, two are as far from 0; ten give 2 in 1,024."""
    assert sign_flip_p([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip_p([0.5] * 10) == pytest.approx(2 / 1024)
    assert sign_flip_p([0.1, -0.1]) == sign_flip_p([0.0, 0.0]) == sign_flip_p([0.5]) == 1.0
    assert np.isnan(sign_flip_p([]))
    assert np.isnan(sign_flip_p([math.nan, 0.1, 0.2]))  # no pattern is as far from 0 as NaN, which is not p = 0
