"""The whole flow: rollouts in; donors, effects, Jacobians, hardening, link scores, chains; fused rewards out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import torch

from cepo.counterfactual.donors import Candidate, candidates
from cepo.counterfactual.nuisance import nuisance_bases, remove_mean, remove_nuisance
from cepo.fusion.config import RewardConfig
from cepo.fusion.order_leak import less_leak, order_leaks
from cepo.fusion.power_mean import power_mean
from cepo.fusion.records import HardenedLink, LinkScore, Measured, score_links
from cepo.fusion.requests import Compared, LinkGradients
from cepo.jacobian.links import Chain, Link
from cepo.jacobian.protocol import Engine
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.records import LinkPath, Rollout


@dataclass(frozen=True)
class RolloutScore:
    """The score of one rollout.

    Attributes:
        links: record of each single link by its name, its S less the order leak; empty if malformed.
        reward: the fused reward in [0, 1]; 0 if malformed.
        malformed: why nothing could be computed, or None.
        values: S of each link or chain as the config names it, in [0, 1], as it enters the reward; empty if malformed.
        paths: path record of each link by its name, if anything reads paths or effects.
        jacobians: the matrices of each link by its name, if they were asked for.
        order_leak: how much less likely the criteria are with the two responses exchanged in the prompt, in nats; None
            if nothing reads it, or the responses could not be exchanged.
    """

    links: Mapping[str, LinkScore]
    reward: float
    malformed: str | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    paths: Mapping[str, LinkPath] = field(default_factory=dict)
    jacobians: Mapping[str, HardenedLink] = field(default_factory=dict)
    order_leak: float | None = None


Pools = Mapping[str, Sequence[Candidate]]
"""Candidates for replacing each source span, by the span's name."""
Place = tuple[int, str]
"""Index of a rollout, and the name of a link."""
# Groups are hardened together while their Jacobians take fewer bytes than this: a few prompts of a tiny model.
_HARDENED_TOGETHER = 2**23


def score_rollouts(
    rollouts: Sequence[Rollout],
    engine: Engine,
    config: RewardConfig,
    layout: Layout,
    *,
    task_rewards: Sequence[float | None] | None = None,
    pools: Pools | None = None,
    exchanged: Sequence[Rollout | None] | None = None,
    keep_jacobians: bool = False,
    seconds: dict[str, float] | None = None,
) -> list[RolloutScore]:
    """Return the score of each rollout, in order.

    rollouts -> donors -> effects and path gradients -> Jacobians -> counterfactual Jacobians -> hardening -> link
    scores -> chains -> fused reward; what neither the score nor `also` reads is not computed.

    Args:
        rollouts: from `SpanReader.read`; malformed ones score 0 with their reason.
        engine: computes effects and Jacobians.
        config: links, hardening, score and fusion.
        layout: the layout that the rollouts were read with.
        task_rewards: the task reward r_base in [0, 1] of each rollout; None fuses only the links.
        pools: the candidates from which donors are drawn; None draws them from the rollouts themselves.
        exchanged: each rollout with its two responses exchanged, or None, from `exchanged_prompts`; needed if the
            config reads the order leak.
        keep_jacobians: whether to return the matrices.
        seconds: a dict to which the seconds spent are added, under "effects", "links" (base Jacobians, and what they
            share with the others), "counterfactuals" and "spectral" (hardening and link scores).

    Raises:
        ValueError: for links that the layout does not have, a rank above the model's width, task rewards that are not
            one per rollout in [0, 1], or exchanged rollouts that are needed and missing; all before the first Jacobian.
    """
    scorer = RolloutScorer(engine, config, layout, keep_jacobians=keep_jacobians, seconds=seconds)
    found = dict(scorer.scores(rollouts, task_rewards=task_rewards, pools=pools, exchanged=exchanged))
    return [found[index] for index in range(len(rollouts))]


