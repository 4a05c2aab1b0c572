"""Protects the tables of written forms in the documentation: they are what the readers read."""

from pathlib import Path

import pytest

from cepo.benchmarks.forms import draw_forms, write_forms
from tests.paths import ROOT


def test_the_page_holds_the_tables_as_they_are_drawn() -> None:
    assert draw_forms() in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8"), "run make forms"


def test_the_tables_replace_those_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- forms: drawn by make forms -->\nold\n<!-- end of forms -->\nafter\n")
    write_forms(page)
    assert page.read_text() == (
        f"before\n<!-- forms: drawn by make forms -->\n\n{draw_forms()}\n<!-- end of forms -->\nafter\n"
    )
    page.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        write_forms(page)
