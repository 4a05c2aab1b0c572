"""What we read from a TRL trainer and pass to it: all access to its internals that needs no class of TRL's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from cepo.jacobian.loading import load_model, resolve_model
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.spans import SpanReader
from cepo.jacobian.reading.thought import thought_opened
from cepo.jacobian.reading.token_bytes import TokenBytes
from cepo.jacobian.records import Rollout

PROMPT_IDS, ENV_MASK = "rollout_prompt_ids", "rollout_env_mask"
"""Columns of what a rollout function returned."""


def watch_metrics(trainer: Any, names: Sequence[str]) -> Callable[[], list[float]]:
    """Return a function that returns the values of training metrics since it was last called, means over all ranks."""
    seen: dict[str, tuple[list[float], int]] = {}

    def since() -> list[float]:
        fresh: list[float] = []
        for name in names:
            values = trainer._metrics["train"].get(name, [])
            known, count = seen.get(name, ([], 0))
            fresh += values[count if values is known else 0 :]  # TRL starts new lists when it logs
            seen[name] = values, len(values)
        return fresh

    return since


def log_metric(trainer: Any, name: str, value: float) -> None:
    """Add a value to a metric, of which TRL logs the mean."""
    trainer._metrics["train"][name].append(value)


def prompt_ids(trainer: Any, prompts: Sequence[Any]) -> list[list[int]]:
    """Return the ids of the prompts as the trainer renders them for generation (TRL passes no ids to rewards)."""
    of_each, _, _ = trainer._tokenize_prompts(list(prompts))
    return [list(ids) for ids in of_each]


def read_rollouts(
    trainer: Any,
    reader: SpanReader,
    prompts: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Any],
) -> list[Rollout]:
    """Return the rollouts of a batch as the policy saw and wrote them.

    Args:
        trainer: renders the prompts, unless a rollout function did.
        reader: of `span_reader`.
        prompts: messages or text.
        completion_ids: as TRL hands them to a reward.
        columns: the batch's other columns. `rollout_prompt_ids` and `rollout_env_mask` are what a rollout function
            returned as `prompt_ids` and `env_mask`, see `_hand_on`. A completion with a 0 in its mask, a token that
            the policy did not write, is malformed.
    """
    ids_of_prompts = columns.get(PROMPT_IDS)
    messages = [prompt if ids_of_prompts is None and isinstance(prompt, list) else None for prompt in prompts]
    if ids_of_prompts is None:
        ids_of_prompts = prompt_ids(trainer, prompts)
    rollouts = [reader.read(*each) for each in zip(ids_of_prompts, completion_ids, messages, strict=True)]
    for place, mask in enumerate(columns.get(ENV_MASK) or ()):
        if mask is not None and not all(mask):
            bare = rollouts[place].prompt_ids, rollouts[place].completion_ids
            rollouts[place] = Rollout(*bare, malformed="the completion holds tokens that the policy did not write")
    return rollouts


def span_reader(trainer: Any, layout: Layout) -> SpanReader:
    """Return the reader of a trainer's rollouts; a rollout function hands on its prompt ids from now on.

    Raises:
        ValueError: for a trainer whose completions hold what the policy did not write (tools, an environment: TRL hands
            rewards no mask), or whose prompts hold images.
    """
    given = {"tools": "tools", "environment_factories": "environment_factory"}
    foreign = [name for attribute, name in given.items() if getattr(trainer, attribute, None)]
    if foreign:
        raise ValueError(
            f"trainer has {' and '.join(foreign)}, so completions may hold what the policy did not write, such as a "
            "tool's result, and TRL gives rewards no mask of it; expected completions that the policy alone wrote"
        )
    for name in ("train_dataset", "eval_dataset"):
        columns = getattr(getattr(trainer, name, None), "column_names", None)
        images = sorted({"image", "images", "pixel_values"}.intersection(columns if isinstance(columns, list) else ()))
        if images:
            raise ValueError(
                f"trainer's {name} has the column {images[0]!r}; prompts with images are not read, only text"
            )
    _hand_on(trainer)
    return SpanReader(tokenizer(trainer), layout)


def _hand_on(trainer: Any) -> None:
    """Make the trainer hand rewards, as columns, what its rollout function returns and TRL keeps to itself."""
    rollout = getattr(trainer, "rollout_func", None)
    if rollout is None or hasattr(rollout, "__wrapped__"):
        return

    @functools.wraps(rollout)
    def handing_on(*arguments: Any) -> dict[str, Any]:
        output = rollout(*arguments)
        return {**output, PROMPT_IDS: output.get("prompt_ids"), ENV_MASK: output.get("env_mask")}

    trainer.rollout_func = handing_on


def tell_opened_thoughts(trainer: Any) -> None:
    """Add the column `thought_opened`, True, to the trainer's data where its chat template opens a thought.

    TRL hands a reward messages, which do not show what the template added; columns it hands on, see `read_completions`.
    Data whose prompts are text, or that have the column, stay as they are.
    """
    (ids,) = prompt_ids(trainer, [[{"role": "user", "content": "?"}]])
    if not thought_opened(b"".join(TokenBytes(tokenizer(trainer)).of(ids))):
        return
    for name in ("train_dataset", "eval_dataset"):
        rows = getattr(trainer, name, None)
        if (
            isinstance(rows, Dataset)
            and "thought_opened" not in rows.column_names
            and isinstance(rows[0]["prompt"], list)
        ):
            setattr(trainer, name, rows.add_column("thought_opened", [True] * len(rows)))


def prompts_per_batch(trainer: Any) -> int:
    """Return the number of prompts in a generation batch, all ranks together."""
    return int(trainer.args.generation_batch_size // trainer.num_generations)


def check_name(trainer: Any, name: str) -> None:
    """Raise ValueError if several of a trainer's reward functions have a name: they would log to the same metrics."""
    count = [getattr(function, "__name__", None) for function in trainer.reward_funcs].count(name)
    if count > 1:
        raise ValueError(
            f"{count} reward functions are named {name!r}, and would log to the same metrics; give one another "
            "name, as in CausalReward(name='causal 2')"
        )


def tokenizer(trainer: Any) -> Any:
    """Return the trainer's tokenizer, without a processor around it."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def frozen_model(trainer: Any, scorer: Any) -> Any:
    """Return the frozen model that a reward reads, loaded where it is a name; None for the trainer's live policy.

    Args:
        trainer: the trainer.
        scorer: None for the policy.

    Raises:
        ValueError: if the policy is meant and its parameters are sharded by FSDP1.
    """
    if isinstance(scorer, str):
        return load_model(resolve_model(scorer), device=str(trainer.accelerator.device))[0]
    if scorer is None and getattr(trainer, "is_fsdp_enabled", False):
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if getattr(plugin, "fsdp_version", 1) != 2:
            raise ValueError(
                "trainer shards the policy's parameters by FSDP1, whose flat parameters hold no layer's weights; use "
                "FSDP2 (fsdp_version: 2), DeepSpeed, DDP, or a frozen model as scorer=..."
            )
    return scorer
