"""Kinds of files: how they are decompressed and decoded, and which are refused with advice on how to convert them."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

FILES = "JSONL, JSON, CSV, TSV or parquet; also packed with gzip, bzip2, xz or zstandard"
"""The files that are read, as options, errors and docs/formats.md say it."""
SOURCES = f"a file ({FILES}), a folder of a data set, or a data set on the hub (owner/name)"
"""The same for commands that also read data sets."""
PARQUET = b"PAR1"
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_UNPACKERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PICKLE = "load it with Python and write it with pandas' to_json(path, orient='records', lines=True)"
_FEATHER = "write it with pandas.read_feather(path).to_parquet('rows.parquet')"
_STREAM = "write it with datasets.Dataset.from_file(path).to_parquet('rows.parquet')"
_UNPACK = "unpack it and name a file inside"
_PAGE = "download the file itself (on the hub: the address with resolve/ in place of blob/)"
_REFUSED = (
    (b"ARROW1", "an Arrow file", _FEATHER),
    (b"FEA1", "a Feather file", _FEATHER),
    (b"\xff\xff\xff\xff", "an Arrow stream", _STREAM),
    (b"ORC", "an ORC file", "write it with pandas.read_orc(path).to_parquet('rows.parquet')"),
    (b"Obj\x01", "an Avro file", "write it as JSONL or parquet"),
    (b"\x89HDF\r\n", "an HDF5 file", "write it with pandas.read_hdf(path).to_parquet('rows.parquet')"),
    (b"\x93NUMPY", "a NumPy array", _PICKLE),
    (b"SQLite format 3\0", "a SQLite database", "write the table with pandas.read_sql(...).to_parquet('rows.parquet')"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook (xls)", "save it as 'CSV UTF-8'"),
    (b"\x04\x22\x4d\x18", "an lz4 file", "decompress it, or compress it with gzip or zstandard"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"%PDF", "a PDF file", "write its rows as JSONL or CSV"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "fetch the data with git lfs pull"),
    *((b"\x80" + bytes([protocol]), "a Python pickle", _PICKLE) for protocol in range(2, 6)),
    *((start, "a web page", _PAGE) for start in (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML")),
)
"""First bytes of a file, what it is, and how to convert it."""


def decompressed(path: Path) -> BinaryIO:
    """Open a file to read its bytes, decompressed if it is gzip, bzip2, xz or zstandard."""
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(_ZSTANDARD):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    unpack = next((opener for magic, opener in _UNPACKERS.items() if start.startswith(magic)), open)
    return unpack(path, "rb")


def check_kind(path: Path, head: bytes) -> None:
    """Raise ValueError for a file that holds neither text nor parquet.

    Args:
        path: the file.
        head: its first bytes, decompressed.

    Raises:
        ValueError: naming the kind that was found and how to convert it.
    """
    kind = next(((name, way) for magic, name, way in _REFUSED if head.startswith(magic)), None)
    if head.startswith(b"PK\x03\x04"):
        kind = _inside_zip(path)
    elif head[257:262] == b"ustar":
        kind = "a tar archive", _UNPACK
    elif kind is None and b"\0" in head and text_encoding(head) == "utf-8-sig" and head.lstrip()[:1] not in b"[{":
        kind = "a binary file of an unknown kind", "write its rows as JSONL or parquet"
    if kind is not None and not head.startswith(PARQUET):
        raise ValueError(f"{path} is {kind[0]}: {kind[1]}; expected {FILES}")


def text_encoding(head: bytes) -> str:
    """Return the encoding of a text: by its byte order mark, or by the position of zero bytes; else UTF-8."""
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), None)
    if marked is not None:
        return marked
    for name, text, zeros in (("utf-16-le", head[:4:2], head[1:4:2]), ("utf-16-be", head[1:4:2], head[:4:2])):
        if zeros and not any(zeros) and all(9 <= byte < 127 for byte in text):
            return name
    return "utf-8-sig"


def _inside_zip(path: Path) -> tuple[str, str]:
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if any(name.startswith("xl/") for name in names):
        return "an Excel workbook (xlsx)", "save the sheet as 'CSV UTF-8'"
    if any(name.endswith("data.pkl") for name in names):
        return "a PyTorch file", _PICKLE
    if any(name.endswith(".npy") for name in names):
        return "a NumPy archive (npz)", _PICKLE
    return "a zip archive", _UNPACK
