"""Path requests in the group engine: values of counterfactuals, and gradients on the paths to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, islice
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from cepo.jacobian.group.branches import (
    Branches,
    Placed,
    Tails,
    Variant,
    branches_of,
    parts_of,
    plan_of_branches,
    sequences_of,
    tails_of,
    trunk_after,
)
from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.group.cotangents import Asked
from cepo.jacobian.group.cuts import Segment
from cepo.jacobian.group.halving import AtOnce, run_in_parts
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
# From tails, their run, the step of each and how many cotangents go back at once, what is read of each.
Reader: TypeAlias = Callable[[Tails, SegmentRun, Tensor, int], Sequence[Read]]


class PathRunner:
    """Answers path requests of one model; requests that follow one another share what they begin with.

    Args:
        served: the model.
        budget: bytes that may be added to what the model holds.
    """

    def __init__(self, served: Served, budget: float) -> None:
        self._served, self._budget = served, budget
        self._trunk: tuple[Segment | None, Past] = (None, _NOTHING)
        self._stems: tuple[Segment | None, Past] = (None, _NOTHING)
        self._prefixes: tuple[tuple[Segment | None, tuple[int, ...]], Past] = ((None, ()), _NOTHING)

    def answers(self, requests: Sequence[PathRequest]) -> list[PathAnswer]:
        """Return the answers to requests, their values computed together; inside `model.prepared()`."""
        in_order = iter(self._run(value_variants(requests), 1, _values))
        answers = []
        for request in requests:
            passes = passes_of(request.links)
            values = [
                [
                    {key: found.get(index, 0.0) for index, key in enumerate(passes)}
                    for found in islice(in_order, 1 + len(others))
                ]
                for others in request.counterfactuals
            ]
            answers.append(path_answer(request, values, partial(self._contract, request)))
        return answers

    def _contract(self, request: PathRequest, points: Sequence[Point]) -> list[dict[Pass, Tensor]]:
        """Return the rows of the gradient at each point times those of the path's step, by pass."""
        passes, source = passes_of(request.links), request.links[0].source
        variants = point_variants(request, points)

        def rows_of(tails: Tails, run: SegmentRun, step_BTD: Tensor, at_once: int) -> list[dict[Pass, Tensor]]:
            asked = Asked(range(len(passes)))
            asked.add_head(tails.segment.head, run.head_PD, run.hidden_BTD.shape)
            outputs = asked.of_outputs(len(run.keys_values))
            parts = backward_in_parts(run, outputs, [run.leaf_BTD], at_once)
            rows_CBT = torch.cat([_contracted(leaf_CBTD, step_BTD) for _, (leaf_CBTD,) in parts])
            found = []
            for place, (index, _, start) in enumerate(tails.placed):
                # A source may begin before the first token that differs: there is no step there.
                at = [position - start for position in variants[index].rollout.spans[source].positions]
                before = rows_CBT.new_zeros(sum(row < 0 for row in at))
                kept = [row for row in at if row >= 0]
                found.append({key: torch.cat([before, rows_CBT[c, place, kept]]) for c, key in enumerate(passes)})
            return found

        return self._run(variants, len(passes), rows_of)

    def _run(self, variants: Sequence[Variant], passes: int, read: Reader[Read]) -> list[Read]:
        """Run variants, and return what is read of each, in order."""
        found: dict[int, Read] = {}
        for branches in branches_of(variants, self._served.cost, self._budget):
            self._run_shared(branches)

            def run(placed: Sequence[Placed], at_once: AtOnce, branches: Branches = branches) -> dict[int, Read]:
                tails = tails_of(variants, placed)
                of_tails = read(tails, *self._run_tails(tails, branches), at_once.passes)
                return {index: one for (index, _, _), one in zip(placed, of_tails, strict=True)}

            for of_part in run_in_parts(branches.placed, AtOnce(branches.tails_at_once, passes), run):
                found |= of_part
        return [found[index] for index in range(len(variants))]

    def _run_shared(self, branches: Branches) -> None:
        """Run what tails share, and what of it is not what the tails before them shared."""
        (trunk, in_trunk), (stems, _), (prefixes, _) = self._trunk, self._stems, self._prefixes
        same = (branches.trunk, branches.stems) == (trunk, stems)
        if not same:
            self._stems, self._prefixes = (None, _NOTHING), ((None, ()), _NOTHING)  # freed before the next are built
            self._trunk = (branches.trunk, self._trunk_after(trunk, in_trunk, branches.trunk))
            if branches.stems is not None:
                self._stems = (branches.stems, self._past_of(branches.stems, lambda places: ()))
        wanted = (branches.prefixes, branches.stem_of)
        if not same or wanted != prefixes:
            self._prefixes = ((None, ()), _NOTHING)
            before = partial(self._after_stems, branches)
            in_prefixes = _NOTHING if branches.prefixes is None else self._past_of(branches.prefixes, before)
            self._prefixes = (wanted, in_prefixes)

    def _trunk_after(self, before: Segment | None, in_before: Past, trunk: Segment | None) -> Past:
        """Return the keys and values of a trunk that goes on from the one before it."""
        shared, new = trunk_after(before, trunk)
        keys_values = [tensor[:, :, :shared] for tensor in in_before.keys_values] if shared else []
        if new is not None:
            past = [Past(keys_values, (shared,))] if shared else []
            more = run_segment(self._served.model, new, past).keys_values
            keys_values = [torch.cat(pair, dim=2) for pair in zip(keys_values, more, strict=True)] if shared else more
        return Past(keys_values, (trunk.length,)) if trunk is not None else _NOTHING

    def _after_stems(self, branches: Branches, families: Sequence[int]) -> tuple[Past, ...]:
        """Return what comes before the prefixes of families, beside the trunk."""
        _, stems = self._stems
        return (stems.leaves([branches.stem_of[at] for at in families], False),) if stems.keys_values else ()

    def _past_of(self, segment: Segment, before: Callable[[Sequence[int]], tuple[Past, ...]]) -> Past:
        """Return the keys and values of a segment after the trunk and, for each sequence, what else is before it."""
        whole: KeyValues = []

        def run(places: Sequence[int], at_once: AtOnce) -> None:
            part = sequences_of(segment, places)
            found = run_segment(self._served.model, part, [self._trunk[1], *before(places)]).keys_values
            if not whole:
                whole.extend(
                    each.new_zeros(len(segment.ids), each.shape[1], segment.length, each.shape[3]) for each in found
                )
            index = torch.tensor(places, device=found[0].device)
            for all_sequences, each in zip(whole, found, strict=True):
                all_sequences[index, :, : part.length] = each

        for places, _ in parts_of(segment, self._served.cost.rows_at_once):
            list(run_in_parts(places, AtOnce(len(places)), run))
        return Past(whole, tuple(map(len, segment.ids)))

    def _run_tails(self, tails: Tails, branches: Branches) -> tuple[SegmentRun, Tensor]:
        """Return a run of tails, and the step of each from its counterfactual (empty where values alone are read)."""
        segment, embedding = tails.segment, self._served.model.held.embedding
        device, step_BTD = embedding.weight.device, torch.empty(0)

        def moved(embedded_BTD: Tensor) -> Tensor:
            nonlocal step_BTD
            ids_BT = torch.zeros(embedded_BTD.shape[:2], dtype=torch.long)
            for place, ((index, _, start), row) in enumerate(zip(tails.placed, segment.ids, strict=True)):
                other = branches.variants[index].other
                assert other is not None
                ids_BT[place, : len(row)] = torch.tensor(other.token_ids[start : start + len(row)])
            fractions = [branches.variants[index].fraction for index, _, _ in tails.placed]
            fraction_B = torch.tensor(fractions, dtype=torch.float64)
            other_BTD = embedding.forward(ids_BT.to(device)).detach()
            entered_BTD, step_BTD = between(embedded_BTD, other_BTD, fraction_B[:, None, None].to(device))
            return entered_BTD

        families = [branch for _, branch, _ in tails.placed]
        (_, trunk), (_, prefixes) = self._trunk, self._prefixes
        past = [trunk, *self._after_stems(branches, families)]
        if prefixes.keys_values:
            past.append(prefixes.leaves(families, differentiated=False))
        run = run_segment(self._served.model, segment, past, moved if segment.differentiated else None)
        return run, step_BTD


