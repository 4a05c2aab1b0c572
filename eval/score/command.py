"""`cepo score`: read rollouts; write link scores, matrices and heat maps; resumable."""

from __future__ import annotations

import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cepo.eval.score.matrices import check_matrices, drop_matrices, merge_matrices, rows_with_matrices
from cepo.eval.score.page import write_page
from cepo.eval.score.ray import check_ray, score_on_ray
from cepo.eval.score.rows import Line, read_input, rollout_of
from cepo.eval.score.scorer import Scoring, batches_of, donor_pools, open_engine, open_reader, score_lines
from cepo.files import append_jsonl, claim, content_hash, counted, fingerprint, make_folder, read_jsonl, write_jsonl
from cepo.fusion.score import Pools
from cepo.jacobian.engines import check_engine
from cepo.jacobian.loading import ModelSource, check_device, embedding_width, model_fingerprint, resolve_model
from cepo.jacobian.protocol import Engine
from cepo.jacobian.reading.spans import SpanReader

_REASONS = 8  # shown in the summary
_OWN_DONORS = "input (its rows are each other's donors)"


@dataclass(frozen=True, kw_only=True)
class ScoreJob(Scoring):
    """The arguments of `cepo score`.

    Attributes:
        input: file of rollouts, see `open_file` and `FORMS`. A row may have a task_reward in [0, 1], which is then
            fused, and a judged pair a label ("A" or "B": where the chosen response was shown; A by default).
        output: JSONL file to write, one record per row of the input, in order.
        batch_size: rows that are scored together, at least 1; affects results only by rounding.
        jacobians: safetensors file for the matrices, or None.
        html: file for the heat maps, or None.
        workers: Ray workers that score the rows, see `cepo.eval.score.ray`; None for this process.
        worker_threads: CPU threads of each worker.
    """

    input: Path
    output: Path
    batch_size: int = 8
    jacobians: Path | None = None
    html: Path | None = None
    workers: int | None = None
    worker_threads: int = 1


@dataclass(frozen=True)
class ScoreSummary:
    """The result of a run in numbers.

    Attributes:
        rows: records written.
        resumed: how many of them an earlier run had scored.
        malformed: number of completions that cannot be scored.
        reasons: the most frequent reasons why, with their counts.
        broken: place and reason of each row of the input that cannot be used.
        means: by name, mean S of each chain and link, mean effect and mean order leak over the well-formed rows, and
            mean reward over all scored rows, where a malformed completion counts with its reward of 0.
        warnings: what the scores cannot tell.
        without_leak: number of well-formed rows without an order leak; all of them if no leak was computed.
        seconds: time of this run.
        peak_gib: peak resident memory of the process, in GiB.
    """

    rows: int
    resumed: int
    malformed: int
    reasons: Mapping[str, int]
    broken: tuple[str, ...]
    means: Mapping[str, float]
    warnings: tuple[str, ...]
    without_leak: int
    seconds: float
    peak_gib: float


