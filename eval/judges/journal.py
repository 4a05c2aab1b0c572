"""judgements.jsonl: one line per prompt, written once it is judged, so that a killed run loses and repeats none."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from cepo.eval.judges.settings import Answer, Judge, Messages, Progress
from cepo.files import append_jsonl, claim, content_hash, resume_jsonl
from cepo.jacobian.reading.judge import read_scores

logger = logging.getLogger("cepo")

Record: TypeAlias = dict[str, Any]

_RESULTS = ("judgements.jsonl", "summary.jsonl", "report.html")


@dataclass(frozen=True)
class JudgeTask:
    """One prompt to be judged.

    Attributes:
        key: unique name of the task within its folder.
        messages: the prompt.
        facts: what its record holds besides the judgement, such as the subset.
    """

    key: str
    messages: Messages
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Collected:
    """The judgements of a run.

    Attributes:
        records: one record per task, by its key.
        resumed: number of records that an earlier run had written.
        tokens: number of tokens generated in this run.
        seconds: seconds of this run, without loading the judge.
    """

    records: Mapping[str, Record]
    resumed: int
    tokens: int
    seconds: float

    @property
    def failed(self) -> Counter[str]:
        """Number of prompts that were not judged, by reason, such as a server that did not answer."""
        return Counter(str(record["error"]) for record in self.records.values() if record["error"])

    @property
    def forced(self) -> int:
        """Number of judgements whose scores were forced."""
        return sum(record.get("forced", False) for record in self.records.values())

    def speed(self) -> str:
        """Return judgements and tokens per second, as text."""
        return _speed(len(self.records) - self.resumed, self.tokens, self.seconds)


def collect_judgements(
    tasks: Sequence[JudgeTask],
    output: Path,
    settings: Mapping[str, Any],
    open_judge: Callable[[], Judge],
    *,
    belongs: Callable[[Record], bool] | None = None,
    progress: Progress | None = None,
) -> Collected:
    """Judge every task without a judgement in the folder, and append each judgement as soon as it is made.

    A task whose judgement failed is judged again. Tasks may be added to a folder, in any order, but every judgement in
    it must answer one of them, so that the file holds what the summary counts. A warning says how many judgements were
    cut off before their verdict.

    Args:
        tasks: what to judge.
        output: folder of judgements.jsonl. A record holds key, prompt (hash of the messages), the task's facts, and for
            a judgement text, scores (of A and B, or null), soft (expected scores, or null), winner ("A", "B", "tie" or
            null), tokens, token_ids, cut, forced, seconds and error; for a reward, see `cepo.eval.judges.reward`.
        settings: everything else that determines a judgement, see `cepo.files.claim`.
        open_judge: opens the judge; called once, and only if something is left to judge.
        belongs: whether a record in the folder is of this run, whose tasks come in several calls; by default, whether
            it answers one of `tasks`.
        progress: called after each judgement.

    Raises:
        ValueError: for a folder with results of other settings, other data or another program, or tasks that share a
            key.
    """
    if len({task.key for task in tasks}) < len(tasks):
        raise ValueError("tasks share a key; expected a different key for each")
    claim(output / "settings.json", settings, results=[output / name for name in _RESULTS])
    path = output / "judgements.jsonl"
    prompts = {task.key: content_hash(task.messages) for task in tasks}
    kept = resume_jsonl(
        path,
        lambda record: (record.get("key"), record.get("prompt")),
        belongs=belongs or (lambda record: prompts.get(record["key"]) == record["prompt"]),
    )
    facts = {task.key: task.facts for task in tasks}  # they may have changed, such as the line of a row without an id
    records = {key: {**kept[key, prompt], **facts[key]} for key, prompt in prompts.items() if (key, prompt) in kept}
    pending = [task for task in tasks if task.key not in records]
    resumed, tokens = len(records), 0
    if progress is not None:
        progress(resumed, len(tasks), "loading" if pending else "")
    if not pending:
        return Collected(records, resumed, 0, 0.0)
    judge = open_judge()
    started = time.perf_counter()
    for index, answer in judge.judge([task.messages for task in pending]):
        task = pending[index]
        records[task.key] = judgement_record(task, answer)
        tokens += answer.tokens
        append_jsonl(path, [records[task.key]])
        if progress is not None:
            speed = _speed(len(records) - resumed, tokens, time.perf_counter() - started)
            progress(len(records), len(tasks), speed)
    _warn_of_unread(list(records.values()))
    return Collected(records, resumed, tokens, time.perf_counter() - started)


def judgement_record(task: JudgeTask, answer: Answer) -> Record:
    """Return the line of judgements.jsonl."""
    return {"key": task.key, "prompt": content_hash(task.messages), **task.facts, **answer.record()}


def _warn_of_unread(records: Sequence[Record]) -> None:
    """Warn of judgements without a readable verdict if the user can do something about it."""
    unread = [record for record in records if not record["error"] and record.get("scores", ()) is None]
    cut = sum(record.get("cut", False) for record in unread)
    if cut:
        logger.warning(
            "%d of %d judgements were cut before their verdict, which counts as none; raise --max-new-tokens to let "
            "them finish",
            cut,
            len(records),
        )
    otherwise = sum(read_scores(record["text"], verdicts="lenient") is not None for record in unread)
    if otherwise:
        logger.warning(
            "%d of %d judgements hold a verdict in another form than the strict one, which counts as none; "
            "--verdicts lenient reads it",
            otherwise,
            len(records),
        )


def _speed(judged: int, tokens: int, seconds: float) -> str:
    if not judged or not seconds > 0:
        return ""
    return f"{judged / seconds:.2f} judgements/s" + (f", {tokens / seconds:.1f} tokens/s" if tokens else "")
