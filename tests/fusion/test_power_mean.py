"""The power mean: its mathematical properties, and fifty-digit arithmetic as the judge."""

from __future__ import annotations

import math
import sys

import mpmath
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from cepo.fusion.power_mean import check_power, check_weights, power_mean

VALUES = [0.9, 0.1, 0.3, 0.5]
WEIGHTS = [0.7, 0.1, 0.1, 0.1]  # the paper's; their float sum is not exactly 1
EXTREME = (1e-320, 5e-324, 1e-300, 1e-100, 1e-12, 1e-9, 1e300, 1e307, sys.float_info.max)

values_in = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 1.0, 1e-300, 5e-324, 1 - 2**-53]))
weights_in = st.floats(1e-3, 10.0)
powers = st.one_of(
    st.floats(-50.0, 50.0),
    st.floats(allow_nan=False),
    st.sampled_from([0.0, math.inf, -math.inf, *EXTREME, *(-p for p in EXTREME)]),
)
terms_in = st.lists(st.tuples(values_in, weights_in), min_size=1, max_size=6)
steadily = settings(max_examples=300, deadline=None, derandomize=True)


def exact(values: list[float], weights: list[float], p: float) -> float:
    """Return the power mean from its definition in 50 digits and more (as many as a tiny p takes)."""
    if p != 0 and abs(p) < 1e-15:
        p = 0.0 if 0.0 not in values else p
    with mpmath.workdps(50):
        pairs = [(mpmath.mpf(v), mpmath.mpf(w)) for v, w in zip(values, weights, strict=True) if w > 0]
        total = mpmath.fsum(w for _, w in pairs)
        if p <= 0 and any(v == 0 for v, _ in pairs):
            return 0.0
        if p == 0:
            return float(mpmath.exp(mpmath.fsum(w * mpmath.log(v) for v, w in pairs) / total))
        with mpmath.extradps(40):
            mean = mpmath.fsum(w * v ** mpmath.mpf(p) for v, w in pairs) / total
            return float(mean ** (1 / mpmath.mpf(p)))


@given(terms=terms_in, p=powers)
@example(terms=[(0.25, 0.7), (0.5, 0.1), (0.75, 0.1)], p=1e-17)
@example(terms=[(0.25, 1.0), (0.5, 1.0)], p=-sys.float_info.max)
@example(terms=[(5e-324, 1.0), (1.0, 1.0)], p=1e306)
@steadily
def test_stays_between_smallest_and_largest(terms: list[tuple[float, float]], p: float) -> None:
    """Whatever p is, the mean is a number from the smallest value to the largest."""
    values, weights = [v for v, _ in terms], [w for _, w in terms]
    assert min(values) <= power_mean(values, weights, p) <= max(values)


@given(terms=terms_in, first=powers, second=powers)
@example(terms=[(0.9, 0.7), (0.1, 0.1), (0.3, 0.1), (0.5, 0.1)], first=-1e-12, second=0.0)
@example(terms=[(0.9, 0.7), (0.1, 0.1), (0.3, 0.1), (0.5, 0.1)], first=1e-12, second=0.01)
@steadily
def test_grows_with_p(terms: list[tuple[float, float]], first: float, second: float) -> None:
    """A larger exponent never gives a smaller mean."""
    values, weights = [v for v, _ in terms], [w for _, w in terms]
    low, high = sorted((first, second))
    assert power_mean(values, weights, low) <= power_mean(values, weights, high) + 1e-9


@given(terms=terms_in, p=powers, data=st.data())
@steadily
def test_order_does_not_matter(terms: list[tuple[float, float]], p: float, data: st.DataObject) -> None:
    """The terms may come in any order."""
    shuffled = data.draw(st.permutations(terms))
    found = power_mean([v for v, _ in shuffled], [w for _, w in shuffled], p)
    assert found == pytest.approx(power_mean([v for v, _ in terms], [w for _, w in terms], p), rel=1e-9, abs=1e-300)


