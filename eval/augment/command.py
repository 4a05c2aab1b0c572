"""`cepo augment`: make pairs from preferences by rules or with a generative model, and filter them by a reward model.

The pairs are a function of the data, the settings and the models' answers. Answers are saved as they come, so a killed
run makes its pairs again from the answers that it has, and asks only for the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from cepo.counterfactual.text.filter import filter_pairs
from cepo.counterfactual.text.pairs import Source, distinct
from cepo.counterfactual.text.synthesise import synthesise
from cepo.eval.augment.answers import JournaledWriter, journaled_difference
from cepo.eval.augment.job import AugmentJob, chosen_kinds
from cepo.eval.augment.summary import AugmentSummary, write_page
from cepo.eval.judges.open import open_judge
from cepo.eval.judges.settings import decisive_settings
from cepo.files import BrokenLine, Row, claim, content_hash, write_jsonl
from cepo.jacobian.loading import model_fingerprint, resolve_model
from cepo.train.config import TESTBED
from cepo.train.reward_scores import RewardModel
from cepo.train.reward_testbed import generate_sources
from cepo.train.rows import check_kept, read_id, read_pair, read_tie
from cepo.train.source import collect_rows

Progress = Callable[[int, int, str], None]
"""Called with (preferences done, preferences in total, a text about the writer's answers)."""
_WORLD_SIZE, _WORLD_CUE = 300, 0.9  # the testbed's defaults for training reward models


def augment(job: AugmentJob, *, progress: Progress | None = None) -> AugmentSummary:
    """Make pairs from every preference and write them, with a page; a killed run loses and repeats no answer.

    Args:
        job: the job.
        progress: called after each answer of the writer, and as preferences are done.

    Returns:
        The counts for the console and the page.

    Raises:
        ValueError: for settings or data that cannot work, before a model is asked; for an output with other settings,
            data or weights; for a server that refuses the key, the address or the model.
    """
    kinds = chosen_kinds(job)
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
    summary = AugmentSummary(writer, tuple(broken), tuple(kinds))
    write_jsonl(pairs_file, (summary.count(pair).row() for pair in pairs))
    facts = {"data": job.data, "kinds": ", ".join(job.kinds)}
    if job.writer.model:
        facts |= {"writer": str(job.writer), "its answers": writer.told}
    if job.filter_model is not None:
        facts["model of the filter"] = job.filter_model
    write_page(page, summary, facts)
    return summary


def _read(job: AugmentJob) -> tuple[list[Source], list[BrokenLine]]:
    """Return the preferences, each with a unique id, and the rows that hold none."""
    if job.data == TESTBED:
        return generate_sources(job.limit or _WORLD_SIZE, seed=job.writer.seed, cue_agreement=_WORLD_CUE), []
    given: Counter[str] = Counter()

    def convert(row: Row, _: str) -> Source:
        check_kept(row)
        if read_tie(row, ties=True):
            raise ValueError("is a tie; expected a preference to make pairs from")
        texts = read_pair(row)
        identity = read_id(row)
        name = content_hash(*texts) if identity is None else str(identity)
        return Source(distinct(name, given), *texts)

    return collect_rows(job.data, convert, split=job.split, limit=job.limit)


def _settings(job: AugmentJob, sources: Sequence[Source]) -> dict[str, Any]:
    """Return everything that determines the pairs; data and weights by their content."""
    return {
        "command": "augment",
        "data": content_hash([content_hash(asdict(source)) for source in sources]),
        "kinds": sorted(set(job.kinds)),
        "seed": job.writer.seed,
        "test_fraction": job.test_fraction,
        "writer": decisive_settings(job.writer) if job.writer.model else None,
        "filter": model_fingerprint(resolve_model(job.filter_model)) if job.filter_model else None,
    }
