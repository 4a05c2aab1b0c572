"""The causal reward as TRL sees it: a plain, picklable callable. All contact with TRL's insides is in this file."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from cepo.fusion.config import RewardConfig
from cepo.fusion.score import RolloutScore, score_rollouts
from cepo.jacobian.engines import EngineName, check_engine, new_engine
from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.protocol import Engine
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout
from cepo.kernels.launch import Implementation
from cepo.train.prompts import JUDGE

TaskReward = Callable[..., Sequence[float | None]]

_LOGGED = ("phi", "retained", "influence", "norm", "tokens")


class CausalReward:
    """Rewards completions for exact d(score)/d(criteria) of the live policy, for TRL's GRPO and RLOO trainers.

    Additive form, a reward function of its own beside the others:

        reward = CausalReward(links={"X->Y": 1.0})
        trainer = GRPOTrainer(model, reward_funcs=[format_reward, argmax_reward, reward], ...)
        reward.bind(trainer)

    CE-PO form, fused with a task reward by the power mean: `CausalReward(PAPER_LINKS, task=exact_match)`; with the
    paper's own score and K, `CausalReward(**PAPER, task=exact_match)`.

    The policy is differentiated in eval mode and outside of autocast, on the very ids that were sampled, with
    untempered logits. Malformed completions score 0 and are counted. Every component is logged: means through
    `log_metric` (`causal/<link>/phi` ...), rows through `log_extra`.

    Args:
        links: weight of each link, >= 0, see `cepo.jacobian.links.parse_link`.
        task: task reward with TRL's signature and values in [0, 1]; where it gives None, so does this.
        task_weight: w_0 of the task reward, >= 0.
        p: exponent of the power mean.
        counterfactuals: K >= 0; None for 4 where the score reads what hardening leaves, else for 0.
        rank: nuisance rank r >= 0, unless energy is given.
        energy: tau in (0, 1], instead of rank.
        permutation: "uniform", "sentence" or "block".
        nuisance: "svd" or "mean".
        score: named score of a link; "phi" is the paper's.
        target: default target function.
        seed: seed of the permutations.
        influence: whether to compute and log `influence` where the score does not need it; costs one backward pass
            through the whole prompt for each completion.
        engine: "group", or "autograd", the oracle.
        kernels: of the group engine: "torch", "auto" (Triton where the policy is on CUDA) or "triton".
        memory_gib: what the group engine may add to the model's memory, in GiB; None for half of what is free.
        layout: what a completion looks like; the judge's format by default, `REASONER` for rationales.
        scorer: None for the live policy, else a frozen causal LM with the policy's tokenizer: the model, or its name.
        shuffle: a control for experiments: the rewards of a prompt's completions are given to each other, drawn from
            the seed and their ids. What the reward does beyond this, it does by telling completions apart.
        name: the name in TRL's logs.

    Raises:
        ValueError: for any setting out of range, before a model is touched.
    """

    def __init__(
        self,
        links: Mapping[str, float] | None = None,
        *,
        task: TaskReward | None = None,
        task_weight: float = 0.7,
        p: float = 0.2,
        counterfactuals: int | None = None,
        rank: int | None = 2,
        energy: float | None = None,
        permutation: str = "uniform",
        nuisance: str = "svd",
        score: str = "influence",
        target: str = "log_likelihood",
        seed: int = 0,
        influence: bool = True,
        engine: EngineName = "group",
        kernels: Implementation = "torch",
        memory_gib: float | None = None,
        layout: Layout = JUDGE,
        scorer: Any = None,
        shuffle: bool = False,
        name: str = "causal",
    ) -> None:
        self.config = RewardConfig(
            links={"X->Y": 1.0} if links is None else links,
            task_weight=task_weight,
            p=p,
            counterfactuals=_counterfactuals(score) if counterfactuals is None else counterfactuals,
            permutation=permutation,  # type: ignore[arg-type]
            rank=None if energy is not None else rank,
            energy=energy,
            nuisance=nuisance,
            score=score,  # type: ignore[arg-type]
            target=target,
            seed=seed,
            influence=influence,
        )
        if task is not None and not callable(task):
            raise ValueError(f"task is {task!r}; expected a task reward with TRL's signature, or None")
        check_engine(engine)
        if memory_gib is not None and not memory_gib > 0:
            raise ValueError(f"memory_gib is {memory_gib!r}; expected a positive number of GiB, or None")
        if kernels not in get_args(Implementation):
            raise ValueError(f"kernels is {kernels!r}; expected one of {', '.join(get_args(Implementation))}")
        self.engine: EngineName = engine
        self.kernels = kernels
        self.memory_gib = memory_gib
        self._links = [link.name for link in self.config.parsed_links(layout)]
        self.task = task
        self.layout = layout
        self.scorer = scorer
        self.shuffle = shuffle
        self.__name__ = name
        self._trainer: Any = None
        self._engine: Engine | None = None
        self._reader: SpanReader | None = None

    def bind(self, trainer: Any) -> CausalReward:
        """Tie the reward to a trainer: its tokenizer, its way of rendering prompts, and its live policy or the scorer.

        Args:
            trainer: a TRL GRPOTrainer or RLOOTrainer. Data-parallel training is served; every rank scores its own rows.

        Returns:
            The reward itself.

        Raises:
            ValueError: if the policy's parameters are sharded (FSDP, DeepSpeed ZeRO-3), since no rank holds the model
                it would differentiate, or if the nuisance rank exceeds the model's width.
        """
        if self.scorer is None and _parameters_are_sharded(trainer):
            raise ValueError(
                "trainer shards the policy's parameters (FSDP or DeepSpeed ZeRO-3), so no rank holds the model to "
                "differentiate; use DDP, ZeRO-2, or a frozen model as scorer=..."
            )
        model = trainer.model if self.scorer is None else self.scorer
        if isinstance(model, str):
            model, _ = load_model(resolve_model(model), device=str(trainer.accelerator.device))
        self._engine = new_engine(
            self.engine, model, memory_budget=self.memory_gib and self.memory_gib * 2**30, kernels=self.kernels
        )
        self.config.check_width(self._engine.width)
        self._reader = SpanReader(_tokenizer(trainer), self.layout)
        self._trainer = trainer
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
        if self._trainer is None or self._engine is None or self._reader is None:
            raise ValueError(f"the reward {self.__name__!r} is not bound; call reward.bind(trainer) before training")
        started = time.perf_counter()
        task_rewards: list[float | None] | None = None
        if self.task is not None:
            task_rewards = list(self.task(prompts=prompts, completions=completions, **columns))
        rollouts = [
            self._reader.read(prompt, completion, messages if isinstance(messages, list) else None)
            for prompt, completion, messages in zip(
                _prompt_ids(self._trainer, prompts), completion_ids, prompts, strict=True
            )
        ]
        parts: dict[str, float] = {}
        scores = score_rollouts(
            rollouts, self._engine, self.config, self.layout, task_rewards=task_rewards, seconds=parts
        )
        rewards: list[float | None] = [score.reward for score in scores]
        if task_rewards is not None:
            rewards = [None if task is None else r for task, r in zip(task_rewards, rewards, strict=True)]
        if self.shuffle:
            rewards = _shuffled(rewards, rollouts, self.config.seed)
        if log_metric is not None:
            _log_means(log_metric, self.__name__, self._links, scores, task_rewards)
            log_metric(f"{self.__name__}/seconds", time.perf_counter() - started)
            for part in ("links", "counterfactuals", "spectral"):
                log_metric(f"{self.__name__}/seconds/{part}", parts.get(part, 0.0))
        if log_extra is not None:
            for link in self._links:
                log_extra(
                    f"{self.__name__} S {link}", [s.links[link].value if link in s.links else None for s in scores]
                )
            log_extra(f"{self.__name__} malformed", [score.malformed for score in scores])
        return rewards

    def __getstate__(self) -> dict[str, Any]:
        """Leave the trainer behind: a copy must be bound anew."""
        return {**self.__dict__, "_trainer": None, "_engine": None, "_reader": None}


def _shuffled(rewards: Sequence[float | None], rollouts: Sequence[Rollout], seed: int) -> list[float | None]:
    """Return the rewards with those of each prompt's rollouts in another order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, rollout in enumerate(rollouts):
        groups.setdefault(rollout.prompt_ids, []).append(place)
    shuffled = list(rewards)
    for places in groups.values():
        drawn = random.Random(f"{seed} {[rollouts[place].completion_ids for place in places]}")
        for place, other in zip(places, drawn.sample(places, len(places)), strict=True):
            shuffled[place] = rewards[other]
    return shuffled


