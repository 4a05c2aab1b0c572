"""`cepo eval causal`: does S measure what the criteria really do? Interventions, evidence, controls; resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cepo.eval.causal.controls import (
    PAIRS,
    captum_difference,
    faithfulness,
    masked_scores,
    randomisation,
    sample_judgements,
)
from cepo.eval.causal.evidence import DEFAULT_LINK, gather_evidence, nuisance_angles, random_angle
from cepo.eval.causal.interventions import Plan, intervene
from cepo.eval.causal.judge_model import JudgeModel
from cepo.eval.causal.report import write_causal_report
from cepo.eval.causal.summary import CausalSummary, Population, summarise
from cepo.eval.score.rows import read_input, read_rollout
from cepo.files import make_folder, write_text
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.loading import check_device, load_model, resolve_model
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.records import Rollout
from cepo.train import testbed, testbed_judges
from cepo.train.policy import load_testbed_judge
from cepo.train.prompts import JUDGE

_CHUNK = 20  # rollouts whose results are written together
_JUDGE_STEPS = 300
_ANGLE_LINKS = ("Z->X", "X->Y", "Z->Y")
_ANGLE_RANKS = (1, 2, 4, 8)
_PERMUTATIONS = ("uniform", "sentence", "block")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CausalJob:
    """What `cepo eval causal` was asked to do.

    Attributes:
        output: folder for rows.jsonl, summary.jsonl, report.html and parts/, from which a killed run goes on.
        model: see `resolve_model`; None for the testbed's judges.
        input: JSONL of rollouts of that model, rows as for `cepo score`; None for the testbed.
        items: testbed items that each judge judges once, at least 8; rows of the input that are read.
        pairs: how many pairs of testbed judges, 1 or 2.
        resamples: criteria sampled for each rollout, at least 1.
        controlled: rollouts of each judge for the controls that need fewer, at least 1.
        draws: bootstrap resamples behind the intervals, at least 1.
        seed: of judges, items, sampling, permutations and bootstrap.
        raw: take prompt text as it is, without the chat template.
        dtype: dtype of the weights.
        device: where to run.
        memory_gib: what the engine may add to the model's memory, in GiB.
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
class _Subject:
    """A judge and its judgements, those malformed among them."""

    name: str
    judge: JudgeModel
    engine: GroupEngine
    rollouts: tuple[Rollout, ...]
    certificate: dict[str, float] | None


def run_causal(job: CausalJob, *, progress: Progress | None = None) -> CausalSummary:
    """Measure how far every definition of S agrees with what interventions on the criteria do, and write the report.

    judgements -> evidence (S and baselines) -> interventions (ground truth) -> rank correlations, areas under the ROC
    curve of judges whose workings are certified, and controls that a true measure must pass. Finished parts are kept in
    `parts/`; the same command goes on from them.

    Args:
        job: what to do.
        progress: called with (what is being done, done, in all).

    Raises:
        ValueError: for settings, input or a model that cannot be used, before long work starts.
    """
    _check(job)
    parts = _Parts(job)
    report = progress or (lambda what, done, total: None)
    populations = []
    for subject in _subjects(job, parts, report):
        rows = _rows(job, subject, parts, report)
        report(f"controls of {subject.name}", 0, 1)
        controls = parts.once(f"controls-{subject.name}", lambda: _controls(job, subject))  # noqa: B023
        populations.append(Population(subject.name, tuple(rows), subject.certificate, controls))
    report("statistics", 0, 1)
    _write_lines(job.output / "rows.jsonl", [row for population in populations for row in population.rows])
    summary = summarise(populations, pairs=PAIRS if job.model is None else (), draws=job.draws, seed=job.seed)
    _write_lines(job.output / "summary.jsonl", summary.records)
    facts = {
        "judges": job.model or "the testbed's",
        "input": str(job.input or f"{job.items} testbed items"),
        "resamples": str(job.resamples),
        "seed": str(job.seed),
    }
    write_causal_report(job.output / "report.html", populations, summary, facts)
    return summary


