"""The causal reward for TRL: a plain, picklable callable. Access to TRL's internals is in `train/trainer.py`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

from cepo.counterfactual.exchange import exchanged_prompts
from cepo.fusion.config import RewardConfig
from cepo.fusion.score import RolloutScore, pools_of, score_rollouts
from cepo.jacobian.engines import EngineName, check_engine, new_engine
from cepo.jacobian.protocol import Engine
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.thought import thought_opened
from cepo.jacobian.records import Rollout
from cepo.jacobian.sharding import Mode, check_mode, readable
from cepo.kernels.launch import Implementation
from cepo.train.prompts import JUDGE
from cepo.train.rewards.bound import BoundReward, gathered, of_ranks, require_donors
from cepo.train.rewards.shuffled import shuffled

TaskReward = Callable[..., Sequence[float | None]]

logger = logging.getLogger(__name__)
_LOGGED = ("delta", "path_sum", "certificate", "phi", "retained", "influence", "norm", "tokens")


class CausalReward(BoundReward):
    """Reward completions whose criteria cause their scores, in TRL's GRPO and RLOO trainers.

    By default a completion is rewarded for the effect of criteria->analysis->scores under the live policy. Additive
    form, as one of several reward functions:

        reward = CausalReward(links={"X->Y": 1.0})
        trainer = GRPOTrainer(model, reward_funcs=[format_reward, argmax_reward, reward], ...)
        reward.bind(trainer)

    CE-PO form, fused with a task reward by the power mean: `CausalReward(RewardConfig.paper(), task=exact_match)`.

    The policy is read in eval mode and outside of autocast, on the very ids that were sampled, at temperature 1.
    Malformed completions score 0 and are counted. Every component is logged: means through `log_metric`
    (`causal/<link>/value` and others), values per completion through `log_extra`.

    Args:
        config: what to compute and how to fuse it; its defaults are what we recommend.
        task: task reward with TRL's signature and values in [0, 1]; where it returns None, so does this reward. It gets
            all arguments that TRL passes to this reward, and `thought_opened`, see `read_completions`.
        engine: "group", or "autograd", the oracle; None for "group".
        scorer: None for the live policy, else a frozen causal LM with the policy's tokenizer: the model, or its name.
        layout: format of the completions: by default the judge's; `REASONER` for rationales.
        kernels: kernels of the group engine: "torch", "auto" (Triton if the policy is on CUDA) or "triton".
        memory_gib: GiB that the group engine may use besides the model; None for half of the free memory.
        sharded: how a policy that is sharded by FSDP2 or DeepSpeed ZeRO-3 is read: "gather" holds the whole model on
            every rank during the call, "step" one layer at a time; "auto" gathers if the model takes at most half of
            the free memory on every rank. See `cepo.jacobian.sharding`.
        shuffle: a control for experiments: each scored completion gets the reward of another completion of its prompt,
            drawn from the seed and their ids. A prompt's only scored completion keeps its own, and is counted as
            `shuffle/alone`. What the reward gains over this control is due to telling completions apart.
        name: the name in TRL's logs.
        **fields: instead of config, its fields by name, see `RewardConfig`.

    Attributes:
        task_rewards: the task rewards of the last call; None without a task.

    Raises:
        ValueError: for any setting out of range, before a model is touched.
        TypeError: for a field that `RewardConfig` does not have.
    """

    def __init__(
        self,
        config: RewardConfig | None = None,
        *,
        task: TaskReward | None = None,
        engine: EngineName | None = None,
        scorer: Any = None,
        layout: Layout = JUDGE,
        kernels: Implementation = "auto",
        memory_gib: float | None = None,
        sharded: Mode = "auto",
        shuffle: bool = False,
        name: str = "causal",
        **fields: Any,
    ) -> None:
        if config is not None and (fields or not isinstance(config, RewardConfig)):
            given = f"{config!r}{''.join(f', {field}={value!r}' for field, value in fields.items())}"
            raise ValueError(f"config is {given}; expected a RewardConfig, or its fields by name, not both")
        self.config = RewardConfig(**fields) if config is None else config
        if task is not None and not callable(task):
            raise ValueError(f"task is {task!r}; expected a task reward with TRL's signature, or None")
        self.engine: EngineName = "group" if engine is None else engine
        check_engine(self.engine)
        if memory_gib is not None and not memory_gib > 0:
            raise ValueError(f"memory_gib is {memory_gib!r}; expected a positive number of GiB, or None")
        if kernels not in get_args(Implementation):
            raise ValueError(f"kernels is {kernels!r}; expected one of {', '.join(get_args(Implementation))}")
        check_mode(sharded)
        super().__init__(scorer, layout, name)
        self._chains = [chain.name for chain in self.config.chains(layout)]
        self._links = self.config.parsed_links(layout)
        for field, why in self.config.unread(layout).items():
            if getattr(self.config, field) not in (None, getattr(RewardConfig, field)):
                logger.warning("%s=%r changes nothing: it %s", field, getattr(self.config, field), why)
        self.kernels = kernels
        self.memory_gib = memory_gib
        self.task = task
        self.task_rewards: list[float | None] | None = None
        self.sharded: Mode = sharded
        self.shuffle = shuffle
        self._last_engine: tuple[Any, Engine] | None = None  # the model that was read last, and its engine

    def bind(self, trainer: Any) -> CausalReward:
        """Bind the reward to a trainer: to its tokenizer, its rendering of prompts, and its live policy unless frozen.

        The policy is looked up at each call, since a trainer may wrap or shard it later. The trainer's data also get a
        column for rewards that read only text, if its chat template opens a thought, see `tell_opened_thoughts`.

        Args:
            trainer: a TRL GRPOTrainer or RLOOTrainer. In data-parallel training every rank scores its own rows.

        Returns:
            The reward itself.

        Raises:
            ValueError: as `cepo.train.trainer.span_reader` (tools, images), and as the engine for the model's layers;
                if the policy's parameters are sharded by FSDP1; if the nuisance rank exceeds the model's width; if the
                score needs donors and the trainer generates for one prompt at a time, unless `no_donor` says what to do
                instead.
        """
        from cepo.train.trainer import prompts_per_batch, tell_opened_thoughts

        self.check_prompts(prompts_per_batch(trainer))
        self._bind(trainer, self.check)
        tell_opened_thoughts(trainer)
        return self

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return the reward of each completion in [0, 1]; called by TRL.

        Raises:
            ValueError: if `bind` was not called.
        """
        started = time.perf_counter()
        reader, rollouts = self._read(prompts, completion_ids, columns)
        task_rewards = None
        if self.task is not None:
            texts = [reader.text_of(rollout.prompt_ids) for rollout in rollouts]
            opened = [thought_opened(text, self.layout.thought_tag) for text in texts]
            columns |= {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
            columns |= {"log_extra": log_extra, "log_metric": log_metric, "thought_opened": opened}
            task_rewards = self.task_rewards = list(self.task(**columns))
        seconds: dict[str, float] = {}
        scores = self.score(rollouts, reader, self._model, task_rewards=task_rewards, seconds=seconds)
        rewards: list[float | None] = [score.reward for score in scores]
        if task_rewards is not None:
            rewards = [None if task is None else r for task, r in zip(task_rewards, rewards, strict=True)]
        if self.shuffle:
            scored = [
                score.malformed is None and reward is not None for score, reward in zip(scores, rewards, strict=True)
            ]
            rewards, alone = shuffled(rewards, rollouts, scored, seed=self.config.seed)
            if log_metric is not None and any(scored):
                log_metric(f"{self.__name__}/shuffle/alone", alone / sum(scored))
        if log_metric is not None:
            # TRL averages the ranks' means, which would give a rank with few well-formed completions too much weight.
            _, ranks = of_ranks(([replace(score, paths={}, jacobians={}) for score in scores], task_rewards or []))
            of_all = [score for of_rank, _ in ranks for score in of_rank]
            self.log(log_metric, of_all, [task for _, of_rank in ranks for task in of_rank])
            log_metric(f"{self.__name__}/seconds", time.perf_counter() - started)
            for part in ("effects", "links", "counterfactuals", "spectral"):
                log_metric(f"{self.__name__}/seconds/{part}", seconds.get(part, 0.0))
        if log_extra is not None:
            for chain in self._chains:
                log_extra(f"{self.__name__} S {chain}", [score.values.get(chain) for score in scores])
            if self.config.reads_leak:
                log_extra(f"{self.__name__} order leak", [score.order_leak for score in scores])
            log_extra(f"{self.__name__} malformed", [score.malformed for score in scores])
        return rewards

    def score(
        self,
        rollouts: Sequence[Rollout],
        reader: SpanReader,
        model: Any,
        *,
        task_rewards: Sequence[float | None] | None = None,
        seconds: dict[str, float] | None = None,
    ) -> list[RolloutScore]:
        """Return the score of each rollout under a live policy, bound or not; all ranks must call it.

        Args:
            rollouts: this rank's rollouts, from `reader`.
            reader: the reader for the policy's tokenizer and this reward's layout.
            model: the policy, sharded or not.
            task_rewards: task rewards of the rollouts, in [0, 1] or None; needed if this reward has a task.
            seconds: see `score_rollouts`.
        """
        pools = gathered(pools_of(rollouts, self._links)) if self.config.reads_effects else None
        with readable(model, self.sharded):
            return score_rollouts(
                rollouts,
                self._engine_of(model),
                self.config,
                self.layout,
                task_rewards=task_rewards,
                pools=pools,
                exchanged=exchanged_prompts(rollouts, reader) if self.config.reads_leak else None,
                seconds=seconds,
            )

    def check_prompts(self, count: int) -> None:
        """Raise ValueError if donors are needed and batches of this many prompts have none."""
        if self.config.reads_effects and self.config.no_donor == "zero":
            require_donors(count, "no_donor='permute'")

    def check(self, model: Any) -> None:
        """Raise ValueError if a policy cannot be differentiated, or is narrower than the nuisance rank."""
        with readable(model, self.sharded):
            self.config.check_width(self._engine_of(model).width)

    def log(
        self,
        log_metric: Callable[[str, float], None],
        scores: Sequence[RolloutScore],
        task_rewards: Sequence[float | None] | None,
    ) -> None:
        """Log the mean of every component over rollouts, and the share of malformed ones."""
        _log_means(log_metric, self.__name__, self._chains, scores, task_rewards)
        if self.config.reads_hardening and self.config.counterfactuals:
            _log_unpermuted(log_metric, self.__name__, scores)
        if self.config.reads_leak:
            _log_leak(log_metric, self.__name__, scores)

    def set_power(self, p: float) -> None:
        """Set the exponent of the power mean for later calls."""
        self.config = replace(self.config, p=p)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last_engine": None}

    def _engine_of(self, model: Any) -> Engine:
        """Return the engine of a model; call it inside `readable`."""
        if self._last_engine is None or self._last_engine[0] is not model:
            budget = self.memory_gib and self.memory_gib * 2**30
            self._last_engine = model, new_engine(self.engine, model, memory_budget=budget, kernels=self.kernels)
        return self._last_engine[1]


def _log_unpermuted(log_metric: Callable[[str, float], None], name: str, scores: Sequence[RolloutScore]) -> None:
    """Log, per link, the share of well-formed completions whose source has no other order and cannot be hardened."""
    sound = [score.links for score in scores if score.malformed is None]
    for link in sound[0] if sound else ():
        alone = sum(not links[link].counterfactuals for links in sound)
        log_metric(f"{name}/{link}/without_permutation", alone / len(sound))


def _log_leak(log_metric: Callable[[str, float], None], name: str, scores: Sequence[RolloutScore]) -> None:
    """Log the mean order leak of well-formed completions, and the share of them whose leak is unknown."""
    sound = [score for score in scores if score.malformed is None]
    leaks = [score.order_leak for score in sound if score.order_leak is not None]
    if leaks:
        log_metric(f"{name}/order_leak", sum(leaks) / len(leaks))
    if sound:
        log_metric(f"{name}/order_leak/unknown", 1.0 - len(leaks) / len(sound))


def _log_means(
    log_metric: Callable[[str, float], None],
    name: str,
    chains: Sequence[str],
    scores: Sequence[RolloutScore],
    task_rewards: Sequence[float | None] | None,
) -> None:
    """Log the mean S over all completions, with 0 for malformed ones, and other means over well-formed ones."""
    if not scores:
        return
    sound = [score for score in scores if score.malformed is None]
    log_metric(f"{name}/malformed", 1.0 - len(sound) / len(scores))
    known = [task for task in task_rewards or () if task is not None]
    if known:
        log_metric(f"{name}/task", sum(known) / len(known))
    for chain in chains:
        log_metric(f"{name}/{chain}/value", sum(score.values[chain] for score in sound) / len(scores))
    for link in sound[0].links if sound else ():
        records = [score.links[link] for score in sound]
        if link not in chains:
            log_metric(f"{name}/{link}/value", sum(record.value for record in records) / len(scores))
        for field in _LOGGED:
            values = [value for record in records if (value := getattr(record, field)) is not None]
            if values:  # empty for a measure that nothing reads
                log_metric(f"{name}/{link}/{field}", sum(values) / len(values))
        if records[0].against is not None:
            kinds = {"without_donor": "nothing", "immovable": "immovable", "same_verdict": "same verdict"}
            for metric, kind in kinds.items():
                share = sum(record.against == kind for record in records) / len(records)
                log_metric(f"{name}/{link}/{metric}", share)
