"""`cepo score`: rollouts in (JSONL), link scores, matrices and heat maps out; resumable."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cepo.counterfactual.exchange import exchanged_prompts
from cepo.eval.report.heat_maps import Attribution, HeatMap
from cepo.eval.report.page import write_report
from cepo.eval.score.criteria import criteria_of
from cepo.eval.score.matrices import check_matrices, drop_matrices, merge_matrices, rows_with_matrices, save_matrices
from cepo.eval.score.rows import Line, read_input, read_lines, rollout_of
from cepo.files import append_jsonl, claim, content_hash, fingerprint, make_folder, read_jsonl, write_jsonl
from cepo.fusion.config import RewardConfig
from cepo.fusion.records import LinkScore
from cepo.fusion.score import Pools, RolloutScore, pools_of, score_rollouts
from cepo.jacobian.engines import EngineName, check_engine, new_engine
from cepo.jacobian.loading import (
    ModelSource,
    check_device,
    embedding_width,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
)
from cepo.jacobian.protocol import Engine
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout

_REASONS = 3  # shown in the summary
_WITHOUT_ATTRIBUTION = (
    "The effect was computed without its path, so it is not spread over tokens. For signed heat maps, and a table of "
    "what each criterion did, score with --also path (or --score path)."
)


@dataclass(frozen=True)
class ScoreJob:
    """What `cepo score` was asked to do.

    Attributes:
        model: see `resolve_model`.
        input: file of rollouts, see `open_file` and FORMS. A row may carry task_reward in [0, 1], which is then fused,
            and a judged pair label ("A" or "B": where the chosen response was shown; A by default).
        output: JSONL file to write, one record per row of the input, in order.
        config: links, hardening, score, fusion.
        layout: what completions look like.
        raw: take prompt text as it is, without the chat template.
        batch_size: rows after which records are written, at least 1; changes no result.
        donors: file of rollouts whose spans serve as donors, rows as in the input; None for the input itself.
        jacobians: safetensors file for the matrices, or None.
        html: file for the heat maps, or None.
        dtype: dtype of the weights.
        device: where to run.
        adapters: False switches the adapters of a PEFT model off.
        engine: "group" or "autograd" (the oracle).
        memory_gib: memory that the group engine may use beyond the model's, in GiB.
        trust_remote_code: whether a hub repository's own code may run.
    """

    model: str
    input: Path
    output: Path
    config: RewardConfig
    layout: Layout
    raw: bool = False
    batch_size: int = 8
    donors: Path | None = None
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
    """The result of a run in numbers.

    Attributes:
        rows: records written.
        resumed: how many of them an earlier run had scored.
        malformed: completions that the model wrote and that cannot be scored.
        reasons: the most frequent reasons why, with their counts.
        broken: for each row of the input that cannot be used, where it stands and the reason.
        means: mean S of each link, mean reward and mean order leak over the well-formed rows, by name.
        without_leak: well-formed rows without an order leak, which are all where it was not asked for.
        seconds: time of this run.
        peak_gib: largest memory of the process, in GiB.
    """

    rows: int
    resumed: int
    malformed: int
    reasons: Mapping[str, int]
    broken: tuple[str, ...]
    means: Mapping[str, float]
    without_leak: int
    seconds: float
    peak_gib: float


def score_file(job: ScoreJob, *, progress: Callable[[int, int], None] | None = None) -> ScoreSummary:
    """Score every row of the input, and go on from an interrupted run with the same settings.

    Records are appended to OUTPUT.partial as they come, and written to the output when all are there. A record is taken
    over where the model's weights, the settings and the row's content are the same. Everything that needs no weights is
    checked before they are loaded.

    Args:
        job: what to do.
        progress: called with (rows done, rows in all).

    Raises:
        ValueError: for input, settings or a model that cannot be used, or an output of other settings or weights.
    """
    started = time.perf_counter()
    lines, _ = read_input(job.input)
    source = _check(job)
    partial, shards = _beside(job.output, ".partial"), _beside(job.output, ".jacobians")
    claim(_beside(job.output, ".settings.json"), _settings(job, source, lines), results=[job.output, partial, shards])
    done = _earlier_records(job, lines)
    resumed = frozenset(done)
    drop_matrices(shards, keep=resumed)
    partial.unlink(missing_ok=True)
    if done:  # a run that fails before its first record leaves nothing that would bind the next one's settings
        write_jsonl(partial, done.values())
    pending = [row for row in range(len(lines)) if row not in done]
    reader, engine = _open_model(job, source, lines, pending)
    pools = _pools(job, lines, reader) if engine is not None and job.config.reads_effects else None
    for start in range(0, len(pending), job.batch_size):
        batch = pending[start : start + job.batch_size]
        for row in batch:
            done[row] = _score_line(job, row, lines[row], reader, engine, pools)
        append_jsonl(partial, (done[row] for row in batch))
        if progress is not None:
            progress(len(resumed) + start + len(batch), len(lines))
    records = [done[row] for row in range(len(lines))]
    if job.jacobians is not None:
        merge_matrices(shards, job.jacobians, keep=resumed)
    if job.html is not None:
        rollouts = [rollout_of(line, reader, raw=job.raw) for line in lines]
        _write_page(job, records, [(reader.texts(one.token_ids), len(one.prompt_ids)) for one in rollouts])
    write_jsonl(job.output, records)
    partial.unlink(missing_ok=True)
    shutil.rmtree(shards, ignore_errors=True)
    return _summarise(records, len(resumed), time.perf_counter() - started)


def _check(job: ScoreJob) -> ModelSource:
    """Check what can be checked without weights, and return where the model comes from."""
    job.config.parsed_links(job.layout)
    if job.batch_size < 1:
        raise ValueError(f"batch_size is {job.batch_size}; expected at least 1")
    source = resolve_model(job.model)
    width = embedding_width(source)
    if width:
        job.config.check_width(width)
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
    if job.jacobians is not None:
        check_matrices(job.jacobians)
    check_device(job.device)
    check_engine(job.engine)
    if not job.memory_gib > 0:
        raise ValueError(f"memory_gib is {job.memory_gib}; expected a positive number of GiB")
    return source


def _settings(job: ScoreJob, source: ModelSource, lines: Sequence[Line]) -> dict[str, Any]:
    """Return what decides the records; where spans are compared with donors, all rows decide each of them."""
    name = "donors" if job.donors else "input (its rows are each other's donors)"
    donors = fingerprint(job.donors) if job.donors else content_hash([line.content for line in lines])
    return {
        **({name: donors} if job.config.reads_effects else {}),
        "command": "cepo score",
        "model": model_fingerprint(source),
        "adapters": job.adapters,
        "dtype": job.dtype,
        "engine": job.engine,
        "raw": job.raw,
        "layout": repr(job.layout),
        "config": asdict(job.config),
    }


def _earlier_records(job: ScoreJob, lines: Sequence[Line]) -> dict[int, dict[str, Any]]:
    """Return the records of earlier runs whose row has the same content and, where they are asked for, its matrices."""
    partial, shards = _beside(job.output, ".partial"), _beside(job.output, ".jacobians")
    saved = rows_with_matrices(shards, job.jacobians)
    done: dict[int, dict[str, Any]] = {}
    for path in (job.output, partial):
        for _, record in read_jsonl(path)[0] if path.is_file() else ():
            row = int(record["row"])
            holds = row < len(lines) and record["content"] == lines[row].content
            if holds and (job.jacobians is None or not record["spans"] or row in saved):
                done[row] = record
    return dict(sorted(done.items()))


def _open_model(
    job: ScoreJob, source: ModelSource, lines: Sequence[Line], pending: Sequence[int]
) -> tuple[SpanReader, Engine | None]:
    """Return the reader, and the engine where a pending line is a row; weights are loaded for nothing else."""
    code = job.trust_remote_code
    model = None
    if any(lines[row].row is not None for row in pending):
        model, tokenizer = load_model(source, dtype=job.dtype, device=job.device, trust_remote_code=code)
    else:
        tokenizer = load_tokenizer(source, trust_remote_code=code)
    if not job.raw and not getattr(tokenizer, "chat_template", None) and any(line.is_text for line in lines):
        raise ValueError(f"model {job.model!r} has no chat template for prompts given as text; score with --raw")
    reader = SpanReader(tokenizer, job.layout)
    if model is None:
        return reader, None
    return reader, new_engine(job.engine, model, adapters=job.adapters, memory_budget=job.memory_gib * 2**30)


def _pools(job: ScoreJob, lines: Sequence[Line], reader: SpanReader) -> Pools:
    """Return the candidates that the donors file, or else the input, offers for each source."""
    offered = lines if job.donors is None else read_lines(job.donors)
    links = job.config.parsed_links(job.layout)
    rollouts = [rollout_of(line, reader, raw=job.raw) for line in offered]
    pools = pools_of(rollouts, links)
    prompts = {candidate.prompt for pool in pools.values() for candidate in pool}
    if job.config.no_donor == "zero" and len(prompts) < (2 if job.donors is None else 1):
        where = "input" if job.donors is None else "donors"
        reason = next((f"; {one.malformed}" for one in rollouts if one.malformed), "")
        raise ValueError(
            f"{where} {str(job.donors or job.input)!r} holds well-formed rollouts of {len(prompts)} prompt(s), so no "
            "span has a donor, the content of another prompt's rollout; name a file of rollouts with --donors, or "
            f"compare with permuted tokens by --no-donor permute{reason}"
        )
    return pools


def _score_line(
    job: ScoreJob, row: int, line: Line, reader: SpanReader, engine: Engine | None, pools: Pools | None
) -> dict[str, Any]:
    """Return the record of a line, scored alone: to the last bit, it does not depend on the lines beside it."""
    rollout = rollout_of(line, reader, raw=job.raw)
    score = RolloutScore({}, 0.0, rollout.malformed)
    if engine is not None and rollout.token_ids:
        (score,) = score_rollouts(
            [rollout],
            engine,
            job.config,
            job.layout,
            task_rewards=[line.task_reward],
            pools=pools,
            exchanged=exchanged_prompts([rollout], reader) if job.config.reads_leak else None,
            keep_jacobians=True,
        )
    if job.jacobians is not None and rollout.token_ids:
        save_matrices(_beside(job.output, ".jacobians"), row, rollout, score)
    texts = reader.texts(rollout.token_ids) if score.links else []
    links = {name: _link_record(link, score, rollout, texts) for name, link in score.links.items()}
    return {
        "row": row,
        "id": line.id,
        "reward": score.reward,
        "malformed": score.malformed,
        "broken": not rollout.token_ids,
        "task_reward": line.task_reward,
        "found_by": rollout.found_by if score.malformed is None else None,
        "prompt_found_by": rollout.prompt_found_by if score.malformed is None else None,
        "prompt_tokens": len(rollout.prompt_ids),
        "completion_tokens": len(rollout.completion_ids),
        "spans": {name: {"text": span.text, "tokens": len(span.positions)} for name, span in rollout.spans.items()},
        "S": dict(score.values),
        "order_leak": score.order_leak,
        "links": links,
        "content": line.content,
    }


def _link_record(link: LinkScore, score: RolloutScore, rollout: Rollout, texts: Sequence[str]) -> dict[str, Any]:
    """Return a link's record, with one number for each token of its source: the Jacobian's norms, the path's nats."""
    facts = asdict(link)
    record = {"S": facts.pop("value"), **{key: value for key, value in facts.items() if key != "link"}}
    hardened, path = score.jacobians.get(link.link), score.paths.get(link.link)
    where = hardened.base if hardened is not None else path
    if where is not None:
        record["source_positions"] = list(where.source_positions)
        record["target_positions"] = list(where.target_positions)
    if hardened is not None:
        record["row_norms"] = [float(f"{norm:.6g}") for norm in hardened.base.jac_SD.double().norm(dim=1).tolist()]
    if path is not None and path.attribution_S is not None:
        record["attribution"] = [float(f"{nats:.6g}") for nats in path.attribution_S.tolist()]
        record["criteria"] = [asdict(one) for one in criteria_of(path, rollout.spans[path.link.source], texts)]
    return record


