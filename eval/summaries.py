"""Results on disk, each written in one step; summary.jsonl: what an evaluation found, one metric a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
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


def write_summary(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows, one a line, in one step; NaN, which JSON has not, becomes null.

    Args:
        path: the file; its folder exists.
        rows: see `summary_row`.
    """
    sound = [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in rows
    ]
    write_text(path, "".join(json.dumps(row) + "\n" for row in sound))


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there, so that a kill leaves the old one or the new one, whole."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def make_folder(path: Path) -> None:
    """Make a folder for results where it is not there.

    Raises:
        ValueError: if it cannot be made, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output is {str(path)!r}, which cannot be made: {error.strerror or error}; expected a folder"
        ) from error
