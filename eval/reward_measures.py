"""Measure what a reward model of the testbed follows: the cause, or length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from cepo.counterfactual.text.mechanical import Source, show
from cepo.train.reward_scores import RewardModel
from cepo.train.reward_testbed import WORDS, generate_sources, with_length

ITEMS = 400
_SEED_OFFSET = 5_000_011  # so that items differ from those of training
_TRAINED = 0.9  # share of the training pairs in which length is right


@dataclass(frozen=True)
class RewardMeasures:
    """Measures of a reward model by interventions; D is a difference of rewards.

    Attributes:
        in_distribution: accuracy on new pairs where length is right as often as in training, in [0, 1].
        flipped: accuracy on new pairs where the longer response is always the worse one, in [0, 1].
        length_effect: mean D between a response with many filler words and the same response with few.
        cause_effect: mean D between a response and a copy with the negative word of the query's aspect.
        other_effect: mean |D| between copies of a response with either word of another aspect, which is irrelevant.
        length_share: |length_effect| / cause_effect; infinite if the cause has no effect or the wrong sign.
    """

    in_distribution: float
    flipped: float
    length_effect: float
    cause_effect: float
    other_effect: float
    length_share: float


def measure_reward_model(model: RewardModel, *, seed: int, items: int = ITEMS) -> RewardMeasures:
    """Measure a reward model of the testbed on new items.

    Args:
        model: a model that was trained on the testbed's pairs.
        seed: seed of the items, which differ from those of training with the same seed.
        items: number of pairs per measure, at least 1.
    """
    drawn, flipped = (
        generate_sources(items, seed=seed + _SEED_OFFSET + place, cue_agreement=agreement)
        for place, agreement in enumerate((_TRAINED, 0.0))
    )
    aspects = list(WORDS)
    lengths, causes, others = [], [], []
    for place, source in enumerate(flipped):
        long, short = (with_length(source.chosen, long=long, seed=seed + place) for long in (True, False))
        lengths.append((source.prompt, long, short))
        causes.append((source.prompt, source.chosen, show(source.chosen, source.cause, WORDS, positive=False)))
        other = [aspect for aspect in aspects if aspect != source.cause][place % (len(aspects) - 1)]
        good, bad = (show(source.chosen, other, WORDS, positive=positive) for positive in (True, False))
        others.append((source.prompt, good, bad))
    length, cause = mean(_differences(model, lengths)), mean(_differences(model, causes))
    return RewardMeasures(
        in_distribution=_accuracy(model, drawn),
        flipped=_accuracy(model, flipped),
        length_effect=length,
        cause_effect=cause,
        other_effect=mean(map(abs, _differences(model, others))),
        length_share=abs(length) / cause if cause > 0 else float("inf"),
    )


def _accuracy(model: RewardModel, sources: Sequence[Source]) -> float:
    pairs = [(source.prompt, source.chosen, source.rejected) for source in sources]
    return mean(float(difference > 0) for difference in _differences(model, pairs))


def _differences(model: RewardModel, pairs: Sequence[tuple[str, str, str]]) -> list[float]:
    """Return D of each pair: prompt, chosen, rejected."""
    prompts, chosen, rejected = zip(*pairs, strict=True)
    found: list[float] = model.differences(prompts, chosen, rejected).values_N.tolist()
    return found