def _write_page(
    job: ScoreJob, records: Sequence[Mapping[str, Any]], texts: Sequence[tuple[Sequence[str], int]]
) -> None:
    """Write the heat maps; `texts` holds the tokens of each rollout and how many of them are the prompt's."""
    maps = []
    for record, (tokens, prompt_tokens) in zip(records, texts, strict=True):
        links = record["links"]
        maps.append(
            HeatMap(
                title=f"row {record['row']}" + (f", {record['id']}" if record["id"] else ""),
                tokens=tuple(tokens),
                prompt_tokens=prompt_tokens,
                links={
                    name: dict(zip(link["source_positions"], link["row_norms"], strict=True))
                    for name, link in links.items()
                    if "row_norms" in link
                },
                attributions={name: _attribution(link) for name, link in links.items() if "attribution" in link},
                targets={
                    name: tuple(link["target_positions"])
                    for name, link in links.items()
                    if "row_norms" in link or "attribution" in link
                },
                facts={
                    "reward": f"{record['reward']:.4f}",
                    **{f"S {name}": f"{value:.4f}" for name, value in record["S"].items()},
                    **({} if record["order_leak"] is None else {"order leak": f"{record['order_leak']:.3f} nats"}),
                },
                malformed=record["malformed"],
            )
        )
    config = job.config
    rank = f"rank = {config.rank}" if config.energy is None else f"energy = {config.energy}"
    summary = {
        "model": job.model,
        "input": str(job.input),
        "links": ", ".join(f"{name} (weight {weight:g})" for name, weight in config.links.items()),
        "score": config.score,
        "hardening": f"K = {config.counterfactuals}, {rank}" if config.counterfactuals else "none (K = 0)",
    }
    if config.reads_effects:
        nodes = f", {config.nodes} nodes along the path to each" if config.reads_paths else ""
        summary["donors"] = f"K = {config.donors}{nodes}"
    notes = [_WITHOUT_ATTRIBUTION] if config.reads_effects and not config.reads_paths else []
    assert job.html is not None
    write_report(job.html, title="cepo score", summary=summary, notes=notes, heat_maps={"Rollouts": maps})


def _attribution(link: Mapping[str, Any]) -> Attribution:
    return Attribution(
        nats=dict(zip(link["source_positions"], link["attribution"], strict=True)),
        delta=link["delta"],
        path_sum=link["path_sum"],
        parts=tuple((one["text"], one["nats"], one["share"]) for one in link["criteria"]),
    )


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _summarise(records: Sequence[Mapping[str, Any]], resumed: int, seconds: float) -> ScoreSummary:
    sound = [record for record in records if record["malformed"] is None]
    means = {
        f"S {name}": sum(record["S"][name] for record in sound) / len(sound)
        for name in (sound[0]["S"] if sound else ())
    }
    if sound:
        means["reward"] = sum(record["reward"] for record in sound) / len(sound)
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
        without_leak=len(sound) - len(leaks),
        seconds=seconds,
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )
