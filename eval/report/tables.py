"""Tables of results: for the console, for pages, and as the rows of summary.jsonl."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rich.table import Column, Table

from cepo.eval.statistics import Estimate

PageTable: TypeAlias = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows; the first cell of a row names it."""


def summary_row(labels: Mapping[str, Any], found: Estimate) -> dict[str, Any]:
    """Return the labels, and value, low, high and count of the estimate; where there is none, why."""
    row = {**labels, "value": found.value, "low": found.low, "high": found.high, "count": found.count}
    return {**row, "why": found.why} if found.why else row


def share(part: int, whole: int) -> Estimate:
    """Return a share as an estimate without an interval; NaN if the whole is 0."""
    return Estimate(part / whole if whole else math.nan, count=whole)


def console_table(*header: str, rows: Sequence[Sequence[str]] = (), title: str | None = None) -> Table:
    """Return a table whose cells are wrapped, never cut, so that every digit is shown on 80 columns or in a log.

    The first cell of a row, its name, breaks between words and after hyphens alone.
    """
    table = Table(*(Column(name, overflow="fold") for name in header), title=title)
    columns = zip(header[1:], *(cells[1:] for cells in rows), strict=False)
    words = [max(len(word) for cell in column for word in (*cell.split(), "")) for column in columns]
    room = max(
        12, 80 - 6 - sum(words) - 3 * len(words)
    )  # beside the words and numbers of all other columns, and borders
    names = [textwrap.wrap(cells[0], room, break_long_words=False) or [""] for cells in rows]
    table.columns[0].no_wrap = all(len(part) <= room for parts in names for part in parts)
    for parts, cells in zip(names, rows, strict=True):
        table.add_row("\n".join(parts), *cells[1:])
    return table
