"""Evidence: what every definition of S, and every simpler measure, says about a rollout's criteria."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cepo.counterfactual.nuisance import angles_between, nuisance_bases, remove_nuisance
from cepo.counterfactual.permute import Permutation
from cepo.eval.causal.judge_model import JudgeModel
from cepo.fusion.records import named_scores
from cepo.fusion.requests import reward_requests
from cepo.jacobian.links import Link, parse_link
from cepo.jacobian.protocol import Engine
from cepo.jacobian.records import LinkJacobian, Rollout
from cepo.kernels.spectral import frobenius_energy, spectral_shares
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
# Chain by target: the criteria's hold on the analysis, and the analysis's on the scores.
CHAINS: Mapping[str, tuple[str, str]] = {
    "chain@log_likelihood": ("criteria->analysis@log_likelihood", "analysis->scores@log_likelihood"),
    "chain@log_odds": ("criteria->analysis@log_odds", "analysis->scores@log_odds"),
    "chain@margin": ("criteria->analysis@log_likelihood", "analysis->scores@margin"),
}
BASELINES: tuple[str, ...] = ("span length", "distance to the scores", "attention mass", "embedding similarity")
HARDENED = (4, 2)
"""K and r of the hardened definitions."""
SWEPT = (1, 2, 4, 8)
"""K and r that are swept for the default link, each with each; 0 of either is the definition without hardening."""
PAPER = f"phi {DEFAULT_LINK} K=4 r=2"
"""The paper's S on X->Y."""
DEFAULT = "influence criteria->analysis@log_likelihood"
"""What a judge is measured by: what the criteria do goes through the analysis."""
REWARD = f"influence {DEFAULT_LINK}"
"""What `CausalReward` scores by default."""

# Hardening leaves the influence as it is, and what it retained is nothing of its own without it.
_BARE = ("phi", "influence", "phi_influence", "norm")
_HARDENED_SCORES = ("phi", "phi_retained", "phi_influence", "influence_retained", "norm")
# Shares of a total multiply along a chain; shapes and sizes are averaged, geometrically.
_PRODUCTS = ("influence", "influence_retained")


