"""How the variants of a path request are cut so that common tokens run once: its schedule, without tensors.

Variants are a rollout, its counterfactuals, and points between the two. All variants of a prompt share a stem; those
of one rollout share a prefix after it, up to the first token in which they differ; from there on each runs alone, in a
tail that ends at the last row that predicts a target. Nothing is ever sent back into stem and prefix: the gradient is
wanted at the source alone, which lies in the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.group.cuts import HeadRow, Segment, shared_length
from cepo.jacobian.group.schedule import Plan, Rows
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import FEWEST_HEAD_ROWS, Term

Placed = tuple[int, int, int]


@dataclass(frozen=True)
class Variant:
    """A sequence to run: a rollout, a counterfactual, or a point between the two.

    Attributes:
        family: the variants of one rollout have the same.
        rollout: whose tokens are run.
        terms: of each pass, what is read of it.
        other: the counterfactual towards which the embeddings are moved, or None.
        fraction: how far they are from it, in [0, 1].
    """

    family: int
    rollout: Rollout
    terms: tuple[tuple[Term, ...], ...]
    other: Rollout | None = None
    fraction: float = 1.0

    @property
    def first_row(self) -> int:
        """The first row that predicts a target."""
        return min(term.position for terms in self.terms for term in terms) - 1

    @property
    def last_row(self) -> int:
        """The last row that predicts a target."""
        return max(term.position for terms in self.terms for term in terms) - 1


@dataclass(frozen=True)
class Tails:
    """Tails that run at once.

    Attributes:
        placed: for each its index among the variants, the index of its prefix, and where it starts.
        segment: their tokens and head rows.
    """

    placed: tuple[Placed, ...]
    segment: Segment


@dataclass(frozen=True)
class Branches:
    """The variants of one prompt.

    Attributes:
        variants: those of all prompts.
        stem: tokens shared by all of them; None where they share none.
        prefixes: what the variants of each family share after it, ragged; None where no family shares more.
        placed: for each variant its index, the index of its prefix, and where its tail starts.
        tails_at_once: how many tails fit the budget.
    """

    variants: Sequence[Variant]
    stem: Segment | None
    prefixes: Segment | None
    placed: tuple[Placed, ...]
    tails_at_once: int

    def tails(self) -> list[Tails]:
        """Return its tails as they run, if memory lasts."""
        size = self.tails_at_once
        return [tails_of(self.variants, self.placed[at : at + size]) for at in range(0, len(self.placed), size)]


def branches_of(variants: Sequence[Variant], cost: CostModel, budget: float) -> list[Branches]:
    """Return the schedule of variants, prompt by prompt.

    Args:
        variants: all with a counterfactual to move towards, which are differentiated, or all without.
        cost: of the model.
        budget: bytes that may be added to what the model holds.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, variant in enumerate(variants):
        by_prompt.setdefault(variant.rollout.prompt_ids, []).append(index)
    return [_branches(variants, members, cost, budget) for members in by_prompt.values()]


def plan_of_branches(work: Sequence[Branches], passes: int, cost: CostModel) -> Plan:
    """Return the rows, FLOPs and memory that branches add up to.

    Args:
        work: from `branches_of`; what a stem has in common with the one before it, and equal prefixes that follow each
            other, are run once.
        passes: cotangents that go back through each differentiated tail.
        cost: of the model.
    """
    total = {kind: Rows(kind) for kind in ("stem", "prefixes", "tails")}
    flops = peak = 0.0
    sizes: list[int] = []

    def add(kind: str, segment: Segment, cotangents: int = 0) -> None:
        nonlocal flops
        head, back = (max(FEWEST_HEAD_ROWS, len(segment.head)) if segment.head else 0), cotangents * segment.rows
        old = total[kind]
        total[kind] = Rows(kind, old.forward + segment.rows, old.backward + back, old.head + head)
        context = sum(segment.starts) / len(segment.starts) + segment.length / 2
        flops += cost.flops(segment.rows, context, backward=False) + cost.flops(back, context, backward=True)
        flops += (4.0 if cotangents else 2.0) * cost.head * head

    stem_before: Segment | None = None
    prefixes_before: Segment | None = None
    for each in work:
        if each.stem != stem_before:
            _, new = stem_after(stem_before, each.stem)
            stem_before, prefixes_before = each.stem, None
            if new is not None:
                add("stem", new)
        if each.prefixes != prefixes_before:
            prefixes_before = each.prefixes
            if each.prefixes is not None:
                add("prefixes", each.prefixes)
        stem = each.stem.length if each.stem is not None else 0
        shared = shared_bytes(stem, each.prefixes, cost)
        peak = max(peak, cost.held_bytes(shared + _shared_forward_bytes(stem, each.prefixes, cost)))
        for tails in each.tails():
            sizes.append(len(tails.placed))
            add("tails", tails.segment, passes if tails.segment.differentiated else 0)
            peak = max(peak, cost.held_bytes(shared + tails_bytes(tails, passes, stem, cost)))
    return Plan(tuple(total.values()), flops, peak, tuple(sizes))


