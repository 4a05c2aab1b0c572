"""Files that commands write: atomically, and resumed only with the settings and the content that they began with.

Standard library only, so that every folder may import it.
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Row: TypeAlias = dict[str, Any]
BrokenLine: TypeAlias = tuple[int, str]
"""Number of a line, from 1, and the reason why it cannot be used."""

SETTINGS = "settings.json"
_SHOWN = 60  # characters of a setting in an error
_FINGERPRINT = re.compile("[0-9a-f]{16}")  # not shown in errors
_locks: dict[Path, IO[str]] = {}  # of the outputs that this process claimed; an open file holds its lock


# Writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, and replace `path` by what the block writes there.

    A file is replaced atomically. A folder is moved aside first, so that a kill between the two moves leaves none;
    a kill at any other time leaves the old one or the new one, whole. A block that raises changes nothing.

    Args:
        path: a file or a folder, whose parent exists.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    replaced = path.with_name(f"{path.name}.{os.getpid()}.old.tmp")
    _remove(unfinished)
    try:
        yield unfinished
        if path.is_dir() and unfinished.exists():  # only an empty folder can be replaced by renaming
            os.replace(path, replaced)
        os.replace(unfinished, path)
    finally:
        _remove(unfinished)
        _remove(replaced)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, see `replacing`."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records atomically, one `json_line` each; they may be a generator and are not all held in memory."""
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(f"{json_line(record)}\n" for record in records)


def json_line(record: Mapping[str, Any]) -> str:
    """Return a JSON object on one line; NaN becomes null, infinities become "inf" and "-inf"."""
    return json.dumps(_plain(record))


def append_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a JSONL file; they are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(f"{json_line(record)}\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Make a folder for results unless it is there.

    Raises:
        ValueError: if it cannot be made, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output is {str(path)!r}, which cannot be created: {error.strerror or error}; expected a folder"
        ) from error


def means_path(name: str) -> bool:
    """Return whether a name that could be a hub id is meant as a path.

    It is if it begins with `.`, `/` or `~`, has more than one separator, or has one and begins with an existing folder.
    """
    first, *rest = name.split("/")
    return name.startswith((".", "/", "~")) or len(rest) > 1 or (bool(rest) and Path(first).is_dir())


# Reading


def read_jsonl(path: str | Path) -> tuple[list[tuple[int, Row]], list[BrokenLine]]:
    """Read a file that a command wrote, with a JSON object per line; invalid lines do not affect the others.

    Data that users bring is read by `cepo.train.source.open_file`.

    Args:
        path: a UTF-8 file.

    Returns:
        Pairs (line number from 1, object) of the valid lines, and pairs (line number, reason) of the others.

    Raises:
        ValueError: if there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; expected a .jsonl file with one JSON object per line")
    with open(path, "rb") as lines:
        read = [(number, parse_line(line)) for number, line in enumerate(lines, start=1)]
    rows = [(number, row) for number, row in read if isinstance(row, dict)]
    return rows, [(number, reason) for number, reason in read if isinstance(reason, str)]


def parse_line(line: bytes) -> Row | str | None:
    """Return the object in a line of JSONL, the reason why there is none, or None for a blank line.

    CRLF, NaN, and a byte order mark at the start of any line (as in concatenated files) are accepted.
    """
    try:
        text = line.decode("utf-8-sig").strip()
        row = json.loads(text) if text else None
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start + 1} of the line"
    except json.JSONDecodeError as error:
        return f"not JSON at character {error.pos + 1}: {error.msg}"
    except (ValueError, RecursionError) as error:
        return f"JSON that can't be held: {error}"
    if isinstance(row, dict) or not text:
        return row
    return f"holds {kind_of(row)}; expected a JSON object"


def kind_of(value: Any) -> str:
    """Return the kind of a value, in terms of JSON, YAML and tables."""
    if isinstance(value, bool):
        return "true or false"
    words = {str: "text", type(None): "nothing", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return words.get(type(value), f"a {type(value).__name__}")


def counted(count: int, noun: str) -> str:
    """Return a count and its noun in words: "1 row", "2 rows"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


# Resuming


def resume_jsonl(
    path: Path,
    key: Callable[[Row], Any] = lambda record: record["key"],
    *,
    belongs: Callable[[Row], bool] = lambda record: True,
) -> dict[Any, Row]:
    """Return the records that an earlier run appended, by key.

    The file is rewritten without truncated lines, failures (records with an `error`) and duplicates.

    Args:
        path: a file that `append_jsonl` wrote; it may be missing.
        key: record -> key; the last record with a key is kept.
        belongs: record -> whether this run asks for it too.

    Raises:
        ValueError: for records that do not belong; the file stays as it is.
    """
    if not path.is_file():
        return {}
    kept = {key(record): record for _, record in read_jsonl(path)[0] if not record.get("error")}
    foreign = sum(not belongs(record) for record in kept.values())
    if foreign:
        raise ValueError(
            f"output {path.parent} began with other data: {foreign} of the {len(kept)} records in {path.name} belong "
            "to rows that this run does not read; name another output, or use the earlier data, to which rows may be "
            "added"
        )
    write_jsonl(path, kept.values())
    return kept


