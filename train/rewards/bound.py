"""Base class of rewards that read a policy, bound to a TRL trainer, which has the model and renders prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from cepo.counterfactual.donors import Candidate, thinned
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.records import Rollout

logger = logging.getLogger(__name__)

_Part = TypeVar("_Part")
_BATCHES = 3  # first batches that must hold only malformed completions for a warning


class BoundReward:
    """Base class of rewards that read the live policy; picklable, without the trainer.

    Args:
        scorer: None for the live policy, else a frozen causal LM with the policy's tokenizer: the model, or its name.
        layout: format of the completions.
        name: the name in TRL's logs.
    """

    def __init__(self, scorer: Any, layout: Layout, name: str) -> None:
        self.scorer, self.layout, self.__name__ = scorer, layout, name
        self._trainer: Any = None
        self._frozen: Any = None
        self._reader: SpanReader | None = None
        self._malformed_batches: int | None = 0  # counted from the first; None after a sound batch, or a warning

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the trainer; a copy must be bound again."""
        return {**self.__dict__, "_trainer": None, "_frozen": None, "_reader": None}

    @property
    def _model(self) -> Any:
        """The model to read, looked up on each call, since a trainer may wrap or shard its policy after binding."""
        return self._trainer.model if self._frozen is None else self._frozen

    def _bind(self, trainer: Any, check: Callable[[Any], object]) -> None:
        """Bind to a trainer after `check`, which raises for a model that cannot be read."""
        from cepo.train.trainer import check_name, frozen_model, span_reader

        check_name(trainer, self.__name__)
        self._frozen, self._trainer = frozen_model(trainer, self.scorer), trainer
        check(self._model)
        self._reader = span_reader(trainer, self.layout)

    def _read(
        self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], columns: Mapping[str, Any]
    ) -> tuple[SpanReader, list[Rollout]]:
        """Return the reader, and the rollouts of a batch from TRL; raise ValueError if no trainer is bound."""
        if self._trainer is None or self._reader is None:
            raise ValueError(f"the reward {self.__name__!r} is not bound; call reward.bind(trainer) before training")
        from cepo.train.trainer import read_rollouts

        rollouts = read_rollouts(self._trainer, self._reader, prompts, completion_ids, columns)
        self._warn_of_malformed(rollouts)
        return self._reader, rollouts

    def _warn_of_malformed(self, rollouts: Sequence[Rollout]) -> None:
        """Warn once if every completion of the first batches was malformed."""
        if self._malformed_batches is None or not rollouts:
            return
        self._malformed_batches += 1
        if any(rollout.malformed is None for rollout in rollouts):
            self._malformed_batches = None
        elif self._malformed_batches == _BATCHES:
            self._malformed_batches = None
            logger.warning(
                "%s", nothing_learned(self.__name__, f"all completions of {_BATCHES} batches were malformed")
            )


def nothing_learned(reward: str, why: str) -> str:
    """Return a warning that every reward was 0, with advice.

    Args:
        reward: the name of the reward that was 0; "" for all rewards.
        why: what was wrong with the completions; "" if unknown.
    """
    which = f"every reward of {reward} was 0" if reward else "every reward was 0, so nothing was learned"
    return (
        f"{which}{': ' if why else ''}{why}. Try a larger max_completion_length, or, for a judge, cepo warm-start, "
        "which teaches the format"
    )


def require_donors(prompts: int, otherwise: str) -> None:
    """Raise ValueError if batches of this many prompts have no donors.

    Args:
        prompts: prompts of a generation batch.
        otherwise: a setting that needs no donors, for the error.
    """
    if prompts < 2:
        raise ValueError(
            f"trainer generates for {prompts} prompt at a time, so no completion has a donor, which is a completion of "
            "another prompt; raise per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation "
            f"(in evaluation, per_device_eval_batch_size), or set {otherwise}"
        )


def gathered(pools: Mapping[str, Sequence[Candidate]]) -> dict[str, list[Candidate]]:
    """Return the candidates of all ranks for each source, given those of this rank."""
    _, parts = of_ranks(pools)
    return {source: thinned(one for each in parts for one in each[source]) for source in pools}


def of_ranks(mine: _Part) -> tuple[int, list[_Part]]:
    """Return this rank's number and the value of each rank; a collective, which every rank must call."""
    if not dist.is_initialized():
        return 0, [mine]
    # Every rank calls its rewards once per generation batch, so collectives stay in the same order.
    parts = [mine] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return dist.get_rank(), parts
