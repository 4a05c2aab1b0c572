"""Path requests in the group engine: values of counterfactuals, and gradients along the paths from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.group.cotangents import Asked
from cepo.jacobian.group.cuts import Segment
from cepo.jacobian.group.halving import AtOnce, run_in_parts
from cepo.jacobian.group.prefix_tree import (
    Branches,
    Placed,
    PrefixTree,
    Variant,
    branches_of,
    opening_after,
    parts_of,
    plan_of_trees,
    sequences_of,
    trees_of,
)
from cepo.jacobian.group.run import KeyValues, Past, SegmentRun, backward_in_parts, run_segment
from cepo.jacobian.group.schedule import WAVE, Plan
from cepo.jacobian.group.trial import Served
from cepo.jacobian.passes import Pass, passes_of
from cepo.jacobian.path import Point, between, gauss_nodes, path_answer
from cepo.jacobian.protocol import PathAnswer, PathRequest
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import Term, target_terms

_NOTHING = Past([], ())
Read = TypeVar("Read")
# (branches, their run, their steps, how many cotangents go back at once) -> results by the index of the variant.
Reader: TypeAlias = Callable[[Branches, SegmentRun, Tensor, int], dict[int, Read]]
Values: TypeAlias = dict[int, float]
"""The value of a variant's target functions, by the index of the pass."""


