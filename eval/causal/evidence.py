"""Evidence: what every definition of S, and every simpler measure, says about a rollout's criteria."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from cepo.counterfactual.nuisance import angles_between
from cepo.counterfactual.permute import Permutation
from cepo.eval.causal.judge_model import JudgeModel
from cepo.fusion.config import RewardConfig
from cepo.fusion.records import Measured, named_scores, score_links
from cepo.fusion.requests import LinkGradients
from cepo.fusion.score import harden
from cepo.jacobian.model import eager_attention
from cepo.jacobian.protocol import Engine
from cepo.jacobian.records import Rollout
from cepo.train.rewards.proxy import measure_sensitivity

LINKS: tuple[str, ...] = (
    "criteria->scores@log_likelihood",
    "criteria->scores@log_odds",
    "criteria->scores@margin",
    "criteria->analysis@log_likelihood",
    "criteria->analysis@log_odds",
    "analysis->scores@log_likelihood",
    "analysis->scores@log_odds",
    "analysis->scores@margin",
)
DEFAULT_LINK = LINKS[0]
# Chain by target function: criteria's effect on the analysis, and the analysis's on the scores.
CHAINS: Mapping[str, tuple[str, str]] = {
    "chain@log_likelihood": ("criteria->analysis@log_likelihood", "analysis->scores@log_likelihood"),
    "chain@log_odds": ("criteria->analysis@log_odds", "analysis->scores@log_odds"),
    "chain@margin": ("criteria->analysis@log_likelihood", "analysis->scores@margin"),
}
BASELINES: tuple[str, ...] = ("span length", "distance to the scores", "attention mass", "embedding similarity")
HARDENED = (4, 2)
"""K and r of the hardened definitions."""
SWEPT = (1, 2, 4, 8)
"""Values of K and of r that are swept for the default link, in all combinations."""
PAPER_DEFINITION = f"phi {DEFAULT_LINK} K=4 r=2"
"""The paper's S on X->Y."""
ANALYSIS_DEFINITION = "influence criteria->analysis@log_likelihood"
"""What a judge is measured by: the criteria's effect goes through the analysis."""
REWARD_DEFINITION = f"influence {DEFAULT_LINK}"
"""What `CausalReward` scores by default."""
COMPARED = (PAPER_DEFINITION, ANALYSIS_DEFINITION, REWARD_DEFINITION)
"""Definitions that every table and figure shows."""

# Hardening leaves the influence as it is, and without hardening everything is retained.
BARE_SCORES = ("phi", "influence", "phi_influence", "norm")
HARDENED_SCORES = ("phi", "phi_retained", "phi_influence", "influence_retained", "norm")
# Shares of a total multiply along a chain; shapes and sizes are averaged geometrically.
_PRODUCTS = ("influence", "influence_retained")


@dataclass(frozen=True)
class Evidence:
    """What is known of one rollout without changing its criteria.

    Attributes:
        values: every definition and baseline by name, see `definition`.
        saliency: L2 norm of each Jacobian row, by link.
        attention: for each criteria token, the mean attention that the score-predicting positions pay to it.
        problem: why there is none, or None.
    """

    values: Mapping[str, float]
    saliency: Mapping[str, tuple[float, ...]]
    attention: tuple[float, ...]
    problem: str | None = None


