"""The Minkowski power mean that fuses the task reward with the links' scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def power_mean(values: Sequence[float], weights: Sequence[float] | None = None, p: float = 0.2) -> float:
    """Return (sum_i w_i v_i^p)^(1/p) with the weights normalised to sum 1.

    p = 0 is the weighted geometric mean, p = inf the maximum, p = -inf the minimum, over the values whose weight is not
    zero. With p <= 0 a zero value gives 0. Computed on logarithms centred at the geometric mean: near p = 0 with expm1,
    so that nothing cancels, and for large |p| with the leading term factored out, so that nothing overflows.

    Args:
        values: numbers in [0, 1].
        weights: one per value, >= 0, not all zero; None for equal weights.
        p: any real number or infinity.

    Returns:
        A number between the smallest and the largest value of positive weight.

    Raises:
        ValueError: if values is empty or holds a number outside [0, 1]; if weights are negative, not finite, all zero
            or of another length; if p is NaN.

    Source:
        CE-PO (arXiv 2509.23095), the Minkowski combiner; the paper uses p = 0.2.
    """
    values = [float(value) for value in values]
    weights = [1.0] * len(values) if weights is None else [float(weight) for weight in weights]
    check_power(p)
    check_weights(weights)
    if len(weights) != len(values):
        raise ValueError(f"weights has {len(weights)} entries for {len(values)} values; expected one each")
    if any(not 0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"values is {values}; expected numbers in [0, 1]")
    heaviest = max(weights)
    terms = [(weight / heaviest, value) for weight, value in zip(weights, values, strict=True) if weight > 0.0]
    smallest, largest = min(value for _, value in terms), max(value for _, value in terms)
    if p == math.inf or smallest == largest:
        return largest
    if p == -math.inf or (p <= 0.0 and smallest == 0.0):
        return smallest
    total = math.fsum(weight for weight, _ in terms)
    logs = [(weight, math.log(value)) for weight, value in terms if value > 0.0]
    kept = math.fsum(weight for weight, _ in logs)
    center = math.fsum(weight * log for weight, log in logs) / kept
    if p == 0.0:
        return _between(smallest, math.exp(center), largest)
    # Zero values contribute only weight: they multiply the mean of the others by (kept / total)^(1/p).
    lost = math.fsum(weight for weight, value in terms if value == 0.0)
    log_kept = math.log1p(-lost / total) if lost < kept else math.log(kept / total)
    if max(abs(p * (log - center)) for _, log in logs) <= 1.0:
        slope = math.fsum(w * (log - center) * _ratio(math.expm1, p * (log - center)) for w, log in logs) / kept
        mean_log = center + slope * _ratio(math.log1p, p * slope)
    else:
        peak = max(log for _, log in logs) if p > 0.0 else min(log for _, log in logs)
        mean = math.fsum(weight * math.exp(p * (log - peak)) for weight, log in logs) / kept
        mean_log = peak + math.log(mean) / p
    return _between(smallest, math.exp(min(0.0, mean_log + log_kept / p)), largest)


def check_power(p: float, name: str = "p") -> None:
    """Raise ValueError, with the argument's name, if an exponent is NaN."""
    if math.isnan(p):
        raise ValueError(f"{name} is NaN; expected a real number, inf or -inf")


def check_weights(weights: Sequence[float], name: str = "weights") -> None:
    """Raise ValueError, with the argument's name, unless all are finite and not negative, and at least one positive."""
    if any(not math.isfinite(weight) or weight < 0.0 for weight in weights) or not any(w > 0.0 for w in weights):
        raise ValueError(f"{name} is {list(weights)}; expected finite numbers >= 0, at least one of them > 0")


def _between(low: float, value: float, high: float) -> float:
    return min(max(value, low), high)


def _ratio(function: Callable[[float], float], x: float) -> float:
    """Return f(x) / x for expm1 or log1p, whose limit at 0 is 1."""
    return function(x) / x if x else 1.0
