"""Read rows from files of many kinds, data set folders, and data sets on the hub.

Every command reads data here, row by row. Large files are never held in memory whole, except for JSON that is not one
object per line.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from cepo.files import BrokenLine, Row, kind_of, means_path, parse_line
from cepo.train.file_kinds import FILES, PARQUET, SOURCES, check_kind, decompressed, text_encoding

Entry: TypeAlias = tuple[int, Row | str]
"""A number, counted from 1, and the row, or the reason why there is none."""
T = TypeVar("T")
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".bz2", ".xz", ".zst", ".xlsx")
# Columns whose cells in a CSV hold a JSON list.
_LISTS = ("prompt_ids", "completion_ids", "completions", "correct", "attribute_words")
_COLUMNS = {"prompt", "prompt_ids", "messages", "completion", "chosen", "question"}  # an object with one is a row
_SPACE = re.compile("[\ufeff\\s]*")
_BATCH = 256  # rows of a parquet file that are held in memory at once
_UNREADABLE = (OSError, EOFError, ValueError, NotImplementedError, zlib.error, lzma.LZMAError, csv.Error)


@dataclass(frozen=True)
class Source:
    """Rows to iterate over, once.

    Attributes:
        entries: the entries in order; blank lines have none.
        unit: what the numbers count: "line" for JSONL and CSV, "row" for other kinds.
    """

    entries: Iterable[Entry]
    unit: str

    def __iter__(self) -> Iterator[Entry]:
        """Iterate over the entries."""
        return iter(self.entries)

    def place(self, number: int) -> str:
        """Return an entry's place, such as "line 3", which names rows without an id."""
        return f"{self.unit} {number}"


def collect_rows(
    source: str | Path,
    convert: Callable[[Row, str], T],
    *,
    split: str | None = None,
    limit: int | None = None,
    renames: Sequence[str] = (),
) -> tuple[list[T], list[BrokenLine]]:
    """Convert the rows of a source until there are enough.

    Args:
        source: see `open_source`.
        convert: called with a row and its place, see `Source.place`; a row for which it raises ValueError is left out,
            with that reason.
        split: see `open_source`.
        limit: number of converted rows at which to stop, at least 1; None for all.
        renames: columns that a recipe's data.columns can map to other names, for the error about a missing one.

    Returns:
        The converted rows in order, and (number, reason) of each that was left out.

    Raises:
        ValueError: for a limit below 1, or a source that cannot be read or holds no usable row.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    collected: list[T] = []
    left_out: list[BrokenLine] = []
    columns: dict[str, None] = {}
    entries = open_source(source, split)
    for number, row in entries:
        try:
            if isinstance(row, str):
                raise ValueError(row)
            columns.update(dict.fromkeys(row))
            collected.append(convert(row, entries.place(number)))
        except ValueError as reason:
            left_out.append((number, str(reason)))
        if len(collected) == limit:
            break
    if not collected:
        reasons = [f"{reason} ({count}x)" for reason, count in Counter(text for _, text in left_out).most_common(3)]
        lacking = any("is missing" in reason for reason in reasons)
        names = ", ".join(f"{name}: NAME" for name in renames if lacking and name not in columns)
        way_out = f"; if they have other names here: --set data.columns='{{{names}}}'" if names else ""
        raise ValueError(
            f"data {source} holds no usable row: {'; '.join(reasons) or 'it is empty'}; "
            f"columns found: {', '.join(columns) or 'none'}{way_out}"
        )
    return collected, left_out


def open_source(source: str | Path, split: str | None = None) -> Source:
    """Open a file, a folder, or a data set on the hub.

    Args:
        source: a file, see `open_file`; a folder that `save_to_disk` wrote; or what `datasets.load_dataset` takes: a
            folder of files, "owner/name" or "owner/name:configuration".
        split: split of a data set; None means "train". A file has none.

    Raises:
        ValueError: for a source that cannot be read, and for a split of a file; while iterating, for a damaged file.
    """
    try:
        check_source(source)
    except ValueError as error:
        raise ValueError(f"data {error}") from error
    path = Path(source)
    if path.is_file():
        if split is not None:
            raise ValueError(f"split is {split!r}, but data {source} is a file, and files have no splits; leave it out")
        return open_file(path)
    import datasets

    name, configuration = str(source), None
    if not path.exists() and ":" in name:
        name, _, configuration = name.partition(":")
    try:
        if any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            rows = _of_split(datasets.load_from_disk(str(path)), split)
        else:
            rows = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = f"{error} {error.__cause__ or ''}".strip()
        raise ValueError(
            f"data {source} is neither a file nor a data set that can be loaded, from a folder or the hub: {reason}"
        ) from error
    return Source(enumerate(rows, start=1), "row")


def _of_split(saved: Any, split: str | None) -> Any:
    """Return a split of what `save_to_disk` wrote: several by name, or one data set, which may know its own."""
    if isinstance(saved, dict):
        splits, wanted = saved, split or "train"
    else:
        own = str(saved.split) if saved.split else "no split"
        splits, wanted = {own: saved}, split or own
    if wanted not in splits:
        raise ValueError(f"it has no split {wanted!r}; it holds {', '.join(splits)}")
    return splits[wanted]


def check_source(source: str | Path) -> None:
    """Raise ValueError for a file or folder that does not exist; names that may be hub data sets pass."""
    path = Path(source)
    there = path.exists() or Path(str(source).partition(":")[0]).exists()
    if not there and (path.suffix.lower() in _ENDINGS or means_path(str(source))):
        raise ValueError(f"{source} does not exist; expected {SOURCES}")


def check_file(path: Path) -> None:
    """Raise ValueError for a file that does not exist."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected {FILES}")


