"""The whole story: rollouts in, Jacobians, counterfactuals, nuisance, scores, fused reward out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from cepo.counterfactual.nuisance import check_rank, nuisance_basis, remove_mean, remove_nuisance
from cepo.counterfactual.permute import Permutation, check_permutation, permute_rollout
from cepo.fusion.power_mean import check_power, check_weights, power_mean
from cepo.fusion.scores import LinkScore, Score, check_score, score_link
from cepo.jacobian.layouts import Layout
from cepo.jacobian.records import NUMERIC_TARGETS, Link, LinkJacobian, Rollout, group_rollouts, parse_link
from cepo.jacobian.vjp import Engine

PAPER_LINKS: Mapping[str, float] = {"Z->X": 0.1, "X->Y": 0.1, "Z->Y": 0.1}


@dataclass(frozen=True)
class RewardConfig:
    """What to compute and how to fuse it. The defaults are the preset `paper` (CE-PO, arXiv 2509.23095).

    Attributes:
        links: weight of each link, >= 0; a link of weight 0 is computed and shown but not fused. See `parse_link`.
        task_weight: w_0, weight of the task reward where there is one, >= 0.
        p: exponent of the power mean; any real, inf or -inf.
        counterfactuals: K >= 0; 0 leaves the Jacobians as they are.
        permutation: "uniform", "sentence" or "block".
        rank: nuisance rank r >= 0. The paper names none; 2 is ours.
        energy: tau in (0, 1], instead of rank: the smallest rank that holds this share of the energy.
        nuisance: "svd" projects the subspace out, "mean" only the mean counterfactual (the reference implementation).
        score: the named score S of a link, see `cepo.fusion.scores`.
        target: default target function of the links.
        seed: seed of the permutations.
    """

    links: Mapping[str, float] = field(default_factory=lambda: dict(PAPER_LINKS))
    task_weight: float = 0.7
    p: float = 0.2
    counterfactuals: int = 4
    permutation: Permutation = "uniform"
    rank: int | None = 2
    energy: float | None = None
    nuisance: str = "svd"
    score: Score = "phi"
    target: str = "log_likelihood"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.links:
            raise ValueError("links is empty; expected at least one, such as {'X->Y': 1.0}")
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

    def parsed_links(self, layout: Layout) -> list[Link]:
        """Return the links against a layout's spans; raises ValueError for one that it does not have."""
        links = [
            parse_link(text, names=layout.names, roles=layout.roles, default_score=self.target) for text in self.links
        ]
        for index, link in enumerate(links):
            for other in links[:index]:
                if replace(link, name="") == replace(other, name=""):
                    raise ValueError(f"links names one link twice, as {other.name!r} and {link.name!r}; expected once")
        if self.target in NUMERIC_TARGETS and not any(link.score == self.target for link in links):
            raise ValueError(f"target is {self.target!r}, but no link ends in the scores; expected one such as 'X->Y'")
        return links

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

    Raises:
        ValueError: for links that the layout does not have, a rank above the model's width, or task rewards that are
            not one a rollout in [0, 1]; all before the first Jacobian.
    """
    links = config.parsed_links(layout)
    config.check_width(engine.width)
    if task_rewards is not None:
        _check_task_rewards(task_rewards, len(rollouts))
    problems = [engine.refusal(rollout) or rollout.malformed for rollout in rollouts]
    sound = [index for index, problem in enumerate(problems) if problem is None]
    base = _jacobians([rollouts[index] for index in sound], engine, links)
    counterfactual = _counterfactual_jacobians([rollouts[index] for index in sound], engine, links, config)
    scores = [RolloutScore({}, 0.0, problem) for problem in problems]
    for index, base_of, counterfactual_of in zip(sound, base, counterfactual, strict=True):
        task_reward = task_rewards[index] if task_rewards is not None else None
        scores[index] = _score_rollout(base_of, counterfactual_of, config, task_reward, keep_jacobians)
    return scores


def _score_rollout(
    base: Mapping[str, LinkJacobian],
    counterfactual: Mapping[str, Sequence[Tensor]],
    config: RewardConfig,
    task_reward: float | None,
    keep_jacobians: bool,
) -> RolloutScore:
    records, kept = {}, {}
    for name, jacobian in base.items():
        jacs_SD = counterfactual[name]
        if not all(bool(torch.isfinite(jac_SD).all()) for jac_SD in (jacobian.jac_SD, *jacs_SD)):
            return RolloutScore({}, 0.0, f"non-finite gradient on {name}")
        if config.nuisance == "mean":
            basis_RD = jacobian.jac_SD.new_zeros(0, jacobian.jac_SD.shape[1])
            residual_SD = remove_mean(jacobian.jac_SD, jacs_SD)
        else:
            basis_RD = nuisance_basis(jacs_SD, rank=config.rank, energy=config.energy)
            residual_SD = remove_nuisance(jacobian.jac_SD, basis_RD)
        records[name] = score_link(jacobian, residual_SD, basis_RD, counterfactuals=len(jacs_SD), score=config.score)
        kept[name] = (jacobian, residual_SD)
    reward = fuse({name: record.value for name, record in records.items()}, config, task_reward)
    return RolloutScore(records, reward, None, kept if keep_jacobians else {})


def fuse(values: Mapping[str, float], config: RewardConfig, task_reward: float | None = None) -> float:
    """Return the power mean of the links' scores and, where there is one, the task reward.

    Args:
        values: S of each link by name, in [0, 1].
        config: weights and exponent.
        task_reward: r_base in [0, 1], or None.
    """
    terms = [(values[name], weight) for name, weight in config.links.items()]
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


def _jacobians(rollouts: Sequence[Rollout], engine: Engine, links: Sequence[Link]) -> list[dict[str, LinkJacobian]]:
    """Return the Jacobians of each rollout, asking the engine group by group."""
    found: dict[int, dict[str, LinkJacobian]] = {}
    places: dict[tuple[int, ...], list[int]] = {}
    for index, rollout in enumerate(rollouts):
        places.setdefault(rollout.prompt_ids, []).append(index)
    for group, indices in zip(group_rollouts(rollouts), places.values(), strict=True):
        found.update(zip(indices, engine.jacobians(group, links), strict=True))
    return [found[index] for index in range(len(rollouts))]


def _counterfactual_jacobians(
    rollouts: Sequence[Rollout], engine: Engine, links: Sequence[Link], config: RewardConfig
) -> list[dict[str, list[Tensor]]]:
    """Return, for each rollout and link, the Jacobians with the link's source permuted, K or fewer."""
    found: list[dict[str, list[Tensor]]] = [{link.name: [] for link in links} for _ in rollouts]
    for source, from_source in _by_source(links):
        for k in range(config.counterfactuals):
            permuted = [
                permute_rollout(rollout, source, k, seed=config.seed, kind=config.permutation) for rollout in rollouts
            ]
            changed = [(index, rollout) for index, rollout in enumerate(permuted) if rollout is not None]
            jacobians = _jacobians([rollout for _, rollout in changed], engine, from_source)
            for (index, _), of_links in zip(changed, jacobians, strict=True):
                for name, jacobian in of_links.items():
                    found[index][name].append(jacobian.jac_SD)
    return found


def _by_source(links: Sequence[Link]) -> Iterable[tuple[str, list[Link]]]:
    ordered = sorted(links, key=lambda link: link.source)
    return [(source, list(members)) for source, members in groupby(ordered, key=lambda link: link.source)]