def stem_after(before: Segment | None, stem: Segment | None) -> tuple[int, Segment | None]:
    """Return how many tokens a stem has in common with the one before it, and the others; None where there are none."""
    if stem is None:
        return 0, None
    ids = stem.ids[0]
    shared = shared_length([ids, before.ids[0]]) if before is not None else 0
    return shared, Segment((ids[shared:],), (shared,)) if shared < len(ids) else None


def shared_bytes(stem: int, prefixes: Segment | None, cost: CostModel) -> float:
    """Return the bytes of the keys and values of a stem of so many tokens, and of prefixes."""
    return cost.cache(1, stem) + (cost.cache(len(prefixes.ids), prefixes.length) if prefixes is not None else 0.0)


def tails_bytes(tails: Tails, passes: int, stem: int, cost: CostModel) -> float:
    """Return the bytes that tails need while they run, beside what they share."""
    segment = tails.segment
    count, past = len(segment.ids), max(segment.starts)
    needed = cost.cache(count, past - stem) + 2.0 * cost.cache(count, segment.length)
    work = cost.forward(count, segment.length, past) + cost.head_bytes(segment)
    if segment.differentiated:
        moved = 16.0 * count * segment.length * cost.width  # the embeddings of both ends, and what lies between
        needed += cost.graph(count, segment.length, past) + moved
        work = max(work, cost.backward(passes, count, segment.length, past))
    return needed + work


def _shared_forward_bytes(stem: int, prefixes: Segment | None, cost: CostModel) -> float:
    """Return what the forward passes of a stem and of prefixes work with, beside their keys and values."""
    of_stem = cost.forward(1, stem, 0) + cost.cache(1, stem)  # the latter where a stem goes on from the one before
    return max(of_stem, cost.forward(len(prefixes.ids), prefixes.length, stem) if prefixes is not None else 0.0)


def _branches(variants: Sequence[Variant], members: Sequence[int], cost: CostModel, budget: float) -> Branches:
    families: dict[int, list[int]] = {}
    for index in members:
        families.setdefault(variants[index].family, []).append(index)
    splits = [
        min(_shared([variants[index] for index in of_family]), *(variants[index].first_row for index in of_family))
        for of_family in families.values()
    ]
    end = min(_shared([variants[index] for index in members]), *splits)
    ids = variants[members[0]].rollout.token_ids
    pieces = [
        variants[of_family[0]].rollout.token_ids[end:split]
        for of_family, split in zip(families.values(), splits, strict=True)
    ]
    placed = [
        (index, branch, split)
        for branch, (of_family, split) in enumerate(zip(families.values(), splits, strict=True))
        for index in of_family
    ]
    # Neighbours of equal length need least padding.
    placed.sort(key=lambda each: each[2] - variants[each[0]].last_row)
    prefixes = Segment(tuple(pieces), (end,) * len(pieces)) if any(pieces) else None
    room = budget / cost.overhead - shared_bytes(end, prefixes, cost)
    return Branches(
        variants,
        Segment((ids[:end],), (0,)) if end else None,
        prefixes,
        tuple(placed),
        _size(variants, placed, end, cost, room),
    )


def _size(
    variants: Sequence[Variant],
    members: Sequence[Placed],
    stem: int,
    cost: CostModel,
    room: float,
) -> int:
    """Return how many tails run at once in so many bytes, at least one."""
    longest = tails_of(variants, members[:1]).segment.length
    passes = len(variants[members[0][0]].terms)
    size = min(len(members), max(1, cost.rows_at_once // longest))
    while size > 1 and tails_bytes(tails_of(variants, members[:size]), passes, stem, cost) > room:
        size = (size + 1) // 2
    return size


def tails_of(variants: Sequence[Variant], members: Sequence[Placed]) -> Tails:
    """Return the tails of some variants, which run at once; `members` as in `Branches.placed`."""
    ids, head = [], []
    for place, (index, _, start) in enumerate(members):
        variant = variants[index]
        ids.append(variant.rollout.token_ids[start : variant.last_row + 1])
        head += [
            HeadRow(place, number, place, term.position - 1 - start, term)
            for number, terms in enumerate(variant.terms)
            for term in terms
        ]
    differentiated = variants[members[0][0]].other is not None
    segment = Segment(tuple(ids), tuple(start for _, _, start in members), tuple(head), differentiated)
    return Tails(tuple(members), segment)


def _shared(variants: Sequence[Variant]) -> int:
    """Return how many tokens variants begin with in common, at both ends of their paths."""
    ends = [end for one in variants for end in (one.rollout, one.other) if end is not None]
    return shared_length([end.token_ids for end in ends])
