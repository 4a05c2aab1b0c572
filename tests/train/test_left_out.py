"""Protects rows that a run leaves out: the warning says how many more there are, and the folder names all of them."""

from pathlib import Path

from cepo.files import read_jsonl
from cepo.train.left_out import LEFT_OUT, shown, write_left_out


def test_a_few_rows_are_shown_and_all_are_written(tmp_path: Path) -> None:
    left_out = [(number, "is blank") for number in range(1, 9)]
    write_left_out(tmp_path, left_out)
    rows = [row for _, row in read_jsonl(tmp_path / LEFT_OUT)[0]]
    assert rows == [{"id": f"row {number}", "reason": "is blank"} for number in range(1, 9)]
    assert shown(left_out).startswith("row 1: is blank; ")
    assert "row 5: is blank; and 3 more (" in shown(left_out)
    assert "more" not in shown(left_out[:5])
