"""The schedules that compare a span with donors: effects, from scores alone, and paths, from gradients along them."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cepo.benchmarks.engine.cases import Case, Subject, counts_of, right_answers
from cepo.benchmarks.engine.peers import (
    LAYOUT,
    Counts,
    Jacobians,
    Padded,
    Workload,
    backward,
    count_passes,
    embedded,
    log_likelihood,
    reference_scores,
    rows_before,
)
from cepo.counterfactual.donors import Candidate
from cepo.fusion.config import RewardConfig
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.path import between, gauss_nodes
from cepo.jacobian.protocol import Engine, PathRequest
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import Rollout, Span

DONORS = RewardConfig().donors
NODES = 4
EFFECT, CHAIN, PATH = "effect of X->Y", "chain's effect", f"path, {NODES} nodes"


@dataclass(frozen=True)
class _Question:
    """What is computed: fields of RewardConfig, and the layout whose links they name."""

    options: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout = LAYOUT


_XY = {"links": {"X->Y": 1.0}}
_QUESTIONS: Mapping[str, _Question] = {
    EFFECT: _Question(_XY),
    CHAIN: _Question(layout=JudgeLayout()),  # the default reward
    PATH: _Question({**_XY, "score": "path", "nodes": NODES}),
}
QUESTIONS = tuple(_QUESTIONS)


def effect_subject(subject: Subject, question: str) -> Subject:
    """Return a model with the oracle's answers to one question on its small workload, with the default donor count.

    An effect is a small difference of large sums, so errors are taken over all effects of a link. In half precision,
    rounding can be as large as the error of a wrong donor, stage or position, so effects are first compared on a
    float32 copy of the model, where it is a thousandth of that.

    Args:
        subject: the model, with the oracle's Jacobians.
        question: one of `QUESTIONS`.
    """
    check = replace(subject.check, counterfactuals=DONORS)
    asked, by_values = _requests(check, subject.model.config.vocab_size, question), question != PATH
    wanted, tolerance, oracle_error = right_answers(
        subject.model, lambda model: _answers(JacobianEngine(model), asked), cancels=True, by_link=by_values
    )
    exact = None
    if by_values and subject.model.dtype.itemsize < 4:
        wide = copy.deepcopy(subject.model).float()
        exact = effect_subject(replace(subject, model=wide, engine=GroupEngine(wide, kernels="torch")), question)
    return replace(
        subject,
        check=check,
        wanted=wanted,
        tolerance=tolerance,
        oracle_error=oracle_error,
        by_link=by_values,
        exact=exact,
    )


def effect_contenders(subject: Subject, peers: Sequence[str], *, question: str) -> list[Case]:
    """Return the reference's schedules, then the group engine's, then those of other peers.

    The chain starts with the reference schedule of the section "peers": Jacobians with as many counterfactuals.

    Args:
        subject: from `effect_subject`.
        peers: names of the peers to include, from `cepo.benchmarks.engine.cases.PEERS`.
        question: the subject's question.
    """
    model, engine, cost = subject.model, subject.engine, subject.cost
    in_float32 = [] if subject.exact is None else effect_contenders(subject.exact, peers, question=question)
    exact = {each.name: each for each in in_float32}

    def case(
        name: str,
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
            baseline=f"reference{' schedule' if question == CHAIN else ''}: {question}",
            exact=exact.get(name),
        )

    def alone(requests: Sequence[PathRequest], *, whole_head: bool = True, jacobians: bool = False) -> Counts:
        return count_passes(cost, _passes(requests, jacobians=jacobians), whole_head=whole_head)

    def planned(requests: Sequence[PathRequest]) -> Counts:
        return counts_of(engine.plan_paths(requests))

    plain = reference_paths if question == PATH else reference_effects
    found = [
        case(f"reference: {question}", partial(plain, model), alone, "reference"),
        case(f"group: {question}", partial(_answers, engine), planned),
    ]
    if question == CHAIN:
        schedule, counted = partial(reference_effects, model, jacobians=True), partial(alone, jacobians=True)
        found.insert(0, case(f"reference schedule: {CHAIN}", schedule, counted, "reference"))
    if question == PATH:
        captum, one_head = partial(captum_paths, model), partial(alone, whole_head=False)
        found.append(case("captum: integrated gradients", captum, one_head, "captum"))
        found.append(case("inseq: integrated gradients", partial(inseq_paths, model), alone, "inseq"))
    return [each for each in found if each.peer is None or each.peer in peers]


def reference_effects(model: Any, requests: Sequence[PathRequest], *, jacobians: bool = False) -> Jacobians:
    """Return effects by a forward pass per rollout and per counterfactual, with all positions through the head.

    Args:
        model: a frozen causal LM in eval mode.
        requests: the comparisons; a rollout that several requests share is run once.
        jacobians: whether to compute each target's gradient as well, as the reference schedule does.
    """
    values: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for each, targets, _ in _passes(requests, jacobians=jacobians):
        with torch.set_grad_enabled(jacobians):
            embeddings_BTD = _embedded(model, each)
            scores = reference_scores(model, each, embeddings_BTD, targets)
            if jacobians:
                backward(scores, embeddings_BTD)
        values[each.token_ids] = {target: score.detach() for target, score in scores.items()}
    return {
        (_name(request, link.name), own.token_ids): torch.stack(
            [values[own.token_ids][link.target] - values[other.token_ids][link.target] for other in others]
        )
        for request, own, others in _compared(requests)
        for link in request.links
    }


def reference_paths(model: Any, requests: Sequence[PathRequest]) -> Jacobians:
    """Return the path attributions of tokens by a forward and a backward pass per node of each path.

    Args:
        model: a frozen causal LM in eval mode.
        requests: the comparisons, one link each.
    """

    def attributed(request: PathRequest, own: Rollout, other: Rollout) -> Tensor:
        (link,) = request.links
        of_nodes = []
        for fraction, weight in gauss_nodes(NODES):
            at_BTD, step_BTD = between(_embedded(model, own), _embedded(model, other), fraction)
            leaf_BTD = at_BTD.detach().requires_grad_()
            gradient_BTD = backward(reference_scores(model, own, leaf_BTD, [link.target]), leaf_BTD)[link.target]
            of_nodes.append(weight * (gradient_BTD * step_BTD)[0].detach().sum(-1))
        return torch.stack(of_nodes).sum(0)

    return _attributions(requests, attributed)


def captum_paths(model: Any, requests: Sequence[PathRequest]) -> Jacobians:
    """Return the path attributions of tokens by Captum's `IntegratedGradients`, with a path's nodes as one batch.

    Its method "gausslegendre" has the nodes and weights of `gauss_nodes`.

    Args:
        model: a frozen causal LM in eval mode.
        requests: the comparisons, one link each.

    Raises:
        ImportError: if captum is not installed.
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


