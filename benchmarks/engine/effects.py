"""The schedules that compare a span with donors: effects, by values alone, and paths, by gradients on the way."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cepo.benchmarks.engine.cases import Case, Subject, counts_of, right_answers
from cepo.benchmarks.engine.peers import BOTH, LAYOUT, Counts, Jacobians, Padded, Workload, count_passes, embedded
from cepo.benchmarks.engine.peers import reference_scores as scores_of
from cepo.counterfactual.donors import Candidate
from cepo.fusion.config import RewardConfig
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.path import between, gauss_nodes
from cepo.jacobian.protocol import Engine, PathRequest
from cepo.jacobian.records import Rollout

NODES = 4
PATH = f"path, {NODES} nodes"
# What is asked: links, and nodes along the path to each donor; 0 for the effect alone.
_QUESTIONS: Mapping[str, tuple[Mapping[str, float], int]] = {
    "effect": ({"X->Y": 1.0}, 0),
    "chain's effect": ({"chain": 1.0}, 0),
    PATH: ({"X->Y": 1.0}, NODES),
}


def effect_subject(subject: Subject, counterfactuals: int) -> Subject:
    """Return a model with the right effects and paths of its small workload.

    Args:
        subject: the model, with the right Jacobians.
        counterfactuals: K of the workload that will be timed; what tokens add along paths is a mean over all K.
    """
    check = replace(subject.check, counterfactuals=counterfactuals)
    asked = [_requests(check, subject.model.config.vocab_size, question) for question in _QUESTIONS]

    def answers_of(oracle: Engine) -> Jacobians:
        return {key: value for requests in asked for key, value in _answers(oracle, requests).items()}

    if subject.model.dtype == torch.float32:
        # An effect is a small difference of large sums: in float32 the oracle's own rounding exceeds the tolerance.
        wide = JacobianEngine(copy.deepcopy(subject.model).double())
        wanted, tolerance, oracle_error = answers_of(wide), subject.tolerance, 0.0
    else:
        wanted, tolerance, oracle_error = right_answers(subject.model, answers_of)
    return replace(subject, check=check, wanted=wanted, tolerance=tolerance, oracle_error=oracle_error)


def effect_contenders(subject: Subject, peers: Sequence[str]) -> list[Case]:
    """Return for each question the reference's schedule, where it is asked for, and the group engine's, then Captum's.

    Args:
        subject: from `effect_subject`.
        peers: some of `cepo.benchmarks.engine.cases.PEERS`.
    """
    model, engine, cost = subject.model, subject.engine, subject.cost

    def case(
        name: str,
        question: str,
        run: Callable[[Sequence[PathRequest]], Jacobians],
        count: Callable[[Sequence[PathRequest]], Counts],
        peer: str | None = None,
    ) -> Case:
        def asked(workload: Workload) -> list[PathRequest]:
            return _requests(workload, model.config.vocab_size, question)

        answered = [_name(request, link.name) for request in asked(subject.check) for link in request.links]
        return Case(
            name,
            tuple(dict.fromkeys(answered)),
            lambda workload, batch: run(asked(workload)),
            lambda workload: count(asked(workload)),
            peer,
            alone=peer is not None,
            baseline=f"reference: {question}",
        )

    def cost_alone(requests: Sequence[PathRequest], *, whole_head: bool = False) -> Counts:
        return count_passes(cost, _passes(requests), whole_head=whole_head)

    def planned(requests: Sequence[PathRequest]) -> Counts:
        return counts_of(engine.plan_paths(requests))

    found, whole = [], partial(cost_alone, whole_head=True)
    for question, (_, nodes) in _QUESTIONS.items():
        reference = partial(reference_paths if nodes else reference_effects, model)
        found.append(case(f"reference: {question}", question, reference, whole, "reference"))
        found.append(case(f"group: {question}", question, partial(_answers, engine), planned))
    found.append(case("captum: integrated gradients", PATH, partial(captum_paths, model), cost_alone, "captum"))
    return [each for each in found if each.peer is None or each.peer in peers]


def reference_effects(model: Any, requests: Sequence[PathRequest]) -> Jacobians:
    """Return effects by one forward pass for every rollout and every counterfactual alone, all positions in the head.

    Args:
        model: a frozen causal LM in eval mode.
        requests: what to compare; a rollout of several requests is run once.
    """
    values: dict[tuple[int, ...], dict[str, Tensor]] = {}
    with torch.no_grad():
        for each, _, _ in _passes(requests):
            values[each.token_ids] = scores_of(model, each, _embedded(model, each))
    return {
        (_name(request, link.name), own.token_ids): torch.stack(
            [values[own.token_ids][link.target] - values[other.token_ids][link.target] for other in others]
        )
        for request, own, others in _compared(requests)
        for link in request.links
    }


def reference_paths(model: Any, requests: Sequence[PathRequest]) -> Jacobians:
    """Return what tokens add along paths by a forward and a backward pass at each node of each path alone.

    Args:
        model: a frozen causal LM in eval mode.
        requests: what to compare, one link each.
    """

    def attributed(request: PathRequest, own: Rollout, other: Rollout) -> Tensor:
        (link,) = request.links
        of_nodes = []
        for fraction, weight in gauss_nodes(NODES):
            at_BTD, step_BTD = between(_embedded(model, own), _embedded(model, other), fraction)
            leaf_BTD = at_BTD.detach().requires_grad_()
            (gradient_BTD,) = torch.autograd.grad(scores_of(model, own, leaf_BTD)[link.target], [leaf_BTD])
            of_nodes.append(weight * (gradient_BTD * step_BTD)[0].detach().sum(-1))
        return torch.stack(of_nodes).sum(0)

    return _attributions(requests, attributed)


def captum_paths(model: Any, requests: Sequence[PathRequest]) -> Jacobians:
    """Return what tokens add along paths by Captum's `IntegratedGradients`, the nodes of a path as one batch.

    Its "gausslegendre" has the nodes and weights of `gauss_nodes`.

    Args:
        model: a frozen causal LM in eval mode.
        requests: what to compare, one link each.

    Raises:
        ImportError: where captum is not installed.
    """
    integrated_gradients_of = importlib.import_module("captum.attr").IntegratedGradients

    def attributed(request: PathRequest, own: Rollout, other: Rollout) -> Tensor:
        (link,) = request.links
        padded = Padded(model, [own] * NODES, [link.target], masked=False)
        integrated = integrated_gradients_of(lambda at_BTD: padded.scores(at_BTD)[link.target])
        tokens = padded.ids_BT.shape[1]
        own_BTD, other_BTD = (_embedded(model, each)[:, :tokens].detach() for each in (own, other))
        found_BTD = integrated.attribute(own_BTD, other_BTD, n_steps=NODES, method="gausslegendre")
        return found_BTD[0].detach().sum(-1)

    return _attributions(requests, attributed)


def _attributions(
    requests: Sequence[PathRequest], attributed: Callable[[PathRequest, Rollout, Rollout], Tensor]
) -> Jacobians:
    """Return the mean over donors at the source's tokens, from what every token of a path adds."""
    return {
        (_name(request, request.links[0].name), own.token_ids): torch.stack(
            [attributed(request, own, other) for other in others]
        ).mean(0)[list(own.spans[request.links[0].source].positions)]
        for request, own, others in _compared(requests)
    }