def score_file(job: ScoreJob, *, progress: Callable[[int, int], None] | None = None) -> ScoreSummary:
    """Score every row of the input, and resume an interrupted run with the same settings.

    Records are appended to OUTPUT.partial as they are computed, grouped by prompt, and written to the output in input
    order at the end. An earlier run's record is kept if the model's weights, the settings and the row's content are
    the same. Everything that needs no weights is checked before they are loaded.

    Args:
        job: what to score.
        progress: called with (rows done, rows in total).

    Raises:
        ValueError: for input, settings or a model that cannot be used, or an output of other settings or weights.
    """
    started = time.perf_counter()
    lines, broken = read_input(job.input, layout=job.layout)
    if len(broken) == len(lines):
        raise ValueError(f"input {str(job.input)!r} has no usable row; {broken[0][1]}")
    source = _check(job)
    partial, shards = _beside(job.output, ".partial"), _beside(job.output, ".jacobians")
    settings = _settings(job, source, lines)
    if job.jacobians is not None:
        check_matrices(job.jacobians, content_hash(settings))
    results = [job.output, partial, shards]
    claim(_beside(job.output, ".settings.json"), settings, results=results, follows=[_OWN_DONORS])
    done = _earlier_records(job, lines)
    resumed = frozenset(done)
    drop_matrices(shards, keep=resumed)
    partial.unlink(missing_ok=True)
    if done:  # a run that fails before its first record leaves no file, so the next may have other settings
        write_jsonl(partial, done.values())
    pending = {row: line for row, line in enumerate(lines) if row not in done}
    usable = any(line.row is not None for line in pending.values())
    reader = open_reader(job, source)
    _check_prompts(job, lines, reader)
    pools = donor_pools(job, lines, reader, origin=job.input) if usable else None
    engine = open_engine(job, source) if usable and job.workers is None else None
    scored = _score_here(job, pending, reader, engine, pools)
    if usable and job.workers is not None:
        scored = score_on_ray(
            job, pending, pools, workers=job.workers, threads=job.worker_threads, batch_size=job.batch_size
        )
    for records in scored:
        append_jsonl(partial, records)
        done.update({record["row"]: record for record in records})
        if progress is not None:
            progress(len(done), len(lines))
    records = [done[row] for row in range(len(lines))]
    warnings = _warnings(job, records)
    if job.jacobians is not None:
        merge_matrices(shards, job.jacobians, content_hash(settings), keep=resumed)
    if job.html is not None:
        rollouts = [rollout_of(line, reader, raw=job.raw) for line in lines]
        texts = [(reader.texts(one.token_ids), len(one.prompt_ids)) for one in rollouts]
        write_page(job.html, job, records, texts, source=str(job.input), warnings=warnings)
    write_jsonl(job.output, records)
    partial.unlink(missing_ok=True)
    shutil.rmtree(shards, ignore_errors=True)
    return _summarise(records, warnings, len(resumed), time.perf_counter() - started)


def _check(job: ScoreJob) -> ModelSource:
    """Check what can be checked without weights, and return the model's source."""
    job.config.parsed_links(job.layout)
    if job.batch_size < 1:
        raise ValueError(f"batch_size is {job.batch_size}; expected at least 1")
    source = resolve_model(job.model)
    width = embedding_width(source)
    if width:
        job.config.check_width(width)
    for path in (job.output, job.jacobians, job.html):
        if path is not None:
            make_folder(path.absolute().parent)
    if job.jacobians is not None and not job.config.reads_jacobians:
        raise ValueError(
            f"--save-jacobians has nothing to save: the score {job.config.score!r} reads no Jacobian; add --also "
            "influence (or phi), or leave it out"
        )
    if job.jacobians is not None and job.workers is not None:
        raise ValueError("--save-jacobians needs one process, whose disk holds the matrices; score without --ray")
    if job.workers is None:
        check_device(job.device)
    else:
        check_ray(job, job.workers)
    check_engine(job.engine)
    if not job.memory_gib > 0:
        raise ValueError(f"memory_gib is {job.memory_gib}; expected a positive number of GiB")
    return source


def _settings(job: ScoreJob, source: ModelSource, lines: Sequence[Line]) -> dict[str, Any]:
    """Return the settings that decide the records; with donors from the input, they include every row's content."""
    own = {_OWN_DONORS: content_hash([line.content for line in lines])}
    return {
        **(own if job.config.reads_effects and job.donors is None else {}),
        "donors_file": fingerprint(job.donors) if job.donors else None,
        "command": "cepo score",
        "model": model_fingerprint(source),
        "adapters": job.adapters,
        "dtype": job.dtype,
        "engine": job.engine,
        "raw": job.raw,
        # The prompt's fixed pieces are long texts, so they enter by their hash.
        "layout": {
            name: content_hash(part) if isinstance(part, tuple) else part for name, part in vars(job.layout).items()
        },
        "config": asdict(job.config),
    }


