"""What tests of records share: two records are alike where their numbers differ by rounding alone."""

from typing import Any

import pytest


def check_alike(found: Any, wanted: Any, tolerance: float, where: str = "") -> None:
    """Fail unless two records, or lists of them, are equal and their numbers differ by no more than the tolerance.

    It is relative above 1, absolute below. Of numbers that records hold with six digits, the last may differ by one.
    """
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), where
        for key, inner in wanted.items():
            six_digits = key in ("row_norms", "attribution")
            check_alike(found[key], inner, max(tolerance, 1.1e-5) if six_digits else tolerance, f"{where}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
            check_alike(one, other, tolerance, f"{where}/{place}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance), where
    else:
        assert found == wanted, where