def _check(job: CausalJob) -> None:
    if (job.model is None) != (job.input is None):
        raise ValueError("model and input go together; expected both, or neither for the testbed's judges")
    for name, least in (("items", 8), ("resamples", 1), ("controlled", 1), ("draws", 1), ("pairs", 1)):
        value = getattr(job, name)
        if value < (1 if name == "items" and job.model is not None else least):
            raise ValueError(f"{name} is {value}; expected at least {least}")
    if job.pairs > len(PAIRS):
        raise ValueError(f"pairs is {job.pairs}; expected at most {len(PAIRS)}")
    if not job.memory_gib > 0:
        raise ValueError(f"memory_gib is {job.memory_gib}; expected a positive number of GiB")
    if job.output.exists() and not job.output.is_dir():
        raise ValueError(f"output is {str(job.output)!r}, which is a file; expected a folder")
    check_device(job.device)


class _Parts:
    """Owns the folder of finished parts: what was computed once is read back."""

    def __init__(self, job: CausalJob) -> None:
        self._folder = job.output / "parts"
        make_folder(self._folder)
        # What changes no part: more pairs or draws go on from the parts that are there.
        settings = {name: value for name, value in asdict(job).items() if name not in ("output", "draws", "pairs")}
        if job.input is not None:
            settings["input"] = hashlib.sha256(job.input.read_bytes()).hexdigest()
        now, path = json.loads(json.dumps(settings, default=str)), self._folder / "settings.json"
        before = json.loads(path.read_text()) if path.is_file() else now
        changed = [
            f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now if before.get(name) != now[name]
        ]
        if changed:
            raise ValueError(
                f"output {str(job.output)!r} comes from other settings ({', '.join(changed)}); choose another "
                "--output, or delete it"
            )
        write_text(path, json.dumps(now, indent=1) + "\n")

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """Return what the work gives, from its file where it was done before."""
        path = self._folder / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text())
        value = json.loads(json.dumps(work()))
        write_text(path, json.dumps(value))
        return value


def _subjects(job: CausalJob, parts: _Parts, report: Progress) -> Sequence[_Subject]:
    if job.model is not None:
        return [_read_subject(job)]
    items = testbed.generate_items(job.items, seed=job.seed + 11, cue_agreement=0.5)
    found = []
    for pair in PAIRS[: job.pairs]:
        for name in (pair.follows, pair.ignores):
            model, tokenizer = load_testbed_judge(
                name,
                steps=_JUDGE_STEPS,
                seed=job.seed,
                progress=lambda step, _, name=name: report(f"making the judge {name}", step, _JUDGE_STEPS),  # type: ignore[misc]
            )
            judge = JudgeModel(model.to(job.device), SpanReader(tokenizer, JUDGE), TokenBytes(tokenizer))
            report(f"judgements of {name}", 0, 1)
            ids = parts.once(f"rollouts-{name}", lambda: _sampled(judge, items, job.seed))  # noqa: B023
            rollouts = tuple(judge.reader.read(prompt, completion) for prompt, completion in ids)
            certified = parts.once(
                f"certificate-{name}",
                lambda: testbed_judges.certify(judge.model, judge.reader.tokenizer, items, seed=job.seed),  # noqa: B023
            )
            found.append(_Subject(name, judge, _engine(job, judge), rollouts, certified))
    return found


def _read_subject(job: CausalJob) -> _Subject:
    assert job.model is not None
    assert job.input is not None
    lines, _ = read_input(job.input)
    model, tokenizer = load_model(
        resolve_model(job.model), dtype=job.dtype, device=job.device, trust_remote_code=job.trust_remote_code
    )
    judge = JudgeModel(model, SpanReader(tokenizer, JUDGE), TokenBytes(tokenizer))
    rollouts = tuple(read_rollout(line, judge.reader, raw=job.raw) for line in lines[: job.items])
    return _Subject("rollouts", judge, _engine(job, judge), rollouts, None)


def _engine(job: CausalJob, judge: JudgeModel) -> GroupEngine:
    return GroupEngine(judge.model, memory_budget=job.memory_gib * 2**30)


def _sampled(judge: JudgeModel, items: Sequence[testbed.Item], seed: int) -> list[list[list[int]]]:
    return [
        [list(rollout.prompt_ids), list(rollout.completion_ids)]
        for rollout in sample_judgements(judge, items, seed=seed)
    ]