def inseq_paths(model: Any, requests: Sequence[PathRequest]) -> Jacobians:
    """Return the path attributions of tokens by Inseq's `integrated_gradients`, which calls Captum's.

    Inseq's text interface allows only the unknown token as the baseline and one target token at a time. The method
    beneath it, used here, takes a batch with any baseline and a function of the logits, which sums over the target's
    tokens. It returns float32 whatever the model's dtype.

    Args:
        model: a frozen causal LM in eval mode.
        requests: the comparisons, one link each.

    Raises:
        ImportError: if inseq is not installed.
    """
    data, models = importlib.import_module("inseq.data"), importlib.import_module("inseq.models")
    words = WordLevel({str(token): token for token in range(model.config.vocab_size)}, unk_token="0")
    named = dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), "0")  # required but not used
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **named)
    loaded = models.load_model(model, "integrated_gradients", tokenizer=tokenizer, device=str(model.device))

    def attributed(request: PathRequest, own: Rollout, other: Rollout) -> Tensor:
        (link,) = request.links
        rows, last = rows_before(own, [link.target]), len(own.token_ids) - 1
        ids_BT = torch.tensor([own.token_ids], device=model.device)
        next_P = ids_BT[0, 1:][rows]

        def score(args: Any) -> Tensor:
            logits_BPV = args.forward_output.logits[:, rows]
            return log_likelihood(logits_BPV, next_P.expand(len(logits_BPV), -1)).sum(-1)

        own_BTD, other_BTD = (_embedded(model, each).detach() for each in (own, other))
        tokens = [[str(token) for token in own.token_ids]]
        encoding = data.BatchEncoding(ids_BT, torch.ones_like(ids_BT), tokens, ids_BT)
        output = loaded.attribution_method.attribute(
            data.DecoderOnlyBatch(encoding, data.BatchEmbedding(own_BTD, other_BTD)),
            score,
            attr_pos_start=last,
            attr_pos_end=last + 1,
            show_progress=False,
            pretty_progress=False,
            output_step_attributions=True,
            attribution_args={"n_steps": NODES, "method": "gausslegendre"},
        )
        attributions_TD: Tensor = output.step_attributions[0].target_attributions[0]
        return attributions_TD.sum(-1)

    return _attributions(requests, attributed)