def _earlier_records(job: ScoreJob, lines: Sequence[Line]) -> dict[int, dict[str, Any]]:
    """Return the records of earlier runs whose row has the same content and, if they are to be saved, its matrices."""
    partial, shards = _beside(job.output, ".partial"), _beside(job.output, ".jacobians")
    saved = rows_with_matrices(shards, job.jacobians)
    done: dict[int, dict[str, Any]] = {}
    for path in (job.output, partial):
        for _, record in read_jsonl(path)[0] if path.is_file() else ():
            row = int(record["row"])
            holds = row < len(lines) and record["content"] == lines[row].content
            if holds and (job.jacobians is None or not record["spans"] or saved.get(row) == record["content"]):
                done[row] = {**record, "id": lines[row].name}
    return dict(sorted(done.items()))


def _check_prompts(job: ScoreJob, lines: Sequence[Line], reader: SpanReader) -> None:
    """Raise ValueError, with advice, for prompts that need the chat template of a model that has none."""
    if getattr(reader.tokenizer, "chat_template", None):
        return
    if any(isinstance(line.prompt, list) for line in lines if line.is_text):
        raise ValueError(
            f"model {job.model!r} has no chat template, which is needed for messages and for the judge's prompt around "
            "chosen and rejected; give rows of prompt and completion as text, and --raw"
        )
    if not job.raw and any(line.is_text for line in lines):
        raise ValueError(f"model {job.model!r} has no chat template for prompts given as text; score with --raw")


def _score_here(
    job: ScoreJob, pending: Mapping[int, Line], reader: SpanReader, engine: Engine | None, pools: Pools | None
) -> Iterator[list[dict[str, Any]]]:
    """Yield each record, in a list of its own, as soon as it is computed."""
    matrices = _beside(job.output, ".jacobians") if job.jacobians is not None else None
    for batch in batches_of(pending, job.batch_size):
        lines = [pending[row] for row in batch]
        for _, record in score_lines(job, lines, reader, engine, pools, rows=batch, matrices=matrices):
            yield [record]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _warnings(job: ScoreJob, records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return what the scores cannot tell: the cause of a verdict that every donor led to as well."""
    links = [link.name for link in job.config.parsed_links(job.layout) if link.target == job.layout.names[-1]]
    sound = [record["links"] for record in records if record["malformed"] is None]
    alike = sum(any(of_row[name]["against"] == "same verdict" for name in links) for of_row in sound)
    if not alike:
        return ()
    return (
        f"In {alike} of {counted(len(sound), 'well-formed row')}, every donor led to the row's own verdict, so the "
        "effect on the verdict is near 0 whatever caused it. Score rows of more prompts, with other verdicts, or name "
        "a file of such rollouts with --donors.",
    )


def _summarise(
    records: Sequence[Mapping[str, Any]], warnings: tuple[str, ...], resumed: int, seconds: float
) -> ScoreSummary:
    sound = [record for record in records if record["malformed"] is None]
    means: dict[str, float] = {}
    if sound:
        scores = [{name: link["S"] for name, link in record["links"].items()} | record["S"] for record in sound]
        names = {**sound[0]["S"], **sound[0]["links"]}
        means = {f"S {name} (well-formed)": sum(row[name] for row in scores) / len(sound) for name in names}
    for name in sound[0]["links"] if sound else ():
        effects = [delta for record in sound if (delta := record["links"][name]["delta"]) is not None]
        if effects:
            means[f"effect {name} in nats"] = sum(effects) / len(effects)
    rewards = [record["reward"] for record in records if not record["broken"] and record["reward"] is not None]
    if rewards:
        means["reward (all completions)"] = sum(rewards) / len(rewards)
    leaks = [record["order_leak"] for record in sound if record["order_leak"] is not None]
    if leaks:
        means["order leak in nats"] = sum(leaks) / len(leaks)
    wrong = [record for record in records if record["malformed"] is not None]
    reasons = Counter(record["malformed"] for record in wrong if not record["broken"])
    return ScoreSummary(
        rows=len(records),
        resumed=resumed,
        malformed=reasons.total(),
        reasons=dict(reasons.most_common(_REASONS)),
        broken=tuple(record["malformed"] for record in wrong if record["broken"]),
        means=means,
        warnings=warnings,
        without_leak=len(sound) - len(leaks),
        seconds=seconds,
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )
