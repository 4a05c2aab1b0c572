"""`cepo score`: rollouts in (JSONL), link scores, matrices and heat maps out; resumable."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cepo.eval.report.heat_maps import HeatMap
from cepo.eval.report.page import write_report
from cepo.eval.score.rows import is_text, read_input, read_row, task_reward
from cepo.files import make_folder, read_jsonl, write_text
from cepo.fusion.config import RewardConfig
from cepo.fusion.score import RolloutScore, score_rollouts
from cepo.jacobian.engines import EngineName, check_engine, new_engine
from cepo.jacobian.loading import check_device, embedding_width, load_model, load_tokenizer, resolve_model
from cepo.jacobian.protocol import Engine
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout

_REASONS = 3  # that the summary tells


@dataclass(frozen=True)
class ScoreJob:
    """What `cepo score` was asked to do.

    Attributes:
        model: see `resolve_model`.
        input: JSONL file of rollouts, see FORMS. A row may carry task_reward in [0, 1], which is then fused, and a
            preference row label ("A" or "B": where the chosen response was shown; A by default).
        output: JSONL file to write, one record a line of the input, in order.
        config: links, hardening, score, fusion.
        layout: what completions look like.
        raw: take prompt text as it is, without the chat template.
        batch_size: rows read and written at once; changes no result.
        jacobians: safetensors file for the matrices, or None.
        html: file for the heat maps, or None.
        dtype: dtype of the weights.
        device: where to run.
        adapters: False switches the adapters of a PEFT model off.
        engine: "group" or "autograd" (the oracle).
        memory_gib: what the group engine may add to the model's memory, in GiB. A figure, not what happens to be free:
            the chunks that follow from it decide the last bit of a result.
        trust_remote_code: whether a hub repository's own code may run.
    """

    model: str
    input: Path
    output: Path
    config: RewardConfig
    layout: Layout
    raw: bool = False
    batch_size: int = 8
    jacobians: Path | None = None
    html: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    adapters: bool = True
    engine: EngineName = "group"
    memory_gib: float = 4.0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class ScoreSummary:
    """What came of it: rows written, rows taken from an earlier run, malformed ones, broken lines, seconds, memory.

    `reasons` holds the most frequent reasons why output is malformed, with their counts.
    """

    rows: int
    resumed: int
    malformed: int
    reasons: Mapping[str, int]
    broken: tuple[tuple[int, str], ...]
    means: Mapping[str, float]
    seconds: float
    peak_gib: float


def score_file(job: ScoreJob, *, progress: Callable[[int, int], None] | None = None) -> ScoreSummary:
    """Score every row of the input, going on from an interrupted run of the same settings.

    Records go to a file beside the output as they come and move into place when all are there. A row counts as done if
    its settings and content are the same. Everything that needs no weights is checked before they are loaded.

    Args:
        job: what to do.
        progress: called with (rows done, rows in all).

    Raises:
        ValueError: for input, settings or a model that cannot be used.
    """
    started = time.perf_counter()
    lines, broken = read_input(job.input)
    job.config.parsed_links(job.layout)
    if job.batch_size < 1:
        raise ValueError(f"batch_size is {job.batch_size}; expected at least 1")
    source = resolve_model(job.model)
    width = embedding_width(source)
    if width:
        job.config.check_width(width)
    _check_paths(job)
    check_device(job.device)
    check_engine(job.engine)
    if not job.memory_gib > 0:
        raise ValueError(f"memory_gib is {job.memory_gib}; expected a positive number of GiB")
    partial, shards = _beside(job.output, ".partial"), _beside(job.output, ".jacobians")
    settings = _fingerprint(job)
    done = _done_records(job, partial, shards, lines, settings)
    resumed = frozenset(done)
    if not resumed:
        shutil.rmtree(shards, ignore_errors=True)  # of a run whose records are gone
    _write_lines(partial, done.values())
    pending = [(row, line) for row, line in enumerate(lines) if row not in done]
    reader, engine = None, None
    if any(isinstance(line, dict) for _, line in pending):
        model, tokenizer = load_model(
            source, dtype=job.dtype, device=job.device, trust_remote_code=job.trust_remote_code
        )
        if not job.raw and not getattr(tokenizer, "chat_template", None) and any(is_text(line) for line in lines):
            raise ValueError(f"model {job.model!r} has no chat template for prompts given as text; score with --raw")
        reader, engine = (
            SpanReader(tokenizer, job.layout),
            new_engine(job.engine, model, adapters=job.adapters, memory_budget=job.memory_gib * 2**30),
        )
    elif job.html is not None:
        reader = SpanReader(load_tokenizer(source, trust_remote_code=job.trust_remote_code), job.layout)
    for start in range(0, len(pending), job.batch_size):
        batch = pending[start : start + job.batch_size]
        records = [_broken_record(row, line) for row, line in batch if isinstance(line, str)]
        rows = [(row, line) for row, line in batch if isinstance(line, dict)]
        if reader is not None and engine is not None and rows:
            records += _score_rows(job, rows, reader, engine, shards)
        for record in records:
            content = _content_hash(lines[record["row"]])
            done[record["row"]] = {**record, "settings": settings, "content": content}
        _append_lines(partial, (done[row] for row, _ in batch))
        if progress is not None:
            progress(len(resumed) + start + len(batch), len(lines))
    ordered = [done[row] for row in range(len(lines))]
    if job.jacobians is not None:
        _merge_jacobians(shards, job.jacobians, resumed)
    if job.html is not None:
        _write_html(job, ordered, reader, lines)
    _write_lines(partial, ordered)
    os.replace(partial, job.output)
    shutil.rmtree(shards, ignore_errors=True)
    return _summarise(ordered, len(resumed), broken, time.perf_counter() - started)


def _score_rows(
    job: ScoreJob, rows: Sequence[tuple[int, dict[str, Any]]], reader: SpanReader, engine: Engine, shards: Path
) -> list[dict[str, Any]]:
    read = [read_row(row, reader.tokenizer, reader, raw=job.raw) for _, row in rows]
    rollouts = [rollout for rollout, _ in read if rollout is not None]
    tasks = [task_reward(row) for (_, row), (rollout, _) in zip(rows, read, strict=True) if rollout is not None]
    scores = (  # one by one: then a row's record is the same to the last bit, whatever rows stand beside it
        score_rollouts([rollout], engine, job.config, job.layout, task_rewards=[task], keep_jacobians=True)[0]
        for rollout, task in zip(rollouts, tasks, strict=True)
    )
    records: list[dict[str, Any]] = []
    for (index, row), (rollout, reason) in zip(rows, read, strict=True):
        if rollout is None:
            records.append(_broken_record(index, str(reason), row.get("id")))
            continue
        score = next(scores)
        records.append(_record(index, row, rollout, score))
        if job.jacobians is not None:
            shards.mkdir(exist_ok=True)
            tensors = _tensors(index, rollout, score)
            unfinished = shards / f"{index}.tmp"
            save_file(tensors, unfinished)
            os.replace(unfinished, shards / f"{index}.safetensors")
    return records


def _record(index: int, row: Mapping[str, Any], rollout: Rollout, score: RolloutScore) -> dict[str, Any]:
    links = {}
    for name, link in score.links.items():
        jacobian, _ = score.jacobians[name]
        facts = asdict(link)
        links[name] = {
            "S": facts.pop("value"),
            **{key: value for key, value in facts.items() if key != "link"},
            "source_positions": list(jacobian.source_positions),
            "target_positions": list(jacobian.target_positions),
            "row_norms": [float(f"{norm:.6g}") for norm in jacobian.jac_SD.double().norm(dim=1).tolist()],
        }
    return {
        "row": index,
        "id": row.get("id"),
        "reward": score.reward,
        "malformed": score.malformed,
        "task_reward": task_reward(row),
        "found_by": rollout.found_by if score.malformed is None else None,
        "prompt_tokens": len(rollout.prompt_ids),
        "completion_tokens": len(rollout.completion_ids),
        "spans": {name: {"text": span.text, "tokens": len(span.positions)} for name, span in rollout.spans.items()},
        "links": links,
    }


def _tensors(index: int, rollout: Rollout, score: RolloutScore) -> dict[str, torch.Tensor]:
    tensors = {f"{index}/token_ids": torch.tensor(rollout.token_ids)}
    for name, (jacobian, residual_SD) in score.jacobians.items():
        tensors[f"{index}/{name}/base"] = jacobian.jac_SD.cpu().contiguous()
        # A residual that nothing was taken from is the base itself, and safetensors takes no shared storage.
        tensors[f"{index}/{name}/residual"] = residual_SD.cpu().clone().contiguous()
        tensors[f"{index}/{name}/source_positions"] = torch.tensor(jacobian.source_positions)
        tensors[f"{index}/{name}/target_positions"] = torch.tensor(jacobian.target_positions)
    return tensors


def _merge_jacobians(shards: Path, target: Path, resumed: frozenset[int]) -> None:
    """Move the rows' matrices into one file; of a file that is there, rows that this run took over are kept."""
    tensors: dict[str, torch.Tensor] = {}
    for file in [target, *sorted(shards.glob("*.safetensors"), key=lambda path: int(path.stem))]:
        if file.is_file():
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if file != target or int(key.split("/")[0]) in resumed:
                        tensors[key] = opened.get_tensor(key)
    unfinished = _beside(target, ".tmp")
    save_file(tensors, unfinished)
    os.replace(unfinished, target)


def _write_html(
    job: ScoreJob, records: Sequence[Mapping[str, Any]], reader: SpanReader | None, lines: Sequence[Any]
) -> None:
    maps = []
    for record in records:
        line = lines[record["row"]]
        rollout = None
        if reader is not None and isinstance(line, dict):
            rollout, _ = read_row(line, reader.tokenizer, reader, raw=job.raw)
        name = f"row {record['row']}" + (f", {record['id']}" if record.get("id") else "")
        facts = {"reward": f"{record['reward']:.4f}"}
        facts |= {f"S {link}": f"{values['S']:.4f}" for link, values in record["links"].items()}
        maps.append(
            HeatMap(
                title=name,
                tokens=tuple(reader.texts(rollout.token_ids)) if reader and rollout else (),
                prompt_tokens=len(rollout.prompt_ids) if rollout else 0,
                links={
                    link: dict(zip(values["source_positions"], values["row_norms"], strict=True))
                    for link, values in record["links"].items()
                },
                targets={link: tuple(values["target_positions"]) for link, values in record["links"].items()},
                facts=facts,
                malformed=record["malformed"],
            )
        )
    config = job.config
    summary = {
        "model": job.model,
        "input": str(job.input),
        "links": ", ".join(f"{name} (weight {weight:g})" for name, weight in config.links.items()),
        "score": config.score,
        "hardening": f"K = {config.counterfactuals}, "
        + (f"rank = {config.rank}" if config.energy is None else f"energy = {config.energy}"),
    }
    assert job.html is not None
    write_report(job.html, title="cepo score", summary=summary, heat_maps={"Rollouts": maps})


