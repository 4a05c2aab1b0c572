"""Arrange the variants of path requests as prefix trees, so that common tokens are run once; without tensors.

Variants are a rollout, its counterfactuals, and points between the two. All variants of a prompt share a stem. After it
the rollout itself is run, once for all requests. Every other variant leaves it at the first token at which they differ,
and runs from there by itself, in a branch that ends at the last row that predicts a target. Prompts that are too short
to fill a batch run as one, with the common prefix of their stems as their opening. No gradient goes back into what
branches share: it is needed only at the source, which lies in the branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.group.cuts import HeadRow, Segment, shared_length
from cepo.jacobian.group.schedule import Plan, Tally
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import Term

Placed = tuple[int, int, int]
"""A branch: the index of its variant, the index of the rollout that it leaves, and the position where it starts."""


@dataclass(frozen=True)
class Variant:
    """A sequence to run: a rollout, a counterfactual, or a point between the two.

    Attributes:
        family: the same for all variants of one rollout.
        rollout: the rollout whose tokens are run.
        terms: the terms of each pass's target function.
        other: for a point on a path, the counterfactual from which it starts; else None.
        fraction: the point's place on the path, in [0, 1]; 0 is the counterfactual.
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

    def is_run_as(self, ids: Sequence[int]) -> bool:
        """Return whether this variant is exactly these tokens."""
        return self.other is None and self.rollout.token_ids == ids

    def leaves(self, ids: Sequence[int]) -> int:
        """Return where its branch leaves these tokens: where an end of its path first differs, or it is first read."""
        ends = [end.token_ids for end in (self.rollout, self.other) if end is not None]
        return min(shared_length([ids, *ends]), self.first_row)


@dataclass(frozen=True)
class Branches:
    """Branches that run at once.

    Attributes:
        placed: the point at which each branch leaves its rollout.
        segment: their tokens and head rows.
    """

    placed: tuple[Placed, ...]
    segment: Segment


@dataclass(frozen=True)
class PrefixTree:
    """The variants of one prompt, or of several that run as one batch.

    Attributes:
        variants: the variants of all prompts.
        opening: tokens shared by all of them; None if they share none.
        stems: what the variants of each prompt share after it, ragged; None for one prompt, whose stem is the opening.
        rollouts: the rollouts after their stems, ragged, as far as anything reads them; None if all variants leave at
            the stem.
        stem_of: for each rollout the index of its stem.
        placed: the branches.
        rollout_rows: rows of rollouts that fit the budget.
        branches_at_once: how many branches fit the budget.
    """

    variants: Sequence[Variant]
    opening: Segment | None
    stems: Segment | None
    rollouts: Segment | None
    stem_of: tuple[int, ...]
    placed: tuple[Placed, ...]
    rollout_rows: int = 1
    branches_at_once: int = 1

    def rollout_parts(self) -> list[tuple[tuple[int, ...], Segment]]:
        """Return its rollouts in the parts that run at once, if memory suffices, with the indices of each part."""
        return parts_of(self.rollouts, self.rollout_rows) if self.rollouts is not None else []

    def has_stems_of(self, before: PrefixTree | None) -> bool:
        """Return whether its opening and stems are those of the preceding tree."""
        return before is not None and (self.opening, self.stems) == (before.opening, before.stems)

    def has_rollouts_of(self, before: PrefixTree | None) -> bool:
        """Return whether the preceding tree ran its rollouts, as far as its branches read them."""
        if self.rollouts is None:
            return True
        if before is None or before.rollouts is None or self.rollouts.head or not self.has_stems_of(before):
            return False
        alike = (self.stem_of, self.rollouts.starts) == (before.stem_of, before.rollouts.starts)
        return alike and all(
            run[: len(ids)] == ids for ids, run in zip(self.rollouts.ids, before.rollouts.ids, strict=True)
        )

    def branches(self) -> list[Branches]:
        """Return its branches in the batches that run at once, if memory suffices."""
        size = self.branches_at_once
        return [branches_of(self.variants, self.placed[at : at + size]) for at in range(0, len(self.placed), size)]


def trees_of(variants: Sequence[Variant], cost: CostModel, budget: float) -> list[PrefixTree]:
    """Return the prefix trees of variants, prompts in order of first appearance.

    Args:
        variants: either all points on paths, which are differentiated, or none.
        cost: the model's costs.
        budget: bytes that may be used besides the model.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, variant in enumerate(variants):
        by_prompt.setdefault(variant.rollout.prompt_ids, []).append(index)
    found = []
    for prompts in _small_enough(list(by_prompt), cost.rows_at_once):
        members = [by_prompt[prompt] for prompt in prompts]
        found += _within_budget(variants, members, cost, budget)
    return found


def _small_enough(prompts: Sequence[tuple[int, ...]], rows: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield runs of prompts that fit in `rows` after their common prefix; a longer prompt is a run by itself."""
    run: list[tuple[int, ...]] = []
    for prompt in prompts:
        more = [*run, prompt]
        if run and len(more) * (max(map(len, more)) - shared_length(more)) > rows:
            yield run
            more = [prompt]
        run = more
    if run:
        yield run


