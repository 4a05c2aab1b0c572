"""Rows that a run leaves out: the first few for a warning, and all of them in a file in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cepo.files import write_jsonl

LEFT_OUT = "left_out.jsonl"
_MOST_SHOWN = 5


def write_left_out(folder: Path, left_out: Sequence[tuple[str | int, str]]) -> None:
    """Write one line per row that is left out: `id` (without one, "row" and its number) and `reason`."""
    lines = [{"id": name if isinstance(name, str) else f"row {name}", "reason": reason} for name, reason in left_out]
    write_jsonl(folder / LEFT_OUT, lines)


def shown(left_out: Sequence[tuple[int, str]]) -> str:
    """Return the first rows that are left out with their reasons, the number of others, and the file that lists all."""
    rows = [f"row {number}: {reason}" for number, reason in left_out[:_MOST_SHOWN]]
    if len(left_out) > _MOST_SHOWN:
        rows.append(f"and {len(left_out) - _MOST_SHOWN} more")
    return f"{'; '.join(rows)} ({LEFT_OUT} in the run's folder names all)"
