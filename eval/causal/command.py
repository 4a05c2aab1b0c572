"""`cepo eval causal`: does S single out, within a prompt, the completions whose verdict came from their criteria?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from cepo.eval.causal.controls import PAIR, captum_difference, masked_scores, randomisation
from cepo.eval.causal.cost import relative_costs
from cepo.eval.causal.judge import Judge, Judgement, sample_judgements
from cepo.eval.causal.measures import links_of, measure
from cepo.eval.causal.report import write_causal_report
from cepo.eval.causal.summary import CausalSummary, JudgeResults, summarise_causal
from cepo.eval.score.rows import read_lines, rollout_of
from cepo.files import (
    SETTINGS,
    append_jsonl,
    claim,
    counted,
    fingerprint,
    json_line,
    make_folder,
    resume_jsonl,
    write_jsonl,
    write_text,
)
from cepo.fusion.score import Pools, pools_of
from cepo.jacobian.loading import check_device, load_model, model_fingerprint, resolve_model
from cepo.jacobian.reading.spans import SpanReader
from cepo.train import testbed, testbed_judges
from cepo.train.policy import CACHE, load_testbed_judge, testbed_fingerprint
from cepo.train.prompts import JUDGE, UNGUARDED_JUDGE
from cepo.train.testbed_words import WordsJudge, load_words_judge, words_fingerprint

_CHUNK = 16  # testbed judgements that are measured and written at once; a real model's, which take minutes, one by one
_JUDGE_STEPS = 300
IN_WORDS = "words-"  # prefix of worlds whose judge is a pretrained model
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CausalJob:
    """The arguments of `cepo eval causal`.

    Attributes:
        output: folder for rows.jsonl, summary.jsonl, report.html, and parts/, from which a killed run continues.
        model: see `resolve_model`; None for a judge of the testbed.
        input: file of that model's judgements, with rows as for `cepo score`; None for the testbed.
        world: kind of testbed judge, see `cepo.train.testbed_judges.warm_start`; with the prefix "words-", a
            pretrained model, see `cepo.train.testbed_words`.
        layers: number of first layers of that pretrained model to keep, at least 1; None for `WordsJudge`'s default.
        items: number of testbed prompts, at least 8; or number of rows of the input to measure, from the first. All
            rows of the input provide donors.
        completions: completions sampled per testbed prompt, at least 2.
        pair: whether to examine the certified pair of testbed judges too, which are warmed up if they are not cached.
        most_nodes: largest number of nodes along a path, at least 1; numbers above 16 are not tried.
        estimates_only: whether to leave out the controls and the scores that do not estimate the effect, which cost
            most on a large model.
        controlled: number of judgements for the controls, at least 1.
        seed: seed of judge, items, sampling and donors.
        raw: whether to use prompt text as it is, without the chat template.
        dtype: dtype of the weights.
        device: device to run on.
        memory_gib: GiB that the engine may use besides the model.
        trust_remote_code: whether a hub repository's own code may run.
    """

    output: Path
    model: str | None = None
    input: Path | None = None
    world: str = "lazy"
    layers: int | None = None
    items: int = 48
    completions: int = 8
    pair: bool = True
    most_nodes: int = 16
    estimates_only: bool = False
    controlled: int = 24
    seed: int = 0
    raw: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    memory_gib: float = 4.0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Judged:
    """A judge and its judgements, including malformed ones."""

    judge: Judge
    judgements: tuple[Judgement, ...]
    pools: Pools
    certificate: dict[str, float] | None = None
    has_controls: bool = True


def run_causal(job: CausalJob, *, progress: Progress | None = None) -> CausalSummary:
    """Compare every score with how completions came to their verdicts, and with exact effects; write the report.

    judgements -> scores, approximations and exact effects -> agreement within prompts -> controls that a valid measure
    must pass. Finished parts are kept in `parts/`, and the same command continues from them.

    Args:
        job: the job.
        progress: called with (what is being done, number done, total).

    Raises:
        ValueError: for settings, input or a model that cannot be used, before long work starts, or an output with other
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
        controls = {}
        if judged.has_controls:
            report(f"controls of {judged.judge.name}", 0, 1)
            controls = _once(parts / f"controls-{judged.judge.name}.json", partial(_controls, job, judged, rows))
        results.append(JudgeResults(judged.judge.name, tuple(rows), controls, judged.certificate))
    report("statistics", 0, 1)
    write_jsonl(rows_file, [row for one in results for row in one.rows])
    summary = summarise_causal(results, seed=job.seed)
    write_jsonl(summary_file, summary.records)
    facts = {
        "judge": job.model or f"the testbed's {job.world} world",
        "judgements": str(job.input or f"{job.completions} of each of {job.items} prompts"),
        "seed": str(job.seed),
    }
    write_causal_report(page, results, summary, facts)
    return summary


