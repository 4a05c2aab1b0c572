"""Numbers as all tables and pages write them: as many digits as their size asks for, and no minus before a zero."""

from __future__ import annotations

import math
from collections.abc import Sequence


def digits(value: float, sign: str = "") -> str:
    """Return a number as text, see `numbers`."""
    return numbers(value, sign=sign)[0]


def numbers(*values: float, sign: str = "") -> list[str]:
    """Return numbers that are read together, such as a value and its interval, with as many decimals each.

    The largest decides: it has three decimals from 0.1 to 10, and three digits after its leading zeros below that.
    Below 0.0001 all are in powers of ten; where all are 0, they have no decimals.

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
    """Return the mean of the numbers that are not NaN with their range; "none" where there are none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "none"
    middle, low, high = numbers(sum(known) / len(known), min(known), max(known))
    return f"{middle} ({low} to {high})"
