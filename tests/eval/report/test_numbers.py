"""Protects how numbers are written: small ones keep their digits, and an interval has the decimals of its value."""

import math

from cepo.eval.report.numbers import digits, mean_and_range, numbers
from cepo.eval.statistics import Estimate


def test_digits_follow_the_size() -> None:
    found = {0.5: "0.500", 1.0: "1.000", -2.25: "-2.250", 12.3456: "12.35", 4821.37: "4821", 0.0893: "0.0893"}
    found |= {0.000335: "0.000335", 2.5e-7: "2.50e-07", math.nan: "none", -math.inf: "-inf"}
    assert {value: digits(value) for value in found} == found
    assert digits(0.25, sign="+") == "+0.250"


def test_no_zero_is_negative() -> None:
    """An influence was shown as "0.000 [-0.000, 0.000]"."""
    assert digits(-0.0) == "0"
    assert numbers(0.5, -1e-9) == ["0.500", "0.000"]
    assert str(Estimate(3.35e-4, -2e-9, 7.1e-4, 8)) == "0.000335 [0.000000, 0.000710]"


def test_a_value_and_its_interval_have_the_same_decimals() -> None:
    estimate = Estimate(0.0, 0.0, 0.602, 4)
    assert (estimate.number, estimate.interval, str(estimate)) == (
        "0.000",
        "0.000 to 0.602",
        "0.000 [0.000, 0.602]",
    )
    assert numbers(2e-5, math.nan, 1e-6) == ["2.00e-05", "none", "1.00e-06"]
    assert mean_and_range([0.25, math.nan, 0.75]) == "0.500 (0.250 to 0.750)"
    assert mean_and_range([]) == "none"