def claim(
    settings_file: Path,
    settings: Mapping[str, Any],
    *,
    results: Sequence[Path],
    written: Sequence[Path] = (),
    follows: Sequence[str] = (),
) -> bool:
    """Record this run's settings for an output, or refuse it; every resumable command calls this before it writes.

    The output is refused if it has results of other settings. Settings hold everything that decides the results, with
    data and weights identified by their content (see `content_hash` and `fingerprint`), never by a path or a name
    alone. Unfinished temporary files of a killed run are removed. Until this process ends, the output is locked against
    others, except those that it started.

    Args:
        settings_file: file of the settings: OUTPUT/settings.json for a folder, OUTPUT.settings.json for a file; its
            folder is created if needed.
        settings: values by name, nested or not; "command" names the command that writes the output.
        results: files and folders that hold an earlier run's work if they exist.
        written: other files that the command writes, which hold nothing to resume from.
        follows: settings that a run has or lacks because of others; where these differ, they alone are named.

    Returns:
        Whether there are results to resume from.

    Raises:
        ValueError: for results of other settings, naming each that differs; for an output of another command, with or
            without results; for results or written files without settings, which another program wrote; for an output
            that another process is writing to.
    """
    make_folder(settings_file.parent)
    there = [path.name for path in results if path.exists()]
    is_folder = settings_file.name == SETTINGS
    output = settings_file.parent if is_folder else str(settings_file).removesuffix(f".{SETTINGS}")
    now = _flat(json.loads(json.dumps(_plain(settings), default=str)))
    before = _read_settings(settings_file)
    foreign = there + [path.name for path in written if path.exists()]
    if before is None and (foreign or settings_file.exists()):
        raise ValueError(
            f"output {output} cannot be used: no earlier run of this command wrote "
            f"{', '.join(foreign) or settings_file.name}; name another output"
        )
    if before is not None and before["command"] != now["command"]:
        raise ValueError(f"output {output} holds results of another command, {before['command']}; name another output")
    told = _differences(before or {}, now, follows)
    if there and told:
        raise ValueError(
            f"output {output} holds results made with other settings: {'; '.join(told)}; name another output, move "
            "this one away, or repeat the earlier settings"
        )
    _lock(settings_file.with_name(f".{settings_file.name}.lock"), output)
    for path in (settings_file, *results):
        for unfinished in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            _remove(unfinished)
    write_text(settings_file, json.dumps(now, indent=1) + "\n")
    return bool(there)


def content_hash(*parts: Any) -> str:
    """Return a hash, 16 hexadecimal digits, of values that JSON can hold; it is the same on every machine."""
    return hashlib.sha256(json.dumps(_plain(parts), sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(path: Path, names: Sequence[str] = ("*",)) -> str:
    """Return a hash, 16 hexadecimal digits, of the content of a file, or of the files directly in a folder.

    Args:
        path: a file or a folder.
        names: patterns, such as "*.json", of the files in a folder to include.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file() and (file == path or any(fnmatch.fnmatch(file.name, name) for name in names)):
            with file.open("rb") as opened:
                digest.update(f"{file.name if path.is_dir() else ''} {file.stat().st_size}\n".encode())
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def _lock(path: Path, output: Path | str) -> None:
    """Lock an output until this process ends, where the platform and the file system have locks.

    The lock is the kernel's, so that a killed process leaves none. The file only says who holds it.

    Raises:
        ValueError: if another process holds the lock, unless it started this one.
    """
    path = path.absolute()
    if fcntl is None or path in _locks:
        return
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read()
        if holder == f"{os.getppid()} on {platform.node()}":
            return
        raise ValueError(
            f"output {output} is being written to by another process (pid {holder or 'unknown'}); wait until it ends, "
            "stop it, or name another output"
        ) from None
    except OSError:
        pass  # such as a network file system without locks
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        return _lock(path, output)  # its holder ended and removed it after it was opened here
    file.truncate(0)
    file.write(f"{os.getpid()} on {platform.node()}")
    file.flush()
    _locks[path] = file
    atexit.register(path.unlink, missing_ok=True)


def _plain(value: Any) -> Any:
    """Return the value with tuples as lists, NaN as None and infinities as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Row:
    """Return nested settings as a flat mapping with dotted names."""
    flat: Row = {}
    for name, value in settings.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def _read_settings(path: Path) -> Row | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "command" in found else None


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], follows: Sequence[str]) -> list[str]:
    """Return a description of each difference between flat settings: its name, and the values before and now."""
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    causes = [name for name in differing if name not in follows or (name in before and name in now)]
    differing = causes or differing
    # Entries of lists of objects, such as rewards, are named by number: rewards.2.weight.
    old, new = (_flat({name: _numbered(settings.get(name)) for name in differing}) for settings in (before, now))
    return [
        _difference(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)
    ]


def _numbered(value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {str(number): item for number, item in enumerate(value, start=1)}
    return value


def _difference(name: str, was: Any, now: Any) -> str:
    if all(isinstance(value, str) and _FINGERPRINT.fullmatch(value) for value in (was, now)):
        return f"{name} has other content"
    texts = _in_words(was), _in_words(now)
    same = next(
        (place for place, pair in enumerate(zip(*texts, strict=False)) if len({*pair}) > 1), min(map(len, texts))
    )
    start = max(0, same - _SHOWN // 2) if max(map(len, texts)) > _SHOWN else 0  # long values are cut to what differs
    cut = [
        f"{'...' if start else ''}{text[start : start + _SHOWN]}{'...' if text[start + _SHOWN :] else ''}"
        for text in texts
    ]
    return f"{name} was {cut[0]} and is {cut[1]}"


def _in_words(value: Any) -> str:
    """Return a setting's value as it is written on the command line or in a recipe."""
    if value is None:
        return "not set"
    if isinstance(value, list):
        return ", ".join(map(_in_words, value)) or "none"
    return value or "empty" if isinstance(value, str) else json.dumps(value)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
