"""The cost of each approximation of the chain's effect, in token rows of the group engine's plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cepo.eval.causal.judge import Judge
from cepo.eval.causal.measures import CHAIN, DONORS, NODES
from cepo.fusion.config import RewardConfig
from cepo.fusion.score import Pools
from cepo.jacobian.protocol import Request
from cepo.jacobian.records import Rollout
from cepo.jacobian.targets import target_positions


def relative_costs(rollouts: Sequence[Rollout], judge: Judge, pools: Pools, *, seed: int) -> dict[str, float]:
    """Return the token rows of each approximation, forward and backward, relative to those of the effect.

    A Hessian-vector product counts as two backward passes through the stages after the source: one through the forward
    pass, and one through the backward pass. For comparison, the influence of one link, criteria->scores, is included.

    Args:
        rollouts: well-formed judgements, at least one.
        judge: the judge.
        pools: donor candidates for each source span.
        seed: seed of the donors.

    Returns:
        The relative costs by name; empty if the oracle serves the model, for which there is no plan.
    """
    if judge.engine.unserved is not None:
        return {}
    known = dict(enumerate(rollouts))
    config = RewardConfig(links=dict.fromkeys(CHAIN, 1.0), score="effect", donors=DONORS, counterfactuals=0, seed=seed)
    links = config.parsed_links(judge.layout)
    rows = {"effect": _path_rows(config, known, judge, pools)}
    for count in NODES:
        rows[f"path {count}"] = _path_rows(replace(config, score="path", nodes=count), known, judge, pools)
    asked = [request for group in config.requests(known, links) for request in group.requests]
    rows["gradient"] = _plan_rows(judge, [replace(request, context_energy=False) for request in asked])
    stages = sum(
        target_positions(rollout, link.target, link.function)[-1] - rollout.spans[link.source].positions[0]
        for rollout in rollouts
        for link in links
    )
    rows["second order"] = rows["gradient"] + 2 * DONORS * stages
    direct = replace(config, links={"criteria->scores": 1.0}, score="influence")
    direct_links = direct.parsed_links(judge.layout)
    rows["influence"] = _plan_rows(
        judge, [request for group in direct.requests(known, direct_links) for request in group.requests]
    )
    return {name: count / rows["effect"] for name, count in rows.items()}


def _path_rows(config: RewardConfig, rollouts: dict[int, Rollout], judge: Judge, pools: Pools) -> int:
    groups = config.effects(rollouts, config.parsed_links(judge.layout), pools)
    plan = judge.engine.plan_paths([request for group in groups for request in group.requests])
    return plan.forward_rows + plan.backward_rows


def _plan_rows(judge: Judge, requests: Sequence[Request]) -> int:
    plan = judge.engine.plan(requests)
    return plan.forward_rows + plan.backward_rows
