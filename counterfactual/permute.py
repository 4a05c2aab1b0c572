"""Counterfactual rollouts: the content tokens of the source span in another order, everything else as sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from cepo.counterfactual.donors import replace_span
from cepo.jacobian.records import Rollout

Permutation = Literal["uniform", "sentence", "block"]
BLOCK_TOKENS = 8
# Draws until an order is new. One that changes nothing is not a counterfactual (hardening would remove the base
# Jacobian itself), and one that was drawn before would count twice.
_DRAWS = 64


def permutations(
    rollout: Rollout, source: str, count: int, *, seed: int, kind: Permutation = "uniform"
) -> tuple[Rollout, ...]:
    """Return the rollout with the movable tokens of the source span in up to `count` orders, no two of them the same.

    - uniform: any order of the span's content tokens.
    - sentence: any order within each sentence.
    - block: the span cut into runs of 8 tokens, the runs in any order.

    The k-th depends only on (seed, kind, the span's own ids, k), so rewards do not depend on batch order, batch size or
    rank, and a smaller count gives the first ones. An order that leaves the ids unchanged, or that was drawn before, is
    drawn again. Lengths never change.

    Args:
        rollout: a well-formed rollout.
        source: name of the span to permute.
        count: K >= 0, the number of orders wanted.
        seed: seed of the whole run.
        kind: one of the above.

    Returns:
        At most `count` rollouts; fewer if the tokens have fewer orders that differ from their own.

    Raises:
        ValueError: for an unknown kind.
    """
    check_permutation(kind)
    found: list[Rollout] = []
    for index in range(count):
        permuted = _permuted(rollout, source, index, seed, kind, found)
        if permuted is None:
            break
        found.append(permuted)
    return tuple(found)


def _permuted(
    rollout: Rollout, source: str, index: int, seed: int, kind: Permutation, but: Sequence[Rollout]
) -> Rollout | None:
    span = rollout.spans[source]
    token_ids = rollout.token_ids
    ids = [token_ids[position] for position in span.movable]
    key = repr((int(seed), kind, [token_ids[position] for position in span.positions], index)).encode()
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:16], "big"))
    for _ in range(_DRAWS if len(set(ids)) > 1 else 0):
        order = _draw(generator, kind, span.sentences)
        permuted = replace_span(rollout, source, [ids[place] for place in order])
        if permuted.token_ids != token_ids and permuted not in but:
            return permuted
    return None


def check_permutation(kind: str) -> None:
    """Raise ValueError unless `kind` names a permutation."""
    if kind not in get_args(Permutation):
        raise ValueError(f"permutation is {kind!r}; expected one of {', '.join(get_args(Permutation))}")


def _draw(generator: np.random.Generator, kind: Permutation, sentences: Sequence[int]) -> list[int]:
    count = len(sentences)
    if kind == "uniform":
        return [int(place) for place in generator.permutation(count)]
    if kind == "sentence":
        runs = [[place for place in range(count) if sentences[place] == number] for number in dict.fromkeys(sentences)]
        return [run[int(place)] for run in runs for place in generator.permutation(len(run))]
    blocks = [list(range(start, min(start + BLOCK_TOKENS, count))) for start in range(0, count, BLOCK_TOKENS)]
    return [place for block in generator.permutation(len(blocks)) for place in blocks[int(block)]]
