"""Counterfactual rollouts with donors: the source span's content is replaced by that of another prompt's rollout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cepo.jacobian.records import Rollout

# More candidates would not improve a mean over a few donors, and every span examines all of them.
POOL = 512
DonorKind = Literal["donors", "same verdict", "same", "nothing"]
"""Which donors a span has: see `cepo.fusion.requests.Against`."""


@dataclass(frozen=True, order=True)
class Candidate:
    """Content that may replace a span's.

    Attributes:
        prompt: key of the prompt that it was written for, the same in both orders of the prompt's responses. Content of
            a span's own prompt is never its donor.
        ids: its movable tokens.
        verdict: the verdict of the completion that it comes from, see `Rollout.verdict`.
    """

    prompt: str
    ids: tuple[int, ...]
    verdict: str = ""


def drawn(
    rollout: Rollout, source: str, pool: Iterable[Candidate], count: int, *, seed: int
) -> tuple[DonorKind, tuple[Rollout, ...]]:
    """Return which donors a span has, and the rollout with its movable tokens replaced by those of each donor.

    A donor is the content of the same span in a rollout of another prompt, repeated or cropped to the span's length;
    tags and positions do not change. If any donors come from rollouts with another verdict, only those are used: after
    a donor that led to the same verdict, this verdict is as likely as before, which says nothing about its cause. The
    choice depends only on the seed, the span's own ids, the rollout's verdict and the set of candidates, so rewards do
    not depend on batch order, batch size or rank. Two donors never have the same content.

    Args:
        rollout: a well-formed rollout.
        source: name of the span.
        pool: candidates, which may include those of the rollout's own prompt.
        count: K >= 1, the number of donors wanted.
        seed: seed of the whole run.

    Returns:
        The kind, and at most `count` rollouts; fewer if the pool has fewer such contents that differ from the span's
        own.
    """
    own, verdict, prompt = _content(rollout, source), rollout.verdict, _prompt_key(rollout)
    led_elsewhere: dict[tuple[int, ...], bool] = {}
    for candidate in pool:
        if candidate.prompt != prompt:
            fitted = _fit(candidate.ids, len(own))
            led_elsewhere[fitted] = led_elsewhere.get(fitted, False) or candidate.verdict != verdict
    if not led_elsewhere:
        return "nothing", ()
    led_elsewhere.pop(own, None)
    fit = [ids for ids, elsewhere in led_elsewhere.items() if elsewhere]
    kind: DonorKind = "donors" if fit else "same verdict" if led_elsewhere else "same"
    chosen = sorted(fit or led_elsewhere, key=lambda ids: _digest(seed, own, ids))[:count]
    return kind, tuple(replace_span(rollout, source, ids) for ids in chosen)


def with_donors(
    rollout: Rollout, source: str, pool: Iterable[Candidate], count: int, *, seed: int
) -> tuple[Rollout, ...]:
    """Return the rollout with each of its donors, see `drawn`."""
    return drawn(rollout, source, pool, count, seed=seed)[1]


def candidates(rollouts: Iterable[Rollout], source: str, *, most: int = POOL) -> list[Candidate]:
    """Return the distinct contents of a span among well-formed rollouts, sorted.

    Args:
        rollouts: any rollouts; malformed ones and those without movable tokens are skipped.
        source: name of the span.
        most: most candidates to return, see `thinned`.
    """
    found = {
        Candidate(_prompt_key(rollout), _content(rollout, source), rollout.verdict)
        for rollout in rollouts
        if rollout.malformed is None and rollout.spans[source].movable
    }
    return thinned(found, most=most)


def thinned(pool: Iterable[Candidate], *, most: int = POOL) -> list[Candidate]:
    """Return at most `most` of the candidates, chosen by a hash of their content, sorted.

    Thinning the parts of a pool and then their union gives the same as thinning the pool.
    """
    return sorted(sorted(set(pool), key=lambda one: _digest(one.prompt, one.ids, one.verdict))[:most])


def replace_span(rollout: Rollout, source: str, ids: Sequence[int]) -> Rollout:
    """Return the rollout with other tokens in place of the movable ones of a span.

    Args:
        rollout: a well-formed rollout.
        source: name of the span.
        ids: one token for each movable token of the span.

    Raises:
        ValueError: if the numbers of tokens differ.
    """
    token_ids = list(rollout.token_ids)
    for position, token in zip(rollout.spans[source].movable, ids, strict=True):
        token_ids[position] = token
    split = len(rollout.prompt_ids)
    return replace(rollout, prompt_ids=tuple(token_ids[:split]), completion_ids=tuple(token_ids[split:]))


def _content(rollout: Rollout, source: str) -> tuple[int, ...]:
    token_ids = rollout.token_ids
    return tuple(token_ids[position] for position in rollout.spans[source].movable)


def _fit(ids: Sequence[int], length: int) -> tuple[int, ...]:
    return tuple(ids[place % len(ids)] for place in range(length))


def _prompt_key(rollout: Rollout) -> str:
    """Return a key for a prompt that ignores the order of its tokens, so that exchanging its responses keeps it."""
    return hashlib.sha256(repr(sorted(rollout.prompt_ids)).encode()).hexdigest()[:16]


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()