def _values(tails: Tails, run: SegmentRun, step_BTD: Tensor, at_once: int) -> list[dict[int, float]]:
    """Return the value of each tail's target functions, by the index of the pass."""
    found: list[dict[int, float]] = [{} for _ in tails.placed]
    for row, value in zip(tails.segment.head, run.values_P.double().tolist(), strict=True):
        found[row.job][row.pass_index] = found[row.job].get(row.pass_index, 0.0) + value
    return found


def _contracted(leaf_CBTD: Tensor, step_BTD: Tensor) -> Tensor:
    """Return each row of a gradient times the row of the step, (C, B, T), in float64 on the CPU."""
    return (leaf_CBTD.to(step_BTD.dtype) * step_BTD).double().sum(-1).cpu()


def together(requests: Sequence[PathRequest], cost: CostModel) -> list[list[PathRequest]]:
    """Return requests in runs that are answered together: values alone that make a few full batches, or one request."""
    found: list[list[PathRequest]] = []
    rows = 0
    for request in requests:
        each = sum(len(rollout.completion_ids) for rollout in request.group.rollouts)
        each += sum(len(other.completion_ids) for others in request.counterfactuals for other in others)
        rows += each
        if found and not request.nodes and not found[-1][-1].nodes and rows <= WAVE * cost.rows_at_once:
            found[-1].append(request)
        else:
            found.append([request])
            rows = each
    return found


def plan_paths(requests: Sequence[PathRequest], cost: CostModel, budget: float) -> Plan:
    """Return the plan of path requests; of nodes "auto", the first."""
    work: list[Branches] = []
    for run in together(requests, cost):
        work += branches_of(value_variants(run), cost, budget)
        request, nodes = run[0], 1 if run[0].nodes == "auto" else run[0].nodes
        points = [
            Point(row, other, fraction)
            for row, others in enumerate(request.counterfactuals)
            for other in range(len(others))
            for fraction, _ in (gauss_nodes(nodes) if nodes else ())
        ]
        if points:
            work += branches_of(point_variants(request, points), cost, budget)
    cotangents = max((len(passes_of(request.links)) for request in requests), default=1)
    return plan_of_branches(work, cotangents, cost)


def value_variants(requests: Sequence[PathRequest]) -> list[Variant]:
    """Return each rollout of requests, followed by its counterfactuals."""
    families = count()
    return [
        Variant(family, each, _terms(request, each))
        for request in requests
        for rollout, others in zip(request.group.rollouts, request.counterfactuals, strict=True)
        for family in [next(families)]
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
