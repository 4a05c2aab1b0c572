"""Make pairs of every kind from every source, after the split; prompts for the writer are batched over sources.

A kind is a generator of the pairs that it makes from a source. A kind that needs a writer also yields `Asked`, and is
sent the answers. So each kind reads from top to bottom, and the writer still gets prompts of many sources at once.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

import numpy as np

from cepo.counterfactual.text.pairs import Pair, Source, Split, digest, distinct, side_of
from cepo.counterfactual.text.relevance import Peers

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A prompt: messages with role and content."""
Answers: TypeAlias = Sequence[str | Exception]
"""The writer's reply to each prompt, including its thought, or the error that prevented one, such as a time-out."""
Writer: TypeAlias = Callable[[Sequence[Messages]], Answers]
"""Any generative model: takes prompts and returns one answer each, in order."""


@dataclass(frozen=True)
class Asked:
    """Prompts that a kind needs answered before it continues."""

    prompts: tuple[Messages, ...]


_Asking: TypeAlias = Generator[Pair | Asked, Answers, None]
Kind: TypeAlias = Callable[[Source, Peers, np.random.Generator], Iterator[Pair | Asked]]
"""Makes pairs from a source, given all sources on its side of the split and a random generator of its own."""


def synthesise(
    sources: Sequence[Source],
    kinds: Mapping[str, Kind],
    *,
    seed: int,
    test_fraction: float = 0.0,
    write: Writer | None = None,
    generator: str | None = None,
    at_once: int = 64,
    on_done: Callable[[int], None] | None = None,
) -> Iterator[Pair]:
    """Yield the pairs of all kinds, source by source; those that a check refuses are yielded too, as not kept.

    The split comes first: prompts and responses of the test side never enter a pair of the training side, and vice
    versa. A source's pairs depend only on the seed, the source, the other sources on its side, and the writer.

    Args:
        sources: preferences with distinct ids.
        kinds: the kinds by name.
        seed: seed of all draws, and of the split.
        test_fraction: share of the prompts on the test side, in [0, 1].
        write: the writer; may be None if no kind needs one.
        generator: the writer's name, for pairs of kinds that set no generator.
        at_once: number of sources whose prompts are asked together.
        on_done: called with the number of sources that are done.

    Raises:
        ValueError: if a kind needs a writer and `write` is None.
    """
    sides = [side_of(source.prompt, test_fraction, seed) for source in sources]
    placed = list(zip(sources, sides, strict=True))
    given: Counter[str] = Counter()
    peers = {side: Peers(source for source, its in placed if its == side) for side in set(sides)}
    for start in range(0, len(sources), at_once):
        made = [
            _Made(side, kind(source, peers[side], np.random.default_rng(digest(name, seed, source.id))))
            for source, side in placed[start : start + at_once]
            for name, kind in kinds.items()
        ]
        _finish(made, write)
        if on_done is not None:
            on_done(min(start + at_once, len(sources)))
        for one in made:
            for pair in one.pairs:
                named = pair.generator or (generator if pair.source_ids else None)
                # A source may be a pair that was made before, with the id that is made here of the source's source.
                yield replace(pair, id=distinct(pair.id, given), split=one.side, generator=named)


@dataclass
class _Made:
    """The pairs of one kind and source while they are being made."""

    side: Split
    making: Iterator[Pair | Asked]
    pairs: list[Pair] = field(default_factory=list)
    prompts: tuple[Messages, ...] | None = None

    def go_on(self, answers: Answers | None) -> None:
        """Collect pairs up to the next `Asked`, or to the end, where `prompts` is None; `answers` is None to start."""
        self.prompts = None
        with contextlib.suppress(StopIteration):
            item = next(self.making) if answers is None else cast(_Asking, self.making).send(answers)
            while isinstance(item, Pair):
                self.pairs.append(item)
                item = next(self.making)
            self.prompts = item.prompts


def _finish(made: Sequence[_Made], write: Writer | None) -> None:
    """Run all generators to their end, asking in rounds; equal prompts are asked once."""
    answered: dict[int, str | Exception] = {}
    for one in made:
        one.go_on(None)
    while going := [one for one in made if one.prompts is not None]:
        asked = {_key(prompt): prompt for one in going for prompt in one.prompts or ()}
        new = {key: prompt for key, prompt in asked.items() if key not in answered}
        if new and write is None:
            raise ValueError("write is None, but a kind needs a writer; expected a callable")
        if new and write is not None:
            answered |= dict(zip(new, write(list(new.values())), strict=True))
        for one in going:
            one.go_on([answered[_key(prompt)] for prompt in one.prompts or ()])


def _key(prompt: Messages) -> int:
    return digest(*(text for message in prompt for text in (message["role"], message["content"])))
