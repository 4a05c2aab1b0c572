"""`cepo train --engine verl`: write verl's configuration and data from a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml
from datasets import Dataset

from cepo.files import SETTINGS, claim, replacing, write_text
from cepo.jacobian.loading import ModelSource, load_tokenizer, resolve_model
from cepo.jacobian.reading.thought import template_opens_thought
from cepo.train.config import AUTO, TASKS, TESTBEDS, TrainConfig
from cepo.train.grpo import load_train_data, run_settings
from cepo.train.left_out import LEFT_OUT, write_left_out
from cepo.train.verl.rewards import verl_rewards

_ACTOR, _OPTIMISER = "actor_rollout_ref.actor", "actor_rollout_ref.actor.optim"
_MODEL, _ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.rollout"
# Fields of GRPOConfig that verl has too: TRL's default, or ours for any trainer, and verl's name.
_SAME: dict[str, tuple[Any, str]] = {
    "num_generations": (8, f"{_ROLLOUT}.n"),
    "max_completion_length": (256, "data.max_response_length"),
    "temperature": (1.0, f"{_ROLLOUT}.temperature"),
    "top_p": (1.0, f"{_ROLLOUT}.top_p"),
    "learning_rate": (1e-6, f"{_OPTIMISER}.lr"),
    "weight_decay": (0.0, f"{_OPTIMISER}.weight_decay"),
    "warmup_steps": (0, f"{_OPTIMISER}.lr_warmup_steps"),
    "max_grad_norm": (1.0, f"{_OPTIMISER}.clip_grad"),
    "num_iterations": (1, f"{_ACTOR}.ppo_epochs"),
    "epsilon": (0.2, f"{_ACTOR}.clip_ratio_low"),
    "epsilon_high": (None, f"{_ACTOR}.clip_ratio_high"),
    "beta": (0.0, f"{_ACTOR}.kl_loss_coef"),
    "gradient_checkpointing": (True, f"{_MODEL}.enable_gradient_checkpointing"),
    "chat_template_kwargs": ({}, "data.apply_chat_template_kwargs"),
    "save_steps": (50, "trainer.save_freq"),
    "save_total_limit": (2, "trainer.max_actor_ckpt_to_keep"),
}
# Fields whose values have other names in verl: verl's name, the default, and the values' names.
_RENAMED: dict[str, tuple[str, str, Mapping[Any, Any]]] = {
    "lr_scheduler_type": (
        f"{_OPTIMISER}.lr_scheduler_type",
        "constant",
        {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"},
    ),
    "loss_type": (
        f"{_ACTOR}.loss_agg_mode",
        "dapo",
        {"dapo": "token-mean", "grpo": "seq-mean-token-mean"},
    ),
    "scale_rewards": (
        "algorithm.norm_adv_by_std_in_grpo",
        "group",
        {"group": True, True: True, "none": False, False: False},
    ),
    "report_to": (
        "trainer.logger",
        "tensorboard",
        {"tensorboard": ["console", "tensorboard"], "wandb": ["console", "wandb"], "none": ["console"]},
    ),
}
# Fields that verl counts in another way: TRL's default.
_COUNTED: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": None,
    "generation_batch_size": None,
    "max_steps": -1,
    "num_train_epochs": 3,
    "multi_objective_aggregation": "sum_then_normalize",
}
_LORA = {
    "r": (8, f"{_MODEL}.lora_rank"),
    "lora_alpha": (8, f"{_MODEL}.lora_alpha"),
    "target_modules": ("all-linear", f"{_MODEL}.target_modules"),
}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def write_verl_run(config: TrainConfig, *, fresh: bool = False) -> str:
    """Write verl.yaml, recipe.yaml, train.parquet, test.parquet and left_out.jsonl into the run's folder.

    The recipe's settings are kept, and others have the defaults of TRL and `cepo train`, except that the learning rate
    is constant, since verl has no linear schedule. verl's checkpoints go into the same folder. The folder may be
    written again unless it holds checkpoints of other settings, data or weights.

    Args:
        config: the run.
        fresh: refuse an output that already holds checkpoints.

    Returns:
        The command that starts the training.

    Raises:
        ValueError: for settings without a counterpart in verl, by name; for other settings or data that cannot work;
            for an output of another run.
    """
    _check(config)
    output = Path(config.output).expanduser().absolute()
    source = resolve_model(config.model)
    if source.base is not None or source.gguf_file:
        raise ValueError(
            f"model is {config.model!r}, {'an adapter' if source.base else 'a GGUF file'}; verl reads hub ids and "
            "folders with config.json and whole weights, such as cepo warm-start writes"
        )
    checkpoints = sorted(output.glob("global_step_*"))
    if fresh and checkpoints:
        raise ValueError(f"output {output} already holds checkpoints; move them away, or leave out --fresh")
    keys = verl_settings(config)
    verl_rewards(config).causal.check_prompts(keys["data.train_batch_size"])
    data = load_train_data(config, keys["data.train_batch_size"], room=keys["data.max_response_length"])
    if not len(data.test):
        raise ValueError("data leaves no row to test on, and verl needs one; raise data.test_fraction, or add rows")
    names = ("verl.yaml", "recipe.yaml", "train.parquet", "test.parquet", LEFT_OUT)
    claim(
        output / SETTINGS,
        {**run_settings(config, data), "command": "train --engine verl"},
        results=checkpoints,
        written=[output / name for name in names],
    )
    write_left_out(output, data.skipped)
    recipe = output / "recipe.yaml"
    write_text(recipe, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    sides = {"train": data.train, "test": data.test}
    longest = max(_write_rows(output / f"{side}.parquet", rows, config, source) for side, rows in sides.items())
    grpo = {**_COUNTED, **config.grpo}
    steps, per_epoch = grpo["max_steps"], len(data.train) // keys["data.train_batch_size"]
    keys |= {
        "data.max_prompt_length": longest,
        f"{_ACTOR}.ppo_max_token_len_per_gpu": grpo["per_device_train_batch_size"]
        * (longest + keys["data.max_response_length"]),
        "data.train_files": str(output / "train.parquet"),
        "data.val_files": str(output / "test.parquet"),
        "trainer.default_local_dir": str(output),
        "trainer.experiment_name": output.name,
        "trainer.total_training_steps": steps if steps > 0 else None,
        # verl stops at the steps or the epochs, whichever comes first.
        "trainer.total_epochs": steps // per_epoch + 1 if steps > 0 else int(grpo["num_train_epochs"]),
        "actor_rollout_ref.cepo_recipe": str(recipe),
        "reward.custom_reward_function.reward_kwargs.recipe": str(recipe),
    }
    hydra = {"searchpath": ["pkg://verl.trainer.config"], "run": {"dir": str(output)}, "output_subdir": None}
    told = {"hydra": hydra, "defaults": ["ppo_trainer", "_self_"], **_nested(keys)}
    write_text(output / "verl.yaml", yaml.safe_dump(told, sort_keys=False))
    return f"python -m verl.trainer.main_ppo --config-path={output} --config-name=verl"


def verl_settings(config: TrainConfig) -> dict[str, Any]:
    """Return verl's settings for a recipe, by dotted key.

    Args:
        config: a run whose settings all have a counterpart in verl.

    Raises:
        ValueError: for batches that are not a whole number of prompts.
    """
    grpo = {**_COUNTED, **config.grpo}
    keys = {key: grpo.get(name, default) for name, (default, key) in _SAME.items()}
    keys |= {key: names[grpo.get(name, default)] for name, (key, default, names) in _RENAMED.items()}
    of_prompt, per_device = keys[f"{_ROLLOUT}.n"], grpo["per_device_train_batch_size"]
    updated = per_device * grpo["gradient_accumulation_steps"]
    generated = grpo["generation_batch_size"] or per_device * (grpo["steps_per_generation"] or updated // per_device)
    for name, count in (("step", updated), ("generation batch", generated)):
        if of_prompt < 2 or count % of_prompt:
            raise ValueError(
                f"grpo: a {name} takes {count} completions, not a whole number of prompts of "
                f"num_generations={of_prompt}; verl counts prompts"
            )
    if keys[f"{_ACTOR}.clip_ratio_high"] is None:
        keys[f"{_ACTOR}.clip_ratio_high"] = keys[f"{_ACTOR}.clip_ratio_low"]
    if grpo["multi_objective_aggregation"] == "normalize_then_sum":
        keys["algorithm.norm_adv_by_std_in_grpo"] = False  # `VerlRewards.total` standardises the sum
    if config.lora is not None:
        keys |= {key: config.lora.get(name, default) for name, (default, key) in _LORA.items()}
        keys[f"{_ROLLOUT}.load_format"] = "safetensors"
    dtype, model = _DTYPES[config.dtype], resolve_model(config.model).location
    return keys | {
        "data.train_batch_size": generated // of_prompt,
        "data.seed": config.seed,
        "data.trust_remote_code": config.trust_remote_code,
        f"{_MODEL}.path": str(Path(model).absolute()) if Path(model).exists() else model,
        f"{_MODEL}.trust_remote_code": config.trust_remote_code,
        f"{_ACTOR}.strategy": "fsdp2",
        f"{_ACTOR}.fsdp_config.model_dtype": dtype,
        f"{_ACTOR}.ppo_mini_batch_size": updated // of_prompt,
        f"{_ACTOR}.use_dynamic_bsz": True,  # however many GPUs share a batch
        f"{_ACTOR}.use_kl_loss": keys[f"{_ACTOR}.kl_loss_coef"] > 0,
        "actor_rollout_ref.ref.fsdp_config.model_dtype": dtype,
        f"{_ROLLOUT}.name": "vllm",
        f"{_ROLLOUT}.tensor_model_parallel_size": 1,
        f"{_ROLLOUT}.seed": config.seed,
        "algorithm.adv_estimator": "grpo",
        "reward.custom_reward_function.path": "pkg://cepo.train.verl.rewards",
        "reward.custom_reward_function.name": "compute_score",
        "trainer.project_name": "cepo",
        "trainer.n_gpus_per_node": 1,
        "trainer.val_before_train": False,
        "trainer.v1.trainer_mode": "cepo",
    }


def _check(config: TrainConfig) -> None:
    """Raise ValueError for settings without a counterpart in verl."""
    defaults = {**_COUNTED, **{name: default for name, (default, _) in _SAME.items()}}
    refused = []
    for name, value in config.grpo.items():
        if name in _RENAMED:
            if not isinstance(value, str | bool) or value not in _RENAMED[name][2]:
                refused.append(f"grpo.{name}={value!r}")
        elif name not in defaults:
            refused.append(f"grpo.{name}")
        elif type(defaults[name]) in (int, float) and not isinstance(value, int | float):
            raise ValueError(f"grpo.{name} is {value!r}; expected a number")
    refused += [f"lora.{name}" for name, value in (config.lora or {}).items() if name not in _LORA and value]
    refused += [f"model={config.model}"] if config.model in TESTBEDS else []
    refused += [f"dtype={config.dtype}"] if config.dtype not in _DTYPES else []
    refused += [name for name in ("causal_loss", "threads") if getattr(config, name) is not None]
    causal = [reward for reward in config.rewards if reward["name"] == "causal"]
    for reward in config.rewards:
        name = reward["name"]
        refused += [f"rewards: {name}"] if name not in ("format", "causal", *TASKS) else []
        refused += [f"rewards: {name}.{key}={AUTO}" for key in ("weight", "p") if reward.get(key) == AUTO]
        refused += [f"rewards: {name}.{key}" for key in ("scorer", "shuffle") if reward.get(key)]
    if refused:
        raise ValueError(f"verl has no counterpart of {', '.join(refused)}; change them, or train with TRL")
    if len(causal) != 1:
        raise ValueError(f"rewards holds {len(causal)} causal rewards; with verl expected one")
    if (epochs := config.grpo.get("num_train_epochs", 1)) % 1:
        raise ValueError(f"grpo.num_train_epochs is {epochs}; verl trains for whole epochs")


def _write_rows(path: Path, rows: Dataset, config: TrainConfig, source: ModelSource) -> int:
    """Write rows in verl's columns; return the length of the longest prompt in tokens."""
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    if not tokenizer.chat_template:
        raise ValueError(f"model {config.model!r} has no chat template; verl renders every prompt with one")
    options = config.grpo.get("chat_template_kwargs", {})
    opened = template_opens_thought(tokenizer, **options)
    longest, written = 0, []
    for index, row in enumerate(rows):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True, **options)
        longest = max(longest, len(tokenizer(prompt, add_special_tokens=False)["input_ids"]))
        truth = row["label" if config.kind == "judge" else "answer"]
        extra = {"index": index, "id": row.get("id"), "thought_opened": opened}
        written.append(
            {
                "data_source": "cepo",
                "prompt": row["prompt"],
                "reward_model": {"style": "rule", "ground_truth": truth},
                "extra_info": extra,
            }
        )
    with replacing(path) as unfinished:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), unfinished)
    return longest


def _nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        *path, name = key.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    return nested
