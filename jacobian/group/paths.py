"""Path requests in the group engine: values of counterfactuals, and gradients on the paths to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from cepo.jacobian.group.branches import (
    Branches,
    Placed,
    Tails,
    Variant,
    branches_of,
    plan_of_branches,
    stem_after,
    tails_of,
)
from cepo.jacobian.group.cost import CostModel
from cepo.jacobian.group.cotangents import Asked
from cepo.jacobian.group.cuts import Segment
from cepo.jacobian.group.halving import AtOnce, run_in_parts
from cepo.jacobian.group.run import KeyValues, SegmentRun, backward_in_parts, run_segment
from cepo.jacobian.group.schedule import Plan
from cepo.jacobian.group.trial import Served
from cepo.jacobian.passes import Pass, passes_of
from cepo.jacobian.path import Point, between, gauss_nodes, path_answer
from cepo.jacobian.protocol import PathAnswer, PathRequest
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import Term, target_terms

Read = TypeVar("Read")
# From tails, their run, the step of each and how many cotangents go back at once, what is read of each.
Reader: TypeAlias = Callable[[Tails, SegmentRun, Tensor, int], Sequence[Read]]


class PathRunner:
    """Answers path requests of one model; consecutive requests of a prompt share its stem.

    Args:
        served: the model.
        budget: bytes that may be added to what the model holds.
    """

    def __init__(self, served: Served, budget: float) -> None:
        self._served, self._budget = served, budget
        self._stem: tuple[Segment | None, KeyValues] = (None, [])
        self._prefixes: tuple[Segment | None, KeyValues] = (None, [])

    def answer(self, request: PathRequest) -> PathAnswer:
        """Return the answer to a request; inside `model.prepared()`."""
        passes, source = passes_of(request.links), request.links[0].source

        def values_of(tails: Tails, run: SegmentRun, step_BTD: Tensor, at_once: int) -> list[dict[Pass, float]]:
            found = [dict.fromkeys(passes, 0.0) for _ in tails.placed]
            for row, value in zip(tails.segment.head, run.values_P.double().tolist(), strict=True):
                found[row.job][passes[row.pass_index]] += value
            return found

        def contract(points: Sequence[Point]) -> list[dict[Pass, Tensor]]:
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

        in_order = iter(self._run(value_variants(request), 1, values_of))
        values = [list(islice(in_order, 1 + len(others))) for others in request.counterfactuals]
        return path_answer(request, values, contract)

    def _run(self, variants: Sequence[Variant], passes: int, read: Reader[Read]) -> list[Read]:
        """Run variants, and return what is read of each, in order."""
        found: dict[int, Read] = {}
        for branches in branches_of(variants, self._served.cost, self._budget):
            stem = self._run_stem(branches)
            prefixes = self._run_prefixes(branches, stem)

            def run(
                placed: Sequence[Placed], at_once: AtOnce, stem: KeyValues = stem, prefixes: KeyValues = prefixes
            ) -> dict[int, Read]:
                tails = tails_of(variants, placed)
                of_tails = read(tails, *self._run_tails(tails, variants, stem, prefixes), at_once.passes)
                return {index: one for (index, _, _), one in zip(placed, of_tails, strict=True)}

            for of_part in run_in_parts(branches.placed, AtOnce(branches.tails_at_once, passes), run):
                found |= of_part
        return [found[index] for index in range(len(variants))]

    def _run_stem(self, branches: Branches) -> KeyValues:
        before, keys_values = self._stem
        if branches.stem != before:
            self._stem = self._prefixes = (None, [])  # freed before the next ones are built
            shared, new = stem_after(before, branches.stem)
            keys_values = [tensor[:, :, :shared] for tensor in keys_values] if shared else []
            if new is not None:
                more = run_segment(self._served.model, new, [keys_values], [shared]).keys_values
                joined = [torch.cat(pair, dim=2) for pair in zip(keys_values, more, strict=True)] if shared else more
                keys_values = joined
            self._stem = (branches.stem, keys_values)
        return self._stem[1]

    def _run_prefixes(self, branches: Branches, stem: KeyValues) -> KeyValues:
        """Return what families share; values and points of a request have it in common."""
        if branches.prefixes != self._prefixes[0]:
            self._prefixes = (None, [])
            if branches.prefixes is not None:
                self._prefixes = (branches.prefixes, self._prefixes_after(branches.prefixes, stem))
        return self._prefixes[1]

    def _prefixes_after(self, prefixes: Segment, stem: KeyValues) -> KeyValues:
        """Return the keys and values of prefixes, padded to the longest."""

        def run(places: Sequence[int], at_once: AtOnce) -> KeyValues:
            segment = Segment(tuple(prefixes.ids[at] for at in places), tuple(prefixes.starts[at] for at in places))
            found = run_segment(self._served.model, segment, [stem], segment.starts).keys_values
            return [functional.pad(tensor, (0, 0, 0, prefixes.length - segment.length)) for tensor in found]

        count = len(prefixes.ids)
        parts = list(run_in_parts(range(count), AtOnce(count), run))
        return [torch.cat(of_parts) for of_parts in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]

    def _run_tails(
        self, tails: Tails, variants: Sequence[Variant], stem: KeyValues, prefixes: KeyValues
    ) -> tuple[SegmentRun, Tensor]:
        """Return a run of tails, and the step of each from its counterfactual (empty where values alone are read)."""
        segment, embedding = tails.segment, self._served.model.held.embedding
        device, step_BTD = embedding.weight.device, torch.empty(0)

        def moved(embedded_BTD: Tensor) -> Tensor:
            nonlocal step_BTD
            ids_BT = torch.zeros(embedded_BTD.shape[:2], dtype=torch.long)
            for place, ((index, _, start), row) in enumerate(zip(tails.placed, segment.ids, strict=True)):
                other = variants[index].other
                assert other is not None
                ids_BT[place, : len(row)] = torch.tensor(other.token_ids[start : start + len(row)])
            fraction_B = torch.tensor([variants[index].fraction for index, _, _ in tails.placed], dtype=torch.float64)
            other_BTD = embedding.forward(ids_BT.to(device)).detach()
            entered_BTD, step_BTD = between(embedded_BTD, other_BTD, fraction_B[:, None, None].to(device))
            return entered_BTD

        branch_B = torch.tensor([branch for _, branch, _ in tails.placed], device=device)
        past = [stem, [tensor[branch_B] for tensor in prefixes]]
        run = run_segment(self._served.model, segment, past, segment.starts, moved if segment.differentiated else None)
        return run, step_BTD


def _contracted(leaf_CBTD: Tensor, step_BTD: Tensor) -> Tensor:
    """Return each row of a gradient times the row of the step, (C, B, T), in float64 on the CPU."""
    return (leaf_CBTD.to(step_BTD.dtype) * step_BTD).double().sum(-1).cpu()


def plan_paths(requests: Sequence[PathRequest], cost: CostModel, budget: float) -> Plan:
    """Return the plan of path requests; of nodes "auto", the first."""
    work: list[Branches] = []
    for request in requests:
        work += branches_of(value_variants(request), cost, budget)
        count = 1 if request.nodes == "auto" else request.nodes
        points = [
            Point(row, other, fraction)
            for row, others in enumerate(request.counterfactuals)
            for other in range(len(others))
            for fraction, _ in (gauss_nodes(count) if count else ())
        ]
        if points:
            work += branches_of(point_variants(request, points), cost, budget)
    cotangents = max((len(passes_of(request.links)) for request in requests), default=1)
    return plan_of_branches(work, cotangents, cost)


def value_variants(request: PathRequest) -> list[Variant]:
    """Return each rollout of a request, followed by its counterfactuals."""
    return [
        Variant(family, each, _terms(request, each))
        for family, (rollout, others) in enumerate(zip(request.group.rollouts, request.counterfactuals, strict=True))
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
