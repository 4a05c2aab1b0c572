"""Protects the numbers that every evaluation reports, and the figures and pages that show them."""

import base64
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from cepo.eval.report.figures import curves, forest, grid, picture, reliability
from cepo.eval.report.heat_maps import HeatMap
from cepo.eval.report.page import write_report
from cepo.eval.statistics import (
    UNDETERMINED,
    Estimate,
    aucs,
    estimate,
    estimates,
    mean,
    mean_difference,
    mean_of_few,
    proportion,
    rank_correlations,
    sign_flip_p,
    spearman,
    widened,
)

RNG = np.random.default_rng(5)
VALUES = RNG.normal(size=60)
OTHERS = 0.5 * VALUES + RNG.normal(size=60)
COARSE = np.round(OTHERS)  # many ties
HALF = Estimate(0.5, 0.4, 0.6, 10)
UNKNOWN = Estimate(math.nan, math.nan, math.nan, 1)


# Statistics


def test_proportions_of_nothing_or_all_get_wilsons_interval() -> None:
    """Protects small samples: ten right of ten do not prove a judge that is always right.

    By hand: with z = 1.95996, the lower bound for n of n is n / (n + z^2).
    """
    assert proportion([1.0] * 10).low == pytest.approx(10.0 / (10.0 + 1.959964**2), abs=1e-6)
    assert proportion([1.0] * 10).high == 1.0
    none = proportion([0.0] * 4)
    assert (none.value, none.low, none.count) == (0.0, 0.0, 4)
    assert none.high == pytest.approx(1.959964**2 / (4.0 + 1.959964**2), abs=1e-6)
    assert proportion([0.0, 1.0, 1.0]) == estimate(mean, [0.0, 1.0, 1.0])
    assert proportion([0.5] * 5) == Estimate(0.5, 0.5, 0.5, 5)
    biased = widened(Estimate(-1.0, -1.0, -1.0, 8), 4, ends=(-1.0, 1.0))
    assert (biased.low, biased.high) == (-1.0, pytest.approx(2.0 * none.high - 1.0))


def test_the_mean_of_few_has_students_interval() -> None:
    """scipy's own t interval; by hand for two numbers, where t is 12.706: 0.2 within 1.2706."""
    few = VALUES[:5]
    theirs = scipy.stats.ttest_1samp(few, 0.0).confidence_interval(0.95)
    found = mean_of_few(few)
    assert (found.value, found.low, found.high) == pytest.approx((few.mean(), theirs.low, theirs.high))
    two = mean_of_few([0.1, 0.3])
    assert (two.low, two.high, two.count) == (pytest.approx(0.2 - 1.2706, abs=1e-4), pytest.approx(1.4706, abs=1e-4), 2)
    assert str(mean_of_few([0.5])) == "0.500"
    assert mean_of_few([]) is UNDETERMINED


