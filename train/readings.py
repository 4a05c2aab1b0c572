"""The texts that the policy reads in the causal loss: completions as sampled, and with a donor's content instead."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cepo.counterfactual.donors import POOL, Candidate, candidates, thinned, with_donors
from cepo.jacobian.links import Link
from cepo.jacobian.records import Rollout
from cepo.train.causal_loss import CausalLoss


@dataclass(frozen=True)
class Reading:
    """A text up to its last target token.

    Attributes:
        ids: prompt and completion.
        targets: ascending positions of the target tokens; the last is that of the last id.
    """

    ids: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, order=True)
class Continuation:
    """The tokens of a completion from its source's content to the end of its target, to be read in another prompt.

    Attributes:
        key: hash of all other fields, so that a long text is hashed once and not for every reader.
        source: the content of the source and the prompt that it was written for.
        ids: the token ids.
        targets: indices of the target tokens in `ids`.
    """

    key: str
    source: Candidate
    ids: tuple[int, ...]
    targets: tuple[int, ...]


Pool = list[Candidate] | list[Continuation]


def donor_pool(rollouts: Sequence[Rollout], link: Link, settings: CausalLoss, earned: Sequence[bool]) -> Pool:
    """Return what these rollouts can donate to others: contents of the source, or for interchange continuations.

    Args:
        rollouts: any rollouts; malformed ones are skipped.
        link: see `CausalLoss.parsed_links`.
        settings: determine which of the two is returned.
        earned: whether each rollout earned the task reward; wrong verdicts are not interchanged.
    """
    if settings.compares:
        return candidates(rollouts, link.source)
    right = [rollout for rollout, is_right in zip(rollouts, earned, strict=True) if is_right]
    return merge_pools([continuation for rollout in right for continuation in _continuation(rollout, link)])


def merge_pools(pools: Pool) -> Pool:
    """Return the distinct members of gathered pools, thinned by content only, so that ranks do not matter."""
    continuations = {one for one in pools if isinstance(one, Continuation)}
    return sorted(continuations)[:POOL] if continuations else thinned(pools)  # type: ignore[arg-type]


def read_with_donors(
    rollout: Rollout, link: Link, pool: Pool, settings: CausalLoss, *, most: float = math.inf
) -> list[Reading]:
    """Return the readings of a completion: itself and up to K with donors, or for interchange only the latter.

    A comparison keeps the length of the source, so all readings have the same target positions. Interchange puts the
    donor's continuation, from its source to its verdict, into the own context. The choice of donors depends only on the
    seed, the source's ids and the set of candidates, and for a comparison also on the verdict.

    Args:
        rollout: any rollout.
        link: see `CausalLoss.parsed_links`.
        pool: from `donor_pool` or `merge_pools`.
        settings: settings of the loss.
        most: most tokens that the policy takes; longer texts are not read. The own text before the source and a donor's
            continuation can be too long together, even if both completions fit.

    Returns:
        The readings; [] if the rollout is malformed or has no donor.
    """
    (own,) = candidates([rollout], link.source) or (None,)
    if own is None:
        return []
    start = rollout.spans[link.source].movable[0]
    if settings.compares:
        contents = [one for one in pool if isinstance(one, Candidate)]
        others = with_donors(rollout, link.source, contents, settings.donors, seed=settings.seed)
        targets = rollout.spans[link.target].positions
        texts = [rollout, *others] if others and targets[-1] < most else []
        return [Reading(text.token_ids[: targets[-1] + 1], targets) for text in texts]
    others_said = {
        one
        for one in pool
        if isinstance(one, Continuation)
        and one.source.prompt != own.prompt
        and one.source.ids != own.ids
        and start + len(one.ids) <= most
    }
    own_key = _digest(settings.seed, own.ids)
    chosen = sorted(others_said, key=lambda one: _digest(own_key, one.key))[: settings.donors]
    return [
        Reading(rollout.token_ids[:start] + one.ids, tuple(start + place for place in one.targets)) for one in chosen
    ]


def pack_readings(readings_BR: Sequence[Sequence[Reading | None]], padding: int) -> dict[str, Tensor]:
    """Return readings as tensors, padded on the left, so that all targets are in the last columns.

    Args:
        readings_BR: R readings for each of B completions; None stands for a missing one.
        padding: id of the padding token.

    Returns:
        `ids_BRT` (int64), and, as bool, which positions are tokens (`tokens_BRT`) and targets (`targets_BRT`); T >= 2.
    """
    length = max([len(reading.ids) for row in readings_BR for reading in row if reading] + [2])
    shape = (len(readings_BR), len(readings_BR[0]), length)
    ids_BRT = torch.full(shape, padding)
    tokens_BRT, targets_BRT = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for place, row in enumerate(readings_BR):
        for number, reading in enumerate(row):
            if reading is not None:
                shift = length - len(reading.ids)
                ids_BRT[place, number, shift:] = torch.tensor(reading.ids)
                tokens_BRT[place, number, shift:] = True
                targets_BRT[place, number, [shift + target for target in reading.targets]] = True
    return {"ids_BRT": ids_BRT, "tokens_BRT": tokens_BRT, "targets_BRT": targets_BRT}


def _continuation(rollout: Rollout, link: Link) -> Iterable[Continuation]:
    for source in candidates([rollout], link.source):
        start, targets = rollout.spans[link.source].movable[0], rollout.spans[link.target].positions
        said = source, rollout.token_ids[start : targets[-1] + 1], tuple(at - start for at in targets)
        yield Continuation(_digest(*said), *said)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
