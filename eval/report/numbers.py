"""Format numbers for tables and pages: digits according to their size, and no minus sign before zero."""

from __future__ import annotations

import math
from collections.abc import Sequence


def digits(value: float, sign: str = "") -> str:
    """Return a number as text, see `numbers`."""
    return numbers(value, sign=sign)[0]


def numbers(*values: float, sign: str = "") -> list[str]:
    """Return related numbers, such as a value and its interval, with the same number of decimals.

    The largest determines it: three decimals from 0.1 to 10, fewer above, and three significant digits below 0.1. Below
    0.0001 all are in scientific notation; if all are 0, they have no decimals.

    Args:
        values: any numbers; NaN becomes "none".
        sign: "+" for a sign before positive numbers too.
    """
    size = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    form = "z.0f"
    if size:
        power = math.floor(math.log10(size))
        form = "z.2e" if power < -4 else f"z.{2 - power if power < 0 else max(0, 3 - power)}f"
    return ["none" if math.isnan(value) else f"{value:{sign}{form}}" for value in values]


def mean_and_range(values: Sequence[float]) -> str:
    """Return the mean and range of the numbers that are not NaN; "none" if there are none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "none"
    middle, low, high = numbers(sum(known) / len(known), min(known), max(known))
    return f"{middle} ({low} to {high})"
