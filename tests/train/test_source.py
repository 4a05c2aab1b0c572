"""Protects the reader of data files: the same rows in every kind of file, or an error that names the kind."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from cepo.eval.score.rows import read_input
from cepo.train.data import load_preferences
from cepo.train.source import collect_rows, open_file, open_source

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Wie so, “warum”? é 你\n\tok"}]
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "3", "completion": 'one, "two";\tthree\n\nfour', "label": "x", "task_reward": 0.25},
    {"id": "b", "prompt": TURNS[:1], "completion": TURNS[1]["content"], "label": "", "task_reward": 1},
    {"id": "c", "prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}], "completion": ""},
    {"id": "d", "prompt_ids": [1, 2], "completion_ids": [3]},
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
UTF8 = LINES.encode()


def packed(kind: str, content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, kind) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def table(separator: str) -> str:
    """The rows as a spreadsheet or pandas writes them: an index, and empty cells where a row has no value."""
    columns = list(dict.fromkeys(name for row in ROWS for name in row))
    written = io.StringIO()
    writer = csv.writer(written, delimiter=separator)
    writer.writerow(["", *columns])
    for number, row in enumerate(ROWS):
        cells = [row.get(name, "") for name in columns]
        writer.writerow([number, *(json.dumps(cell) if isinstance(cell, list) else cell for cell in cells)])
    return written.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


FILES: dict[str, bytes] = {
    "rows.jsonl": UTF8,
    "rows": UTF8 + b"\r\n\r\n",
    "marked.jsonl": b"\n".join(codecs.BOM_UTF8 + line for line in UTF8.split(b"\n")),
    "powershell.jsonl": LINES.encode("utf-16"),
    "unmarked.jsonl": LINES.encode("utf-16-le"),
    "unmarked-be.jsonl": LINES.encode("utf-16-be"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "rows.jsonl.gz": gzip.compress(UTF8),
    "members.gz": gzip.compress(UTF8[:30]) + gzip.compress(UTF8[30:]),
    "rows.bz2": bz2.compress(UTF8),
    "rows.xz": lzma.compress(UTF8),
    "rows.jsonl.zst": packed("zstd", UTF8),
    "list.json": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode("utf-8-sig"),
    "inside.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "inside-indented.json": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "jq.json": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "joined.json": "".join(map(json.dumps, ROWS)).encode(),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "table.csv": table(",").encode(),
    "excel.csv": table(";").encode("utf-8-sig"),
    "excel16.csv": table("\t").encode("utf-16"),
    "table.tsv": table("\t").encode(),
    "table.csv.gz": gzip.compress(table(",").encode()),
}


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", list(FILES))
def test_the_same_rows_in_every_kind_of_file_give_the_same_records(tmp_path: Path, name: str) -> None:
    """Numbers in cells are text, an empty cell is no value, and content hashes agree, so that any of them resumes."""
    expected = [(line.id, line.row, line.task_reward) for line in read_input(written(tmp_path, "plain", UTF8))[0]]
    lines, broken = read_input(written(tmp_path, name, FILES[name]))
    assert [(line.id, line.row, line.task_reward) for line in lines] == expected
    assert broken == []
    assert lines[0].row == {"prompt": "3", "completion": ROWS[0]["completion"]}
    assert lines[3].row == {"prompt_ids": [1, 2], "completion_ids": [3]}


def test_parquet_and_data_set_folders_give_the_same_records(tmp_path: Path) -> None:
    """Tables fill absent columns and keys with nulls, which are no value."""
    rows = [*ROWS[1:2], {**ROWS[3], "prompt": None, "nested": {"score": [1.5]}}]
    plain = read_input(written(tmp_path, "plain", "\n".join(map(json.dumps, rows)).encode()))[0]
    for name, content in (("rows.parquet", parquet(rows)), ("rows.parquet.gz", gzip.compress(parquet(rows)))):
        lines, broken = read_input(written(tmp_path, name, content))
        assert ([line.content for line in lines], broken) == ([line.content for line in plain], [])
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
    for folder in ("one", "splits"):
        ids = [row["id"] for _, row in open_source(tmp_path / folder) if isinstance(row, dict)]
        assert ids == ["b", "d"]
    with pytest.raises(ValueError, match="splits is neither .* it has no split 'test'; it holds train"):
        open_source(tmp_path / "splits", "test")


def test_another_split_is_never_read_for_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """A data set that is saved alone knows its split, or has none."""
    for name, split in (("known", datasets.Split("test")), ("unknown", None)):
        datasets.Dataset.from_list(ROWS[1:2], split=split).save_to_disk(tmp_path / name)
        assert len(list(open_source(tmp_path / name))) == 1
    assert len(list(open_source(tmp_path / "known", "test"))) == 1
    for name, held in (("known", "test"), ("unknown", "no split")):
        with pytest.raises(ValueError, match=f"it has no split 'train'; it holds {held}"):
            open_source(tmp_path / name, "train")


def test_a_colon_in_the_name_of_a_folder_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "run-10:00").mkdir()
    written(tmp_path / "run-10:00", "rows.jsonl", json.dumps(ROWS[1]).encode())
    assert [row["id"] for _, row in open_source(tmp_path / "run-10:00") if isinstance(row, dict)] == ["b"]


def workbook(entry: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(entry, "x")
    return sink.getvalue()


def twice_named() -> bytes:
    sink = io.BytesIO()
    columns = [pyarrow.array([text]) for text in ("x", "y", "z")]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["prompt", "completion", "prompt"]), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.xlsx", workbook("xl/workbook.xml"), "an Excel workbook.*save the sheet as 'CSV UTF-8'"),
        ("a.zip", workbook("rows.jsonl"), "a zip archive.*unpack it"),
        ("a.pt", workbook("archive/data.pkl"), "a PyTorch file"),
        ("a.npz", workbook("rows.npy"), "a NumPy archive"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook"),
        ("a.pkl", pickle.dumps(ROWS), "a Python pickle.*to_json"),
        ("a.pkl.gz", gzip.compress(pickle.dumps(ROWS)), "a Python pickle"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\x02", "an Arrow stream.*to_parquet"),
        ("a.feather", b"ARROW1\0\0", "an Arrow file.*read_feather"),
        ("a.tar", b"rows.jsonl".ljust(257, b"\0") + b"ustar\0", "a tar archive"),
        ("a.db", b"SQLite format 3\0", "a SQLite database"),
        ("a.bin", b"\x00\x01\x02\x03binary", "a binary file of an unknown kind"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", "a web page.*download"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x", "a Git LFS pointer.*git lfs pull"),
        ("a.jsonl", b"prompt,completion\nx,y\n", "begins with 'prompt,completion', which is not JSON.*ends in .csv"),
        ("a.json", b'[\n{"prompt": "x"},\n{"pro', "begins as a JSON list, but the rest is not valid JSON"),
        ("a.csv", b"prompt,prompt\n1,2\n", "names the column 'prompt' twice"),
        ("a.csv", b'prompt,completion\n"a,b\nx,y\n', "cannot be read: line 2: unexpected end of data"),
        ("a.tsv", b'prompt\tcompletion\na\tb\n"a" b\tc\n', "cannot be read: line 3: .*begins with a quotation mark"),
        ("a.parquet", twice_named(), "names the column 'prompt' twice"),
        ("a.parquet", parquet(ROWS[:1])[:100], "cannot be read: .*[Pp]arquet"),
        ("a.jsonl.gz", gzip.compress(UTF8 * 100)[:-20], "cannot be read: Compressed file ended before"),
        ("a.jsonl.zst", packed("zstd", UTF8)[:-4], "cannot be read: Truncated"),
        ("a.jsonl", LINES.encode("utf-16")[:-1], "cannot be read: 'utf-16"),
    ],
)
def test_other_kinds_are_named_with_the_way_out(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    path = written(tmp_path, name, content)
    readers: list[Callable[[Path], object]] = [lambda path: list(open_file(path)), read_input, load_preferences]
    for reader in readers:
        with pytest.raises(ValueError, match=f"{name} .*{complaint}"):
            reader(path)


def test_rows_that_cannot_be_read_keep_their_number_and_lose_no_other(tmp_path: Path) -> None:
    """A cell may hold line ends: the number is that of the line on which its row begins."""
    cells = b'prompt,completion\n"two\nlines",x\na,b,c\n\n,\n"caf\xe9",x\nlast,x\n'
    lines = b'null\n{"prompt": "x"}\n{"latin": "\xe9"}\n\n[1]\n'
    for name, content, rows, reasons in (
        ("a.csv", cells, [2, 8], {4: "has 3 cells; the first line names 2 columns", 7: "not UTF-8; save the table"}),
        (
            "a.jsonl",
            lines,
            [2],
            {
                1: "holds nothing; expected a JSON object",
                3: "not UTF-8 at byte 12",
                5: "holds a list; expected a JSON object",
            },
        ),
        ("a.json", b'[{"a": 1}, 3, {"a": 2}]', [1, 3], {2: "holds a number; expected a JSON object"}),
    ):
        found = dict(open_file(written(tmp_path, name, content)))
        assert [number for number, row in found.items() if isinstance(row, dict)] == rows
        told = {number: row for number, row in found.items() if isinstance(row, str)}
        assert list(told) == list(reasons)
        assert all(told[number].startswith(reason) for number, reason in reasons.items())


def test_commas_in_names_of_columns_part_no_cells_of_a_tsv(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", b"prompt\tnotes, by hand\tsource, date\nx\ty\tz\n")
    assert [row for _, row in open_file(path)] == [{"prompt": "x", "notes, by hand": "y", "source, date": "z"}]


def test_a_limit_stops_reading(tmp_path: Path) -> None:
    """A long file is not read to its end for its first rows: the damage behind them is never met."""
    for name, content in (("a.jsonl.gz", gzip.compress(UTF8 * 10_000)[:-20]), ("a.csv", b'x\n1\n2\n"open\n')):
        rows, left_out = collect_rows(written(tmp_path, name, content), lambda row, place: (place, row), limit=2)
        assert (len(rows), left_out) == (2, [])


def test_a_name_of_a_file_is_never_taken_for_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    assert len(list(open_source(written(tmp_path, "rows", UTF8)))) == len(ROWS)
    for name in ("absent.json", "data/absent.csv.gz", "absent.xlsx"):
        with pytest.raises(ValueError, match=rf"^data {re.escape(name)} does not exist; expected a file \(JSONL"):
            open_source(name)
    with pytest.raises(ValueError, match="split is 'test', but data .* is a file, and files have no splits"):
        open_source(tmp_path / "rows", "test")


def test_a_folder_with_a_file_that_holds_no_rows_is_refused_in_words(tmp_path: Path) -> None:
    written(tmp_path, "rows.jsonl", UTF8)
    written(tmp_path, "notes.jsonl", b"not json\n")
    with pytest.raises(ValueError, match="^data .* is neither a file nor a data set that can be loaded"):
        open_source(tmp_path)


@pytest.mark.parametrize("beside", [{"version": [1]}, {"columns": ["prompt"]}, {"notes": [], "total": 1}])
def test_the_one_list_of_objects_in_an_object_holds_the_rows(tmp_path: Path, beside: dict[str, Any]) -> None:
    """Lists of anything else beside it are about the file."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [{"prompt": "a"}, {"prompt": "b"}], **beside}))
    assert [row for _, row in open_file(path)] == [{"prompt": "a"}, {"prompt": "b"}]
