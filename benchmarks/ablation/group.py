"""One group of the ablation: its Jacobians are computed once, and every setting is derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from cepo.benchmarks.ablation.sweep import Hardening, Sweep
from cepo.fusion.config import RewardConfig
from cepo.fusion.names import Score
from cepo.fusion.records import LinkScore, Measured, named_scores, score_links
from cepo.fusion.requests import LinkGradients, reward_requests
from cepo.fusion.score import fuse, harden
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.links import Link
from cepo.jacobian.records import Rollout
from cepo.train.prompts import JUDGE


def sweep_group(
    number: int,
    members: Mapping[int, Rollout],
    tasks: Mapping[int, float | None],
    sweep: Sweep,
    config: RewardConfig,
    engine: GroupEngine,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[int, str]]:
    """Return the link rows and the reward rows of one group, and the reason of each rollout that has none.

    Args:
        number: number of the group.
        members: well-formed rollouts of one prompt, by row of the input.
        tasks: the task reward in [0, 1] of each, or None.
        sweep: what to sweep.
        config: weights, permutation and seed; its other settings are replaced by the sweep's.
        engine: computes the Jacobians.
    """
    links = config.parsed_links(JUDGE)
    malformed = {row: reason for row, rollout in members.items() if (reason := engine.refusal(rollout))}
    gradients = _gradients(
        {row: rollout for row, rollout in members.items() if row not in malformed}, sweep, links, config, engine
    )
    for one in gradients:
        if not one.is_finite:
            malformed.setdefault(one.rollout, f"non-finite gradient on {one.base.link.name}")
    scored = _score_settings([one for one in gradients if one.rollout not in malformed], sweep, config)
    link_rows, reward_rows = [], []
    weights = {chosen: {name: config.links[name] for name in chosen.links} for chosen in sweep.link_sets}
    fusions = {
        (chosen, p): replace(config, links=weights[chosen], p=p) for chosen in sweep.link_sets for p in sweep.powers
    }
    for row in (row for row in members if row not in malformed):
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


def _gradients(
    rollouts: Mapping[int, Rollout], sweep: Sweep, links: Sequence[Link], config: RewardConfig, engine: GroupEngine
) -> list[LinkGradients]:
    """Return the group's Jacobians with the most counterfactuals that any setting needs, each computed once."""
    groups = reward_requests(
        rollouts,
        links,
        counterfactuals=max(hardening.counterfactuals for hardening in sweep.hardenings),
        permutation=config.permutation,
        seed=config.seed,
        context_energy=True,
    )
    found: list[LinkGradients] = []
    for group in groups:  # one, or none if no rollout is well-formed
        base, *counterfactuals = engine.compute(group.requests)
        found += group.gradients(base, counterfactuals)
    return found


def _score_settings(
    gradients: Sequence[LinkGradients], sweep: Sweep, config: RewardConfig
) -> dict[tuple[int, str, Hardening], LinkScore]:
    """Return the record of each rollout, link and hardening; a smaller K takes the first K counterfactuals."""
    scored = {}
    for hardening in sweep.hardenings:
        count = hardening.counterfactuals
        chosen = [replace(one, counterfactuals=one.counterfactuals[:count]) for one in gradients]
        hardened = harden(chosen, hardening.applied_to(config))
        measured = [Measured.by_gradient(link) for link in hardened]
        for link, record in zip(hardened, score_links(measured, score="phi", also=("angles",)), strict=True):
            scored[link.rollout, record.link, hardening] = record
    return scored


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