@given(terms=terms_in, p=powers, scale=st.floats(1e-3, 1e3))
@steadily
def test_scale_of_weights_does_not_matter(terms: list[tuple[float, float]], p: float, scale: float) -> None:
    """Weights are normalised."""
    assume(0.0 not in [v for v, _ in terms] or not 0.0 < p < 1e-3)  # there the result is w^(1/p), ill-conditioned
    values, weights = [v for v, _ in terms], [w for _, w in terms]
    scaled = power_mean(values, [scale * weight for weight in weights], p)
    assert scaled == pytest.approx(power_mean(values, weights, p), rel=1e-9, abs=1e-300)


@given(values=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5), data=st.data())
@steadily
def test_named_means(values: list[float], data: st.DataObject) -> None:
    """p = 1 is the arithmetic mean, -1 the harmonic, 0 the geometric, 2 the root mean square, inf and -inf the ends."""
    count = len(values)
    weights = data.draw(st.lists(weights_in, min_size=count, max_size=count))
    total = sum(weights)
    pairs = list(zip(values, weights, strict=True))
    assert power_mean(values, weights, 1.0) == pytest.approx(sum(w * v for v, w in pairs) / total, rel=1e-12)
    assert power_mean(values, weights, -1.0) == pytest.approx(total / sum(w / v for v, w in pairs), rel=1e-12)
    geometric = math.exp(sum(w * math.log(v) for v, w in pairs) / total)
    assert power_mean(values, weights, 0.0) == pytest.approx(geometric, rel=1e-12)
    assert power_mean(values, weights, 2.0) == pytest.approx(
        math.sqrt(sum(w * v * v for v, w in pairs) / total), rel=1e-12
    )
    assert power_mean(values, weights, math.inf) == max(values)
    assert power_mean(values, weights, -math.inf) == min(values)
    assert power_mean(values, None, 1.0) == pytest.approx(sum(values) / count, rel=1e-12)


@pytest.mark.parametrize(
    "p", [1e-12, -1e-12, 1e-9, -1e-9, 1e-15, -1e-15, 1e-100, -1e-100, 1e-320, -1e-320, 5e-324, 1e-5]
)
@pytest.mark.parametrize("weights", [WEIGHTS, [0.25] * 4, [3.0, 1.0, 1.0, 7.0], [0.1, 0.2, 0.3, 0.4]], ids=str)
def test_continuous_at_zero(p: float, weights: list[float]) -> None:
    """Near p = 0 nothing jumps and no digit is lost; the slope there is half the variance of the logarithms."""
    total = sum(weights)
    logs = [math.log(value) for value in VALUES]
    mean = sum(w * x for w, x in zip(weights, logs, strict=True)) / total
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, logs, strict=True)) / total
    expected = math.exp(mean) * (1.0 + p * variance / 2.0)
    assert power_mean(VALUES, weights, p) == pytest.approx(expected, rel=max(1e-13, 10 * p * p))


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        *((p, 0.9) for p in (1e300, 1e308, sys.float_info.max, math.inf)),
        *((p, 0.1) for p in (-1e300, -1e308, -sys.float_info.max, -math.inf)),
    ],
)
def test_huge_exponents(p: float, expected: float) -> None:
    """Exponents up to the end of the float range are the maximum and the minimum, never NaN."""
    assert power_mean(VALUES, WEIGHTS, p) == pytest.approx(expected, rel=1e-14)


@given(
    terms=st.lists(st.tuples(st.one_of(st.floats(1e-12, 1.0), st.just(0.0)), weights_in), min_size=1, max_size=5),
    p=st.one_of(st.floats(-50.0, 50.0), st.floats(-1e-2, 1e-2), st.sampled_from([0.2, 1e-6, -1e-6, 1e-8])),
)
@example(terms=[(0.9, 0.7), (0.1, 0.1), (0.3, 0.1), (0.5, 0.1)], p=1e-6)
@example(terms=[(0.9, 0.7), (0.0, 0.1), (0.3, 0.1), (0.5, 0.1)], p=0.2)
@settings(max_examples=500, deadline=None, derandomize=True)
def test_equals_fifty_digits(terms: list[tuple[float, float]], p: float) -> None:
    """Twelve digits are right for any p in [-50, 50]."""
    values, weights = [v for v, _ in terms], [w for _, w in terms]
    assert power_mean(values, weights, p) == pytest.approx(exact(values, weights, p), rel=1e-12, abs=1e-290)


