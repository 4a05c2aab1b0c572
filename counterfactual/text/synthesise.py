"""The making of pairs: every kind for every source, split first; what kinds ask of a writer is asked in large batches.

A kind is a generator of the pairs that it makes of a source. One that needs a model that writes also yields `Asked`,
and is sent the answers; so each kind reads top to bottom, and the writer still gets prompts of many sources at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

import numpy as np

from cepo.counterfactual.text.pairs import Pair, Source, Split, digest, side_of
from cepo.counterfactual.text.relevance import Peers

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A prompt: messages with role and content."""
Answers: TypeAlias = Sequence[str | Exception]
"""What a writer wrote for each prompt, its thought included, or why there is nothing, such as a time-out."""
Writer: TypeAlias = Callable[[Sequence[Messages]], Answers]
"""Any model that writes: takes prompts and returns as many answers, in their order."""


@dataclass(frozen=True)
class Asked:
    """Prompts that a kind wants answered before it continues."""

    prompts: tuple[Messages, ...]


_Asking: TypeAlias = Generator[Pair | Asked, Answers, None]
Kind: TypeAlias = Callable[[Source, Peers, np.random.Generator], Iterator[Pair | Asked]]
"""Makes pairs of a source, given the sources of its side of the split (itself included) and its own random numbers."""


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
    """Yield the pairs of all kinds, source by source; those that a check refuses are there, and not kept.

    The split comes first: prompts and responses of the test side never enter a pair of the training side, and vice
    versa. A source's pairs depend on the seed, the source, the other sources of its side and the writer alone.

    Args:
        sources: preferences with distinct ids.
        kinds: by name.
        seed: of all draws, and of the split.
        test_fraction: share of the prompts on the test side, in [0, 1].
        write: answers what kinds ask; may be left out where none asks.
        generator: the writer's name, for pairs of kinds that name none.
        at_once: sources whose prompts are asked together.
        on_done: called with the number of sources that are done.
    """
    sides = [side_of(source.prompt, test_fraction, seed) for source in sources]
    placed = list(zip(sources, sides, strict=True))
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
                yield replace(pair, split=one.side, generator=named)


@dataclass
class _Made:
    """Pairs of one kind and source in the making."""

    side: Split
    making: Iterator[Pair | Asked]
    pairs: list[Pair] = field(default_factory=list)
    prompts: tuple[Messages, ...] | None = None

    def go_on(self, answers: Answers | None) -> None:
        """Collect pairs up to the next question, or to the end, where `prompts` is None; None begins."""
        self.prompts = None
        with contextlib.suppress(StopIteration):
            item = next(self.making) if answers is None else cast(_Asking, self.making).send(answers)
            while isinstance(item, Pair):
                self.pairs.append(item)
                item = next(self.making)
            self.prompts = item.prompts


def _finish(made: Sequence[_Made], write: Writer | None) -> None:
    """Ask, round by round, what is still in the making; prompts that are equal are asked once."""
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
