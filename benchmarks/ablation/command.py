"""`cepo ablate`: K, rank, p, links and score definition swept over a rollout file, every Jacobian computed once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from cepo.benchmarks.ablation.figures import draw_figures
from cepo.benchmarks.ablation.group import REFERENCE, Hardening, LinkSet, Sweep, sweep_group
from cepo.benchmarks.ablation.summary import AblateSummary, read_measures, summarise
from cepo.counterfactual.permute import Permutation
from cepo.eval.score.rows import is_text, read_input, read_rollout, task_reward
from cepo.files import make_folder, write_text
from cepo.fusion.config import PAPER_LINKS, RewardConfig
from cepo.fusion.records import Score
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.loading import check_device, embedding_width, load_model, load_tokenizer, resolve_model
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train.prompts import JUDGE

_DTYPES = ("float64", "float32", "bfloat16", "float16")
# What decides where a sweep is written and how fast it runs, and changes no result but for rounding.
_NOT_SETTINGS = ("input", "output", "device", "memory_budget")


@dataclass(frozen=True)
class AblateJob:
    """What `cepo ablate` was asked to do.

    The sweep is the grid of counterfactuals, ranks and scores; the reference (K = 4, rank 2: the preset `paper`) is
    always part of it.

    Attributes:
        model: see `resolve_model`.
        input: JSONL file of rollouts, as for `cepo score`.
        output: folder for the tables, the plots and the groups that are done; new, empty, or of the same sweep.
        links: weight of each link, > 0 (0 leaves it out). Rewards are fused of all links, each alone, each removed.
        counterfactuals: the K to sweep, each >= 0.
        ranks: the nuisance ranks to sweep, integers >= 0 as "2", or energies in (0, 1] as "tau=0.5".
        powers: the exponents p to sweep; any reals, inf or -inf.
        scores: the named scores S to sweep.
        permutation: "uniform", "sentence" or "block".
        task_weight: weight of the task reward, where a row carries one.
        target: default target function of the links.
        layout: what completions look like.
        raw: take prompt text as it is, without the chat template.
        seed: of permutations and of the bootstrap.
        resamples: of the bootstrap, at least 100.
        dtype: dtype of the weights.
        device: where to run.
        memory_budget: bytes the engine may use, see `GroupEngine`.
        adapters: False switches the adapters of a PEFT model off.
        trust_remote_code: whether a hub repository's own code may run.
    """

    model: str
    input: Path
    output: Path
    links: Mapping[str, float] = field(default_factory=lambda: dict(PAPER_LINKS))
    counterfactuals: tuple[int, ...] = (0, 1, 2, 4, 8)
    ranks: tuple[str, ...] = ("0", "1", "2", "4", "8", "tau=0.5", "tau=0.9")
    powers: tuple[float, ...] = (-2.0, 0.0, 0.2, 1.0, 10.0)
    scores: tuple[Score, ...] = get_args(Score)
    permutation: Permutation = "uniform"
    task_weight: float = 0.7
    target: str = "log_likelihood"
    layout: Layout = JUDGE
    raw: bool = False
    seed: int = 0
    resamples: int = 999
    dtype: str = "float32"
    device: str = "cpu"
    memory_budget: float | None = None
    adapters: bool = True
    trust_remote_code: bool = False


def run_ablation(job: AblateJob, *, progress: Callable[[int, int], None] | None = None) -> AblateSummary:
    """Sweep every setting over every rollout, and write tables and plots.

    Group by group: the base Jacobians and those of max(K) counterfactuals are computed, once; every setting is then
    worked out from them (a smaller K uses the first K). A group's results are moved into place when all of them are
    there, and a later run of the same sweep goes on after them.

    Writes `ablation.parquet` (a row for each rollout, link and setting), `rewards.parquet` (for each rollout, setting,
    set of links and p), `summary.jsonl`, `malformed.jsonl`, the plots and `groups/`.

    Args:
        job: what to do.
        progress: called with (groups done, groups in all).

    Raises:
        ValueError: for arguments, input or a model that cannot be used, or an output of another sweep; all but a model
            that does not load before the model is loaded.
    """
    started = time.perf_counter()
    sweep, config = check_sweep(job), _config(job, REFERENCE)
    lines, _ = read_input(job.input)
    source = resolve_model(job.model)
    width = embedding_width(source)
    for hardening in sweep.hardenings:
        if width:
            _config(job, hardening).check_width(width)
    check_device(job.device)
    _check_output(job)
    tokenizer = load_tokenizer(source, trust_remote_code=job.trust_remote_code)
    if not job.raw and not getattr(tokenizer, "chat_template", None) and any(is_text(line) for line in lines):
        raise ValueError(f"model {job.model!r} has no chat template for prompts given as text; sweep with raw")
    groups, malformed = _read_groups(job, lines, SpanReader(tokenizer, job.layout))
    _claim(job)
    pending = [number for number in range(len(groups)) if not _folder(job, number).is_dir()]
    engine = None
    if pending:
        model, _ = load_model(source, dtype=job.dtype, device=job.device, trust_remote_code=job.trust_remote_code)
        engine = GroupEngine(model, adapters=job.adapters, memory_budget=job.memory_budget)
        for hardening in sweep.hardenings:
            _config(job, hardening).check_width(engine.width)
    for done, number in enumerate(pending, start=len(groups) - len(pending)):
        assert engine is not None
        if progress is not None:
            progress(done, len(groups))
        tasks = {row: task_reward(lines[row]) for row in groups[number]}
        swept = sweep_group(number, groups[number], tasks, sweep, config.parsed_links(job.layout), config, engine)
        _write_group(_folder(job, number), *swept)
    if progress is not None:
        progress(len(groups), len(groups))
    for number in range(len(groups)):
        without_jacobians = json.loads((_folder(job, number) / "malformed.json").read_text())
        malformed.update({int(row): reason for row, reason in without_jacobians.items()})
    _write_lines(job.output / "malformed.jsonl", [{"row": row, "reason": malformed[row]} for row in sorted(malformed)])
    for name in ("ablation.parquet", "rewards.parquet"):
        _merge(job.output / name, [_folder(job, number) / name for number in range(len(groups))])
    if len(malformed) == len(lines):
        raise ValueError(
            f"input {str(job.input)!r} has no rollout that can be scored; the first is malformed: "
            f"{malformed[min(malformed)]}"
        )
    measures = read_measures([_folder(job, number) for number in range(len(groups))], sweep)
    rows = summarise(measures, sweep, resamples=job.resamples, seed=job.seed)
    _write_lines(job.output / "summary.jsonl", rows)
    draw_figures(job.output, rows)
    return AblateSummary(
        output=job.output,
        rollouts=len(lines) - len(malformed),
        groups=len(groups),
        resumed=len(groups) - len(pending),
        malformed=dict(sorted(malformed.items())),
        rows=tuple(rows),
        seconds=time.perf_counter() - started,
    )


# Arguments


def check_sweep(job: AblateJob) -> Sweep:
    """Return the sweep, or raise ValueError for the first argument that cannot be used; reads no file."""
    for name in ("counterfactuals", "ranks", "powers", "scores"):
        values = getattr(job, name)
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"{name} is {values!r}; expected a sequence of at least one value")
        if len(set(values)) < len(values):
            raise ValueError(f"{name} is {', '.join(map(str, values))}; expected each value once")
    if job.dtype not in _DTYPES:
        raise ValueError(f"dtype is {job.dtype!r}; expected one of {', '.join(_DTYPES)}")
    if not isinstance(job.resamples, int) or job.resamples < 100:
        raise ValueError(f"resamples is {job.resamples!r}; expected an integer of at least 100")
    if not isinstance(job.seed, int) or job.seed < 0:
        raise ValueError(f"seed is {job.seed!r}; expected an integer >= 0")
    if job.memory_budget is not None and not job.memory_budget > 0:
        raise ValueError(f"memory_budget is {job.memory_budget!r}; expected a positive number of bytes, or None")
    hardenings: dict[Hardening, None] = {}
    for text in job.ranks:
        rank, tau = _read_rank(text)
        for counterfactuals in job.counterfactuals:
            hardenings[Hardening(counterfactuals, rank, tau)] = None
    if len(hardenings) < len(job.ranks) * len(job.counterfactuals):
        raise ValueError(f"ranks is {', '.join(job.ranks)}; expected each value once")
    for hardening in hardenings:
        _config(job, hardening)
    hardenings[REFERENCE] = None
    ordered = sorted(hardenings, key=lambda hardening: hardening.order)
    for score in job.scores:
        replace(_config(job, REFERENCE), score=score)
    for p in job.powers:
        replace(_config(job, REFERENCE), p=p)
    links = [link.name for link in _config(job, REFERENCE).parsed_links(job.layout)]
    sets = [LinkSet("all", tuple(links))]
    if len(links) > 1:
        sets += [LinkSet(f"only {name}", (name,)) for name in links]
    if len(links) > 2:  # of two links, each removed is the other alone
        sets += [LinkSet(f"without {name}", tuple(other for other in links if other != name)) for name in links]
    return Sweep(tuple(ordered), tuple(links), tuple(job.scores), tuple(sets), tuple(job.powers))


def _read_rank(text: str) -> tuple[int | None, float | None]:
    name, equals, value = str(text).partition("=")
    try:
        if equals and name.strip() == "tau":
            return None, float(value)
        return int(text), None
    except ValueError:
        raise ValueError(f"ranks holds {text!r}; expected integers such as 2, or energies such as tau=0.5") from None


def _config(job: AblateJob, hardening: Hardening) -> RewardConfig:
    return RewardConfig(
        links=job.links,
        task_weight=job.task_weight,
        counterfactuals=hardening.counterfactuals,
        permutation=job.permutation,
        rank=hardening.rank,
        energy=hardening.tau,
        target=job.target,
        seed=job.seed,
    )


def _settings(job: AblateJob) -> dict[str, Any]:
    found = {one.name: getattr(job, one.name) for one in fields(job) if one.name not in _NOT_SETTINGS}
    found["layout"] = repr(job.layout)
    found["links"] = dict(job.links)
    found["rollouts"] = hashlib.sha256(job.input.read_bytes()).hexdigest()[:16]
    return json.loads(json.dumps(found))


def _check_output(job: AblateJob) -> None:
    settings = job.output / "settings.json"
    if job.output.exists() and not job.output.is_dir():
        raise ValueError(f"output is {str(job.output)!r}, which is a file; expected a folder")
    if settings.is_file():
        there, here = json.loads(settings.read_text()), _settings(job)
        for name in here:
            if there.get(name) != here[name]:
                raise ValueError(
                    f"output {str(job.output)!r} holds a sweep with other {name} ({there.get(name)}, now "
                    f"{here[name]}); name another folder, or delete it"
                )
    elif job.output.is_dir() and any(job.output.iterdir()):
        raise ValueError(f"output {str(job.output)!r} holds other files; expected a new or empty folder, or a sweep")


def _claim(job: AblateJob) -> None:
    """Make the output folder this sweep's, and clear what a killed run left half done."""
    make_folder(job.output / "groups")
    for unfinished in (job.output / "groups").glob("*.tmp"):
        shutil.rmtree(unfinished)
    write_text(job.output / "settings.json", json.dumps(_settings(job), indent=2) + "\n")


