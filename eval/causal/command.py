"""`cepo eval causal`: does S measure what the criteria really do? Interventions, evidence, controls; resumable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from cepo.counterfactual.permute import Permutation
from cepo.eval.causal.controls import (
    PAIRS,
    captum_difference,
    faithfulness,
    masked_scores,
    randomisation,
    sample_judgements,
)
from cepo.eval.causal.evidence import DEFAULT_LINK, gather_evidence, nuisance_angles, random_angle
from cepo.eval.causal.interventions import InterventionInput, intervene
from cepo.eval.causal.judge_model import JudgeModel
from cepo.eval.causal.report import write_causal_report
from cepo.eval.causal.summary import CausalSummary, JudgeResults, summarise_causal
from cepo.eval.score.rows import read_input, read_rollout
from cepo.files import SETTINGS, claim, fingerprint, make_folder, write_jsonl, write_text
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.loading import check_device, load_model, model_fingerprint, resolve_model
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.records import Rollout
from cepo.train import testbed, testbed_judges
from cepo.train.policy import load_testbed_judge, testbed_fingerprint
from cepo.train.prompts import UNGUARDED_JUDGE

_CHUNK = 20  # rollouts per part
_JUDGE_STEPS = 300
_ANGLE_LINKS = ("Z->X", "X->Y", "Z->Y")
_ANGLE_RANKS = (1, 2, 4, 8)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CausalJob:
    """What `cepo eval causal` was asked to do.

    Attributes:
        output: folder for rows.jsonl, summary.jsonl, report.html, and parts/, from which a killed run goes on.
        model: see `resolve_model`; None for the testbed's judges.
        input: JSONL of rollouts of that model, rows as for `cepo score`; None for the testbed.
        items: number of testbed items, each judged once by each judge, at least 8; or of rows read from the input.
        pairs: number of pairs of testbed judges, 1 or 2.
        resamples: number of criteria sampled for each rollout, at least 1.
        controlled: number of rollouts of each judge that the controls use, at least 1.
        draws: number of bootstrap resamples behind the intervals, at least 1.
        seed: seed of judges, items, sampling, permutations and bootstrap.
        raw: take prompt text as it is, without the chat template.
        dtype: dtype of the weights.
        device: where to run.
        memory_gib: memory that the engine may use beyond the model's, in GiB.
        trust_remote_code: whether a hub repository's own code may run.
    """

    output: Path
    model: str | None = None
    input: Path | None = None
    items: int = 220
    pairs: int = 2
    resamples: int = 8
    controlled: int = 40
    draws: int = 1000
    seed: int = 0
    raw: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    memory_gib: float = 4.0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Judged:
    """A judge and its judgements, malformed ones included."""

    name: str
    judge: JudgeModel
    engine: GroupEngine
    rollouts: tuple[Rollout, ...]
    certificate: dict[str, float] | None


def run_causal(job: CausalJob, *, progress: Progress | None = None) -> CausalSummary:
    """Measure how well every definition of S agrees with what interventions on the criteria do; write the report.

    judgements -> evidence (S and baselines) -> interventions (ground truth) -> rank correlations, areas under the ROC
    curve for judges whose workings are certified, and controls that a true measure must pass. Finished parts are kept
    in `parts/`; the same command goes on from them.

    Args:
        job: what to do.
        progress: called with (what is being done, done, in all).

    Raises:
        ValueError: for settings, input or a model that cannot be used, before long work starts, or an output of other
            settings, data or weights.
    """
    _check(job)
    names = ("parts", "rows.jsonl", "summary.jsonl", "report.html")
    parts, rows_file, summary_file, page = (job.output / name for name in names)
    claim(job.output / SETTINGS, _settings(job), results=[parts, rows_file, summary_file, page])
    report = progress or (lambda what, done, total: None)
    results = []
    for judged in _judged(job, parts, report):
        rows = _rows(job, judged, parts, report)
        report(f"controls of {judged.name}", 0, 1)
        controls = _once(parts / f"controls-{judged.name}.json", partial(_controls, job, judged, rows))
        results.append(JudgeResults(judged.name, tuple(rows), judged.certificate, controls))
    report("statistics", 0, 1)
    write_jsonl(rows_file, [row for one in results for row in one.rows])
    summary = summarise_causal(results, pairs=PAIRS if job.model is None else (), draws=job.draws, seed=job.seed)
    write_jsonl(summary_file, summary.records)
    facts = {
        "judges": job.model or "the testbed's",
        "input": str(job.input or f"{job.items} testbed items"),
        "resamples": str(job.resamples),
        "seed": str(job.seed),
    }
    write_causal_report(page, results, summary, facts)
    return summary


def _check(job: CausalJob) -> None:
    if (job.model is None) != (job.input is None):
        raise ValueError("model and input go together; expected both, or neither for the testbed's judges")
    least = {"items": 8 if job.model is None else 1, "resamples": 1, "controlled": 1, "draws": 1, "pairs": 1}
    for name, smallest in least.items():
        if getattr(job, name) < smallest:
            raise ValueError(f"{name} is {getattr(job, name)}; expected at least {smallest}")
    if job.pairs > len(PAIRS):
        raise ValueError(f"pairs is {job.pairs}; expected at most {len(PAIRS)}")
    if not job.memory_gib > 0:
        raise ValueError(f"memory_gib is {job.memory_gib}; expected a positive number of GiB")
    check_device(job.device)


def _settings(job: CausalJob) -> dict[str, Any]:
    """Return what decides the parts; more pairs or draws go on from the parts that are there."""
    names = ("items", "resamples", "controlled", "seed", "raw", "dtype")
    settings = {"command": "cepo eval causal", **{name: getattr(job, name) for name in names}}
    if job.model is not None and job.input is not None:
        return {**settings, "model": model_fingerprint(resolve_model(job.model)), "input": fingerprint(job.input)}
    judges = [name for pair in PAIRS for name in (pair.follows, pair.ignores)]
    return {
        **settings,
        "judges": {name: testbed_fingerprint(name, steps=_JUDGE_STEPS, seed=job.seed) for name in judges},
    }


def _once(path: Path, work: Callable[[], Any]) -> Any:
    """Return what the work gives as JSON, from its file where an earlier run finished it."""
    if not path.is_file():
        value = json.dumps(work())
        make_folder(path.parent)
        write_text(path, value)
    return json.loads(path.read_text(encoding="utf-8"))


def _judged(job: CausalJob, parts: Path, report: Progress) -> Iterator[_Judged]:
    """Yield the judges one after the other."""
    if job.model is not None and job.input is not None:
        lines, _ = read_input(job.input)
        model, tokenizer = load_model(
            resolve_model(job.model), dtype=job.dtype, device=job.device, trust_remote_code=job.trust_remote_code
        )
        judge = JudgeModel(model, SpanReader(tokenizer, UNGUARDED_JUDGE), TokenBytes(tokenizer))
        rollouts = tuple(read_rollout(line, judge.reader, raw=job.raw) for line in lines[: job.items])
        yield _Judged("rollouts", judge, _engine(job, model), rollouts, None)
        return
    items = testbed.generate_items(job.items, seed=job.seed + 11, cue_agreement=0.5)
    for pair in PAIRS[: job.pairs]:
        yield _testbed_judge(job, pair.follows, items, parts, report)
        yield _testbed_judge(job, pair.ignores, items, parts, report)


def _testbed_judge(
    job: CausalJob, name: testbed_judges.JudgeKind, items: Sequence[testbed.Item], parts: Path, report: Progress
) -> _Judged:
    model, tokenizer = load_testbed_judge(
        name,
        steps=_JUDGE_STEPS,
        seed=job.seed,
        progress=lambda step, _: report(f"making the judge {name}", step, _JUDGE_STEPS),
    )
    judge = JudgeModel(model.to(job.device), SpanReader(tokenizer, UNGUARDED_JUDGE), TokenBytes(tokenizer))
    report(f"judgements of {name}", 0, 1)
    ids = _once(parts / f"rollouts-{name}.json", partial(_sample_ids, judge, items, job.seed))
    certify = partial(testbed_judges.certify, model, tokenizer, items, seed=job.seed)
    certificate = _once(parts / f"certificate-{name}.json", certify)
    rollouts = tuple(judge.reader.read(prompt, completion) for prompt, completion in ids)
    return _Judged(name, judge, _engine(job, model), rollouts, certificate)


def _engine(job: CausalJob, model: Any) -> GroupEngine:
    return GroupEngine(model, memory_budget=job.memory_gib * 2**30)


def _sample_ids(judge: JudgeModel, items: Sequence[testbed.Item], seed: int) -> list[tuple[Sequence[int], ...]]:
    return [(one.prompt_ids, one.completion_ids) for one in sample_judgements(judge, items, seed=seed)]


def _rows(job: CausalJob, judged: _Judged, parts: Path, report: Progress) -> list[dict[str, Any]]:
    """Return one record per rollout, chunk by chunk: its evidence, and the effect of every intervention."""
    prompts = {rollout.prompt_ids: number for number, rollout in reversed(list(enumerate(judged.rollouts)))}
    rows: list[dict[str, Any]] = []
    for start in range(0, len(judged.rollouts), _CHUNK):
        report(f"interventions on {judged.name}", start, len(judged.rollouts))
        for record in _once(parts / f"rows-{judged.name}-{start:05d}.json", partial(_chunk, job, judged, start)):
            prompt = prompts[judged.rollouts[record["row"]].prompt_ids]
            rows.append({"judge": judged.name, "prompt": prompt, **record})
    return rows


def _chunk(job: CausalJob, judged: _Judged, start: int) -> list[dict[str, Any]]:
    chunk = judged.rollouts[start : start + _CHUNK]
    evidence = gather_evidence(chunk, judged.judge, judged.engine, seed=job.seed)
    sound = [place for place, one in enumerate(evidence) if one.problem is None]
    inputs = [
        InterventionInput(
            chunk[place],
            _another(judged.rollouts, start + place, job.seed),
            evidence[place].saliency[DEFAULT_LINK],
            evidence[place].attention,
        )
        for place in sound
    ]
    changes = intervene(inputs, judged.judge, resamples=job.resamples, seed=(job.seed << 20) + start)
    changed = dict(zip(sound, changes, strict=True))
    records = []
    for place, (rollout, known) in enumerate(zip(chunk, evidence, strict=True)):
        record: dict[str, Any] = {"row": start + place, "malformed": known.problem}
        if known.problem is None:
            record |= {
                "effects": {
                    name: {mode: None if change is None else asdict(change) for mode, change in modes.items()}
                    for name, modes in changed[place].items()
                },
                "evidence": known.values,
                "tokens": judged.judge.reader.texts(rollout.token_ids),
                "prompt_tokens": len(rollout.prompt_ids),
                "positions": {name: span.positions for name, span in rollout.spans.items()},
                "saliency": known.saliency,
                "attention": known.attention,
            }
        records.append(record)
    return records


def _another(rollouts: Sequence[Rollout], row: int, seed: int) -> tuple[int, ...]:
    """Return the ids of another prompt's criteria that differ from the row's own; empty where there are none."""
    own = _criteria(rollouts[row])
    others = dict.fromkeys(
        _criteria(rollout)
        for rollout in rollouts
        if rollout.malformed is None and rollout.prompt_ids != rollouts[row].prompt_ids
    )
    suited = [ids for ids in others if ids != own]
    return suited[np.random.default_rng((seed, row)).integers(len(suited))] if suited else ()


def _criteria(rollout: Rollout) -> tuple[int, ...]:
    return tuple(rollout.token_ids[at] for at in rollout.spans["criteria"].positions)


def _controls(job: CausalJob, judged: _Judged, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the controls show on the first well-formed rollouts."""
    kept = [row for row in rows if row["malformed"] is None][: job.controlled]
    if not kept:
        return {}
    judge, rollouts = judged.judge, [judged.rollouts[row["row"]] for row in kept]
    angles = [
        nuisance_angles(
            rollouts,
            _ANGLE_LINKS,
            judge,
            judged.engine,
            permutation=kind,
            counterfactuals=4,
            ranks=_ANGLE_RANKS,
            seed=job.seed,
        )
        for kind in get_args(Permutation)
    ]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return {
            "masked": masked_scores(rollouts, judge),
            "randomisation": randomisation(rollouts, judge, seed=job.seed),
            "captum": captum_difference(rollouts, judge),
            "faithfulness": faithfulness(
                rollouts, [row["saliency"][DEFAULT_LINK] for row in kept], judge, seed=job.seed
            ),
            "angles": [record for records in angles for record in records],
            "random_angles": {str(rank): random_angle(rank, judged.engine.width) for rank in _ANGLE_RANKS},
        }
