"""`cepo ablate`: sweep K, rank, p, links and score over a file of rollouts, computing every Jacobian once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cepo.benchmarks.ablation.figures import draw_figures
from cepo.benchmarks.ablation.group import sweep_group
from cepo.benchmarks.ablation.summary import AblateSummary, summarise_sweep
from cepo.benchmarks.ablation.sweep import Sweep
from cepo.benchmarks.ablation.tables import merge_groups, read_malformed, read_values, write_group
from cepo.eval.score.rows import Line, read_lines, rollout_of
from cepo.files import claim, fingerprint, write_jsonl
from cepo.fusion.config import RewardConfig
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.loading import (
    check_device,
    embedding_width,
    load_tokenizer,
    load_weights,
    model_fingerprint,
    resolve_model,
)
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train.prompts import UNGUARDED_JUDGE

_DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class AblateJob:
    """The arguments of `cepo ablate`.

    Attributes:
        model: see `resolve_model`.
        input: JSONL file of rollouts, as for `cepo score`.
        output: folder for the tables, the plots and the finished groups; new, empty, or of the same sweep.
        sweep: what varies, from `plan_sweep`.
        config: links, weights, permutation, target and seed, which stay the same.
        raw: whether to take prompt text as it is, without the chat template.
        dtype: dtype of the weights.
        device: device to run on.
        trust_remote_code: whether a hub repository's own code may run.
    """

    model: str
    input: Path
    output: Path
    sweep: Sweep
    config: RewardConfig
    raw: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False


def run_ablation(job: AblateJob, *, progress: Callable[[int, int], None] | None = None) -> AblateSummary:
    """Sweep every setting over every rollout, and write tables and plots.

    For each group of rollouts of a prompt, the base Jacobians and those of max(K) counterfactuals are computed once,
    and every setting is derived from them (a smaller K uses the first K). A group's results are written atomically, and
    a later run of the same sweep continues after them.

    Writes `ablation.parquet` (a row per rollout, link and setting), `rewards.parquet` (a row per rollout, setting, set
    of links and p), `summary.jsonl`, `malformed.jsonl`, the plots and `groups/`.

    Args:
        job: what to sweep.
        progress: called with (groups done, groups in total).

    Raises:
        ValueError: for arguments, input or a model that cannot be used, or an output of another sweep.
    """
    sweep = job.sweep
    if job.dtype not in _DTYPES:
        raise ValueError(f"dtype is {job.dtype!r}; expected one of {', '.join(_DTYPES)}")
    lines = read_lines(job.input)
    source = resolve_model(job.model)
    width = embedding_width(source)
    if width:
        _check_width(job, width)
    check_device(job.device)
    tokenizer = load_tokenizer(source, trust_remote_code=job.trust_remote_code)
    if not job.raw and not getattr(tokenizer, "chat_template", None) and any(line.is_text for line in lines):
        raise ValueError(f"model {job.model!r} has no chat template for prompts given as text; sweep with raw")
    groups, malformed = _read_groups(lines, SpanReader(tokenizer, UNGUARDED_JUDGE), raw=job.raw)
    folders = [job.output / "groups" / f"{number:06d}" for number in range(len(groups))]
    settings = {
        "command": "ablate",
        "model": model_fingerprint(source),
        "input": fingerprint(job.input),
        **{name: value for name, value in asdict(job).items() if name in ("sweep", "config", "raw", "dtype")},
    }
    there = [path for path in job.output.glob("*") if "settings.json" not in path.name]
    claim(job.output / "settings.json", settings, results=[*there, *folders])
    (job.output / "groups").mkdir(exist_ok=True)
    pending = [number for number, folder in enumerate(folders) if not folder.is_dir()]
    if pending:
        model = load_weights(source, dtype=job.dtype, device=job.device, trust_remote_code=job.trust_remote_code)
        engine = GroupEngine(model)
        _check_width(job, engine.width)
    for done, number in enumerate(pending, start=len(groups) - len(pending)):
        if progress is not None:
            progress(done, len(groups))
        tasks = {row: lines[row].task_reward for row in groups[number]}
        write_group(folders[number], *sweep_group(number, groups[number], tasks, sweep, job.config, engine))
    if progress is not None:
        progress(len(groups), len(groups))
    for folder in folders:
        malformed |= read_malformed(folder)
    malformed = dict(sorted(malformed.items()))
    write_jsonl(job.output / "malformed.jsonl", [{"row": row, "reason": reason} for row, reason in malformed.items()])
    merge_groups(job.output, folders)
    if len(malformed) == len(lines):
        first = next(iter(malformed.values()))
        raise ValueError(f"input {str(job.input)!r} has no rollout that can be scored; the first is malformed: {first}")
    rows = summarise_sweep(read_values(folders, sweep), sweep)
    write_jsonl(job.output / "summary.jsonl", rows)
    draw_figures(job.output, rows, sweep.asked)
    resumed = len(groups) - len(pending)
    return AblateSummary(job.output, len(lines) - len(malformed), len(groups), resumed, malformed, tuple(rows))


def _check_width(job: AblateJob, width: int) -> None:
    for hardening in job.sweep.hardenings:
        hardening.applied_to(job.config).check_width(width)


def _read_groups(
    lines: Sequence[Line], reader: SpanReader, *, raw: bool
) -> tuple[list[dict[int, Rollout]], dict[int, str]]:
    """Return the well-formed rollouts by prompt and row, in order of first appearance, and the other rows' reasons."""
    groups: dict[tuple[int, ...], dict[int, Rollout]] = {}
    malformed: dict[int, str] = {}
    for row, line in enumerate(lines):
        rollout = rollout_of(line, reader, raw=raw)
        if rollout.malformed is not None:
            malformed[row] = rollout.malformed
        else:
            groups.setdefault(rollout.prompt_ids, {})[row] = rollout
    return list(groups.values()), malformed
