"""The whole story: rollouts in, Jacobians, counterfactuals, nuisance, scores, fused reward out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from cepo.counterfactual.nuisance import nuisance_bases, remove_mean, remove_nuisance
from cepo.fusion.config import RewardConfig
from cepo.fusion.power_mean import power_mean
from cepo.fusion.records import LinkScore, score_links
from cepo.fusion.requests import GroupRequests
from cepo.jacobian.protocol import Answer, Engine
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import LinkJacobian, Rollout

T = TypeVar("T")


@dataclass(frozen=True)
class RolloutScore:
    """What came of one rollout.

    Attributes:
        links: record of each link by name; empty where the rollout is malformed.
        reward: the fused reward in [0, 1]; 0 where malformed.
        malformed: why nothing could be computed, or None.
        jacobians: base and residual matrix of each link, only where they were asked to be kept.
    """

    links: Mapping[str, LinkScore]
    reward: float
    malformed: str | None = None
    jacobians: Mapping[str, tuple[LinkJacobian, Tensor]] = field(default_factory=dict)


def score_rollouts(
    rollouts: Sequence[Rollout],
    engine: Engine,
    config: RewardConfig,
    layout: Layout,
    *,
    task_rewards: Sequence[float | None] | None = None,
    keep_jacobians: bool = False,
    seconds: dict[str, float] | None = None,
) -> list[RolloutScore]:
    """Return the score of each rollout, in order.

    rollouts -> Jacobians -> counterfactual Jacobians -> nuisance basis -> residual -> link scores -> fused reward.

    Args:
        rollouts: from `SpanReader.read`; malformed ones score 0 with their reason.
        engine: what computes Jacobians.
        config: links, hardening, score and fusion.
        layout: the layout that the rollouts were read with.
        task_rewards: the task reward r_base in [0, 1] of each rollout, or None for none (then only links are fused).
        keep_jacobians: whether to return the matrices.
        seconds: where to add the time taken by "links" (base Jacobians, and what they share with the others),
            "counterfactuals" and "spectral".

    Raises:
        ValueError: for links that the layout does not have, a rank above the model's width, or task rewards that are
            not one a rollout in [0, 1]; all before the first Jacobian.
    """
    links = config.parsed_links(layout)
    config.check_width(engine.width)
    if task_rewards is not None:
        _check_task_rewards(task_rewards, len(rollouts))
    problems = [engine.refusal(rollout) or rollout.malformed for rollout in rollouts]
    scores = [RolloutScore({}, 0.0, problem) for problem in problems]
    sound = {index: rollout for index, rollout in enumerate(rollouts) if problems[index] is None}
    groups = config.requests(sound, links)
    answers = engine.compute([request for group in groups for request in group.requests])
    for group in groups:
        base = _timed("links", seconds, lambda: next(answers))
        permuted = [_timed("counterfactuals", seconds, lambda: next(answers)) for _ in group.requests[1:]]
        found = _timed("spectral", seconds, lambda: _score_group(group, base, permuted, config))  # noqa: B023
        for index, (records, jacobians, problem) in zip(group.members, found, strict=True):
            if problem is not None:
                scores[index] = RolloutScore({}, 0.0, problem)
                continue
            values = {name: record.value for name, record in records.items()}
            reward = fuse(values, config, task_rewards[index] if task_rewards is not None else None)
            scores[index] = RolloutScore(records, reward, None, jacobians if keep_jacobians else {})
    return scores


def _timed(what: str, seconds: dict[str, float] | None, work: Callable[[], T]) -> T:
    """Do the work, and add the time it took."""
    if seconds is None:
        return work()
    started = time.perf_counter()
    done = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started
    return done


_Found = tuple[dict[str, LinkScore], dict[str, tuple[LinkJacobian, Tensor]], str | None]


def _score_group(group: GroupRequests, base: Answer, permuted: Sequence[Answer], config: RewardConfig) -> list[_Found]:
    """Return link records and matrices of each rollout of a group, or why there are none; spectra in one batch."""
    found: list[_Found] = [({}, {}, None) for _ in group.members]
    cells: list[tuple[int, str, LinkJacobian, list[Tensor]]] = []
    for name in base[0]:
        owned = group.counterfactuals(permuted, name)
        for place, index in enumerate(group.members):
            jacobian, jacs_SD = base[place][name], owned[index]
            if not all(bool(torch.isfinite(jac_SD).all()) for jac_SD in (jacobian.jac_SD, *jacs_SD)):
                found[place] = ({}, {}, found[place][2] or f"non-finite gradient on {name}")
            cells.append((place, name, jacobian, jacs_SD))
    cells = [cell for cell in cells if found[cell[0]][2] is None]
    for (place, name, jacobian, _), record, residual_SD in zip(cells, *_harden(cells, config), strict=True):
        records, jacobians, _ = found[place]
        records[name] = record
        jacobians[name] = (jacobian, residual_SD)
    return found


def _harden(
    cells: Sequence[tuple[int, str, LinkJacobian, list[Tensor]]], config: RewardConfig
) -> tuple[list[LinkScore], list[Tensor]]:
    """Return the record and the residual of each cell."""
    jacobians = [jacobian for _, _, jacobian, _ in cells]
    if config.nuisance == "mean":
        bases = [jacobian.jac_SD.new_zeros(0, jacobian.jac_SD.shape[1]) for jacobian in jacobians]
        residuals = [remove_mean(jacobian.jac_SD, jacs_SD) for _, _, jacobian, jacs_SD in cells]
    else:
        bases = nuisance_bases([jacs_SD for _, _, _, jacs_SD in cells], rank=config.rank, energy=config.energy)
        residuals = [
            remove_nuisance(jacobian.jac_SD, basis_RD) for jacobian, basis_RD in zip(jacobians, bases, strict=True)
        ]
    counts = [len(jacs_SD) for _, _, _, jacs_SD in cells]
    links = list(zip(jacobians, residuals, bases, counts, strict=True))
    return score_links(links, score=config.score), residuals


def fuse(values: Mapping[str, float], config: RewardConfig, task_reward: float | None = None) -> float:
    """Return the power mean of the links' scores and, where there is one, the task reward.

    Args:
        values: S of each link by name, in [0, 1].
        config: weights and exponent.
        task_reward: r_base in [0, 1], or None.
    """
    terms = [(values[name], weight) for name, weight in config.links.items() if weight > 0.0]
    if task_reward is not None:
        _check_task_rewards([task_reward], 1)
        terms.insert(0, (task_reward, config.task_weight))
    return power_mean([value for value, _ in terms], [weight for _, weight in terms], config.p)


def _check_task_rewards(task_rewards: Sequence[float | None], count: int) -> None:
    if len(task_rewards) != count:
        raise ValueError(f"task_rewards has {len(task_rewards)} entries for {count} rollouts; expected one each")
    for task_reward in task_rewards:
        if task_reward is not None and not 0.0 <= task_reward <= 1.0:
            raise ValueError(f"task_rewards holds {task_reward}; expected numbers in [0, 1], or None")
