"""Tables of results: for the console, for pages, and as the rows of summary.jsonl."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Column, Table
from rich.text import Text

from cepo.eval.statistics import Estimate

PageTable: TypeAlias = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows; the first cell of a row names it."""
_GAP = 2  # spaces between columns
_NUMBER = r"[-+]?\d[\d.e+-]*"
_RANGE = re.compile(rf"[\[(]?{_NUMBER}(?:, | to ){_NUMBER}[\])]?")


@dataclass(frozen=True)
class ConsoleTable:
    """A table for consoles of any width, which never breaks a word, number or interval.

    Cells wrap between words and after hyphens. Columns that do not fit next to the others follow in a further part,
    where the first column, which names the rows, is repeated.

    Attributes:
        header: names of the columns, at least one.
        rows: rows with as many cells.
        title: printed above the table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield the title and the parts."""
        columns = [[_unbroken(cell) for cell in column] for column in zip(self.header, *self.rows, strict=True)]
        most = [max(map(len, column)) for column in columns]
        # Only words longer than half of the console are broken.
        widest = (options.max_width - _GAP) // 2
        least = [min(widest, max(len(word) for cell in column for word in _wrapped(cell, 1))) for column in columns]
        if self.title:
            yield Text(self.title, style="bold")
        for part in _parts(least, options.max_width):
            widths = _widths([(least[at], most[at]) for at in part], options.max_width)
            (header, *rows) = zip(
                *(
                    ["\n".join(_wrapped(cell, width, break_long_words=True)) for cell in columns[at]]
                    for at, width in zip(part, widths, strict=True)
                ),
                strict=True,
            )
            table = Table(
                *(
                    Column(Text(name.replace("\xa0", " ")), width=width, overflow="fold")
                    for name, width in zip(header, widths, strict=True)
                ),
                box=SIMPLE_HEAD,
                padding=(0, _GAP - 1, 0, 0),
                pad_edge=False,
                show_edge=False,
                show_lines=any("\n" in cell for row in rows for cell in row),
            )
            for row in rows:
                table.add_row(*(Text(cell.replace("\xa0", " ")) for cell in row))
            yield table
            yield Text()


def summary_row(labels: Mapping[str, Any], found: Estimate) -> dict[str, Any]:
    """Return the labels with value, low, high and count of the estimate, and why if it lacks a value or interval."""
    row = {**labels, "value": found.value, "low": found.low, "high": found.high, "count": found.count}
    return {**row, "why": found.why} if found.why else row


def share(part: int, whole: int) -> Estimate:
    """Return a share as an estimate without an interval; NaN if the whole is 0."""
    return Estimate(part / whole if whole else math.nan, count=whole)


def _unbroken(cell: str) -> str:
    """Return the cell with no-break spaces inside numeric ranges and intervals."""
    return _RANGE.sub(lambda found: found[0].replace(" ", "\xa0"), cell)


def _wrapped(cell: str, width: int, *, break_long_words: bool = False) -> list[str]:
    return textwrap.wrap(cell, width, break_long_words=break_long_words) or [""]


def _parts(least: Sequence[int], room: int) -> list[list[int]]:
    """Return the columns of each part: the first column, and as many others as fit at their minimum widths."""
    parts: list[list[int]] = [[0]]
    for column in range(1, len(least)):
        if len(parts[-1]) > 1 and sum(least[at] + _GAP for at in (*parts[-1], column)) - _GAP > room:
            parts.append([0])
        parts[-1].append(column)
    return parts


def _widths(ranges: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Return a width for each column between its minimum and maximum; the widest columns are narrowed first."""
    room -= _GAP * (len(ranges) - 1)
    widths: list[int] = []
    for cap in range(max(most for _, most in ranges), -1, -1):
        widths = [max(least, min(most, cap)) for least, most in ranges]
        if sum(widths) <= room:
            break
    return widths
