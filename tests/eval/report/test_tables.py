"""Protects the console's tables: on 80 columns no word, number or interval is cut or broken, and nothing is lost."""

import io
import re

import pytest
from rich.console import Console

from cepo.eval.report.tables import ConsoleTable
from tests.paths import ROOT


def shown(table: ConsoleTable, width: int = 80) -> list[str]:
    sink = io.StringIO()
    Console(width=width, file=sink).print(table)
    return [line.rstrip() for line in sink.getvalue().splitlines()]


def cells(lines: list[str]) -> list[list[str]]:
    return [re.split(r"  +", line) for line in lines if line and set(line) != {"─"}]


def test_names_break_at_hyphens_and_numbers_stay_whole() -> None:
    """The console's widest table of single numbers, of a reward model on RewardBench 2."""
    header = ("subset", "right", "ties shared", "longest wins", "shortest wins", "better longer", "better shorter")
    names = ("llmbar-adver-GPTInst", "alpacaeval-length", "mean of subsets without Ties")
    rows = [[name, *["0.625"] * 6, "2985"] for name in names]
    lines = shown(ConsoleTable((*header, "items"), rows))
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if "0.625" in line] == [line for line in lines if line.count("0.625") == 6]
    assert sum("2985" in line for line in lines) == 3
    assert " ".join(" ".join(lines).split()).count("llmbar-") == 1


@pytest.mark.parametrize("width", [60, 80, 200])
def test_columns_that_do_not_fit_follow_behind_the_names(width: int) -> None:
    """The scores of `cepo eval causal` by place: an interval is never broken, however narrow the console is."""
    places = ("chain", "criteria->analysis", "analysis->scores", "criteria->scores", "both->scores")
    intervals = [f"0.{place}23 [0.{place}00, 0.{place}50]" for place in range(1, 6)]
    lines = shown(ConsoleTable(("score", *places), [["influence", *intervals], ["phi", *intervals]], "a title"), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert lines[0] == "a title"
    for place, interval in zip(places, intervals, strict=True):
        assert text.count(place) == 1
        assert text.count(interval.partition(" ")[2]) == 2
    parts = text.count("influence")
    assert text.count("score  ") == parts == {60: 3, 80: 2, 200: 1}[width]


def test_what_looks_like_markup_is_text_and_a_word_longer_than_half_of_the_console_is_folded() -> None:
    lines = shown(ConsoleTable(("reason", "rows"), [["[bold] in a row", "1"], ["x" * 90, "2"]]))
    assert "[bold] in a row" in "\n".join(lines)
    assert "".join(lines).count("x") == 90
    assert max(map(len, lines)) <= 80


def test_a_table_without_rows_shows_its_header() -> None:
    assert cells(shown(ConsoleTable(("arm", "seeds"), []))) == [["arm", "seeds"]]


def test_tables_are_made_in_one_place() -> None:
    """What a table does at 80 columns is decided once."""
    folders = ("eval", "benchmarks", "cepo/cli", "train")
    paths = [*(path for folder in folders for path in (ROOT / folder).rglob("*.py")), *(ROOT / "cepo").glob("*.py")]
    making = [path.name for path in paths if "rich.table" in path.read_text()]
    assert making == ["tables.py"]