def _rows(job: CausalJob, subject: _Subject, parts: _Parts, report: Progress) -> list[dict[str, Any]]:
    """Return one record a rollout, chunk by chunk: its evidence, and the effect of every intervention."""
    prompts = {rollout.prompt_ids: number for number, rollout in reversed(list(enumerate(subject.rollouts)))}
    rows: list[dict[str, Any]] = []
    for start in range(0, len(subject.rollouts), _CHUNK):
        report(f"interventions on {subject.name}", start, len(subject.rollouts))
        chunk = subject.rollouts[start : start + _CHUNK]
        for record in parts.once(f"rows-{subject.name}-{start:05d}", lambda: _chunk(job, subject, start, chunk)):  # noqa: B023
            rollout = subject.rollouts[record["row"]]
            rows.append({"judge": subject.name, "prompt": prompts[rollout.prompt_ids], **record})
    return rows


def _chunk(job: CausalJob, subject: _Subject, start: int, chunk: Sequence[Rollout]) -> list[dict[str, Any]]:
    problems = [rollout.malformed or subject.engine.refusal(rollout) for rollout in chunk]
    sound = [place for place, problem in enumerate(problems) if problem is None]
    evidence = dict(
        zip(
            sound,
            gather_evidence([chunk[place] for place in sound], subject.judge, subject.engine, seed=job.seed),
            strict=True,
        )
    )
    for place in list(sound):
        if evidence[place].problem is not None:
            problems[place] = evidence[place].problem
            sound.remove(place)
    plans = [
        Plan(
            chunk[place],
            _another(subject.rollouts, start + place, job.seed),
            evidence[place].saliency[DEFAULT_LINK],
            evidence[place].attention,
        )
        for place in sound
    ]
    effects = dict(
        zip(
            sound,
            intervene(plans, subject.judge, resamples=job.resamples, seed=(job.seed << 20) + start),
            strict=True,
        )
    )
    records = []
    for place, rollout in enumerate(chunk):
        record: dict[str, Any] = {"row": start + place, "malformed": problems[place]}
        if place in effects:
            record |= {
                "effects": {
                    name: {mode: None if effect is None else asdict(effect) for mode, effect in modes.items()}
                    for name, modes in effects[place].items()
                },
                "evidence": dict(evidence[place].values),
                "tokens": subject.judge.reader.texts(rollout.token_ids),
                "prompt_tokens": len(rollout.prompt_ids),
                "positions": {name: list(span.positions) for name, span in rollout.spans.items()},
                "saliency": {name: list(norms) for name, norms in evidence[place].saliency.items()},
                "attention": list(evidence[place].attention),
            }
        records.append(record)
    return records


def _another(rollouts: Sequence[Rollout], row: int, seed: int) -> tuple[int, ...]:
    """Return the ids of another prompt's criteria that differ from the row's own; none where there are none."""
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


def _controls(job: CausalJob, subject: _Subject) -> dict[str, Any]:
    """Return what the controls show on the first sound rollouts."""
    sound = [
        rollout for rollout in subject.rollouts if rollout.malformed is None and subject.engine.refusal(rollout) is None
    ][: job.controlled]
    if not sound:
        return {}
    parsed = [
        nuisance_angles(
            sound,
            _ANGLE_LINKS,
            subject.judge,
            subject.engine,
            permutation=kind,  # type: ignore[arg-type]
            counterfactuals=4,
            ranks=_ANGLE_RANKS,
            seed=job.seed,
        )
        for kind in _PERMUTATIONS
    ]
    evidence = gather_evidence(sound, subject.judge, subject.engine, seed=job.seed)
    kept = [(rollout, one) for rollout, one in zip(sound, evidence, strict=True) if one.problem is None]
    rollouts = [rollout for rollout, _ in kept]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return {
            "masked": masked_scores(rollouts, subject.judge),
            "randomisation": randomisation(rollouts, subject.judge, seed=job.seed),
            "captum": captum_difference(rollouts, subject.judge),
            "faithfulness": faithfulness(
                rollouts, [one.saliency[DEFAULT_LINK] for _, one in kept], subject.judge, seed=job.seed
            ),
            "angles": [record for records in parsed for record in records],
            "random_angles": {str(rank): random_angle(rank, subject.engine.width) for rank in _ANGLE_RANKS},
        }


def _write_lines(path: Path, records: Sequence[Any]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
