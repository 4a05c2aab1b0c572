"""`cepo augment`: pairs made of preferences by rule or by a model that writes, and filtered by a reward model.

The pairs are a function of the data, the settings and what the models answer. The answers are kept as they come, so a
killed run makes its pairs anew from the answers that it has, and asks for the others alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cepo.counterfactual.text.filter import filter_pairs
from cepo.counterfactual.text.kinds import BY_RULE, WRITTEN
from cepo.counterfactual.text.mechanical import world_kinds
from cepo.counterfactual.text.pairs import Source
from cepo.counterfactual.text.synthesise import Kind, synthesise
from cepo.eval.augment.answers import JournaledWriter, journaled_difference
from cepo.eval.augment.summary import AugmentSummary, write_page
from cepo.eval.judges.open import open_judge
from cepo.eval.judges.settings import JudgeSettings, check_judge, decisive_settings
from cepo.files import BrokenLine, Row, claim, content_hash, write_jsonl
from cepo.jacobian.loading import model_fingerprint, resolve_model
from cepo.train.policy import TESTBED
from cepo.train.reward_scores import RewardModel
from cepo.train.reward_testbed import WORDS, generate_sources
from cepo.train.rows import given, read_flag, read_id, read_pair, read_tie
from cepo.train.source import collect_rows

Progress = Callable[[int, int, str], None]
"""Called with (preferences done, preferences in all, what has been asked in words)."""
_WORLD_SIZE, _WORLD_CUE = 300, 0.9  # of the testbed, as reward models train on it by default


@dataclass(frozen=True)
class AugmentJob:
    """What `cepo augment` is asked to do.

    Attributes:
        data: preferences, see `open_source`, or "testbed".
        output: folder for pairs.jsonl, report.html and the models' answers.
        kinds: names of kinds, of `WRITTEN` and `BY_RULE`, or of the testbed's own.
        writer: which model writes, and how; its name is empty where none does. Its seed is also that of the draws and
            the split, and its dtype, device, batch size and trust are also those of the filter's model.
        filter_model: a reward model, see `RewardModel.open`; None for no filter.
        split: of a hub data set, or None for its usual one.
        limit: number of preferences to read, or None for all.
        test_fraction: share of the prompts on the test side, in [0, 1].
    """

    data: str
    output: Path
    kinds: tuple[str, ...]
    writer: JudgeSettings
    filter_model: str | None = None
    split: str | None = None
    limit: int | None = None
    test_fraction: float = 0.02


def augment(job: AugmentJob, *, progress: Progress | None = None) -> AugmentSummary:
    """Make pairs of every preference and write them, with a page; a killed run loses and repeats no answer.

    Args:
        job: what to do.
        progress: called after each answer of the writer, and as preferences are done.

    Raises:
        ValueError: for what cannot work, before a model is asked; for an output of other settings, data or weights; for
            a server that refuses the key, the address or the model.
    """
    kinds = _kinds(job)
    sources, broken = _read(job)
    results = [job.output / name for name in ("pairs.jsonl", "writings.jsonl", "differences.jsonl", "report.html")]
    claim(job.output / "settings.json", _settings(job, sources), results=results)
    pairs_file, writings, differences, page = results
    done = 0

    def show(now: int | None = None) -> None:
        nonlocal done
        done = done if now is None else now
        if progress is not None:
            progress(done, len(sources), writer.told if job.writer.model else "")

    writer = JournaledWriter(writings, lambda: open_judge(job.writer), show)
    pairs = synthesise(
        sources,
        kinds,
        seed=job.writer.seed,
        test_fraction=job.test_fraction,
        write=writer,
        generator=job.writer.model,
        on_done=show,
    )
    if job.filter_model is not None:
        model = RewardModel.open(
            job.filter_model,
            batch_size=job.writer.batch_size,
            dtype=job.writer.dtype,
            device=job.writer.device,
            trust_remote_code=job.writer.trust_remote_code,
        )
        pairs = filter_pairs(pairs, journaled_difference(differences, model))
    summary = AugmentSummary(writer, tuple(broken))
    write_jsonl(pairs_file, (summary.count(pair).row() for pair in pairs))
    facts = {"data": job.data, "kinds": ", ".join(job.kinds)}
    if job.writer.model:
        facts |= {"writer": str(job.writer), "its answers": writer.told}
    if job.filter_model is not None:
        facts["model of the filter"] = job.filter_model
    write_page(page, summary, facts)
    return summary


def _kinds(job: AugmentJob) -> dict[str, Kind]:
    """Return the kinds of a job; everything about it that needs neither data nor models is checked here."""
    known: Mapping[str, Kind] = {**BY_RULE, **WRITTEN}
    written = [name for name in job.kinds if name in WRITTEN]
    if job.data == TESTBED:
        known, written = {str(name): kind for name, kind in world_kinds(WORDS).items()}, []
    unknown = [name for name in job.kinds if name not in known]
    if unknown or not job.kinds:
        raise ValueError(
            f"kinds holds {', '.join(map(repr, unknown)) or 'nothing'}; expected some of {', '.join(known)}"
        )
    if written and not job.writer.model:
        raise ValueError(f"kinds holds {', '.join(written)}, which a model writes; name one with --writer")
    if job.writer.model and not written:
        raise ValueError(f"writer is {job.writer.model!r}, but no kind needs one; those that do: {', '.join(WRITTEN)}")
    if written:
        check_judge(job.writer)
    if not 0.0 <= job.test_fraction <= 1.0:
        raise ValueError(f"test_fraction is {job.test_fraction}; expected a fraction in [0, 1]")
    return {name: known[name] for name in job.kinds}


def _read(job: AugmentJob) -> tuple[list[Source], list[BrokenLine]]:
    """Return the preferences, each with an id of its own, and the rows that hold none."""
    if job.data == TESTBED:
        return generate_sources(job.limit or _WORLD_SIZE, seed=job.writer.seed, cue_agreement=_WORLD_CUE), []
    seen: Counter[str] = Counter()

    def convert(row: Row) -> Source:
        if not read_flag(row, "kept", default=True):
            raise ValueError(f"not kept: {given(row, 'reason')}")
        if read_tie(row, ties=True):
            raise ValueError("is a tie; expected a preference, of which pairs are made")
        texts = read_pair(row)
        identity = read_id(row)
        name = content_hash(*texts) if identity is None else str(identity)
        seen[name] += 1
        return Source(name if seen[name] == 1 else f"{name}#{seen[name]}", *texts)

    return collect_rows(job.data, convert, split=job.split, limit=job.limit)


def _settings(job: AugmentJob, sources: Sequence[Source]) -> dict[str, Any]:
    """Return all that decides the pairs; data and weights by their content."""
    return {
        "command": "augment",
        "data": content_hash([content_hash(asdict(source)) for source in sources]),
        "kinds": sorted(set(job.kinds)),
        "seed": job.writer.seed,
        "test_fraction": job.test_fraction,
        "writer": decisive_settings(job.writer) if job.writer.model else None,
        "filter": model_fingerprint(resolve_model(job.filter_model)) if job.filter_model else None,
    }
