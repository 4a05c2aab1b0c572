"""Original and transformed pairs, and the verdicts of a generative judge or a reward model on them, in one format."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cepo.eval.judges.journal import Collected, JudgeTask, Record
from cepo.eval.judges.reward import RewardSettings, collect_rewards
from cepo.eval.judges.settings import PLACES, Place, Progress, winner
from cepo.eval.report.numbers import digits
from cepo.eval.rewardbench.items import PreferenceItem
from cepo.eval.robustness.effects import ORIGINAL
from cepo.eval.robustness.transformations import ResponsePair, transform
from cepo.files import Row, content_hash
from cepo.train.prompts import judge_prompt


@dataclass(frozen=True)
class Variant:
    """A pair as it is, or transformed.

    Attributes:
        item: the item that the pair is of.
        name: name of the transformation, or ORIGINAL.
        pair: prompt and responses, transformed.
        label: where the better response is shown, "A" or "B".
    """

    item: PreferenceItem
    name: str
    pair: ResponsePair
    label: Place

    @property
    def key(self) -> str:
        """Key of the variant, unique within its data."""
        return f"{self.item.key}/{self.name}"

    @property
    def facts(self) -> Row:
        """Fields of the variant's record besides those of the judgement."""
        item = self.item
        return {
            "row": item.key,
            "id": item.name,
            "subset": item.subset,
            "transformation": self.name,
            "label": self.label,
        }


def variants_of(item: PreferenceItem, transformations: Sequence[str], seed: int) -> list[Variant]:
    """Return an item's pair as it is and under each transformation that applies; an empty list if none does."""
    drawn = random.Random(content_hash("pair", seed, item.key))
    pair = ResponsePair(item.prompt, drawn.choice(item.chosen), drawn.choice(item.rejected))
    label = drawn.choice(PLACES)
    changed = {name: transform(name, pair, seed=seed) for name in transformations}
    found = {ORIGINAL: pair} | {name: variant for name, variant in changed.items() if variant is not None}
    return [Variant(item, name, variant, label) for name, variant in found.items()] if len(found) > 1 else []


def judge_task(variant: Variant) -> JudgeTask:
    """Return the task of a generative judge for a variant."""
    responses = (variant.pair.chosen, variant.pair.rejected)
    messages = judge_prompt(variant.item.prompt, *(responses if variant.label == "A" else responses[::-1]))
    return JudgeTask(variant.key, messages, variant.facts)


def reward_records(
    variants: Sequence[Variant], settings: RewardSettings, output: Path, command: str, progress: Progress | None
) -> tuple[Collected, list[Record]]:
    """Score all variants, and return for each a record like a judge's, with the verdict of the reward difference."""
    shown = settings.shown
    triples = [(variant.item.prompt, variant.pair.chosen, variant.pair.rejected) for variant in variants]
    texts = [
        (variant.facts, messages)
        for variant, triple in zip(variants, triples, strict=True)
        for messages in shown.pair_messages(*triple)
    ]
    rewards = collect_rewards(settings, texts, output, command, progress=progress)
    records = []
    for variant, triple in zip(variants, triples, strict=True):
        difference = rewards.difference(*triple)
        error = "a text has no reward" if math.isnan(difference) else None
        first = difference if variant.label == "A" else -difference
        verdict = {"winner": None if error else winner((first, 0.0)), "forced": False, "error": error}
        records.append({**variant.facts, **verdict, "text": f"difference of the rewards: {digits(difference)}"})
    return rewards.collected, records
