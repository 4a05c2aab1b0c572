"""The schedules that are compared: what each computes on a workload, its cost, and its error against the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cepo.benchmarks.engine.peers import (
    ALL_LINKS,
    LAYOUT,
    ONLY_XY,
    Counts,
    Jacobians,
    Key,
    Workload,
    captum_jacobians,
    count_rows,
    functional_jacobians,
    padded_jacobians,
    reference_jacobians,
)
from cepo.benchmarks.measure import matmul_rate
from cepo.fusion.config import PAPER_LINKS, RewardConfig
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.cost import CostModel, measured_cost
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.schedule import Plan
from cepo.jacobian.group.swaps import Swaps
from cepo.jacobian.passes import passes_of
from cepo.jacobian.protocol import Engine, Request

PEERS = ("reference", "padded", "functional", "captum", "inseq")
EXACT, ONLY = "group: all links, exact", "group: X->Y"
REFERENCE_SCHEDULE, PADDED = "reference schedule", "padded autograd"

# Relative Frobenius error of a Jacobian. Two orders of magnitude above observed rounding.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
# In half precision: twice the error of plain autograd in that precision, since the order of summation differs, but
# never so much that a wrong formula passes (a wrong sign has an error of 2, rows that are one token off 1.4).
_NARROW_FACTOR, _NARROW_LIMIT = 2.0, 0.25
# An effect is a small difference of large sums: in half precision rounding can be as large as the effect itself, and no
# bound there detects a wrong donor. So effects are compared in float32 first; in half precision their error need only
# be of the size of plain autograd's. Both errors are norms of about ten independent numbers. Their ratio exceeded 2 in
# 3 of 42 random models (at most 2.4), and exceeds 4 with a probability of 4e-4 by the F distribution with (8, 8)
# degrees of freedom.
_NARROW_FACTOR_OF_DIFFERENCES = 4.0


@dataclass(frozen=True)
class Case:
    """A schedule: one way to compute the Jacobians.

    Attributes:
        name: name of the row.
        links: links that it computes for every rollout as sampled.
        run: (workload, batch size) -> Jacobians; the group engine ignores the batch size.
        count: workload -> cost.
        peer: one of `PEERS`; None for the group engine.
        alone: whether it runs one rollout at a time, so that its time is proportional to their number.
        baseline: name of the case that speedups are relative to.
        exact: the same case on the subject's float32 copy, if there is one.
    """

    name: str
    links: tuple[str, ...]
    run: Callable[[Workload, int], Jacobians]
    count: Callable[[Workload], Counts]
    peer: str | None = None
    alone: bool = False
    baseline: str = REFERENCE_SCHEDULE
    exact: Case | None = None

    @property
    def batched(self) -> bool:
        """Whether a smaller batch needs less memory."""
        return self.peer is not None and not self.alone


@dataclass(frozen=True)
class Subject:
    """A model to measure on, and the reference Jacobians of a small workload.

    Attributes:
        name: name of the model.
        model: the model, frozen and in eval mode.
        engine: the group engine on it.
        cost: its cost model.
        check: the small workload.
        wanted: Jacobians of the small workload by the oracle, in float32 or wider.
        tolerance: largest relative error that rounding explains.
        oracle_error: relative error of the oracle in the model's own precision.
        matmul: rate of matrix products of the shape of its MLP, in operations per second.
        device: device of the model.
        by_link: whether errors are per link, not per link and rollout, see `worst_error`.
        exact: the same model in float32, for results that are compared in float32 first.
    """

    name: str
    model: Any
    engine: GroupEngine
    cost: CostModel
    check: Workload
    wanted: Jacobians
    tolerance: float
    oracle_error: float
    matmul: float
    device: torch.device
    by_link: bool = False
    exact: Subject | None = None

    def matmul_rate(self, seconds: float) -> float:
        """Measure the rate of matrix products again, for at least `seconds`."""
        config = self.model.config
        return matmul_rate(self.model.dtype, self.device, config.hidden_size, config.intermediate_size, seconds)


def new_subject(
    name: str,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    check: Workload,
    seed: int,
) -> Subject:
    """Build a model with random weights, and compute its Jacobians by the oracle.

    Args:
        name: name of the model.
        config: its transformers configuration.
        dtype: dtype of its weights.
        device: device to put it on.
        check: the small workload.
        seed: seed of the weights.
    """
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    model.eval().requires_grad_(False)
    requests = jacobian_requests(check, {**PAPER_LINKS, "Z->Y:total": 1.0})
    wanted, tolerance, oracle_error = right_answers(
        model, lambda oracle: engine_jacobians(JacobianEngine(oracle), requests)
    )
    rate = matmul_rate(dtype, device, config.hidden_size, config.intermediate_size, 0.3)
    # Peers need the cost by shapes only, no memory estimate.
    cost = measured_cost(model, 0, 0, 0)
    return Subject(
        name, model, GroupEngine(model, kernels="torch"), cost, check, wanted, tolerance, oracle_error, rate, device
    )


def right_answers(
    model: Any, answers_of: Callable[[Any], Jacobians], *, cancels: bool = False, by_link: bool = False
) -> tuple[Jacobians, float, float]:
    """Return the oracle's answers in float32 or wider, the tolerance, and the oracle's error in the model's dtype.

    Args:
        model: the model.
        answers_of: model -> the oracle's answers.
        cancels: whether terms cancel, so that the oracle's rounding in float32 would exceed the tolerance; the answers
            of a float32 model are then computed on a float64 copy.
        by_link: whether the answers are differences with errors per link, which are compared in float32 first.
    """
    if model.dtype in _TOLERANCES:
        oracle = copy.deepcopy(model).double() if cancels else model
        return answers_of(oracle), _TOLERANCES[model.dtype], 0.0
    wanted = answers_of(copy.deepcopy(model).float())
    oracle_error = worst_error(answers_of(model), wanted, [], by_link=by_link)
    if by_link:
        return wanted, _NARROW_FACTOR_OF_DIFFERENCES * oracle_error, oracle_error
    return wanted, min(_NARROW_LIMIT, _NARROW_FACTOR * oracle_error), oracle_error


def contenders(subject: Subject, peers: Sequence[str]) -> list[Case]:
    """Return the reference schedule, then the group engine's schedules, then the other peers.

    Args:
        subject: the model.
        peers: names of the peers to include, from `PEERS`.
    """
    model = subject.model
    xy = {"X->Y": 1.0}

    def peer(
        kind: str,
        name: str,
        links: tuple[str, ...],
        run: Callable[[Workload, int], Jacobians],
        *,
        alone: bool = False,
        **cost: bool,
    ) -> Case:
        return Case(name, links, run, lambda workload: count_rows(subject.cost, workload, links, **cost), kind, alone)

    found = [
        peer(
            "reference",
            REFERENCE_SCHEDULE,
            ALL_LINKS,
            lambda workload, batch: reference_jacobians(model, workload),
            alone=True,
            whole_head=True,
            always_both=True,
        ),
        _group_case(subject, EXACT, PAPER_LINKS),
        _group_case(subject, "group: all links, base only", PAPER_LINKS, counterfactuals=0),
        _group_case(subject, ONLY, xy),
        _group_case(subject, "group: X->Y, with influence", xy, also=("influence",)),
        peer(
            "padded",
            PADDED,
            ALL_LINKS,
            lambda workload, batch: padded_jacobians(model, workload, links=ALL_LINKS, batch=batch),
        ),
        peer(
            "padded",
            "padded autograd: X->Y",
            ONLY_XY,
            lambda workload, batch: padded_jacobians(model, workload, links=ONLY_XY, batch=batch),
        ),
        peer(
            "functional",
            "torch.func vmap of vjp",
            ALL_LINKS,
            lambda workload, batch: functional_jacobians(model, workload),
            alone=True,
            always_both=True,
        ),
        peer(
            "captum",
            "captum: X->Y",
            ONLY_XY,
            lambda workload, batch: captum_jacobians(model, workload, batch=batch),
        ),
    ]
    return [case for case in found if case.peer is None or case.peer in peers]


def on_kernels(subject: Subject, cases_of: Callable[[Subject, Sequence[str]], list[Case]]) -> list[Case]:
    """Return the group engine's schedules on the Triton kernels; none if the kernels do not run.

    Args:
        subject: the model.
        cases_of: `contenders`, or another function like it.
    """
    with_kernels = _with_kernels(subject)
    if with_kernels.engine.swaps == Swaps():
        return []
    return [replace(case, name=f"{case.name}, kernels") for case in cases_of(with_kernels, ())]


def _with_kernels(subject: Subject) -> Subject:
    exact = None if subject.exact is None else _with_kernels(subject.exact)
    return replace(subject, engine=GroupEngine(subject.model, kernels="auto"), exact=exact)


def engine_jacobians(engine: Engine, requests: Sequence[Request]) -> Jacobians:
    """Return an engine's Jacobians by link and token ids."""
    found: Jacobians = {}
    for request, answer in zip(requests, engine.compute(requests), strict=True):
        for rollout, records in zip(request.group.rollouts, answer, strict=True):
            for name, record in records.items():
                found[name, rollout.token_ids] = record.jac_SD
    return found


