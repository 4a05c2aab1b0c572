"""Controls: judges whose causes are known, criteria hidden by the mask, randomised weights, and Captum's gradient."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cepo.eval.causal.judge import Judge
from cepo.eval.causal.measures import CHAIN, LINKS, scored
from cepo.eval.statistics import spearman
from cepo.fusion.config import RewardConfig
from cepo.fusion.score import Pools, score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.layers import decoder_layers
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import sum_of_terms, target_terms
from cepo.train import testbed_judges

FOLLOWS = 0.9
"""A judge follows its criteria if its verdict follows at least this share of swapped criteria."""
IGNORES = 0.1
"""A judge ignores its criteria if swaps flip at most this share of its verdicts."""
PAIR: tuple[testbed_judges.JudgeKind, testbed_judges.JudgeKind] = ("criteria", "query")
"""Two judges of the testbed that a true signal must separate: one follows its criteria, the other the query."""
_STEPS = 4
_REDRAWN = 2


def certificate(follows: Mapping[str, float], ignores: Mapping[str, float]) -> str | None:
    """Return why interventions do not certify the pair, or None if they do.

    Args:
        follows: result of `testbed_judges.certify` for the judge that must follow its criteria.
        ignores: the same for the judge that must not.
    """
    if follows["follows_swap"] < FOLLOWS:
        return (
            f"the first judge's verdict follows {follows['follows_swap']:.2f} of swapped criteria; "
            f"expected at least {FOLLOWS}"
        )
    if ignores["flips"] > IGNORES:
        return (
            f"swapped criteria flip {ignores['flips']:.2f} of the second judge's verdicts; expected at most {IGNORES}"
        )
    return None


def masked_scores(rollouts: Sequence[Rollout], judge: Judge, pools: Pools) -> dict[str, float]:
    """Return the largest effect (in nats), influence and norm of criteria on a judge that cannot see them.

    Later tokens cannot attend to the criteria at any layer, so the criteria cannot reach the analysis or the scores,
    and all three must be exactly zero. Any other value is a bug.

    Args:
        rollouts: well-formed judgements, at least one.
        judge: the judge.
        pools: donor candidates for each source span.

    Returns:
        The largest values by measure and link, such as "delta criteria->scores".
    """
    engine = JacobianEngine(judge.model)
    links = [link for link in LINKS if link.startswith("criteria")]
    config = RewardConfig(links=dict.fromkeys(links, 1.0), score="effect", also=("influence",), counterfactuals=0)
    largest: dict[str, float] = {}
    for rollout in rollouts:
        with criteria_hidden(judge.model, rollout.spans["criteria"].positions):
            (score,) = score_rollouts([rollout], engine, config, judge.layout, pools=pools)
        for name, link in score.links.items():
            for measure in ("delta", "influence", "norm"):
                what = f"{measure} {name}"
                largest[what] = max(largest.get(what, 0.0), abs(getattr(link, measure) or 0.0))
    return largest


@contextlib.contextmanager
def criteria_hidden(model: Any, positions: Sequence[int]) -> Iterator[None]:
    """Hide some positions from all tokens, at every layer, inside this context.

    Args:
        model: a Hugging Face causal language model whose decoder takes a (B, T) attention mask.
        positions: positions in the sequences that the model is run on.
    """

    def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids_BT = args[0] if args else kwargs["input_ids"]
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[:, [at for at in positions if at < ids_BT.shape[1]]] = 0
        return args, {**kwargs, "attention_mask": mask_BT}

    handle = model.get_decoder().register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def randomisation(rollouts: Sequence[Rollout], judge: Judge, pools: Pools, *, seed: int) -> list[dict[str, Any]]:
    """Return how much of the scores' order remains when the weights are randomised from the top layer down.

    Each step randomises some more layers below those of the step before: matrices are drawn from a normal distribution
    with their own standard deviation, and the entries of vectors (gains and biases) are shuffled. The last step
    randomises the embeddings, and with them a tied head. A measure of what the model learnt must lose its order.

    Args:
        rollouts: well-formed judgements.
        judge: the judge; not changed.
        pools: donor candidates for each source span.
        seed: seed of the random parameters.

    Returns:
        One record per step: what was randomised, and the rank correlation over the rollouts between the original and
        the randomised model, for `effect` of the chain and `influence` of criteria->scores, mean over random models;
        NaN if it is undetermined.

    Source:
        Adebayo et al., Sanity checks for saliency maps (2018), section 4.1 (cascading randomisation).
    """
    count = len(decoder_layers(judge.model))
    if not count:
        expected = judge.model.config.get_text_config().num_hidden_layers
        raise ValueError(f"model is a {type(judge.model).__name__}, in which no list of {expected} layers was found")
    edges = np.unique(np.linspace(0, count, min(count, _STEPS) + 1).round().astype(int)).tolist()
    names = [*(f"top {below} of {count} layers" for below in edges[1:]), "and the embeddings"]
    original = _orders(rollouts, judge, pools)
    kept: list[list[dict[str, float]]] = [[] for _ in names]
    for draw in range(_REDRAWN):
        model = copy.deepcopy(judge.model)
        layers = decoder_layers(model)
        generator = torch.Generator().manual_seed((seed << 8) + draw)
        redrawn = [layers[count - below : count - above] for above, below in pairwise(edges)]
        for of_step, modules in zip(kept, [*redrawn, [model.get_input_embeddings()]], strict=True):
            for module in modules:
                _redraw(module, generator)
            found = _orders(rollouts, Judge(judge.name, model, judge.reader, judge.memory_gib), pools)
            of_step.append({name: spearman(original[name], values) for name, values in found.items()})
    return [
        {"redrawn": name, **{score: float(np.mean([one[score] for one in of_step])) for score in of_step[0]}}
        for name, of_step in zip(names, kept, strict=True)
    ]


def captum_difference(rollouts: Sequence[Rollout], judge: Judge) -> float | None:
    """Return the largest difference between our J_XY and Captum's gradient, relative to the latter's largest entry.

    Args:
        rollouts: well-formed judgements.
        judge: the judge.

    Returns:
        The maximum over the rollouts; None if captum, an optional extra, is not installed.
    """
    try:
        # By name, so that type checkers do not look for an optional package.
        saliency_of = importlib.import_module("captum.attr").Saliency
    except ImportError:
        return None
    config = RewardConfig(links={"X->Y": 1.0}, counterfactuals=0, score="phi")
    scores = score_rollouts(rollouts, judge.engine, config, judge.layout, keep_jacobians=True)
    worst = 0.0
    for rollout, score in zip(rollouts, scores, strict=True):
        terms = target_terms(rollout, "scores", "log_likelihood")
        ids_BT = torch.tensor([rollout.token_ids[: terms[-1].position]], device=judge.model.device)

        def score_of(embedded_BTD: Tensor, terms: Any = terms) -> Tensor:
            logits_TV = judge.model(inputs_embeds=embedded_BTD, use_cache=False).logits[0]
            return sum_of_terms(logits_TV[[term.position - 1 for term in terms]], terms)[None]

        embedded_BTD = judge.model.get_input_embeddings()(ids_BT).detach().requires_grad_()
        gradient_TD = saliency_of(score_of).attribute(embedded_BTD, abs=False)[0]
        theirs_SD = gradient_TD[list(rollout.spans["criteria"].positions)].double()
        ours_SD = score.jacobians["X->Y"].base.jac_SD.double()
        worst = max(worst, float((ours_SD - theirs_SD).abs().max() / theirs_SD.abs().max()))
    return worst


def _orders(rollouts: Sequence[Rollout], judge: Judge, pools: Pools) -> dict[str, list[float]]:
    """Return for each rollout the chain's effect in nats, and the influence of criteria->scores."""
    scores = scored(rollouts, judge, pools, score="effect", also=("influence",), seed=0)
    return {
        "effect": [min([one.links[link].delta or 0.0 for link in CHAIN], default=0.0) for one in scores],
        "influence": [one.links["criteria->scores"].influence or 0.0 for one in scores],
    }


def _redraw(module: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for weight in module.parameters():
            if weight.ndim > 1:
                drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * float(
                    weight.double().std()
                )
                weight.copy_(drawn.to(weight))
            else:
                weight.copy_(weight[torch.randperm(len(weight), generator=generator).to(weight.device)])
