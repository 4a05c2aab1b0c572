"""One group of the ablation: its Jacobians computed once, and every setting worked out from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from cepo.benchmarks.ablation.sweep import Hardening, Sweep
from cepo.counterfactual.nuisance import nuisance_basis, remove_nuisance
from cepo.fusion.config import RewardConfig
from cepo.fusion.records import LinkScore, Score, named_scores, score_link
from cepo.fusion.requests import GroupRequests, reward_requests
from cepo.fusion.score import fuse
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.links import Link
from cepo.jacobian.protocol import Answer, Request
from cepo.jacobian.records import LinkJacobian, Rollout
from cepo.train.prompts import JUDGE

# A Jacobian's name: prompt, completion, where the spans stand, link. Rollouts that agree in these share it.
_Key = tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...], str]


def sweep_group(
    number: int,
    members: Mapping[int, Rollout],
    tasks: Mapping[int, float | None],
    sweep: Sweep,
    config: RewardConfig,
    engine: GroupEngine,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[int, str]]:
    """Return the link rows and the reward rows of one group, and why some rollouts have none.

    Args:
        number: of the group.
        members: well-formed rollouts of one prompt, by row of the input.
        tasks: the task reward in [0, 1] of each, or None.
        sweep: what to sweep.
        config: weights, permutation and seed; what the sweep varies is taken from the sweep.
        engine: what computes Jacobians.
    """
    links = config.parsed_links(JUDGE)
    malformed = {row: reason for row, rollout in members.items() if (reason := engine.refusal(rollout))}
    sound = {row: rollout for row, rollout in members.items() if row not in malformed}
    known, not_finite = _jacobians(sound, sweep, links, config, engine)
    malformed |= not_finite
    sound = {row: rollout for row, rollout in sound.items() if row not in malformed}
    scored = dict(_score_settings(sound, sweep, links, config, known))
    link_rows, reward_rows = [], []
    weights = {chosen: {name: config.links[name] for name in chosen.links} for chosen in sweep.link_sets}
    fusions = {
        (chosen, p): replace(config, links=weights[chosen], p=p) for chosen in sweep.link_sets for p in sweep.powers
    }
    for row in sound:
        for name in sweep.links:
            for hardening in sweep.hardenings:
                for score in sweep.scores:
                    link_rows.append(_link_row(row, number, hardening, score, scored[row, name, hardening]))
        for hardening in sweep.hardenings:
            named = {name: _named(scored[row, name, hardening]) for name in sweep.links}
            for score in sweep.scores:
                values = {name: named[name][score] for name in sweep.links}
                setting = {"row": row, "group": number, **asdict(hardening), "score": score}
                for (chosen, p), fusion in fusions.items():
                    reward = fuse(values, fusion, tasks[row])
                    reward_rows.append({**setting, "links": chosen.name, "p": p, "reward": reward})
    return link_rows, reward_rows, malformed


def _jacobians(
    rollouts: Mapping[int, Rollout], sweep: Sweep, links: Sequence[Link], config: RewardConfig, engine: GroupEngine
) -> tuple[dict[_Key, LinkJacobian], dict[int, str]]:
    """Return every Jacobian of the group that any setting needs, each computed once, and the rollouts without one."""
    if not rollouts:
        return {}, {}
    most = max(hardening.counterfactuals for hardening in sweep.hardenings)
    group = _requests(rollouts, links, config, most)
    answers = list(engine.compute(group.requests))
    known: dict[_Key, LinkJacobian] = {}
    for request, answer in zip(group.requests, answers, strict=True):
        for rollout, jacobians in zip(request.group.rollouts, answer, strict=True):
            for name, jacobian in jacobians.items():
                # A permuted rollout can be another one as sampled, whose base came first and knows its context energy.
                known.setdefault(_key(rollout, name), jacobian)
    not_finite: dict[int, str] = {}
    for link in links:
        owned = group.counterfactuals(answers[1:], link.name)
        for row, base in zip(group.members, answers[0], strict=True):
            jacs_SD = [base[link.name].jac_SD, *owned[row]]
            if not all(bool(torch.isfinite(jac_SD).all()) for jac_SD in jacs_SD):
                not_finite.setdefault(row, f"non-finite gradient on {link.name}")
    return known, not_finite


def _score_settings(
    rollouts: Mapping[int, Rollout],
    sweep: Sweep,
    links: Sequence[Link],
    config: RewardConfig,
    known: Mapping[_Key, LinkJacobian],
) -> Iterator[tuple[tuple[int, str, Hardening], LinkScore]]:
    """Yield the record of each rollout, link and hardening."""
    for counterfactuals in dict.fromkeys(one.counterfactuals for one in sweep.hardenings) if rollouts else ():
        group = _requests(rollouts, links, config, counterfactuals)
        base, *permuted = [_recall(request, known) for request in group.requests]
        for name in sweep.links:
            owned = group.counterfactuals(permuted, name)
            for hardening in sweep.hardenings:
                if hardening.counterfactuals != counterfactuals:
                    continue
                for row, of_rollout in zip(group.members, base, strict=True):
                    jacobian, count = of_rollout[name], len(owned[row])
                    basis_RD = nuisance_basis(owned[row], rank=hardening.rank, energy=hardening.tau)
                    residual_SD = remove_nuisance(jacobian.jac_SD, basis_RD)
                    record = score_link(jacobian, residual_SD, basis_RD, counterfactuals=count, score="phi")
                    yield (row, name, hardening), record


def _requests(
    rollouts: Mapping[int, Rollout], links: Sequence[Link], config: RewardConfig, counterfactuals: int
) -> GroupRequests:
    (group,) = reward_requests(
        rollouts,
        links,
        counterfactuals=counterfactuals,
        permutation=config.permutation,
        seed=config.seed,
        context_energy=True,
    )
    return group


def _key(rollout: Rollout, name: str) -> _Key:
    where = tuple(span.positions for span in rollout.spans.values())
    return rollout.prompt_ids, rollout.completion_ids, where, name


def _recall(request: Request, known: Mapping[_Key, LinkJacobian]) -> Answer:
    """Return what the engine would answer to a request, from Jacobians that are known."""
    return [
        {link.name: known[_key(rollout, link.name)] for link in request.links} for rollout in request.group.rollouts
    ]


def _named(record: LinkScore) -> dict[Score, float]:
    return named_scores(record.phi, record.retained, record.influence)


def _link_row(row: int, group: int, hardening: Hardening, score: Score, record: LinkScore) -> dict[str, Any]:
    angles = record.nuisance_angles
    return {
        "row": row,
        "group": group,
        "link": record.link,
        **asdict(hardening),
        "score": score,
        "S": _named(record)[score],
        "phi": record.phi,
        "retained": record.retained,
        "influence": record.influence,
        "norm": record.norm,
        "tokens": record.tokens,
        "removed_rank": record.rank,
        "nuisance_angle": sum(angles) / len(angles) if angles else None,
    }
