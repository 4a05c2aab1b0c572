"""Protects the console's tables: what names a row is readable on 80 columns, and no digit is lost."""

import io

from rich.console import Console

from cepo.eval.report.tables import console_table


def test_names_break_at_hyphens_and_numbers_stay_whole_on_80_columns() -> None:
    """The console's widest table, of a reward model on RewardBench 2."""
    titles = (
        "right",
        "ties shared",
        "longest wins",
        "shortest wins",
        "better longer",
        "better shorter",
        "own",
        "items",
    )
    names = ("llmbar-adver-GPTInst", "alpacaeval-length", "mean of subsets without Ties")
    rows = [[name, *["0.625"] * 7, "2985"] for name in names]
    sink = io.StringIO()
    Console(width=80, file=sink).print(console_table("subset", *titles, rows=rows))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in sink.getvalue().splitlines() if "│" in line]
    first = [cells[0] for cells in lines]
    parts = [*("llmbar-", "adver-", "GPTInst", "alpacaeval-", "length"), *("mean of", "subsets", "without Ties")]
    assert first == parts
    assert [cells[1:] for cells in lines if cells[1]] == [["0.625"] * 7 + ["2985"]] * 3
    assert max(map(len, sink.getvalue().splitlines())) <= 80
