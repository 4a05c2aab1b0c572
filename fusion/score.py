"""The whole story: rollouts in; Jacobians, counterfactuals, hardening, link scores; fused rewards out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch

from cepo.counterfactual.nuisance import nuisance_bases, remove_mean, remove_nuisance
from cepo.fusion.config import RewardConfig
from cepo.fusion.power_mean import power_mean
from cepo.fusion.records import HardenedLink, LinkScore, score_links
from cepo.fusion.requests import LinkGradients
from cepo.jacobian.protocol import Engine
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import Rollout


@dataclass(frozen=True)
class RolloutScore:
    """The score of one rollout.

    Attributes:
        links: record of each link by name; empty where the rollout is malformed.
        reward: the fused reward in [0, 1]; 0 where malformed.
        malformed: why nothing could be computed, or None.
        jacobians: the matrices of each link by name, where they were asked for.
    """

    links: Mapping[str, LinkScore]
    reward: float
    malformed: str | None = None
    jacobians: Mapping[str, HardenedLink] = field(default_factory=dict)


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

    rollouts -> Jacobians -> counterfactual Jacobians -> hardening -> link scores -> fused reward.

    Args:
        rollouts: from `SpanReader.read`; malformed ones score 0 with their reason.
        engine: what computes Jacobians.
        config: links, hardening, score and fusion.
        layout: the layout that the rollouts were read with.
        task_rewards: the task reward r_base in [0, 1] of each rollout; None fuses the links alone.
        keep_jacobians: whether to return the matrices.
        seconds: where to add the time spent on "links" (base Jacobians, and what they share with the others),
            "counterfactuals" and "spectral" (hardening and link scores).

    Raises:
        ValueError: for links that the layout does not have, a rank above the model's width, or task rewards that are
            not one per rollout in [0, 1]; all before the first Jacobian.
    """
    links = config.parsed_links(layout)
    config.check_width(engine.width)
    if task_rewards is not None:
        _check_task_rewards(task_rewards, len(rollouts))
    scores = [RolloutScore({}, 0.0, engine.refusal(rollout) or rollout.malformed) for rollout in rollouts]
    sound = {index: rollout for index, rollout in enumerate(rollouts) if scores[index].malformed is None}
    groups = config.requests(sound, links)
    answers = engine.compute([request for group in groups for request in group.requests])
    for group in groups:
        with _timed("links", seconds):
            base = next(answers)
        with _timed("counterfactuals", seconds):
            counterfactuals = [next(answers) for _ in group.requests[1:]]
        with _timed("spectral", seconds):
            gradients = group.gradients(base, counterfactuals)
            for one in gradients:
                if scores[one.rollout].malformed is None and not one.is_finite:
                    scores[one.rollout] = RolloutScore({}, 0.0, f"non-finite gradient on {one.base.link.name}")
            hardened = harden([one for one in gradients if scores[one.rollout].malformed is None], config)
            records = score_links(hardened, score=config.score, also=config.also)
        for index, of_rollout in groupby(zip(hardened, records, strict=True), key=lambda pair: pair[0].rollout):
            matrices, of_links = zip(*of_rollout, strict=True)
            values = {record.link: record.value for record in of_links}
            scores[index] = RolloutScore(
                links={record.link: record for record in of_links},
                reward=fuse(values, config, task_rewards[index] if task_rewards is not None else None),
                jacobians={link.base.link.name: link for link in matrices} if keep_jacobians else {},
            )
    return scores


def harden(gradients: Sequence[LinkGradients], config: RewardConfig) -> list[HardenedLink]:
    """Return what is left of each base Jacobian when the nuisance that its counterfactuals show is removed.

    Args:
        gradients: finite Jacobians.
        config: says what is nuisance: a subspace of a rank or an energy, or the mean counterfactual.
    """
    stacks = [one.counterfactuals if config.nuisance == "svd" else () for one in gradients]
    bases = nuisance_bases(stacks, rank=config.rank, energy=config.energy)
    return [
        HardenedLink(
            rollout=one.rollout,
            base=one.base,
            counterfactuals=len(one.counterfactuals),
            basis_RD=basis_RD,
            residual_SD=remove_nuisance(one.base.jac_SD, basis_RD)
            if config.nuisance == "svd"
            else remove_mean(one.base.jac_SD, one.counterfactuals),
        )
        for one, basis_RD in zip(gradients, bases, strict=True)
    ]


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


@contextlib.contextmanager
def _timed(stage: str, seconds: dict[str, float] | None) -> Iterator[None]:
    """Add the time that the block takes."""
    started = time.perf_counter()
    yield
    if seconds is not None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