def _within_budget(
    variants: Sequence[Variant], members: Sequence[Sequence[int]], cost: CostModel, budget: float
) -> list[PrefixTree]:
    """Return the trees of prompts, with fewer prompts per tree if their shared parts take over half the budget."""
    found = _tree(variants, members, cost, budget)
    if len(members) == 1 or cost.held_bytes(shared_bytes(found, cost)) <= budget / 2:
        return [found]
    half = len(members) // 2
    return [
        *_within_budget(variants, members[:half], cost, budget),
        *_within_budget(variants, members[half:], cost, budget),
    ]


def plan_of_trees(work: Sequence[PrefixTree], passes: int, cost: CostModel) -> Plan:
    """Return the rows, FLOPs and memory that trees add up to.

    Args:
        work: from `trees_of`; the common prefix of consecutive openings, and consecutive equal stems and rollouts, are
            run once.
        passes: cotangents that go back through each differentiated branch.
        cost: the model's costs.
    """
    tally = Tally(cost, "stem", "rollouts", "branches")
    sizes: list[int] = []
    before: PrefixTree | None = None
    for each in work:
        if not each.has_stems_of(before):
            _, new = opening_after(before.opening if before is not None else None, each.opening)
            tally.add("stem", new)
            tally.add("stem", each.stems)
        if not each.has_rollouts_of(before):
            for _, segment in each.rollout_parts():
                tally.add("rollouts", segment)
        before = each
        shared = shared_bytes(each, cost)
        tally.reach(cost.held_bytes(shared + _shared_forward_bytes(each, cost)))
        for branches in each.branches():
            sizes.append(len(branches.placed))
            tally.add("branches", branches.segment, passes if branches.segment.differentiated else 0)
            tally.reach(cost.held_bytes(shared + branches_bytes(branches, passes, expanded(each), cost)))
    return tally.plan(sizes)


def opening_after(before: Segment | None, opening: Segment | None) -> tuple[int, Segment | None]:
    """Return the length of an opening's common prefix with the preceding one, and the rest, if any."""
    if opening is None:
        return 0, None
    ids = opening.ids[0]
    shared = shared_length([ids, before.ids[0]]) if before is not None else 0
    return shared, Segment((ids[shared:],), (shared,)) if shared < len(ids) else None