@dataclass(frozen=True)
class RolloutScorer:
    """Scores rollouts incrementally; see also `score_rollouts`.

    Attributes:
        engine: computes effects and Jacobians.
        config: links, hardening, score and fusion.
        layout: the layout that rollouts are read with.
        keep_jacobians: whether to return the matrices.
        one_by_one: whether each rollout is compared with its donors in a request of its own, in the order of the token
            ids. The group engine then runs the common prefix of consecutive rollouts once, such as a thought before the
            criteria, and holds the keys and values of few rollouts. That is less work for long rollouts; short ones run
            faster in larger batches.
        seconds: a dict to which the seconds spent are added, or None.
    """

    engine: Engine
    config: RewardConfig
    layout: Layout
    keep_jacobians: bool = False
    one_by_one: bool = False
    seconds: dict[str, float] | None = None

    def scores(
        self,
        rollouts: Sequence[Rollout],
        *,
        task_rewards: Sequence[float | None] | None = None,
        pools: Pools | None = None,
        exchanged: Sequence[Rollout | None] | None = None,
    ) -> Iterator[tuple[int, RolloutScore]]:
        """Yield the index and the score of each rollout: first the malformed and refused ones, then prompt by prompt.

        Only the matrices of one prompt are held at a time, or those of a few prompts if they are small. Arguments and
        errors are as for `score_rollouts`.
        """
        config, links = self.config, self._links
        config.check_width(self.engine.width)
        if task_rewards is not None:
            _check_task_rewards(task_rewards, len(rollouts))
        if config.reads_leak and (exchanged is None or len(exchanged) != len(rollouts)):
            came = "None" if exchanged is None else f"{len(exchanged)} entries"
            raise ValueError(f"exchanged is {came}, for {len(rollouts)} rollouts; the order leak needs one for each")
        sound: dict[int, Rollout] = {}
        for index, rollout in enumerate(rollouts):
            problem = self.engine.refusal(rollout) or rollout.malformed
            if problem is None:
                sound[index] = rollout
            else:
                yield index, _refused(problem)
        leaks: dict[int, float] = {}
        if config.reads_leak and exchanged is not None:
            with self._timed("effects"):
                leaks = order_leaks(sound, dict(enumerate(exchanged)), self.engine, self.layout)
        for members, hardened, compared in self._measure(sound, pools):
            measured = []
            for index in members:
                of_links = [
                    Measured(
                        index,
                        link,
                        len(rollouts[index].spans[link.source].positions),
                        hardened.get((index, link.name)),
                        compared.get((index, link.name)),
                    )
                    for link in links
                ]
                problem = next(filter(None, (_problem(one, config) for one in of_links)), None)
                if not math.isfinite(leaks.get(index, 0.0)):
                    problem = "non-finite order leak"
                if problem is None:
                    measured += of_links
                else:
                    yield index, _refused(problem)
            with self._timed("spectral"):
                records = score_links(measured, score=config.score, also=config.also)
            for index, of_rollout in groupby(zip(measured, records, strict=True), key=lambda pair: pair[0].rollout):
                task_reward = task_rewards[index] if task_rewards is not None else None
                yield index, self._score(list(of_rollout), leaks.get(index), task_reward)

    @cached_property
    def _chains(self) -> list[Chain]:
        return self.config.chains(self.layout)

    @cached_property
    def _links(self) -> list[Link]:
        return self.config.parsed_links(self.layout)

    def _score(
        self, parts: Sequence[tuple[Measured, LinkScore]], leak: float | None, task_reward: float | None
    ) -> RolloutScore:
        """Return the score of one rollout: subtract the leak from its links, join chains, fuse with the task reward."""
        by_name = {
            record.link: replace(record, value=less_leak(record.value, leak, self.config.leak_weight))
            for _, record in parts
        }
        values = {
            chain.name: power_mean([by_name[link.name].value for link in chain.links], p=self.config.join)
            for chain in self._chains
        }
        hardened = {one.link.name: one.hardened for one, _ in parts if one.hardened}
        return RolloutScore(
            values=values,
            links=by_name,
            reward=fuse(values, self.config, task_reward),
            paths={one.link.name: one.compared.path for one, _ in parts if one.compared and one.compared.path},
            jacobians=hardened if self.keep_jacobians else {},
            order_leak=leak,
        )

    def _measure(
        self, rollouts: Mapping[int, Rollout], pools: Pools | None
    ) -> Iterator[tuple[tuple[int, ...], Mapping[Place, HardenedLink], Mapping[Place, Compared]]]:
        """Yield, group by group, its members, their hardened Jacobians and their comparisons with donors.

        All effects are computed before the first Jacobian, so that the memory of the two never adds up.
        """
        effects = self._compare(rollouts, pools) if self.config.reads_effects else iter(())
        if not self.config.reads_jacobians:
            yield from ((members, {}, compared) for members, compared in effects)
            return
        of_all = {key: one for _, compared in effects for key, one in compared.items()}
        for members, hardened in self._differentiate(rollouts):
            yield members, hardened, of_all

    def _compare(
        self, rollouts: Mapping[int, Rollout], pools: Pools | None
    ) -> Iterator[tuple[tuple[int, ...], dict[Place, Compared]]]:
        """Yield, group by group, its members and the comparison of each of their links with donors."""
        with self._timed("effects"):
            pools = pools_of(rollouts.values(), self._links) if pools is None else self._takeable(pools)
            by_ids = sorted(rollouts, key=lambda index: rollouts[index].token_ids)
            parts = [{index: rollouts[index]} for index in by_ids] if self.one_by_one else [rollouts]
            groups = [group for part in parts for group in self.config.effects(part, self._links, pools)]
        answers = self.engine.paths([request for group in groups for request in group.requests])
        for group in groups:
            with self._timed("effects"):
                compared = group.compared([next(answers) for _ in group.requests])
            yield group.members, compared

    def _takeable(self, pools: Pools) -> Pools:
        """Return the candidates that the model can take: a pool may hold those of rollouts that it refuses."""
        return {
            source: [one for one in pool if self.engine.refusal(Rollout((), one.ids)) is None]
            for source, pool in pools.items()
        }

    def _differentiate(
        self, rollouts: Mapping[int, Rollout]
    ) -> Iterator[tuple[tuple[int, ...], dict[Place, HardenedLink]]]:
        """Yield members of groups and the Jacobians of their links, hardened; those that are not finite are left out.

        Groups are hardened together while their Jacobians are small, and one by one if they are large.
        """
        groups = self.config.requests(rollouts, self._links)
        answers = self.engine.compute([request for group in groups for request in group.requests])
        members: tuple[int, ...] = ()
        gradients: list[LinkGradients] = []
        for group in groups:
            with self._timed("links"):
                base = next(answers)
            with self._timed("counterfactuals"):
                counterfactuals = [next(answers) for _ in group.requests[1:]]
            with self._timed("spectral"):
                members += group.members
                gradients += (one for one in group.gradients(base, counterfactuals) if one.is_finite)
                if group is not groups[-1] and sum(one.nbytes for one in gradients) < _HARDENED_TOGETHER:
                    continue
                hardened = {(one.rollout, one.base.link.name): one for one in harden(gradients, self.config)}
            yield members, hardened
            members, gradients = (), []

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add the seconds that the block takes to those of a stage."""
        started = time.perf_counter()
        yield
        if self.seconds is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def pools_of(rollouts: Iterable[Rollout], links: Iterable[Link]) -> dict[str, list[Candidate]]:
    """Return the candidates that the rollouts provide for each link's source."""
    rollouts = list(rollouts)
    return {source: candidates(rollouts, source) for source in dict.fromkeys(link.source for link in links)}