def worst_error(found: Jacobians, wanted: Jacobians, expected: Sequence[Key], *, by_link: bool = False) -> float:
    """Return the largest ||J - J*|| / ||J*|| over the keys of both; infinity if an expected key is missing.

    Args:
        found: the answers J to compare.
        wanted: the reference answers J*.
        expected: keys that `found` must have.
        by_link: whether to take all answers of a link as one J, since an answer of a few differences can be small by
            chance.
    """
    if any(key not in found for key in expected):
        return float("inf")
    squares: dict[Any, tuple[float, float]] = {}
    for key in found.keys() & wanted.keys():
        right = wanted[key].double().cpu()  # a peer answers on the model's device
        difference, size = squares.get(of := key[0] if by_link else key, (0.0, 0.0))
        difference += float((found[key].double().cpu() - right).square().sum())
        squares[of] = difference, size + float(right.square().sum())
    # A direct effect can be zero, as of a prompt on a one-token answer that the blocked rationale predicts.
    errors = [(difference / max(size, 1e-300)) ** 0.5 if difference else 0.0 for difference, size in squares.values()]
    return max(errors, default=0.0) if all(error == error for error in errors) else float("nan")


def base_keys(case: Case, workload: Workload) -> list[Key]:
    """Return the keys that a schedule must compute, whatever its counterfactuals."""
    return [(link, rollout.token_ids) for link in case.links for rollout in workload.rollouts]


def counts_of(plan: Plan) -> Counts:
    """Return the cost of a plan of the group engine."""
    return Counts(plan.forward_rows, plan.backward_rows, plan.head_rows, plan.flops, plan.peak_bytes)


def _group_case(subject: Subject, name: str, links: Mapping[str, float], **options: Any) -> Case:
    def count(workload: Workload) -> Counts:
        requests = jacobian_requests(workload, links, **options)
        vjps = sum(len(request.group.rollouts) * len(passes_of(request.links)) for request in requests)
        return replace(counts_of(subject.engine.plan(requests)), vjps=vjps)

    return Case(
        name,
        tuple(links),
        lambda workload, batch: engine_jacobians(subject.engine, jacobian_requests(workload, links, **options)),
        count,
    )


def jacobian_requests(workload: Workload, links: Mapping[str, float], **options: Any) -> list[Request]:
    """Return the requests that a reward would send to an engine."""
    config = RewardConfig.paper(links=links, counterfactuals=workload.counterfactuals, seed=workload.seed)
    config = replace(config, **options)
    groups = config.requests(dict(enumerate(workload.rollouts)), config.parsed_links(LAYOUT))
    return [request for group in groups for request in group.requests]