def gather_evidence(rollouts: Sequence[Rollout], judge: JudgeModel, engine: Engine, *, seed: int) -> list[Evidence]:
    """Return every definition of S and every baseline of each rollout; each Jacobian is computed once.

    Args:
        rollouts: judgements; those that are malformed, or that the engine cannot serve, have a problem.
        judge: the judge that wrote them.
        engine: of the same model.
        seed: of the permutations.
    """
    problems = [engine.refusal(rollout) or rollout.malformed for rollout in rollouts]
    sound = {row: rollout for row, rollout in enumerate(rollouts) if problems[row] is None}
    # Only the default link is swept, so only it needs the largest K.
    gradients = _gradients(sound, LINKS[:1], judge, engine, counterfactuals=SWEPT[-1], seed=seed)
    gradients += _gradients(sound, LINKS[1:], judge, engine, counterfactuals=HARDENED[0], seed=seed)
    for one in gradients:
        if not one.is_finite:
            problems[one.rollout] = problems[one.rollout] or f"non-finite gradient on {one.base.link.name}"
    gradients = [one for one in gradients if problems[one.rollout] is None]
    saliency: list[dict[str, tuple[float, ...]]] = [{} for _ in rollouts]
    for one in gradients:
        saliency[one.rollout][one.base.link.name] = tuple(one.base.jac_SD.double().norm(dim=1).tolist())
    values: list[dict[str, float]] = [{} for _ in rollouts]
    for count, rank in dict.fromkeys([(0, 0), HARDENED, *product(SWEPT, SWEPT)]):
        everywhere = (count, rank) in ((0, 0), HARDENED)
        cut = [
            replace(one, counterfactuals=one.counterfactuals[:count])
            for one in gradients
            if everywhere or one.base.link.name == DEFAULT_LINK
        ]
        hardened = harden(cut, RewardConfig(counterfactuals=count, rank=rank))
        measured = [Measured.by_gradient(link) for link in hardened]
        for link, record in zip(hardened, score_links(measured, score="phi_influence"), strict=True):
            assert record.norm is not None
            assert record.retained is not None
            named: dict[str, float] = {"norm": record.norm * math.sqrt(record.retained)}
            named.update(named_scores(record.phi, record.retained, record.influence).items())
            for score in HARDENED_SCORES if count else BARE_SCORES:
                values[link.rollout][definition(score, record.link, count, rank)] = named[score]
    found = []
    for row, (rollout, problem) in enumerate(zip(rollouts, problems, strict=True)):
        if problem is not None:
            found.append(Evidence({}, {}, (), problem))
            continue
        attention = attention_to_criteria(rollout, judge)
        every = {**values[row], **_chains(values[row]), **_baselines(rollout, judge, attention)}
        found.append(Evidence(every, saliency[row], attention))
    return found


def definition(score: str, link: str, counterfactuals: int = 0, rank: int = 0) -> str:
    """Return the name of a definition: score, link and target function, and the hardening where there is one."""
    if not counterfactuals or not rank or score not in HARDENED_SCORES:
        return f"{score} {link}"
    return f"{score} {link} K={counterfactuals} r={rank}"


def attention_to_criteria(rollout: Rollout, judge: JudgeModel) -> tuple[float, ...]:
    """Return how much the score-predicting positions attend to each criteria token, the mean over heads and layers."""
    rows = [at - 1 for at in rollout.spans["scores"].positions]
    criteria = list(rollout.spans["criteria"].positions)
    ids_BT = torch.tensor([rollout.token_ids[: rows[-1] + 1]], device=judge.model.device)
    with eager_attention(judge.model), torch.no_grad():
        # Everything before the scores goes first, since only the rows that predict them need their weights kept.
        before = judge.model(input_ids=ids_BT[:, : rows[0]], use_cache=True).past_key_values
        attentions = judge.model(
            input_ids=ids_BT[:, rows[0] :], past_key_values=before, use_cache=True, output_attentions=True
        ).attentions
    chosen = [row - rows[0] for row in rows]
    paid = [layer_BHTT[0][:, chosen][:, :, criteria].double().mean((0, 1)) for layer_BHTT in attentions]
    return tuple(torch.stack(paid).mean(0).tolist())


