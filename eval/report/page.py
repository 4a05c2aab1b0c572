"""Write what was measured as one self-contained HTML page: summary, figures, tables and token heat maps."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from cepo.eval.report.figures import picture
from cepo.eval.report.heat_maps import LEVELS, HeatMap, link_view, text_parts

_UNFOLDED = 4  # rollouts of a section that start open
_NUMBER = re.compile(r"\s*[-+−±]?\d[\d.,_]*(e[-+]?\d+)?\s*[%×]?(\s*±\s*\d[\d.,]*\s*%?)?\s*", re.IGNORECASE)
# What no UTF-8 file or HTML page may hold: lone surrogates, and the control characters that are no white space.
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, str],
    notes: Sequence[str] = (),
    figures: Mapping[str, Figure] | None = None,
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]] | None = None,
    heat_maps: Mapping[str, Sequence[HeatMap]] | None = None,
) -> None:
    """Write a page: the summary, then notes, figures, tables and heat maps, as far as there are some.

    Args:
        path: where the page goes; a page that is already there is replaced in one step.
        title: heading of the page.
        summary: values by label.
        notes: paragraphs below the summary.
        figures: by caption, see `cepo.eval.report.figures`.
        tables: header and rows, by the table's caption; the first cell of a row names it.
        heat_maps: heat maps by the section's title, e.g. "Before training".

    Raises:
        ValueError: for a table with a row that is not as long as its header.
    """
    for caption, (header, rows) in (tables or {}).items():
        if ragged := [row for row in rows if len(row) != len(header)]:
            raise ValueError(f"tables[{caption!r}] has the row {list(ragged[0])}; expected {len(header)} cells")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FileSystemLoader(Path(__file__).parent)
    )
    environment.tests["numeric"] = lambda cell: _NUMBER.fullmatch(cell) is not None
    sections = [
        _Section(name, f"section-{number}", tuple(members))
        for number, (name, members) in enumerate((heat_maps or {}).items())
    ]
    page = environment.get_template("page.html").generate(
        title=title,
        summary=summary,
        notes=notes,
        pictures={caption: picture(figure) for caption, figure in (figures or {}).items()},
        tables=tables,
        sections=sections,
        link_view=link_view,
        text_parts=text_parts,
        unfolded=_UNFOLDED,
        levels=LEVELS,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Block by block: a long page is never held whole.
        with draft.open("x", encoding="utf-8", newline="") as file:
            file.writelines(_UNWRITABLE.sub("\ufffd", piece) for piece in page)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Section:
    """Heat maps under one heading."""

    title: str
    anchor: str
    maps: tuple[HeatMap, ...]

    @property
    def labels(self) -> list[str]:
        """Every label of the maps' facts, in order of first appearance."""
        return list(dict.fromkeys(label for heat_map in self.maps for label in heat_map.facts))

    @property
    def malformed(self) -> dict[str, list[tuple[int, HeatMap]]]:
        """The malformed maps with their numbers, by reason."""
        found: dict[str, list[tuple[int, HeatMap]]] = {}
        for number, heat_map in enumerate(self.maps):
            if heat_map.malformed is not None:
                found.setdefault(heat_map.malformed, []).append((number, heat_map))
        return found