class PathRunner:
    """Answers path requests of one model; consecutive requests share their common prefix.

    Args:
        served: the model.
        budget: bytes that may be used besides the model.
    """

    def __init__(self, served: Served, budget: float) -> None:
        self._served, self._budget = served, budget
        self._before: PrefixTree | None = None  # the tree that was run last, whose shared keys and values follow
        self._opening = self._stems = self._rollouts = _NOTHING

    def answers(self, requests: Sequence[PathRequest]) -> list[PathAnswer]:
        """Return the answers to requests, whose values are computed together; inside `model.prepared()`."""
        variants = value_variants(requests)
        found: dict[int, Values] = {}
        for tree in trees_of(variants, self._served.cost, self._budget):
            found |= self._run_shared(tree)
            found |= self._run_branches(
                tree, 1, lambda branches, run, step_BTD, at_once: _values(branches.segment, run)
            )
        in_order = (found[index] for index in range(len(variants)))
        answers = []
        for request in requests:
            passes = passes_of(request.links)
            values = [
                [
                    {key: of_one.get(index, 0.0) for index, key in enumerate(passes)}
                    for of_one in islice(in_order, 1 + len(others))
                ]
                for others in request.counterfactuals
            ]
            answers.append(path_answer(request, values, partial(self._contract, request)))
        return answers

    def _contract(self, request: PathRequest, points: Sequence[Point]) -> list[dict[Pass, Tensor]]:
        """Return each pass's gradient at each point, contracted row by row with the path's step; see `path_answer`."""
        passes, source = passes_of(request.links), request.links[0].source
        variants = point_variants(request, points)

        def rows_of(
            branches: Branches, run: SegmentRun, step_BTD: Tensor, at_once: int
        ) -> dict[int, dict[Pass, Tensor]]:
            asked = Asked(range(len(passes)))
            head = [replace(row, job=row.sequence) for row in branches.segment.head]
            asked.add_head(head, run.head_PD, run.hidden_BTD.shape)
            outputs = asked.of_outputs(len(run.keys_values))
            parts = backward_in_parts(run, outputs, [run.leaf_BTD], at_once)
            rows_CBT = torch.cat([_contracted(leaf_CBTD, step_BTD) for _, (leaf_CBTD,) in parts])
            found = {}
            for place, (index, _, start) in enumerate(branches.placed):
                # A source may begin before the first token that differs, where the step is 0.
                at = [position - start for position in variants[index].rollout.spans[source].positions]
                before = rows_CBT.new_zeros(sum(row < 0 for row in at))
                kept = [row for row in at if row >= 0]
                found[index] = {key: torch.cat([before, rows_CBT[c, place, kept]]) for c, key in enumerate(passes)}
            return found

        found: dict[int, dict[Pass, Tensor]] = {}
        for tree in trees_of(variants, self._served.cost, self._budget):
            self._run_shared(tree)
            found |= self._run_branches(tree, len(passes), rows_of)
        return [found[index] for index in range(len(variants))]

    def _run_shared(self, tree: PrefixTree) -> dict[int, Values]:
        """Run what branches share, unless the last tree's can be reused; return the values of the rollouts."""
        before, self._before = self._before, None  # in case memory runs out
        if not tree.has_stems_of(before):
            self._stems = self._rollouts = _NOTHING  # freed before the next ones are built
            self._opening = self._opening_after(before.opening if before is not None else None, tree.opening)
            if tree.stems is not None:
                self._stems, _ = self._past_of(tree.stems, parts_of(tree.stems, self._served.cost.rows_at_once))
        values: dict[int, Values] = {}
        if tree.rollouts is not None and not tree.has_rollouts_of(before):
            self._rollouts = _NOTHING
            self._rollouts, values = self._past_of(tree.rollouts, tree.rollout_parts(), tree.stem_of)
        self._before = tree
        return values

    def _opening_after(self, before: Segment | None, opening: Segment | None) -> Past:
        """Return the keys and values of an opening, reusing those of its common prefix with the preceding one."""
        shared, new = opening_after(before, opening)
        keys_values = [tensor[:, :, :shared] for tensor in self._opening.keys_values] if shared else []
        if new is not None:
            past = [Past(keys_values, (shared,))] if shared else []
            more = run_segment(self._served.model, new, past).keys_values
            keys_values = [torch.cat(pair, dim=2) for pair in zip(keys_values, more, strict=True)] if shared else more
        return Past(keys_values, (opening.length,)) if opening is not None else _NOTHING

    def _past_of(
        self, segment: Segment, parts: Sequence[tuple[Sequence[int], Segment]], stem_of: Sequence[int] = ()
    ) -> tuple[Past, dict[int, Values]]:
        """Return the keys and values of a segment after the opening and, if any, stems; and the values at its head."""
        whole: KeyValues = []
        values: dict[int, Values] = {}

        def run(places: Sequence[int], at_once: AtOnce) -> None:
            part = sequences_of(segment, places)
            past = [self._opening, *self._after_opening([stem_of[at] for at in places] if stem_of else ())]
            found = run_segment(self._served.model, part, past)
            if not whole:
                whole.extend(
                    each.new_zeros(len(segment.ids), each.shape[1], segment.length, each.shape[3])
                    for each in found.keys_values
                )
            index = torch.tensor(places, device=whole[0].device)
            for all_sequences, each in zip(whole, found.keys_values, strict=True):
                all_sequences[index, :, : part.length] = each
            values.update(_values(part, found))

        for places, _ in parts:
            list(run_in_parts(places, AtOnce(len(places)), run))
        return Past(whole, tuple(map(len, segment.ids))), values

    def _after_opening(self, stems: Sequence[int]) -> tuple[Past, ...]:
        """Return the stems with these indices; nothing if the opening is the stem."""
        return (self._stems.leaves(stems, differentiated=False),) if self._stems.keys_values and stems else ()

    def _run_branches(self, tree: PrefixTree, passes: int, read: Reader[Read]) -> dict[int, Read]:
        """Return the result of `read` for each branch, by the index of its variant."""
        found: dict[int, Read] = {}

        def run(placed: Sequence[Placed], at_once: AtOnce) -> dict[int, Read]:
            branches = branches_of(tree.variants, placed)
            return read(branches, *self._run_at_once(branches, tree), at_once.passes)

        for of_part in run_in_parts(tree.placed, AtOnce(tree.branches_at_once, passes), run):
            found |= of_part
        return found

    def _run_at_once(self, branches: Branches, tree: PrefixTree) -> tuple[SegmentRun, Tensor]:
        """Return a run of branches, and the step E(X) - E(X') of each (empty if only values are read)."""
        segment, embedding = branches.segment, self._served.model.held.embedding
        device, step_BTD = embedding.weight.device, torch.empty(0)

        def moved(embedded_BTD: Tensor) -> Tensor:
            nonlocal step_BTD
            ids_BT = torch.zeros(embedded_BTD.shape[:2], dtype=torch.long)
            for place, ((index, _, start), row) in enumerate(zip(branches.placed, segment.ids, strict=True)):
                other = tree.variants[index].other
                assert other is not None
                ids_BT[place, : len(row)] = torch.tensor(other.token_ids[start : start + len(row)])
            fractions = [tree.variants[index].fraction for index, _, _ in branches.placed]
            fraction_B = torch.tensor(fractions, dtype=torch.float64)
            other_BTD = embedding.forward(ids_BT.to(device)).detach()
            entered_BTD, step_BTD = between(embedded_BTD, other_BTD, fraction_B[:, None, None].to(device))
            return entered_BTD

        rollouts = [rollout for _, rollout, _ in branches.placed]
        past = [self._opening, *self._after_opening([tree.stem_of[rollout] for rollout in rollouts])]
        if tree.rollouts is not None:  # each rollout up to where its branch leaves it
            lengths = tuple(start - tree.rollouts.starts[rollout] for _, rollout, start in branches.placed)
            narrow = Past(
                [tensor[:, :, : max(lengths)] for tensor in self._rollouts.keys_values], self._rollouts.lengths
            )
            past.append(replace(narrow.leaves(rollouts, differentiated=False), lengths=lengths))
        run = run_segment(self._served.model, segment, past, moved if segment.differentiated else None)
        return run, step_BTD