def _counterfactuals(score: str) -> int:
    """Return K: `influence` alone does not read what hardening leaves."""
    return 0 if score == "influence" else 4


def _log_means(
    log_metric: Callable[[str, float], None],
    name: str,
    links: Iterable[str],
    scores: Sequence[RolloutScore],
    task_rewards: Sequence[float | None] | None,
) -> None:
    """Log S over all completions, a malformed one as the 0 that it earns, and the other fields over the sound ones."""
    sound = [score for score in scores if score.malformed is None]
    log_metric(f"{name}/malformed", 1.0 - len(sound) / len(scores))
    known = [task for task in task_rewards or () if task is not None]
    if known:
        log_metric(f"{name}/task", sum(known) / len(known))
    for link in links:
        log_metric(f"{name}/{link}/value", sum(score.links[link].value for score in sound) / len(scores))
        for field in _LOGGED if sound else ():
            values = [getattr(score.links[link], field) for score in sound]
            if None not in values:  # influence, where it was not asked for
                log_metric(f"{name}/{link}/{field}", sum(values) / len(values))


def _prompt_ids(trainer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Return the ids of the prompts as the trainer itself renders them for generation (TRL hands rewards no ids)."""
    prompt_ids, _, _ = trainer._tokenize_prompts(list(prompts))
    return [list(ids) for ids in prompt_ids]


def _tokenizer(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _parameters_are_sharded(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return bool(getattr(trainer, "is_fsdp_enabled", False)) or (plugin is not None and plugin.zero_stage == 3)
