"""A judge to examine, and its judgements: several per testbed item, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cepo.eval.score.rows import read_rollout
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.model import HeldModel
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.train import testbed, testbed_judges
from cepo.train.testbed_modes import Mode, completion_mode


@dataclass(frozen=True)
class Judge:
    """A judge to examine.

    Attributes:
        name: name of the world or testbed judge, or "judgements" for those of a model.
        model: causal language model in eval mode.
        reader: reads its rollouts.
        memory_gib: GiB that the engine may use besides the model.
    """

    name: str
    model: Any
    reader: SpanReader
    memory_gib: float = 4.0

    @property
    def layout(self) -> Layout:
        """The format of its judgements."""
        return self.reader.layout

    @cached_property
    def engine(self) -> GroupEngine:
        """The group engine on its model."""
        return GroupEngine(self.model, memory_budget=self.memory_gib * 2**30)

    @cached_property
    def held(self) -> HeldModel:
        """Its model, prepared for forward passes outside of an engine."""
        return HeldModel(self.model)


@dataclass(frozen=True)
class Judgement:
    """One judgement, and how it came about.

    Attributes:
        rollout: the judgement, possibly malformed.
        mode: how it came to its verdict, see `completion_mode`; None if unknown.
    """

    rollout: Rollout
    mode: Mode | None = None


def sample_judgements(judge: Judge, items: Sequence[testbed.Item], *, completions: int, seed: int) -> list[Judgement]:
    """Return several judgements of each testbed item, sampled at temperature 1, in the order of the items.

    Args:
        judge: a testbed judge.
        items: the items to judge.
        completions: judgements per item, at least 1.
        seed: seed of the sampling.
    """
    repeated = [item for item in items for _ in range(completions)]
    tokenizer = judge.reader.tokenizer
    texts = testbed_judges.judge_items(judge.model, tokenizer, repeated, temperature=1.0, seed=seed)
    return [
        Judgement(
            read_rollout({"prompt": item.prompt, "completion": text + tokenizer.eos_token}, judge.reader),
            completion_mode(item, text),
        )
        for item, text in zip(repeated, texts, strict=True)
    ]