def _values(segment: Segment, run: SegmentRun) -> dict[int, Values]:
    """Return the values of target functions at the head of a segment, by the index of the variant."""
    found: dict[int, Values] = {}
    for row, value in zip(segment.head, run.values_P.double().tolist(), strict=True):
        of_variant = found.setdefault(row.job, {})
        of_variant[row.pass_index] = of_variant.get(row.pass_index, 0.0) + value
    return found


def _contracted(leaf_CBTD: Tensor, step_BTD: Tensor) -> Tensor:
    """Return the inner products of the rows of gradient and step, (C, B, T), in float64 on the CPU."""
    return (leaf_CBTD.to(step_BTD.dtype) * step_BTD).double().sum(-1).cpu()


def together(requests: Sequence[PathRequest], cost: CostModel) -> list[list[PathRequest]]:
    """Return requests in runs that are answered together: without nodes, as many as make a few full batches.

    Requests without nodes for the same rollouts stay together, whatever their size: the rollouts are run once for all.
    A request with nodes is answered by itself.
    """
    found: list[list[PathRequest]] = []
    rows = 0
    for request in requests:
        each = sum(len(rollout.completion_ids) for rollout in request.group.rollouts)
        each += sum(len(other.completion_ids) for others in request.counterfactuals for other in others)
        before = found[-1][-1] if found else None
        fits = rows + each <= WAVE * cost.rows_at_once or (before is not None and before.group == request.group)
        if fits and before is not None and not before.nodes and not request.nodes:
            found[-1].append(request)
            rows += each
        else:
            found.append([request])
            rows = each
    return found


def plan_paths(requests: Sequence[PathRequest], cost: CostModel, budget: float) -> Plan:
    """Return the plan of path requests; for nodes "auto", of the first round with one node."""
    work: list[PrefixTree] = []
    for run in together(requests, cost):
        work += trees_of(value_variants(run), cost, budget)
        request, nodes = run[0], 1 if run[0].nodes == "auto" else run[0].nodes
        points = [
            Point(row, other, fraction)
            for row, others in enumerate(request.counterfactuals)
            for other in range(len(others))
            for fraction, _ in (gauss_nodes(nodes) if nodes else ())
        ]
        if points:
            work += trees_of(point_variants(request, points), cost, budget)
    cotangents = max((len(passes_of(request.links)) for request in requests), default=1)
    return plan_of_trees(work, cotangents, cost)


def value_variants(requests: Sequence[PathRequest]) -> list[Variant]:
    """Return each rollout of requests, followed by its counterfactuals; equal rollouts belong to one family."""
    families: dict[tuple[int, ...], int] = {}
    return [
        Variant(families.setdefault(rollout.token_ids, len(families)), each, _terms(request, each))
        for request in requests
        for rollout, others in zip(request.group.rollouts, request.counterfactuals, strict=True)
        for each in (rollout, *others)
    ]


def point_variants(request: PathRequest, points: Sequence[Point]) -> list[Variant]:
    """Return the variant of each point."""
    rollouts, others = request.group.rollouts, request.counterfactuals
    terms = [_terms(request, rollout) for rollout in rollouts]
    return [
        Variant(at.rollout, rollouts[at.rollout], terms[at.rollout], others[at.rollout][at.other], at.fraction)
        for at in points
    ]


def _terms(request: PathRequest, rollout: Rollout) -> tuple[tuple[Term, ...], ...]:
    return tuple(target_terms(rollout, key.target, key.function) for key in passes_of(request.links))