def _check_paths(job: ScoreJob) -> None:
    """Refuse files that cannot be written, or that are one another's or the input, before anything is computed."""
    taken = {job.input.resolve(): "--input"}
    for option, path in (("--output", job.output), ("--save-jacobians", job.jacobians), ("--html", job.html)):
        if path is None:
            continue
        if path.resolve() in taken:
            raise ValueError(f"{option} is {str(path)!r}, the same file as {taken[path.resolve()]}; name another")
        taken[path.resolve()] = option
        make_folder(path.absolute().parent)
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            what = "is a folder" if path.is_dir() else "lies in a folder that cannot be written to"
            raise ValueError(f"{option} is {str(path)!r}, which {what}; expected a file")
    if job.jacobians is not None and job.jacobians.is_file():
        try:
            with safe_open(job.jacobians, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"--save-jacobians is {str(job.jacobians)!r}, which exists and is no safetensors file ({error}); "
                "name another"
            ) from error


def _broken_record(index: int, reason: str, name: Any = None) -> dict[str, Any]:
    """Return the record of a line that gave no rollout, with the keys of any other."""
    record: dict[str, Any] = {"row": index, "id": name, "reward": 0.0, "malformed": reason, "task_reward": None}
    return {**record, "found_by": None, "prompt_tokens": 0, "completion_tokens": 0, "spans": {}, "links": {}}


def _done_records(
    job: ScoreJob, partial: Path, shards: Path, lines: Sequence[Any], settings: str
) -> dict[int, dict[str, Any]]:
    """Return the records of an earlier run that still hold, by row."""
    done: dict[int, dict[str, Any]] = {}
    have_matrices = {int(path.stem) for path in shards.glob("*.safetensors")}
    if job.jacobians is not None and job.jacobians.is_file():
        with safe_open(job.jacobians, framework="pt") as opened:
            have_matrices |= {int(key.split("/")[0]) for key in opened.keys()}  # noqa: SIM118
    for path in (job.output, partial):
        for _, record in read_jsonl(path)[0] if path.is_file() else ():
            if record.get("settings") != settings:
                raise ValueError(
                    f"output {str(path)!r} comes from other settings or another model; "
                    "choose another --output, or delete it"
                )
            row = int(record["row"])
            holds = row < len(lines) and record.get("content") == _content_hash(lines[row])
            needs_matrices = job.jacobians is not None and bool(record.get("spans"))
            if holds and (not needs_matrices or row in have_matrices):
                done[row] = record
    return dict(sorted(done.items()))


def _fingerprint(job: ScoreJob) -> str:
    parts = [
        job.model,
        job.dtype,
        job.raw,
        job.adapters,
        job.engine,
        job.memory_gib,
        asdict(job.config),
        repr(job.layout),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _content_hash(line: Any) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()[:16]


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def _append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _summarise(
    records: Sequence[Mapping[str, Any]], resumed: int, broken: Sequence[tuple[int, str]], seconds: float
) -> ScoreSummary:
    sound = [record for record in records if record["malformed"] is None]
    names = list(sound[0]["links"]) if sound else []
    means = {f"S {name}": sum(record["links"][name]["S"] for record in sound) / len(sound) for name in names}
    if sound:
        means["reward"] = sum(record["reward"] for record in sound) / len(sound)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    unusable = {reason for _, reason in broken}
    reasons = Counter(str(record["malformed"]) for record in records if record["malformed"] not in (None, *unusable))
    return ScoreSummary(
        rows=len(records),
        resumed=resumed,
        malformed=reasons.total(),
        reasons=dict(reasons.most_common(_REASONS)),
        broken=tuple(broken),
        means=means,
        seconds=seconds,
        peak_gib=peak,
    )
