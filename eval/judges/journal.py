"""judgements.jsonl: one line a judge prompt, as it comes; a killed run goes on without losing or doubling one."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from cepo.eval.judges.settings import Judge, Judgement, Messages, winner
from cepo.files import read_jsonl, write_text
from cepo.jacobian.reading.judge import read_scores

Record: TypeAlias = dict[str, Any]


_RESULTS = ("summary.jsonl", "report.html")  # what commands write beside the judgements


@dataclass(frozen=True)
class Request:
    """One prompt to be judged.

    Attributes:
        key: names the prompt for good: another run finds what it has by it. No two requests of a run share one.
        messages: the prompt.
        facts: what its record says beside the judgement, such as the subset.
    """

    key: str
    messages: Messages
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Collected:
    """What came of it.

    Attributes:
        records: one a request, by key.
        resumed: how many of them an earlier run had written.
        tokens: tokens generated in this run.
        seconds: of this run, without the time that loading took.
    """

    records: Mapping[str, Record]
    resumed: int
    tokens: int
    seconds: float

    @property
    def judged(self) -> int:
        """How many prompts this run judged."""
        return len(self.records) - self.resumed

    def speed(self) -> str:
        """Return judgements and tokens a second, for people."""
        return _speed(self.judged, self.tokens, self.seconds)


def collect_judgements(
    requests: Sequence[Request],
    path: Path,
    settings: Mapping[str, Any],
    open_judge: Callable[[], Judge],
    *,
    progress: Callable[[int, int, str], None] | None = None,
) -> Collected:
    """Judge every request that the file does not hold yet, and append each judgement as it comes.

    A torn last line, which a killed run leaves, is dropped, and so are judgements with an error: their prompts are
    judged anew. Records of other requests, such as those of a run over more rows, stay.

    Args:
        requests: what to judge.
        path: the JSONL file. A record holds key, settings (their hash), the request's facts, text, scores (of A and B,
            or null), soft (their expectations, or null), winner ("A", "B", "tie" or null), tokens, token_ids, forced,
            seconds and error.
        settings: what decides a judgement; kept in settings.json beside the file, for the message below.
        open_judge: called once, and only where something is left to judge.
        progress: called with (done, in all, speed in words).

    Raises:
        ValueError: for a folder that other settings or another program wrote, or requests that share a key.
    """
    if len({request.key for request in requests}) < len(requests):
        raise ValueError("requests share a key; expected a key of its own for each")
    _check_folder(path, settings)
    mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    kept = _kept_records(path, settings, mark)
    records = {request.key: kept[request.key] for request in requests if request.key in kept}
    pending = [request for request in requests if request.key not in records]
    write_text(path.with_name("settings.json"), json.dumps(settings, sort_keys=True, indent=1) + "\n")
    write_text(path, "".join(_line(record) for record in kept.values()))
    resumed, tokens, started = len(records), 0, time.perf_counter()
    if progress is not None:
        progress(resumed, len(requests), "loading" if pending else "")
    if not pending:
        return Collected(records, resumed, 0, 0.0)
    judge = open_judge()
    started = time.perf_counter()
    with path.open("a", encoding="utf-8") as file:

        def append(index: int, judgement: Judgement) -> None:
            nonlocal tokens
            request = pending[index]
            records[request.key] = _record(request, judgement, mark)
            tokens += judgement.tokens
            file.write(_line(records[request.key]))
            file.flush()
            os.fsync(file.fileno())
            if progress is not None:
                speed = _speed(len(records) - resumed, tokens, time.perf_counter() - started)
                progress(len(records), len(requests), speed)

        judge.judge([request.messages for request in pending], append)
    return Collected(records, resumed, tokens, time.perf_counter() - started)


def content_key(*parts: Any) -> str:
    """Return a key of 16 hexadecimal digits from what JSON can hold, alike on every machine."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _record(request: Request, judgement: Judgement, mark: str) -> Record:
    scores = None if judgement.error else read_scores(judgement.text)
    return {
        "key": request.key,
        "settings": mark,
        **request.facts,
        "text": judgement.text,
        "scores": scores,
        "soft": judgement.soft,
        "winner": winner(scores),
        "tokens": judgement.tokens,
        "token_ids": judgement.token_ids,
        "forced": judgement.forced,
        "seconds": round(judgement.seconds, 4),
        "error": judgement.error,
    }


def _kept_records(path: Path, settings: Mapping[str, Any], mark: str) -> dict[str, Record]:
    """Return the sound records of an earlier run by key, the first of each."""
    kept: dict[str, Record] = {}
    for _, record in read_jsonl(path)[0] if path.is_file() else ():
        if record.get("settings") != mark:
            raise ValueError(_other_settings(path, settings))
        if not record.get("error"):
            kept.setdefault(str(record.get("key")), record)
    return kept


def _check_folder(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to replace files that no run of ours wrote: ours stand beside settings of the same names."""
    beside = path.with_name("settings.json")
    there = [file.name for file in (path, beside, *map(path.with_name, _RESULTS)) if file.exists()]
    try:
        ours = json.loads(beside.read_text(encoding="utf-8")).keys() == settings.keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if there and not ours:
        raise ValueError(
            f"output {str(path.parent)!r} holds {', '.join(there)}, which no earlier run of this command wrote; "
            "name another folder"
        )


def _other_settings(path: Path, settings: Mapping[str, Any]) -> str:
    beside = path.with_name("settings.json")
    try:
        before = json.loads(beside.read_text())
        differing = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        told = ", ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in differing)
    except (OSError, ValueError, TypeError):
        told = ""
    return (
        f"output {str(path.parent)!r} holds judgements of other settings{f' ({told})' if told else ''}; choose another "
        "--output, or delete it"
    )


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _speed(judged: int, tokens: int, seconds: float) -> str:
    if not judged or not seconds > 0:
        return ""
    return f"{judged / seconds:.2f} judgements/s, {tokens / seconds:.1f} tokens/s"
