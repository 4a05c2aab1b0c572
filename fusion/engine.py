"""The whole story: rollouts in, Jacobians, counterfactuals, nuisance, scores, fused reward out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from cepo.counterfactual.nuisance import check_rank, nuisance_bases, remove_mean, remove_nuisance
from cepo.counterfactual.permute import Permutation, check_permutation
from cepo.fusion.power_mean import check_power, check_weights, power_mean
from cepo.fusion.requests import GroupRequests, reward_requests
from cepo.fusion.scores import INFLUENCE_SCORES, LinkScore, Score, check_score, score_links
from cepo.jacobian.layouts import Layout
from cepo.jacobian.records import NUMERIC_TARGETS, Link, LinkJacobian, Rollout, parse_link
from cepo.jacobian.vjp import Answer, Engine

T = TypeVar("T")
Pool = Literal["none", "group"]
PAPER_LINKS: Mapping[str, float] = {"Z->X": 0.1, "X->Y": 0.1, "Z->Y": 0.1}
PAPER: Mapping[str, Any] = {
    "links": PAPER_LINKS,
    "task_weight": 0.7,
    "p": 0.2,
    "counterfactuals": 4,
    "rank": 2,
    "score": "phi",
}
"""The preset `paper`, CE-PO's own values (arXiv 2509.23095). The paper names no rank; 2 is ours."""


@dataclass(frozen=True)
class RewardConfig:
    """What to compute and how to fuse it. Weights, p and K are CE-PO's; the score is the one that interventions chose.

    Attributes:
        links: weight of each link, >= 0; a link of weight 0 is not computed. See `parse_link`.
        task_weight: w_0, weight of the task reward where there is one, >= 0.
        p: exponent of the power mean; any real, inf or -inf.
        counterfactuals: K >= 0; 0 leaves the Jacobians as they are.
        permutation: "uniform", "sentence" or "block".
        rank: nuisance rank r >= 0.
        energy: tau in (0, 1], instead of rank: the smallest rank that holds this share of the energy.
        nuisance: "svd" projects the subspace out, "mean" only the mean counterfactual (the reference implementation).
        score: the named score S of a link, see `cepo.fusion.scores`. `influence` tells a judge whose criteria cause
            its verdict from one whose criteria are decoration; the paper's `phi` does not (see the README).
        target: default target function of the links.
        seed: seed of the permutations.
        influence: whether to compute `influence` where the score does not need it; it costs one backward pass through
            the whole prompt for each rollout and target.
        pool: "none", every rollout has its own nuisance subspace, or "group", the group shares one: cheaper, and then a
            reward depends on the whole group (the part of it that one process holds).
    """

    links: Mapping[str, float] = field(default_factory=lambda: dict(PAPER_LINKS))
    task_weight: float = 0.7
    p: float = 0.2
    counterfactuals: int = 4
    permutation: Permutation = "uniform"
    rank: int | None = 2
    energy: float | None = None
    nuisance: str = "svd"
    score: Score = "influence"
    target: str = "log_likelihood"
    seed: int = 0
    influence: bool = True
    pool: Pool = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.links, Mapping):
            raise ValueError(f"links is {self.links!r}; expected weights by link, such as {{'X->Y': 1.0}}")
        if not self.links:
            raise ValueError("links is empty; expected at least one, such as {'X->Y': 1.0}")
        for weight in self.links.values():
            if not isinstance(weight, int | float):
                raise ValueError(f"links holds the weight {weight!r}; expected a number >= 0")
        check_weights(list(self.links.values()))
        check_weights([self.task_weight, 1.0])
        check_power(self.p)
        if not isinstance(self.counterfactuals, int) or self.counterfactuals < 0:
            raise ValueError(f"counterfactuals (K) is {self.counterfactuals!r}; expected an integer >= 0")
        check_permutation(self.permutation)
        check_rank(self.rank, self.energy)
        if self.nuisance not in ("svd", "mean"):
            raise ValueError(f"nuisance is {self.nuisance!r}; expected svd or mean")
        check_score(self.score)
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool is {self.pool!r}; expected one of {', '.join(get_args(Pool))}")
        if self.pool == "group" and self.nuisance == "mean":
            raise ValueError(
                "pool is 'group' with the nuisance 'mean'; expected 'svd', the only one that can be shared"
            )

    @classmethod
    def paper(cls, **changes: Any) -> RewardConfig:
        """Return the preset `paper`, with changes by name."""
        return cls(**{**PAPER, **changes})

    def parsed_links(self, layout: Layout) -> list[Link]:
        """Return the links of positive weight against a layout's spans; ValueError for one that it does not have."""
        links = [
            parse_link(text, names=layout.names, roles=layout.roles, default_score=self.target) for text in self.links
        ]
        for index, link in enumerate(links):
            for other in links[:index]:
                if replace(link, name="") == replace(other, name=""):
                    raise ValueError(f"links names one link twice, as {other.name!r} and {link.name!r}; expected once")
        if self.target in NUMERIC_TARGETS and not any(link.score == self.target for link in links):
            raise ValueError(f"target is {self.target!r}, but no link ends in the scores; expected one such as 'X->Y'")
        return [link for link in links if self.links[link.name] > 0.0]

    def requests(self, rollouts: Mapping[int, Rollout], links: Sequence[Link]) -> list[GroupRequests]:
        """Return what to ask an engine for, see `cepo.fusion.requests.reward_requests`."""
        return reward_requests(
            rollouts,
            links,
            counterfactuals=self.counterfactuals,
            permutation=self.permutation,
            seed=self.seed,
            context_energy=self.influence or self.score in INFLUENCE_SCORES,
            pool=self.pool == "group",
        )

    def check_width(self, width: int) -> None:
        """Raise ValueError if the nuisance rank exceeds the model's embedding size."""
        if self.rank is not None and self.rank > width:
            raise ValueError(f"rank is {self.rank}, but the model's embeddings have d = {width}; expected rank <= d")


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
            # A pooled subspace leaves out what is not finite: it would cost every rollout of the group its reward.
            pooled = config.pool == "group"
            jacs_SD = owned.get(None if pooled else index, [])
            finite = [bool(torch.isfinite(jac_SD).all()) for jac_SD in jacs_SD]
            jacobian = base[place][name]
            if not bool(torch.isfinite(jacobian.jac_SD).all()) or not (pooled or all(finite)):
                found[place] = ({}, {}, found[place][2] or f"non-finite gradient on {name}")
            kept = [jac_SD for jac_SD, sound in zip(jacs_SD, finite, strict=True) if sound]
            cells.append((place, name, jacobian, kept))
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
        stacks = {id(jacs_SD[0]): jacs_SD for _, _, _, jacs_SD in cells if jacs_SD}  # a pooled stack is decomposed once
        of_stack = dict(
            zip(stacks, nuisance_bases(list(stacks.values()), rank=config.rank, energy=config.energy), strict=True)
        )
        nothing = torch.zeros(0, 0, dtype=torch.float64)
        bases = [of_stack[id(jacs_SD[0])] if jacs_SD else nothing for _, _, _, jacs_SD in cells]
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
