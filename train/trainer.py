"""All access to the internals of a TRL trainer that does not need TRL's classes."""

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
"""Columns with the outputs of a rollout function."""


def watch_metrics(trainer: Any, names: Sequence[str]) -> Callable[[], list[float]]:
    """Return a function that returns the metrics' values (means over all ranks) since its last call."""
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
    """Add a value to a training metric; TRL logs the mean of its values."""
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
        reader: from `span_reader`.
        prompts: messages or text.
        completion_ids: as TRL passes them to a reward.
        columns: the batch's other columns. `rollout_prompt_ids` and `rollout_env_mask` hold what a rollout function
            returned as `prompt_ids` and `env_mask`, see `_pass_rollout_outputs`. A completion whose mask holds a 0, for
            a token that the policy did not write, is malformed.
    """
    ids_of_prompts = columns.get(PROMPT_IDS)
    messages = [prompt if ids_of_prompts is None and isinstance(prompt, list) else None for prompt in prompts]
    if ids_of_prompts is None:
        ids_of_prompts = prompt_ids(trainer, prompts) if prompts else []
    rollouts = [reader.read(*each) for each in zip(ids_of_prompts, completion_ids, messages, strict=True)]
    for place, mask in enumerate(columns.get(ENV_MASK) or ()):
        if mask is not None and not all(mask):
            bare = rollouts[place].prompt_ids, rollouts[place].completion_ids
            rollouts[place] = Rollout(*bare, malformed="the completion holds tokens that the policy did not write")
    return rollouts


def span_reader(trainer: Any, layout: Layout) -> SpanReader:
    """Return the reader of a trainer's rollouts, and make rewards see what a rollout function returns.

    Raises:
        ValueError: for a trainer whose completions may hold text that the policy did not write (tools, an environment:
            TRL passes rewards no mask), or whose prompts hold images.
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
    _pass_rollout_outputs(trainer)
    return SpanReader(tokenizer(trainer), layout)


def _pass_rollout_outputs(trainer: Any) -> None:
    """Make the trainer pass its rollout function's prompt ids and mask to rewards as columns, which TRL does not."""
    rollout = getattr(trainer, "rollout_func", None)
    if rollout is None or hasattr(rollout, "__wrapped__"):
        return

    @functools.wraps(rollout)
    def with_columns(*arguments: Any) -> dict[str, Any]:
        output = rollout(*arguments)
        return {**output, PROMPT_IDS: output.get("prompt_ids"), ENV_MASK: output.get("env_mask")}

    trainer.rollout_func = with_columns


def tell_opened_thoughts(trainer: Any) -> None:
    """Add the column `thought_opened`, True, to the trainer's data if its chat template opens a thought.

    TRL passes rewards messages, which do not show what the template adds, but also columns, see `read_completions`.
    Data whose prompts are text, or that already have the column, are not changed.
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


def uses_completions_again(trainer: Any) -> bool:
    """Return whether a trainer's next step trains on completions of an earlier one, which checkpoints do not hold."""
    given = trainer.args
    every = getattr(given, "steps_per_generation", 1) * getattr(given, "num_iterations", 1)
    return bool(getattr(trainer, "_step", 0) % every)


def write_no_card(trainer: Any) -> None:
    """Keep TRL from writing a model card, with each checkpoint, over a README.md of the user's in the run's folder."""
    trainer.create_model_card = lambda *_, **__: None


def prompts_per_batch(trainer: Any) -> int:
    """Return the number of prompts in a generation batch, over all ranks; of evaluation, where that has fewer."""
    given = trainer.args
    prompts = given.generation_batch_size // trainer.num_generations
    if getattr(trainer, "eval_dataset", None) is not None and given.eval_strategy != "no":
        prompts = min(prompts, given.per_device_eval_batch_size * given.world_size // trainer.num_generations_eval)
    return int(prompts)


def check_name(trainer: Any, name: str) -> None:
    """Raise ValueError if several of a trainer's rewards have this name, since they would log to the same metrics."""
    count = [getattr(function, "__name__", None) for function in trainer.reward_funcs].count(name)
    if count > 1:
        raise ValueError(
            f"{count} reward functions are named {name!r}, and would log to the same metrics; give one another "
            "name, as in CausalReward(name='causal 2')"
        )


def tokenizer(trainer: Any) -> Any:
    """Return the trainer's tokenizer, unwrapped from a processor."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def frozen_model(trainer: Any, scorer: Any) -> Any:
    """Return the frozen model that a reward reads, loaded if given by name; None for the trainer's live policy.

    Args:
        trainer: the trainer.
        scorer: a model or its name; None for the live policy.

    Raises:
        ValueError: for the live policy, if its parameters are sharded by FSDP1.
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
