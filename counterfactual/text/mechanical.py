"""Pairs for reward models that are made by rules, in a world where known words show each attribute.

A *cause* is an attribute that decides what is better under a prompt. Edits teach it: a response is paired with a copy
in which one attribute is worse or better, all else equal. Neutrals teach what is not a cause: both responses are put
under an unrelated prompt, where neither is better, however much they differ.

Source: Srivastava et al., Robust Reward Modeling via Causal Rubrics (arXiv 2506.16507), for edits and irrelevant-query
neutrals; Liu et al., RRM: Robust Reward Model Training Mitigates Reward Hacking (arXiv 2409.13156), for `rrm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cepo.counterfactual.text.pairs import MECHANICAL, ORIGINAL, Pair, Source
from cepo.counterfactual.text.synthesise import Kind, synthesise

Rule = Literal["original", "degrade", "upgrade", "irrelevant", "rrm"]
Ties = Literal["true", "unchecked", "wrong"]
_KEEPS: dict[Ties, Callable[[bool], bool]] = {
    "true": lambda is_tie: is_tie,
    "unchecked": lambda is_tie: True,
    "wrong": lambda is_tie: not is_tie,
}
_DROPPED = {
    "true": "the responses differ in what the prompt asks",
    "wrong": "the tie is true, and wrong ones are asked",
}


def make_pairs(
    sources: Sequence[Source],
    words: Mapping[str, tuple[str, str]],
    *,
    kinds: Sequence[Rule],
    seed: int,
    ties: Ties = "true",
    test_fraction: float = 0.0,
) -> Iterator[Pair]:
    """Yield pairs of the given kinds, see `world_kinds` and `synthesise`.

    Args:
        sources: preferences with known causes and distinct ids.
        words: by attribute, the positive and the negative word; a response contains exactly one of them, once.
        kinds: which kinds to make.
        seed: seed of all draws, and of the split.
        ties: which neutrals to keep: those that are ties, all, or (a control) only those that are not.
        test_fraction: share of the prompts on the test side, in [0, 1].

    Raises:
        ValueError: for an unknown kind or `ties`, or too few sources for a kind.
    """
    known = world_kinds(words, ties=ties)
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise ValueError(f"kinds holds {', '.join(map(repr, unknown))}; expected some of {', '.join(known)}")
    return synthesise(sources, {kind: known[kind] for kind in kinds}, seed=seed, test_fraction=test_fraction)


def world_kinds(words: Mapping[str, tuple[str, str]], *, ties: Ties = "true") -> dict[Rule, Kind]:
    """Return the kinds of pairs by name.

    original: the preference itself.
    degrade: a preference of the chosen response over a copy with its cause's word made negative.
    upgrade: a preference of a copy of the rejected response, with its cause's word made positive, over the original.
    irrelevant: a tie of both responses under a prompt of another cause. Such prompts are drawn in turn until one passes
        the check: both responses show that cause by the same word, so the tie is true.
    rrm: preferences of the chosen response over both responses of another source, and a tie of the other source's
        chosen response and a third one's rejected response; unchecked.

    Args:
        words: as for `make_pairs`.
        ties: as for `make_pairs`.

    Raises:
        ValueError: for an unknown `ties`.
    """
    if ties not in _KEEPS:
        raise ValueError(f"ties is {ties!r}; expected one of {', '.join(_KEEPS)}")

    def kind_of(make: Callable[[Source, _World], Iterator[Pair]]) -> Kind:
        return lambda source, peers, rng: make(source, _World(words, peers, rng, ties))

    return {rule: kind_of(make) for rule, make in _MAKERS.items()}


def shows(response: str, attribute: str, words: Mapping[str, tuple[str, str]]) -> bool:
    """Return whether a response shows an attribute by its positive word; ValueError unless it shows it once."""
    found = re.findall(rf"\b(?:{'|'.join(words[attribute])})\b", response)
    if len(found) != 1:
        raise ValueError(f"response {response!r} shows {attribute} {len(found)} times; expected once")
    return bool(found[0] == words[attribute][0])


def show(response: str, attribute: str, words: Mapping[str, tuple[str, str]], *, positive: bool) -> str:
    """Return the response with the attribute shown by its positive or its negative word, in the same place."""
    return re.sub(rf"\b(?:{'|'.join(words[attribute])})\b", words[attribute][not positive], response)


@dataclass(frozen=True)
class _World:
    words: Mapping[str, tuple[str, str]]
    peers: Sequence[Source]  # of the same side, the source itself included
    rng: np.random.Generator
    ties: Ties


def _original(source: Source, world: _World) -> Iterator[Pair]:
    yield Pair(source.id, source.prompt, source.chosen, source.rejected, kind=ORIGINAL)


def _degrade(source: Source, world: _World) -> Iterator[Pair]:
    worse = show(source.chosen, source.cause, world.words, positive=False)
    yield _edit(source, "degrade", source.chosen, worse, world.words[source.cause])


def _upgrade(source: Source, world: _World) -> Iterator[Pair]:
    better = show(source.rejected, source.cause, world.words, positive=True)
    yield _edit(source, "upgrade", better, source.rejected, world.words[source.cause])


def _edit(
    source: Source, kind: Literal["degrade", "upgrade"], chosen: str, rejected: str, words: tuple[str, str]
) -> Pair:
    return Pair(
        f"{source.id}/{kind}",
        source.prompt,
        chosen,
        rejected,
        kind=kind,
        attribute=source.cause,
        attribute_words=words,
        weight=1.0,
        direction="down" if kind == "degrade" else "up",
        source_ids=(source.id,),
        generator=MECHANICAL,
    )


def _irrelevant(source: Source, world: _World) -> Iterator[Pair]:
    unrelated = sorted({(peer.prompt, peer.cause) for peer in world.peers if peer.cause != source.cause})
    if not unrelated:
        raise ValueError(f"sources holds no prompt with a cause other than {source.cause!r}; expected one")
    for draw, place in enumerate(world.rng.permutation(len(unrelated))):
        prompt, cause = unrelated[place]
        is_tie = shows(source.chosen, cause, world.words) == shows(source.rejected, cause, world.words)
        kept = _KEEPS[world.ties](is_tie)
        yield Pair(
            f"{source.id}/irrelevant-{draw}",
            prompt,
            source.chosen,
            source.rejected,
            tie=True,
            kind="irrelevant",
            source_ids=(source.id,),
            generator=MECHANICAL,
            checks={"is_tie": is_tie},
            kept=kept,
            reason=None if kept else _DROPPED[world.ties],
        )
        if kept:
            return


def _rrm(source: Source, world: _World) -> Iterator[Pair]:
    others = [peer for peer in world.peers if peer.prompt != source.prompt]
    if len(others) < 2:
        raise ValueError(
            f"sources holds {len(others)} with a prompt other than that of {source.id!r}; expected two for rrm"
        )
    second, third = (others[place] for place in world.rng.choice(len(others), size=2, replace=False))
    for draw, (chosen, rejected, tie, used) in enumerate(
        (
            (source.chosen, second.chosen, False, (second,)),
            (source.chosen, second.rejected, False, (second,)),
            (second.chosen, third.rejected, True, (second, third)),
        )
    ):
        yield Pair(
            f"{source.id}/rrm-{draw}",
            source.prompt,
            chosen,
            rejected,
            tie=tie,
            kind="rrm",
            source_ids=(source.id, *(other.id for other in used)),
            generator=MECHANICAL,
        )


_MAKERS: dict[Rule, Callable[[Source, _World], Iterator[Pair]]] = {
    "original": _original,
    "degrade": _degrade,
    "upgrade": _upgrade,
    "irrelevant": _irrelevant,
    "rrm": _rrm,
}
