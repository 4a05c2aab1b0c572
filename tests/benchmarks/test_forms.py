"""Protects the tables of written forms in the documentation: they are what the readers read."""

from pathlib import Path

import pytest

from cepo.benchmarks.answer_forms import draw_answers
from cepo.benchmarks.forms import draw_forms, write_forms
from tests.paths import ROOT


def test_the_page_holds_the_tables_as_they_are_drawn() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert draw_forms() in page, "run make forms"
    assert draw_answers() in page, "run make forms"


def test_the_tables_replace_those_between_the_marks(tmp_path: Path) -> None:
    page, frame = tmp_path / "page.md", "<!-- {}: drawn by make forms -->\n{}<!-- end of forms -->\n"
    page.write_text(f"before\n{frame.format('forms', 'old')}between\n{frame.format('answers', 'old')}after\n")
    write_forms(page)
    verdicts, answers = (
        frame.format(name, f"\n{tables}\n") for name, tables in (("forms", draw_forms()), ("answers", draw_answers()))
    )
    assert page.read_text() == f"before\n{verdicts}between\n{answers}after\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        write_forms(page)