@dataclass(frozen=True)
class Evidence:
    """What is known of one rollout without touching its criteria.

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


def gather_evidence(
    rollouts: Sequence[Rollout],
    judge: JudgeModel,
    engine: Engine,
    *,
    seed: int,
    permutation: Permutation = "uniform",
) -> list[Evidence]:
    """Return every definition of S and every baseline of each rollout; each Jacobian is computed once.

    Args:
        rollouts: well-formed judgements that the engine serves.
        judge: the judge that wrote them.
        engine: of the same model.
        seed: of the permutations.
        permutation: "uniform", "sentence" or "block".
    """
    names, roles = judge.layout.names, judge.layout.roles
    links = [parse_link(text, names=names, roles=roles) for text in LINKS]
    found = []
    # Only the default link is swept, so only it needs the largest K.
    asked = [(links[:1], SWEPT[-1]), (links[1:], HARDENED[0])]
    parts = [
        compute_jacobians(rollouts, some, engine, counterfactuals=count, seed=seed, permutation=permutation)
        for some, count in asked
    ]
    for rollout, *both in zip(rollouts, *parts, strict=True):
        base = {name: jacobian for jacobians, _ in both for name, jacobian in jacobians.items()}
        permuted = {name: jacs_SD for _, jacs in both for name, jacs_SD in jacs.items()}
        matrices = [jacobian.jac_SD for jacobian in base.values()] + [jac for jacs in permuted.values() for jac in jacs]
        broken = [name for name in LINKS if not bool(torch.isfinite(base[name].jac_SD).all())]
        if not all(bool(torch.isfinite(jac_SD).all()) for jac_SD in matrices):
            where = broken[0] if broken else "a counterfactual"
            found.append(Evidence({}, {}, (), f"non-finite gradient on {where}"))
            continue
        attention = attention_to_criteria(rollout, judge)
        saliency = {name: tuple(base[name].jac_SD.double().norm(dim=1).tolist()) for name in LINKS}
        values = {**link_values(base, permuted), **_baselines(rollout, judge, attention)}
        found.append(Evidence(values, saliency, attention))
    return found


def definition(score: str, link: str, counterfactuals: int = 0, rank: int = 0) -> str:
    """Return the name of a definition: score, link and target, and the hardening where there is one."""
    if not counterfactuals or not rank or score not in _HARDENED_SCORES:
        return f"{score} {link}"
    return f"{score} {link} K={counterfactuals} r={rank}"


def compute_jacobians(
    rollouts: Sequence[Rollout],
    links: Sequence[Link],
    engine: Engine,
    *,
    counterfactuals: int,
    seed: int,
    permutation: Permutation = "uniform",
) -> list[tuple[dict[str, LinkJacobian], dict[str, list[Tensor]]]]:
    """Return the Jacobians of each rollout by link, and its counterfactual ones (S, D), in the order of k.

    Args:
        rollouts: well-formed rollouts that the engine serves.
        links: from `parse_link`.
        engine: what computes them.
        counterfactuals: K >= 0.
        seed: of the permutations.
        permutation: "uniform", "sentence" or "block".
    """
    groups = reward_requests(
        dict(enumerate(rollouts)),
        links,
        counterfactuals=counterfactuals,
        permutation=permutation,
        seed=seed,
        context_energy=True,
    )
    answers = engine.compute([request for group in groups for request in group.requests])
    found: dict[int, tuple[dict[str, LinkJacobian], dict[str, list[Tensor]]]] = {}
    for group in groups:
        base, *permuted = [next(answers) for _ in group.requests]
        for gradients in group.gradients(base, permuted):
            jacobians, counterfactual = found.setdefault(gradients.rollout, ({}, {}))
            jacobians[gradients.base.link.name] = gradients.base
            counterfactual[gradients.base.link.name] = list(gradients.counterfactuals)
    return [found[row] for row in range(len(rollouts))]


def link_values(base: Mapping[str, LinkJacobian], permuted: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """Return every definition of S from one rollout's Jacobians.

    Args:
        base: Jacobian of each of LINKS.
        permuted: its counterfactual ones.

    Returns:
        By `definition`: the named scores and the norm of every link, of the chains, and of the sweep.
    """
    cells: list[tuple[str, int, int, Tensor]] = []
    for name in LINKS:
        jac_SD = base[name].jac_SD
        cells.append((name, 0, 0, jac_SD))
        hardenings = [(k, r) for k in SWEPT for r in SWEPT] if name == DEFAULT_LINK else [HARDENED]
        largest = max(rank for _, rank in hardenings)
        counts = dict.fromkeys(count for count, _ in hardenings)
        # The largest subspace holds the smaller ones: its rows are in the order of the singular values.
        bases = nuisance_bases([permuted[name][:count] for count in counts], rank=largest)
        basis_of = dict(zip(counts, bases, strict=True))
        for count, rank in hardenings:
            cells.append((name, count, rank, remove_nuisance(jac_SD, basis_of[count][:rank])))
    shares = spectral_shares([residual_SD for *_, residual_SD in cells])
    values: dict[str, float] = {}
    for (name, count, rank, residual_SD), share in zip(cells, shares, strict=True):
        energy, left = frobenius_energy(base[name].jac_SD), frobenius_energy(residual_SD)
        context = base[name].context_energy
        influence = _share(energy, context) if context is not None else None
        named: dict[str, float] = {"norm": math.sqrt(left)}
        named.update(named_scores(share.value, _share(left, energy), influence).items())
        for score in _HARDENED_SCORES if count else _BARE:
            values[definition(score, name, count, rank)] = named[score]
    return {**values, **_chains(values)}


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
        rollouts: well-formed judgements.
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
    parsed = [parse_link(text, names=judge.layout.names, roles=judge.layout.roles) for text in links]
    jacobians = compute_jacobians(
        rollouts, parsed, engine, counterfactuals=counterfactuals, seed=seed, permutation=permutation
    )
    records = []
    for row, (base, permuted) in enumerate(jacobians):
        for name in links:
            if not permuted[name]:
                continue
            nuisance_RD, own_RD = nuisance_bases([permuted[name], [base[name].jac_SD]], rank=max(ranks))
            for rank in ranks:
                angles = angles_between(nuisance_RD[:rank], own_RD[:rank])
                if angles:
                    angle = float(np.mean(angles))
                    records.append({"row": row, "link": name, "permutation": permutation, "rank": rank, "angle": angle})
    return records


def random_angle(rank: int, width: int, *, draws: int = 200, seed: int = 0) -> float:
    """Return the mean principal angle, in degrees, between two random subspaces of a dimension in R^width."""
    rng = np.random.default_rng(seed)
    angles = []
    for _ in range(draws):
        one, other = (np.linalg.qr(rng.standard_normal((width, min(rank, width))))[0].T for _ in range(2))
        angles += angles_between(torch.from_numpy(one), torch.from_numpy(other))
    return float(np.mean(angles))


@contextlib.contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Let the model return its attention weights, which fused attention never forms."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def own_encoder(judge: JudgeModel) -> Callable[[str], np.ndarray]:
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
        measure_sensitivity(text, own_encoder(judge)).mean,
    )
    return dict(zip(BASELINES, found, strict=True))


def _chains(values: Mapping[str, float]) -> dict[str, float]:
    """Return each definition along the chain criteria -> analysis -> scores."""
    found = {}
    for chain, (first, second) in CHAINS.items():
        for count, rank in ((0, 0), HARDENED):
            for score in _HARDENED_SCORES if count else _BARE:
                product = values[definition(score, first, count, rank)] * values[definition(score, second, count, rank)]
                joined = product if score in _PRODUCTS else math.sqrt(product)
                found[definition(score, chain, count, rank)] = joined
    return found


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0.0 else 0.0
