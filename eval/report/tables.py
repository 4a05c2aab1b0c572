"""Results on disk, each written in one step; summary.jsonl: what an evaluation found, one metric a line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.table import Column, Table

from cepo.eval.statistics import Estimate


def summary_row(labels: Mapping[str, Any], found: Estimate) -> dict[str, Any]:
    """Return the labels, and value, low, high and count of the estimate."""
    return {**labels, "value": found.value, "low": found.low, "high": found.high, "count": found.count}


def share(part: int, whole: int) -> Estimate:
    """Return a share as an estimate without an interval; NaN of nothing."""
    return Estimate(part / whole if whole else math.nan, math.nan, math.nan, whole)


def console_table(*header: str, title: str | None = None) -> Table:
    """Return an empty table whose cells are wrapped, never cut: on 80 columns, or in a log, every digit stays."""
    return Table(*(Column(name, overflow="fold") for name in header), title=title)