def nuisance_angles(
    rollouts: Sequence[Rollout],
    links: Sequence[str],
    judge: JudgeModel,
    engine: Engine,
    *,
    permutation: Permutation,
    counterfactuals: int,
    ranks: Sequence[int],
    seed: int,
) -> list[dict[str, Any]]:
    """Return the principal angles between each rollout's nuisance subspace and its Jacobian's own top subspace.

    Args:
        rollouts: well-formed judgements that the engine serves.
        links: e.g. "X->Y".
        judge: for its layout.
        engine: what computes the Jacobians.
        permutation: "uniform", "sentence" or "block".
        counterfactuals: K >= 1.
        ranks: r of both subspaces.
        seed: of the permutations.

    Returns:
        Records of row, link, permutation, rank and the mean angle in degrees; none where no order of the tokens
        differs.
    """
    known = dict(enumerate(rollouts))
    gradients = _gradients(
        known, links, judge, engine, counterfactuals=counterfactuals, seed=seed, permutation=permutation
    )
    records = []
    for rank in ranks:
        hardened = harden(gradients, RewardConfig(counterfactuals=counterfactuals, rank=rank))
        measured = [Measured.by_gradient(link) for link in hardened]
        for link, record in zip(hardened, score_links(measured, score="influence", also=("angles",)), strict=True):
            if record.nuisance_angles:
                labels = {"row": link.rollout, "link": record.link, "permutation": permutation, "rank": rank}
                records.append({**labels, "angle": float(np.mean(record.nuisance_angles))})
    return records


def random_angle(rank: int, width: int, *, draws: int = 200, seed: int = 0) -> float:
    """Return the mean principal angle, in degrees, between two random subspaces of a dimension in R^width."""
    rng = np.random.default_rng(seed)
    angles = []
    for _ in range(draws):
        one, other = (np.linalg.qr(rng.standard_normal((width, min(rank, width))))[0].T for _ in range(2))
        angles += angles_between(torch.from_numpy(one), torch.from_numpy(other))
    return float(np.mean(angles))


def _gradients(
    rollouts: Mapping[int, Rollout],
    links: Sequence[str],
    judge: JudgeModel,
    engine: Engine,
    *,
    counterfactuals: int,
    seed: int,
    permutation: Permutation = "uniform",
) -> list[LinkGradients]:
    """Return the Jacobians of each link of each rollout; many definitions are then read from them."""
    config = RewardConfig(
        links=dict.fromkeys(links, 1.0),
        counterfactuals=counterfactuals,
        permutation=permutation,
        score="phi_influence",
        seed=seed,
    )
    groups = config.requests(rollouts, config.parsed_links(judge.layout))
    answers = engine.compute([request for group in groups for request in group.requests])
    return [
        one for group in groups for one in group.gradients(next(answers), [next(answers) for _ in group.requests[1:]])
    ]


def _own_encoder(judge: JudgeModel) -> Callable[[str], np.ndarray]:
    """Return the judge itself as an encoder of texts: the mean of its last hidden states."""

    @torch.no_grad()
    def encode(text: str) -> np.ndarray:
        ids = judge.reader.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids_BT = torch.tensor([ids], device=judge.model.device)
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(judge.model.forward).parameters else {}
        states = judge.model(input_ids=ids_BT, output_hidden_states=True, use_cache=False, **keep).hidden_states
        hidden: np.ndarray = states[-1][0].double().mean(0).cpu().numpy()
        return hidden

    return encode


def _baselines(rollout: Rollout, judge: JudgeModel, attention: Sequence[float]) -> dict[str, float]:
    criteria, scores = rollout.spans["criteria"].positions, rollout.spans["scores"].positions
    text = b"".join(judge.pieces.of(rollout.completion_ids)).decode("utf-8", errors="replace")
    found = (
        float(len(criteria)),
        float(scores[0] - criteria[-1]),
        float(sum(attention)),
        measure_sensitivity(text, _own_encoder(judge)).mean,
    )
    return dict(zip(BASELINES, found, strict=True))


def _chains(values: Mapping[str, float]) -> dict[str, float]:
    """Return each definition along the chain criteria -> analysis -> scores."""
    found = {}
    for chain, (first, second) in CHAINS.items():
        for count, rank in ((0, 0), HARDENED):
            for score in HARDENED_SCORES if count else BARE_SCORES:
                joined = values[definition(score, first, count, rank)] * values[definition(score, second, count, rank)]
                found[definition(score, chain, count, rank)] = joined if score in _PRODUCTS else math.sqrt(joined)
    return found