def _check(job: CausalJob) -> None:
    if job.layers is not None and not job.world.startswith(IN_WORDS):
        raise ValueError(f"layers is {job.layers} for the world {job.world}; expected one in words, such as words-lazy")
    if (job.model is None) != (job.input is None):
        raise ValueError("model and input go together; expected both, or neither for the testbed's judges")
    least = {"items": 8 if job.model is None else 1, "completions": 2, "most_nodes": 1, "controlled": 1}
    for name, smallest in least.items():
        if getattr(job, name) < smallest:
            raise ValueError(f"{name} is {getattr(job, name)}; expected at least {smallest}")
    if job.world.removeprefix(IN_WORDS) not in get_args(testbed_judges.JudgeKind):
        known = ", ".join(get_args(testbed_judges.JudgeKind))
        raise ValueError(f"world is {job.world!r}; expected one of {known}, with or without words- before it")
    if not job.memory_gib > 0:
        raise ValueError(f"memory_gib is {job.memory_gib}; expected a positive number of GiB")
    check_device(job.device)


def _settings(job: CausalJob) -> dict[str, Any]:
    """Return what determines the parts; `pair` is not included, since it only adds parts."""
    names = ("items", "most_nodes", "estimates_only", "controlled", "seed", "raw", "dtype")
    settings = {"command": "cepo eval causal", **{name: getattr(job, name) for name in names}}
    if job.model is not None and job.input is not None:
        return {**settings, "model": model_fingerprint(resolve_model(job.model)), "input": fingerprint(job.input)}
    judges = {name: _judge_fingerprint(name, job) for name in dict.fromkeys((job.world, *PAIR))}
    return {**settings, "world": job.world, "completions": job.completions, "judges": judges}


def _judge_fingerprint(name: str, job: CausalJob) -> str:
    if name.startswith(IN_WORDS):
        return words_fingerprint(_in_words(name, job.layers))
    return testbed_fingerprint(name, steps=_JUDGE_STEPS, seed=job.seed)  # type: ignore[arg-type]


def _in_words(name: str, layers: int | None) -> WordsJudge:
    judge: Any = name.removeprefix(IN_WORDS)
    return WordsJudge(judge) if layers is None else WordsJudge(judge, layers=layers)


def _once(path: Path, work: Callable[[], Any]) -> Any:
    """Return the JSON result of some work, from its file if an earlier run finished it."""
    if not path.is_file():
        value = json.dumps(work())
        make_folder(path.parent)
        write_text(path, value)
    return json.loads(path.read_text(encoding="utf-8"))


def _judged(job: CausalJob, parts: Path, report: Progress) -> Iterator[_Judged]:
    """Yield the judge, and then those of the certified pair."""
    if job.model is not None and job.input is not None:
        lines = read_lines(job.input)
        model, tokenizer = load_model(
            resolve_model(job.model), dtype=job.dtype, device=job.device, trust_remote_code=job.trust_remote_code
        )
        judge = Judge("judgements", model, SpanReader(tokenizer, JUDGE), job.memory_gib)
        read = [rollout_of(line, judge.reader, raw=job.raw) for line in lines]
        sound = [one for one in read if (one.malformed or judge.engine.refusal(one)) is None]
        prompts = {one.prompt_ids for one in sound}
        if len(prompts) < 2:
            raise ValueError(
                f"input {str(job.input)!r} holds well-formed judgements of {counted(len(prompts), 'prompt')}, so no "
                "span has a donor, the content of another prompt's judgement; expected at least two prompts"
            )
        yield _Judged(judge, tuple(map(Judgement, read[: job.items])), pools_of(sound, links_of(judge)))
        return
    yield _testbed_judge(job, job.world, job.completions, parts, report)
    for name in PAIR if job.pair else ():
        if name != job.world:
            yield _testbed_judge(job, name, 1, parts, report)


def _testbed_judge(job: CausalJob, name: str, completions: int, parts: Path, report: Progress) -> _Judged:
    making = f"making the judge {name}"
    if name.startswith(IN_WORDS):  # one judge for all seeds
        wanted = _in_words(name, job.layers)
        model, tokenizer = load_words_judge(
            wanted, cache=CACHE, device=job.device, progress=lambda step, steps, _: report(making, step, steps)
        )
    else:
        model, tokenizer = load_testbed_judge(
            name,  # type: ignore[arg-type]
            steps=_JUDGE_STEPS,
            seed=job.seed,
            progress=lambda step, _: report(making, step, _JUDGE_STEPS),
        )
    # Without the guard, since judgements whose criteria hold the verdict would all be malformed.
    layout = UNGUARDED_JUDGE if name.endswith("copied") else JUDGE
    judge = Judge(name, model.to(job.device), SpanReader(tokenizer, layout), job.memory_gib)
    items = testbed.generate_items(job.items, seed=job.seed + 11, cue_agreement=0.5)
    report(f"judgements of {name}", 0, 1)

    def sample() -> list[list[Any]]:
        drawn = sample_judgements(judge, items, completions=completions, seed=job.seed)
        return [[one.rollout.prompt_ids, one.rollout.completion_ids, one.mode] for one in drawn]

    certify = partial(testbed_judges.certify, model, tokenizer, items, seed=job.seed)
    known = _once(parts / f"judgements-{name}.json", sample)
    judgements = tuple(Judgement(judge.reader.read(prompt, completion), mode) for prompt, completion, mode in known)
    return _Judged(
        judge,
        judgements,
        pools_of((one.rollout for one in judgements), links_of(judge)),
        _once(parts / f"certificate-{name}.json", certify) if name in PAIR else None,
        has_controls=name == job.world,
    )


def _rows(job: CausalJob, judged: _Judged, parts: Path, report: Progress) -> list[dict[str, Any]]:
    """Return one record per judgement, written to the journal as soon as its chunk is measured."""
    judgements, name, pools = judged.judgements, judged.judge.name, judged.pools
    # Prompts are numbered in order, so that testbed judges with different numbers of completions share the numbers.
    numbers = {ids: number for number, ids in enumerate(dict.fromkeys(one.rollout.prompt_ids for one in judgements))}
    journal = parts / f"rows-{name}.jsonl"
    done = resume_jsonl(journal, lambda record: record["row"])
    pending = [row for row in range(len(judgements)) if row not in done]
    make_folder(parts)
    size = _CHUNK if job.model is None else 1
    for start in range(0, len(pending), size):
        report(f"scores of {name}", len(done), len(judgements))
        rows = pending[start : start + size]
        records = _chunk(job, judged.judge, [judgements[row] for row in rows], pools)
        labelled = [
            {"judge": name, "row": row, "prompt": numbers[judgements[row].rollout.prompt_ids]}
            | {"mode": judgements[row].mode, **record}
            for row, record in zip(rows, records, strict=True)
        ]
        append_jsonl(journal, labelled)
        done.update({record["row"]: json.loads(json_line(record)) for record in labelled})
    return [done[row] for row in range(len(judgements))]


def _chunk(job: CausalJob, judge: Judge, chunk: Sequence[Judgement], pools: Pools) -> list[dict[str, Any]]:
    rollouts = [one.rollout for one in chunk]
    measured = measure(
        rollouts, judge, pools, seed=job.seed, most_nodes=job.most_nodes, estimates_only=job.estimates_only
    )
    return [
        {
            **asdict(one),
            "tokens": judge.reader.texts(rollout.token_ids),
            "prompt_tokens": len(rollout.prompt_ids),
            "positions": {name: span.positions for name, span in rollout.spans.items()},
        }
        for rollout, one in zip(rollouts, measured, strict=True)
    ]


def _controls(job: CausalJob, judged: _Judged, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of the controls on the first well-formed judgements, and the cost of each approximation."""
    kept = [row["row"] for row in rows if row["problem"] is None][: job.controlled]
    if not kept:
        return {}
    judge, pools, rollouts = judged.judge, judged.pools, [judged.judgements[row].rollout for row in kept]
    if job.estimates_only:
        return {"costs": relative_costs(rollouts, judge, pools, seed=job.seed)}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return {
            "costs": relative_costs(rollouts, judge, pools, seed=job.seed),
            "masked": masked_scores(rollouts, judge, pools),
            "randomisation": randomisation(rollouts, judge, pools, seed=job.seed),
            "captum": captum_difference(rollouts, judge),
        }
