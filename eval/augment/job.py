"""The arguments of `cepo augment`; without torch, so that bad ones are refused before it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cepo.counterfactual.text.kinds import BY_RULE, WRITTEN
from cepo.counterfactual.text.mechanical import world_kinds
from cepo.counterfactual.text.synthesise import Kind
from cepo.eval.judges.settings import JudgeSettings, check_judge


@dataclass(frozen=True)
class AugmentJob:
    """The arguments of `cepo augment`.

    Attributes:
        data: preferences, see `open_source`, or "testbed".
        output: folder for pairs.jsonl, report.html and the models' answers.
        kinds: names of kinds in `WRITTEN` and `BY_RULE`, or of the testbed's kinds.
        writer: the generative model and its settings; its name is empty if none is needed. Its seed is also that of
            the draws and the split, and its dtype, device, batch size and trust_remote_code also apply to the filter's
            model.
        filter_model: a reward model, see `RewardModel.open`; None for no filter.
        split: split of a hub data set; None for "train".
        limit: number of preferences to read; None for all.
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


def chosen_kinds(job: AugmentJob) -> dict[str, Kind]:
    """Return the kinds of a job, after checking everything about it that needs neither data nor models.

    Raises:
        ValueError: for an unknown kind, a writer that is missing or not needed, and numbers out of range.
    """
    known: Mapping[str, Kind] = {**BY_RULE, **WRITTEN}
    written = [name for name in job.kinds if name in WRITTEN]
    if job.data == "testbed":
        from cepo.train.reward_testbed import WORDS

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