def open_file(path: Path) -> Source:
    """Open a file of rows. Its kind is recognised by its content, except for CSV and TSV, which need their suffix.

    Kinds: JSONL; JSON (a list of objects, an object with one list of objects, or objects over several lines); CSV and
    TSV, whose first line names the columns; parquet. Each may be compressed with gzip, bzip2, xz or zstandard. Text is
    UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        ValueError: for a file that does not exist, or of another kind, which the error names with the way to convert
            it; while iterating, for a damaged file.
    """
    check_file(path)
    try:
        with decompressed(path) as stream:
            head = stream.read(4096)
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    check_kind(path, head)
    if head.startswith(PARQUET):
        return Source(_guarded(path, _read_parquet), "row")
    encoding = text_encoding(head)
    try:
        with _text(path, encoding) as lines:
            first, second = (*itertools.islice((line for line in map(_bare, lines) if line), 2), "", "")[:2]
        if first.startswith(("{", "[")):
            return _open_json(path, encoding, first, second)
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if ".csv" in endings or ".tsv" in endings:
        return Source(_guarded(path, _read_csv, encoding), "line")
    if first and not second.startswith(("{", "[")):
        raise ValueError(
            f"{path} begins with {first[:40]!r}, which is not JSON; expected one JSON object per line, or a name that "
            "ends in .csv or .tsv for a table"
        )
    return Source(_guarded(path, _read_lines, encoding), "line")


def _guarded(path: Path, read: Callable[..., Iterator[Entry]], *arguments: Any) -> Iterator[Entry]:
    try:
        yield from read(path, *arguments)
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read: {error}")


def _text(path: Path, encoding: str, newline: str = "\n") -> io.TextIOWrapper:
    """Open a text file. Bytes that are not UTF-8 become lone surrogates, so that only their own line is unreadable."""
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    return io.TextIOWrapper(decompressed(path), encoding, errors, newline)


def _bare(line: str) -> str:
    return line.strip("\ufeff \t\r\n")


def _read_lines(path: Path, encoding: str) -> Iterator[Entry]:
    with _text(path, encoding) as lines:
        for number, line in enumerate(lines, start=1):
            row = parse_line(line.encode("utf-8", "surrogateescape"))
            if row is not None:
                yield number, row