def _attributions(
    requests: Sequence[PathRequest], attributed: Callable[[PathRequest, Rollout, Rollout], Tensor]
) -> Jacobians:
    """Return the mean over donors of the source tokens' attributions, (S,) per link and rollout."""
    return {
        (_name(request, request.links[0].name), own.token_ids): torch.stack(
            [attributed(request, own, other) for other in others]
        ).mean(0)[list(own.spans[request.links[0].source].positions)]
        for request, own, others in _compared(requests)
    }


def _answers(engine: Engine, requests: Sequence[PathRequest]) -> Jacobians:
    """Return an engine's answers by link and token ids: effects (K,) in nats, or with nodes attributions (S,)."""
    found: Jacobians = {}
    for request, answer in zip(requests, engine.paths(requests), strict=True):
        for rollout, of_links in zip(request.group.rollouts, answer, strict=True):
            for name, path in of_links.items():
                effects_K = torch.tensor([path.own - other for other in path.others], dtype=torch.float64)
                value = effects_K if path.attribution_S is None else path.attribution_S
                found[_name(request, name), rollout.token_ids] = value
    return found


def _requests(workload: Workload, vocabulary: int, question: str) -> list[PathRequest]:
    """Return the requests that a reward would send to an engine, with K donors of random ids per source."""
    asked = _QUESTIONS[question]
    rollouts = [_judged(each) if isinstance(asked.layout, JudgeLayout) else each for each in workload.rollouts]
    config = RewardConfig(donors=workload.counterfactuals, seed=workload.seed, **asked.options)
    parsed, generator = config.parsed_links(asked.layout), torch.Generator().manual_seed(workload.seed + 1)
    pools = {}
    for link in parsed:
        shape_KS = (workload.counterfactuals, len(rollouts[0].spans[link.source].movable))
        drawn = torch.randint(0, vocabulary, shape_KS, generator=generator).tolist()
        pools[link.source] = [Candidate(f"another prompt {k}", tuple(ids)) for k, ids in enumerate(drawn)]
    groups = config.effects(dict(enumerate(rollouts)), parsed, pools)
    return [request for group in groups for request in group.requests]


def _judged(rollout: Rollout) -> Rollout:
    """Return a rollout with a judge's spans: the first half of its rationale as criteria, the rest as analysis."""
    prompt, rationale, answer = (rollout.spans[name].positions for name in LAYOUT.names)
    half = len(rationale) // 2
    parts = (prompt, rationale[:half], rationale[half:], answer)
    spans = {
        name: Span(name, positions, positions, (0,) * len(positions), "")
        for name, positions in zip(JudgeLayout().names, parts, strict=True)
    }
    return replace(rollout, spans=spans)


def _compared(requests: Sequence[PathRequest]) -> list[tuple[PathRequest, Rollout, tuple[Rollout, ...]]]:
    return [
        (request, own, others)
        for request in requests
        for own, others in zip(request.group.rollouts, request.counterfactuals, strict=True)
    ]


def _passes(requests: Sequence[PathRequest], *, jacobians: bool) -> list[tuple[Rollout, Sequence[str], int]]:
    """Return the passes of a schedule without batches; a rollout that several requests share is run once."""
    compared = _compared(requests)
    targets = list(dict.fromkeys(link.target for request in requests for link in request.links))
    if requests[0].nodes:
        return [(own, targets, 1) for _, own, others in compared for _ in others for _ in range(NODES)]
    distinct = {each.token_ids: each for _, own, others in compared for each in (own, *others)}
    return [(each, targets, len(targets) if jacobians else 0) for each in distinct.values()]


def _embedded(model: Any, rollout: Rollout) -> Tensor:
    return embedded(model, torch.tensor([rollout.token_ids], device=model.device))


def _name(request: PathRequest, link: str) -> str:
    return f"{'path' if request.nodes else 'effect'} of {link}"
