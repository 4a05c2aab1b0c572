"""Results as one self-contained HTML page: summary, figures, tables and token heat maps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from cepo.eval.report.figures import picture
from cepo.eval.report.heat_maps import LEVELS, HeatMap, attribution_view, criteria_table, link_view, text_parts
from cepo.eval.report.numbers import digits
from cepo.eval.report.tables import PageTable
from cepo.files import replacing

_UNFOLDED = 4  # rollouts of a section that are shown unfolded
_NUMBER = re.compile(r"\s*[-+−±]?\d[\d.,_]*(e[-+]?\d+)?\s*[%×]?(\s*±\s*\d[\d.,]*\s*%?)?\s*", re.IGNORECASE)
# What a UTF-8 file or HTML page cannot hold: lone surrogates, and control characters other than white space.
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def write_report(
    path: Path,
    *,
    title: str,
    summary: Mapping[str, str],
    notes: Sequence[str] = (),
    figures: Mapping[str, Figure] | None = None,
    tables: Mapping[str, PageTable] | None = None,
    heat_maps: Mapping[str, Sequence[HeatMap]] | None = None,
) -> None:
    """Write a page: the summary, then the notes, figures, tables and heat maps that are given.

    Args:
        path: the page's file, replaced atomically; its folder is created.
        title: heading of the page.
        summary: values by label.
        notes: paragraphs below the summary.
        figures: figures by caption, see `cepo.eval.report.figures`.
        tables: tables by caption, see `PageTable`.
        heat_maps: heat maps by the title of their section, e.g. "Before training".

    Raises:
        ValueError: for a table row that is not as long as the header.
    """
    for caption, (header, rows) in (tables or {}).items():
        if ragged := [row for row in rows if len(row) != len(header)]:
            raise ValueError(f"tables[{caption!r}] has the row {list(ragged[0])}; expected {len(header)} cells")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FileSystemLoader(Path(__file__).parent)
    )
    environment.filters["digits"] = digits
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
        attribution_view=attribution_view,
        criteria_table=criteria_table,
        text_parts=text_parts,
        unfolded=_UNFOLDED,
        levels=LEVELS,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written block by block, so that a long page is never in memory whole.
    with replacing(path) as unfinished, unfinished.open("x", encoding="utf-8", newline="") as file:
        file.writelines(_UNWRITABLE.sub("\ufffd", piece) for piece in page)


@dataclass(frozen=True)
class _Section:
    """Heat maps under one heading."""

    title: str
    anchor: str
    maps: tuple[HeatMap, ...]

    @property
    def labels(self) -> list[str]:
        """All labels of the maps' facts, in order of first appearance."""
        return list(dict.fromkeys(label for heat_map in self.maps for label in heat_map.facts))

    @property
    def malformed(self) -> dict[str, list[tuple[int, HeatMap]]]:
        """The malformed maps with their numbers, by reason."""
        found: dict[str, list[tuple[int, HeatMap]]] = {}
        for number, heat_map in enumerate(self.maps):
            if heat_map.malformed is not None:
                found.setdefault(heat_map.malformed, []).append((number, heat_map))
        return found