def _open_json(path: Path, encoding: str, first: str, second: str) -> Source:
    """Open JSON; as JSONL if the first or second line is an object by itself, or the whole text is not JSON."""
    alone = _documents(first)
    is_row = len(alone) == 1 and isinstance(alone[0], dict) and _rows_inside(alone[0]) is None
    if is_row or (first.startswith("{") and _documents(second)):
        return Source(_guarded(path, _read_lines, encoding), "line")
    with _text(path, encoding) as text:
        documents = _documents(text.read())
    if not documents and first.startswith("[") and not alone:
        raise ValueError("it begins as a JSON list, but the rest is not valid JSON")
    if not documents or (len(alone) == 1 and len(documents) > 1):
        return Source(_guarded(path, _read_lines, encoding), "line")
    inside = _rows_inside(documents[0])
    rows = documents if len(documents) > 1 or inside is None else inside
    return Source(
        [
            (number, row if isinstance(row, dict) else f"holds {kind_of(row)}; expected a JSON object")
            for number, row in enumerate(rows, start=1)
        ],
        "row",
    )


def _documents(text: str) -> list[Any]:
    """Return the concatenated JSON values of a text; [] if it is anything else."""
    decoder, found, at = json.JSONDecoder(), [], 0
    text = _bare(text)
    try:
        while at < len(text):
            value, end = decoder.raw_decode(text, at)
            found.append(value)
            at = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return []
    return found


def _rows_inside(document: Any) -> list[Any] | None:
    """Return the list of rows that a document is or contains; None for an object that is itself a row."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict) or _COLUMNS & set(document):
        return None
    lists = [value for value in document.values() if isinstance(value, list) and value]
    of_objects = [rows for rows in lists if all(isinstance(row, dict) and "role" not in row for row in rows)]
    return of_objects[0] if len(of_objects) == 1 else None


def _read_csv(path: Path, encoding: str) -> Iterator[Entry]:
    csv.field_size_limit(2**31 - 1)  # texts may exceed the default limit of 128 KiB
    with _text(path, encoding, newline="") as text:
        lines = (line.lstrip("\ufeff") for line in text)
        header = next(lines, "")
        mark = "\t" if "\t" in header else max(",;", key=header.count)
        reader = csv.reader(itertools.chain([header], lines), delimiter=mark, strict=True)
        number = 1
        try:
            names = _named_once(name.strip() for name in next(reader, []))
            number = reader.line_num + 1
            while (cells := next(reader, None)) is not None:
                if any(cells):
                    yield number, _csv_row(names, cells)
                number = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"line {number}: {error}; a cell that begins with a quotation mark ends with one, and has those inside "
                "it doubled"
            ) from error


def _named_once(columns: Iterable[str]) -> list[str]:
    names = list(columns)
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise ValueError(f"it names the column {twice[0]!r} twice")
    return names


def _csv_row(names: list[str], cells: list[str]) -> Row | str:
    if len(cells) != len(names):
        return f"has {len(cells)} cells; the first line names {len(names)} columns"
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return "not UTF-8; save the table as 'CSV UTF-8'"
    return {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}


def _cell(name: str, text: str) -> Any:
    """Return a cell's text, or its JSON list if that holds messages or parts, or the column is one of `_LISTS`."""
    if not text.startswith("["):
        return text
    values = _documents(text)
    if len(values) != 1 or not isinstance(values[0], list):
        return text
    messages = all(isinstance(item, dict) and ("role" in item or "type" in item) for item in values[0])
    return values[0] if name in _LISTS or (values[0] and messages) else text


def _read_parquet(path: Path) -> Iterator[Entry]:
    import pyarrow
    import pyarrow.parquet

    with decompressed(path) as stream, path.open("rb") as raw:
        packed = raw.read(len(PARQUET)) != PARQUET
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(stream.read()) if packed else stream)
        _named_once(file.schema_arrow.names)
        rows = (row for batch in file.iter_batches(_BATCH) for row in batch.to_pylist())
        yield from enumerate(rows, start=1)