def test_paper_values() -> None:
    """The preset's exponent and weights, computed by hand."""
    expected = (0.7 * 0.9**0.2 + 0.1 * 0.1**0.2 + 0.1 * 0.3**0.2 + 0.1 * 0.5**0.2) ** 5
    assert power_mean(VALUES, WEIGHTS) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(
    ("values", "weights", "p", "expected"),
    [
        ([0.0, 0.5], [1, 1], 1.0, 0.25),
        ([0.0, 0.5], [1, 3], 0.5, 0.75**2 * 0.5),
        ([0.0, 0.5], [1, 1], 1e-320, 0.0),
        ([0.0, 0.5], [1, 1], 0.0, 0.0),
        ([0.0, 0.5], [1, 1], -1e-320, 0.0),
        ([0.0, 0.5], [1, 1], -2.0, 0.0),
        ([0.0, 0.5], [1, 1], -math.inf, 0.0),
        ([0.0, 0.5], [1, 1], math.inf, 0.5),
        ([0.0, 0.0], [1, 1], 0.2, 0.0),
        ([1.0, 1.0], [1, 1], -3.0, 1.0),
        ([0.4], [9.0], 0.2, 0.4),
    ],
)
def test_zeros_and_equal_values(values: list[float], weights: list[float], p: float, expected: float) -> None:
    """A zero pulls a mean with p > 0 down by its weight, and one with p <= 0 to zero; equal values are their mean."""
    assert power_mean(values, weights, p) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("p", [-math.inf, -2.0, 0.0, 1e-12, 0.2, 1.0, 30.0, math.inf])
def test_zero_weights_are_ignored(p: float) -> None:
    """A value without weight has no say, not even as maximum, minimum or zero."""
    padded = power_mean([0.0, 0.9, 0.2, 1.0], [0.0, 2.0, 1.0, 0.0], p)
    assert padded == power_mean([0.9, 0.2], [2.0, 1.0], p)


def test_extreme_weights() -> None:
    """Finite weights are finite weights: the largest float, and a zero's weight too small to change a sum."""
    assert power_mean([0.5, 0.25], [1e308, 1e308], 1.0) == pytest.approx(0.375, rel=1e-14)
    assert power_mean([0.5, 0.25], [5e-324, 5e-324], 1.0) == pytest.approx(0.375, rel=1e-14)
    found = power_mean([0.0, 0.5], [1e-20, 1.0], 1e-19)
    assert found == pytest.approx(0.5 * math.exp(-0.1), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "weights", "p", "message"),
    [
        ([], None, 1.0, "weights"),
        ([0.5, 1.1], None, 1.0, "values"),
        ([0.5, -0.1], None, 1.0, "values"),
        ([math.nan], None, 1.0, "values"),
        ([math.inf], None, math.inf, "values"),
        ([0.5, 0.5], [1.0], 1.0, "weights has 1 entries for 2 values"),
        ([0.5, 0.5], [1.0, -1.0], 1.0, "weights"),
        ([0.5, 0.5], [0.0, 0.0], 1.0, "weights"),
        ([0.5, 0.5], [1.0, math.nan], 1.0, "weights"),
        ([0.5, 0.5], [1.0, math.inf], 1.0, "weights"),
        ([0.5, 0.5], [1.0, 1.0], math.nan, "p is NaN"),
    ],
)
def test_bad_input(values: list[float], weights: list[float] | None, p: float, message: str) -> None:
    """Each argument is refused by name."""
    with pytest.raises(ValueError, match=message):
        power_mean(values, weights, p)


def test_checks_alone() -> None:
    """The checks that RewardConfig borrows accept what is allowed."""
    check_weights([0.0, 1.0])
    for p in (0.0, -3.0, math.inf, -math.inf):
        check_power(p)