def _answers(engine: Engine, requests: Sequence[PathRequest]) -> Jacobians:
    """Return an engine's answers: of each rollout (K,) effects in nats, or with nodes what its tokens add, (S,)."""
    found: Jacobians = {}
    for request, answer in zip(requests, engine.paths(requests), strict=True):
        for rollout, of_links in zip(request.group.rollouts, answer, strict=True):
            for name, path in of_links.items():
                effects_K = torch.tensor([path.own - other for other in path.others], dtype=torch.float64)
                value = effects_K if path.attribution_S is None else path.attribution_S
                found[_name(request, name), rollout.token_ids] = value
    return found


def _requests(workload: Workload, vocabulary: int, question: str) -> list[PathRequest]:
    """Return the requests that a reward would make of an engine, with K donors of random ids for each source."""
    links, nodes = _QUESTIONS[question]
    options: dict[str, Any] = {"score": "path", "nodes": nodes} if nodes else {}
    config = RewardConfig(links=links, donors=workload.counterfactuals, seed=workload.seed, **options)
    parsed, generator = config.parsed_links(LAYOUT), torch.Generator().manual_seed(workload.seed + 1)
    pools = {}
    for link in parsed:
        shape_KS = (workload.counterfactuals, len(workload.rollouts[0].spans[link.source].movable))
        drawn = torch.randint(0, vocabulary, shape_KS, generator=generator).tolist()
        pools[link.source] = [Candidate(f"another prompt {k}", tuple(ids)) for k, ids in enumerate(drawn)]
    groups = config.effects(dict(enumerate(workload.rollouts)), parsed, pools)
    return [request for group in groups for request in group.requests]


def _compared(requests: Sequence[PathRequest]) -> list[tuple[PathRequest, Rollout, tuple[Rollout, ...]]]:
    return [
        (request, own, others)
        for request in requests
        for own, others in zip(request.group.rollouts, request.counterfactuals, strict=True)
    ]


def _passes(requests: Sequence[PathRequest]) -> list[tuple[Rollout, Sequence[str], int]]:
    """Return the passes of a schedule that runs everything alone; a rollout of several requests is run once."""
    compared = _compared(requests)
    if requests[0].nodes:
        once = [(own, [request.links[0].target], 1) for request, own, others in compared for _ in others]
        return [each for each in once for _ in range(NODES)]
    distinct = {each.token_ids: each for _, own, others in compared for each in (own, *others)}
    return [(each, BOTH, 0) for each in distinct.values()]


def _embedded(model: Any, rollout: Rollout) -> Tensor:
    return embedded(model, torch.tensor([rollout.token_ids], device=model.device))


def _name(request: PathRequest, link: str) -> str:
    return f"{'path' if request.nodes else 'effect'} of {link}"