def test_the_interval_of_a_mean_is_scipys_percentile_bootstrap() -> None:
    """Another implementation with other random numbers: equal up to the noise of 4000 resamples."""
    found = estimate(mean, VALUES, draws=4000)
    theirs = scipy.stats.bootstrap(
        (VALUES,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    spread = VALUES.std() / math.sqrt(len(VALUES))
    assert found.value == pytest.approx(VALUES.mean())
    assert found.low == pytest.approx(theirs.low, abs=0.12 * spread)
    assert found.high == pytest.approx(theirs.high, abs=0.12 * spread)
    assert found.count == 60


def test_a_wider_level_gives_a_wider_interval_and_a_seed_gives_it_again() -> None:
    narrow, wide = estimate(mean, VALUES, level=0.5), estimate(mean, VALUES, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert estimate(mean, VALUES, seed=3) == estimate(mean, VALUES, seed=3)
    assert estimate(mean, VALUES, seed=3) != estimate(mean, VALUES, seed=4)


def test_columns_are_resampled_together() -> None:
    """Of paired columns whose difference is constant, every resample has that difference."""
    found = estimate(mean_difference, VALUES + 2.0, VALUES)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_clusters_are_drawn_whole() -> None:
    """Six copies of each of ten numbers know no more than the ten: the interval is theirs, not that of sixty."""
    copies, labels = np.repeat(VALUES[:10], 6), np.repeat(np.arange(10), 6)
    whole, copied = estimate(mean, VALUES[:10]), estimate(mean, copies, clusters=labels)
    assert (copied.low, copied.high) == pytest.approx((whole.low, whole.high))
    assert copied.count == 60
    apart = estimate(mean, copies)
    assert apart.high - apart.low < 0.7 * (copied.high - copied.low)


def test_clusters_of_unlike_size_and_order_are_kept_together() -> None:
    labels = ["b", "a", "b", "c", "b"]
    sums: list[float] = []

    def record(values_N: np.ndarray, weights_BN: np.ndarray) -> np.ndarray:
        sums.extend((weights_BN @ values_N).tolist())
        return mean(values_N, weights_BN)

    estimate(record, [1.0, 10.0, 1.0, 100.0, 1.0], clusters=labels, draws=50)
    possible = {a + b + c for a in (3, 10, 100) for b in (3, 10, 100) for c in (3, 10, 100)}
    assert set(sums) <= possible
    assert len(set(sums)) > 3


def test_draws_that_do_not_determine_the_statistic_are_left_out() -> None:
    found = estimate(aucs, [0.0, 1.0, 2.0], [0.0, 0.0, 1.0], draws=300)
    assert found.value == 1.0
    assert np.isfinite([found.low, found.high]).all()
    nothing = estimate(rank_correlations, [1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()
    assert str(nothing) == "undetermined"
    assert str(HALF) == "0.500 [0.400, 0.600]"


def test_many_statistics_of_one_sample_are_those_of_each_alone() -> None:
    columns = np.stack([VALUES, COARSE], axis=1)
    many = estimates(mean, columns, draws=200, seed=2)
    for together, column in zip(many, columns.T, strict=True):
        alone = estimate(mean, column, draws=200, seed=2)
        assert (together.low, together.value, together.high) == pytest.approx((alone.low, alone.value, alone.high))


@pytest.mark.parametrize(
    ("columns", "options", "named"),
    [
        ((), {}, "columns"),
        (([],), {}, "columns"),
        (([1.0], [1.0, 2.0]), {}, "columns"),
        (([[1.0], [2.0]],), {}, "columns"),
        (([1.0],), {"draws": 0}, "draws is 0"),
        (([1.0],), {"level": 1.0}, "level 1.0"),
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


def test_batches_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = estimate(rank_correlations, VALUES, OTHERS, draws=100)
    monkeypatch.setattr("cepo.eval.statistics._BATCH_NUMBERS", 7 * 120)
    batched = estimate(rank_correlations, VALUES, OTHERS, draws=100)
    assert (batched.low, batched.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


def test_one_cluster_has_no_interval_and_no_observation_no_estimate() -> None:
    alone = estimate(mean, VALUES, clusters=np.zeros(60))
    assert alone.value == pytest.approx(VALUES.mean())
    assert np.isnan([alone.low, alone.high]).all()
    assert str(alone) == f"{VALUES.mean():.3f}"
    assert (alone.interval, HALF.interval) == ("none", "0.400 to 0.600")
    assert proportion([]) is UNDETERMINED
    assert proportion([1.0]).low == pytest.approx(1.0 / (1.0 + 1.959964**2), abs=1e-6)


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
    (axes,) = reliability(VALUES, OTHERS, across="score", up="effect").axes
    assert len(axes.containers[0].lines[0].get_xdata()) == 8
    parts = np.array_split(np.argsort(VALUES, kind="stable"), 8)
    assert list(axes.containers[0].lines[0].get_ydata()) == pytest.approx([OTHERS[part].mean() for part in parts])
    shown = grid([[0.25, math.nan]], ["row"], ["one", "two"], label="share")
    assert [text.get_text() for text in shown.axes[0].texts] == ["0.25"]


@pytest.mark.parametrize("count", [1, 3])
def test_reliability_of_few_observations_is_drawn(count: int) -> None:
    assert picture(reliability(VALUES[:count], OTHERS[:count], across="score", up="effect"))


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