# Rollouts


def _read_groups(
    job: AblateJob, lines: Sequence[dict[str, Any] | str], reader: SpanReader
) -> tuple[list[dict[int, Rollout]], dict[int, str]]:
    """Return the well-formed rollouts by prompt and row, in order of first appearance, and why the others are none."""
    groups: dict[tuple[int, ...], dict[int, Rollout]] = {}
    malformed: dict[int, str] = {}
    for row, line in enumerate(lines):
        rollout = read_rollout(line, reader, raw=job.raw)
        if rollout.malformed is not None:
            malformed[row] = rollout.malformed
        else:
            groups.setdefault(rollout.prompt_ids, {})[row] = rollout
    return list(groups.values()), malformed


# Files


def _folder(job: AblateJob, number: int) -> Path:
    return job.output / "groups" / f"{number:06d}"


def _write_group(
    folder: Path, link_rows: list[dict[str, Any]], reward_rows: list[dict[str, Any]], malformed: Mapping[int, str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    integer, number, text = pa.int64(), pa.float64(), pa.string()
    setting = {"row": integer, "group": integer, "counterfactuals": integer, "rank": integer, "tau": number}
    setting["score"] = text
    measures = dict.fromkeys(("S", "phi", "retained", "influence", "norm"), number)
    measures |= {"tokens": integer, "removed_rank": integer, "nuisance_angle": number}
    unfinished = folder.with_name(folder.name + ".tmp")
    unfinished.mkdir()
    for name, rows, columns in (
        ("ablation.parquet", link_rows, {**setting, "link": text, **measures}),
        ("rewards.parquet", reward_rows, {**setting, "links": text, "p": number, "reward": number}),
    ):
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items()))), unfinished / name)
    (unfinished / "malformed.json").write_text(json.dumps(malformed))
    os.replace(unfinished, folder)


def _merge(target: Path, parts: Sequence[Path]) -> None:
    """Write the groups' tables into one, a group at a time."""
    import pyarrow.parquet as pq

    if not parts:
        return
    unfinished = target.with_name(target.name + ".tmp")
    with pq.ParquetWriter(unfinished, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))
    os.replace(unfinished, target)


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