def parts_of(segment: Segment, rows: int) -> list[tuple[tuple[int, ...], Segment]]:
    """Return a segment's sequences, longest first, in parts of at most `rows`, with the indices of each part.

    Empty sequences are left out.
    """
    order = sorted((at for at, ids in enumerate(segment.ids) if ids), key=lambda at: -len(segment.ids[at]))
    found, start = [], 0
    while start < len(order):
        size = max(1, rows // len(segment.ids[order[start]]))
        places = tuple(order[start : start + size])
        found.append((places, sequences_of(segment, places)))
        start += size
    return found


def sequences_of(segment: Segment, places: Sequence[int]) -> Segment:
    """Return the segment that consists of some sequences, with their rows of the head."""
    new = {place: sequence for sequence, place in enumerate(places)}
    return Segment(
        tuple(segment.ids[at] for at in places),
        tuple(segment.starts[at] for at in places),
        tuple(replace(row, sequence=new[row.sequence]) for row in segment.head if row.sequence in new),
    )


def expanded(tree: PrefixTree) -> int:
    """Return how many tokens before branches are read by all of them without a copy per branch."""
    return tree.opening.length if tree.opening is not None else 0


def shared_bytes(tree: PrefixTree, cost: CostModel) -> float:
    """Return the bytes of the keys and values of what branches share."""
    segments = (tree.opening, tree.stems, tree.rollouts)
    return sum(cost.cache(len(each.ids), each.length) for each in segments if each is not None)


def branches_bytes(branches: Branches, passes: int, shared: int, cost: CostModel) -> float:
    """Return the bytes of running branches, without what they share, of which `shared` tokens are not copied."""
    segment = branches.segment
    count, past = len(segment.ids), max(segment.starts)
    needed = cost.cache(count, past - shared) + 2.0 * cost.cache(count, segment.length)
    work = cost.forward(count, segment.length, past, differentiated=segment.differentiated) + cost.head_bytes(segment)
    if segment.differentiated:
        moved = 16.0 * count * segment.length * cost.width  # the embeddings of both ends and of the point between
        needed += cost.graph(count, segment.length, past) + moved
        work = max(work, cost.backward(passes, count, segment.length, past))
    return needed + work


def _shared_forward_bytes(tree: PrefixTree, cost: CostModel) -> float:
    """Return the most bytes that the forward passes of shared parts take besides their keys and values."""
    opening, past = tree.opening, 0
    most = 0.0
    if opening is not None:
        past = opening.length
        most = cost.forward(1, past, 0) + cost.cache(1, past)  # the latter if it continues the preceding one
    if tree.stems is not None:
        most = max(most, cost.forward(len(tree.stems.ids), tree.stems.length, past))
    for _, part in tree.rollout_parts():
        most = max(most, _rollout_bytes(part, expanded(tree), cost))
    return most


def _rollout_bytes(part: Segment, shared: int, cost: CostModel) -> float:
    """Return the bytes of running rollouts, without what they share, of which `shared` tokens are not copied."""
    count, past = len(part.ids), max(part.starts)
    copies = cost.cache(count, past - shared) + 2.0 * cost.cache(count, part.length)
    return copies + cost.forward(count, part.length, past) + cost.head_bytes(part)


def _tree(variants: Sequence[Variant], members: Sequence[Sequence[int]], cost: CostModel, budget: float) -> PrefixTree:
    """Return the tree of some prompts, given the indices of the variants of each."""
    stems: list[tuple[int, ...]] = []  # of each prompt, whole
    rollouts: list[tuple[int, tuple[int, ...], list[int]]] = []  # index of the stem, tokens, the variants that it is
    placed: list[Placed] = []
    for place, of_prompt in enumerate(members):
        by_family: dict[int, list[int]] = {}
        for index in of_prompt:
            by_family.setdefault(variants[index].family, []).append(index)
        first, ends = len(rollouts), []
        for of_family in by_family.values():
            ids = variants[of_family[0]].rollout.token_ids
            own = [index for index in of_family if variants[index].is_run_as(ids)]
            start_of = {index: variants[index].leaves(ids) for index in of_family if index not in own}
            placed += [(index, len(rollouts), start) for index, start in start_of.items()]
            ends += [*start_of.values(), *(variants[index].first_row for index in own)]
            read = [*start_of.values(), *(variants[index].last_row + 1 for index in own)]
            rollouts.append((place, ids[: max(read)], own))
        stems.append(rollouts[first][1][: min(shared_length([ids for _, ids, _ in rollouts[first:]]), *ends)])
    opening = shared_length(stems)
    rests = Segment(tuple(ids[opening:] for ids in stems), (opening,) * len(stems))
    pieces = tuple(ids[len(stems[place]) :] for place, ids, _ in rollouts)
    head = tuple(
        HeadRow(index, number, rollout, term.position - 1 - len(stems[place]), term)
        for rollout, (place, _, own) in enumerate(rollouts)
        for index in own
        for number, terms in enumerate(variants[index].terms)
        for term in terms
    )
    # Batches of similar length need least padding.
    placed.sort(key=lambda each: each[2] - variants[each[0]].last_row)
    found = PrefixTree(
        variants,
        Segment((stems[0][:opening],), (0,)) if opening else None,
        rests if any(rests.ids) else None,
        Segment(pieces, tuple(len(stems[place]) for place, _, _ in rollouts), head) if any(pieces) else None,
        tuple(place for place, _, _ in rollouts),
        tuple(placed),
    )
    return _sized(found, cost, cost.tensors_within(budget) - shared_bytes(found, cost))


def _sized(tree: PrefixTree, cost: CostModel, room: float) -> PrefixTree:
    """Return the tree with the rows of rollouts and the branches that fit in `room` bytes, at least one each."""
    shared, rows, size = expanded(tree), cost.rows_at_once, 1
    while rows > 1 and any(
        len(places) > 1 and _rollout_bytes(part, shared, cost) > room
        for places, part in replace(tree, rollout_rows=rows).rollout_parts()
    ):
        rows = (rows + 1) // 2
    if tree.placed:
        variants, placed = tree.variants, tree.placed
        passes = len(variants[placed[0][0]].terms)
        size = min(len(placed), max(1, cost.rows_at_once // branches_of(variants, placed[:1]).segment.length))
        while size > 1 and branches_bytes(branches_of(variants, placed[:size]), passes, shared, cost) > room:
            size = (size + 1) // 2
    return replace(tree, rollout_rows=rows, branches_at_once=size)


def branches_of(variants: Sequence[Variant], members: Sequence[Placed]) -> Branches:
    """Return branches that run at once; `members` as in `PrefixTree.placed`."""
    ids, head = [], []
    for place, (index, _, start) in enumerate(members):
        variant = variants[index]
        ids.append(variant.rollout.token_ids[start : variant.last_row + 1])
        head += [
            HeadRow(index, number, place, term.position - 1 - start, term)
            for number, terms in enumerate(variant.terms)
            for term in terms
        ]
    differentiated = variants[members[0][0]].other is not None
    segment = Segment(tuple(ids), tuple(start for _, _, start in members), tuple(head), differentiated)
    return Branches(tuple(members), segment)