def _problem(one: Measured, config: RewardConfig) -> str | None:
    """Return why a link has no score, or None."""
    path = one.compared.path if one.compared is not None else None
    if path is not None and not all(map(math.isfinite, (path.own, *path.others, *path.sums))):
        return f"non-finite effect on {one.link.name}"
    if one.hardened is None and config.reads_jacobians:
        return f"non-finite gradient on {one.link.name}"
    return None


def _refused(reason: str | None) -> RolloutScore:
    return RolloutScore({}, 0.0, reason)


def harden(gradients: Sequence[LinkGradients], config: RewardConfig) -> list[HardenedLink]:
    """Return each base Jacobian with the nuisance that its counterfactuals show removed.

    Args:
        gradients: finite Jacobians.
        config: defines the nuisance: a subspace of a given rank or energy, or the mean counterfactual.
    """
    stacks = [one.counterfactuals if config.nuisance == "svd" else () for one in gradients]
    bases = nuisance_bases(stacks, rank=config.rank, energy=config.energy)
    return [
        HardenedLink(
            rollout=one.rollout,
            base=one.base,
            wanted=config.counterfactuals,
            counterfactuals=len(one.counterfactuals),
            basis_RD=basis_RD,
            residual_SD=remove_nuisance(one.base.jac_SD, basis_RD)
            if config.nuisance == "svd"
            else remove_mean(one.base.jac_SD, one.counterfactuals),
        )
        for one, basis_RD in zip(gradients, bases, strict=True)
    ]


def fuse(values: Mapping[str, float], config: RewardConfig, task_reward: float | None = None) -> float:
    """Return the power mean of the links' scores and, if given, the task reward.

    Args:
        values: S of each link by name, in [0, 1].
        config: weights and exponent.
        task_reward: r_base in [0, 1], or None.

    Raises:
        ValueError: for a task reward outside [0, 1].
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
