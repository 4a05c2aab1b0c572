"""`cepo train`: GRPO through TRL with exact causal rewards, configured by a YAML file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

from cepo.files import counted
from cepo.fusion.settings import check_settings
from cepo.jacobian.loading import ModelSource, embedding_width, resolve_model
from cepo.jacobian.reading.guard import Guard
from cepo.jacobian.reading.layout import Layout
from cepo.jacobian.reading.verdict import STRICT, Verdicts
from cepo.train.causal_loss import FIRST_WEIGHT, CausalLoss
from cepo.train.config import AUTO, PEERS, TASKS, TESTBEDS, TrainConfig
from cepo.train.controller import ControlledPressure, Knob
from cepo.train.data import DataSplit
from cepo.train.left_out import shown, write_left_out
from cepo.train.policy import load_data, load_policy, policy_fingerprint
from cepo.train.prompt_length import prompt_check
from cepo.train.prompts import JUDGE, REASONER, TIES_JUDGE
from cepo.train.ranks import failing_together
from cepo.train.recipe import decisive, read_recipe, trainer_arguments
from cepo.train.repeats import warn_of_repeats
from cepo.train.run import lora_config, require_trl, train_to_end

logger = logging.getLogger(__name__)


def load_config(path: str | Path, overrides: Mapping[str, Any]) -> TrainConfig:
    """Return the run that a YAML file describes, with dotted overrides such as {"grpo.max_steps": 2} applied.

    Raises:
        ValueError: if the file cannot be read, or holds a key that does not exist.
    """
    return read_recipe(TrainConfig, path, overrides)


def train(config: TrainConfig, *, fresh: bool = False) -> Path:
    """Run GRPO, starting from the last complete checkpoint in the output folder if there is one.

    Everything that can be checked without loading weights is checked first. A finished run trains nothing. If more
    steps are asked for, it continues, and its old final/ is removed at once, so that final/ is always of the last step.

    Args:
        config: the run.
        fresh: start from scratch, and refuse an output that already holds checkpoints.

    Returns:
        Folder of the trained model (with LoRA, of the adapter).

    Raises:
        ValueError: for settings, data or a model that cannot work, or an output with other settings, data or weights.
    """
    arguments = grpo_arguments(config)
    functions, arguments.reward_weights = build_rewards(config)
    causal_loss = build_causal_loss(config)
    lora = lora_config(config.lora)
    source = resolve_model(config.model) if config.model not in TESTBEDS else None
    _check_rank(source, functions)
    with failing_together():
        data = load_train_data(
            config,
            arguments.generation_batch_size // arguments.num_generations,
            room=arguments.max_completion_length or 0,
            tells=arguments.process_index == 0,
        )
        settings = run_settings(config, data)

    def build() -> Any:
        if arguments.process_index == 0:
            write_left_out(Path(config.output), data.skipped)
        return _trainer(config, arguments, functions, causal_loss, data, lora)

    return train_to_end(
        build,
        arguments,
        settings,
        fresh=fresh,
    )


def load_train_data(config: TrainConfig, prompts: int, *, room: int, tells: bool = True) -> DataSplit:
    """Return the rows of a run, with warnings for those that were skipped and those that repeat or contradict others.

    Args:
        config: the run.
        prompts: number of prompts of a generation batch.
        room: most tokens of a completion; rows whose prompt leaves less of the model's positions are left out.
        tells: whether to warn; only one of several processes should.

    Raises:
        ValueError: for data that cannot be used, or fewer rows to train on than `prompts`.
    """
    check = None
    if config.model not in TESTBEDS:
        template = config.grpo.get("chat_template_kwargs")
        source = resolve_model(config.model)
        check = prompt_check(source, room, template=template, trust_remote_code=config.trust_remote_code)
    data = load_data(config.kind, config.data, seed=config.seed, check_prompt=check)
    if len(data.train) < prompts:
        raise ValueError(
            f"data leaves {counted(len(data.train), 'row')} to train on ({len(data.test)} to test on), but a "
            f"generation batch takes {prompts} prompts; add rows, or lower data.test_fraction or "
            "grpo.per_device_train_batch_size"
        )
    if data.skipped and tells:
        logger.warning(
            "skipped %s of %s: %s", counted(len(data.skipped), "row"), config.data["source"], shown(data.skipped)
        )
    if tells:
        warn_of_repeats(data.preferences())
    return data


def _trainer(
    config: TrainConfig,
    arguments: Any,
    functions: Sequence[Any],
    causal_loss: CausalLoss | None,
    data: DataSplit,
    lora: Any,
) -> Any:
    import torch
    from trl import GRPOTrainer

    from cepo.train.causal_trainer import CausalTrainer
    from cepo.train.timing import time_steps
    from cepo.train.trainer import tell_opened_thoughts

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    # One rank of each machine makes a testbed's policy, and the others find it in the cache. Not under ZeRO-3, which
    # loads any model on all ranks at once.
    alone = config.model in TESTBEDS and arguments.deepspeed_plugin is None
    with arguments.main_process_first() if alone else contextlib.nullcontext():
        model, tokenizer = load_policy(
            config.model,
            dtype=config.dtype,
            seed=config.seed,
            testbed_judge=config.testbed,
            trust_remote_code=config.trust_remote_code,
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options: dict[str, Any] = {}
    if causal_loss is not None:
        tasks = [f.__name__ for f, reward in zip(functions, config.rewards, strict=True) if reward["name"] in TASKS]
        options = {"causal_loss": causal_loss, "layout": _layout(config), "task_rewards": tasks}
    trainer = (CausalTrainer if options else GRPOTrainer)(
        model=model,
        reward_funcs=functions,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.test if arguments.eval_strategy != "no" and len(data.test) else None,
        processing_class=tokenizer,
        peft_config=lora,
        **options,
    )
    tell_opened_thoughts(trainer)
    for function in functions:
        if hasattr(function, "bind"):
            function.bind(trainer)
    time_steps(trainer)
    if _is_automatic(config):
        trainer.add_callback(_control(config, trainer, functions))
    return trainer


def grpo_arguments(config: TrainConfig) -> Any:
    """Return TRL's GRPOConfig for the run; raise ValueError without TRL, or for a field it lacks or refuses."""
    require_trl()
    from trl import GRPOConfig

    return trainer_arguments(GRPOConfig, "grpo", config.grpo, output=config.output, seed=config.seed)


def build_rewards(config: TrainConfig) -> tuple[list[Any], list[float]]:
    """Return the reward functions and their weights; raise ValueError for rewards that cannot be built."""
    functions, weights = [], []
    for reward in config.rewards:
        settings = dict(reward)
        name, weight = settings.pop("name"), settings.pop("weight", 1.0)
        if weight == AUTO and name in ("causal", *PEERS):
            weight = 1.0
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 <= weight < math.inf:
            raise ValueError(
                f"rewards: the weight of {name} is {weight!r}; expected a finite number >= 0, or "
                "auto for a causal reward"
            )
        if name == "causal" and settings.get("p") == AUTO:
            del settings["p"]  # it starts at the default
        functions.append(_build_reward(name, settings, config))
        weights.append(float(weight))
    if _is_automatic(config) and not _watched(config, functions):
        raise ValueError(f"auto needs a task reward to watch; expected one of {', '.join(TASKS)} among the rewards")
    return functions, weights


def build_causal_loss(config: TrainConfig) -> CausalLoss | None:
    """Return the checked settings of the causal loss, or None; raise ValueError for settings that cannot be used."""
    if config.causal_loss is None:
        return None
    check_settings("causal_loss", config.causal_loss, CausalLoss)
    try:
        settings = CausalLoss(**config.causal_loss)
        settings.parsed_links(_layout(config))
    except ValueError as error:
        raise ValueError(f"causal_loss cannot be used: {error}") from error
    return settings


def _is_automatic(config: TrainConfig) -> bool:
    loss = config.causal_loss or {}
    return AUTO in [loss.get("weight"), *(reward.get(key) for reward in config.rewards for key in ("weight", "p"))]


def _watched(config: TrainConfig, functions: Sequence[Any]) -> list[str]:
    """Return the names of the task rewards' metrics."""
    pairs = list(zip(config.rewards, functions, strict=True))
    alone = [f"rewards/{function.__name__}/mean" for reward, function in pairs if reward["name"] in TASKS]
    return alone + [f"{function.__name__}/task" for reward, function in pairs if reward.get("task") is not None]


def _control(config: TrainConfig, trainer: Any, functions: Sequence[Any]) -> ControlledPressure:
    """Return the controller of all settings that are auto; weights start at 1 (the loss's at 0.5), p at its default."""
    from cepo.train.trainer import log_metric, watch_metrics

    knobs = []
    for index, (reward, function) in enumerate(zip(config.rewards, functions, strict=True)):
        if reward.get("weight") == AUTO:
            knobs.append(Knob(f"{function.__name__}/weight", float, partial(trainer.reward_weights.__setitem__, index)))
        if reward.get("p") == AUTO:
            power = partial(_power_at, function.config.p)
            knobs.append(Knob(f"{function.__name__}/p", power, function.set_power))
    if config.causal_loss is not None and config.causal_loss.get("weight") == AUTO:
        knobs.append(Knob("causal_loss/weight", lambda u: FIRST_WEIGHT * u, partial(setattr, trainer, "causal_weight")))
    return ControlledPressure(knobs, watch_metrics(trainer, _watched(config, functions)), partial(log_metric, trainer))


def _power_at(start: float, pressure: float) -> float:
    """Return the exponent of the power mean: the higher the pressure, the less one score compensates for another."""
    return 1.0 - (1.0 - start) * pressure


def run_settings(config: TrainConfig, data: DataSplit) -> dict[str, Any]:
    """Return what determines the trained weights, except the number of steps; data and weights by their content."""
    settings = dataclasses.asdict(config)
    for elsewhere in ("output", "model", "testbed", "data", "trust_remote_code"):
        del settings[elsewhere]
    return {
        "command": "train",
        **settings,
        "grpo": decisive(config.grpo),
        "weights": policy_fingerprint(config.model, seed=config.seed, testbed_judge=config.testbed),
        "data": data.fingerprint,
    }


def _build_reward(name: str, settings: dict[str, Any], config: TrainConfig) -> Any:
    from cepo.fusion.config import PAPER, RewardConfig
    from cepo.train.rewards import peers
    from cepo.train.rewards import task as task_rewards
    from cepo.train.rewards.causal import CausalReward, TaskReward
    from cepo.train.rewards.proxy import ProxyReward

    plain: dict[str, TaskReward] = {
        "format": _with_verdicts(task_rewards.format_reward, config.verdicts),
        "argmax": _with_verdicts(task_rewards.argmax_reward, config.verdicts),
        "exact_match": task_rewards.exact_match,
        "math_verify": task_rewards.math_verify_reward,
        "bertscore": task_rewards.bertscore_reward,
    }
    published: dict[str, type[peers.PeerReward]] = {
        "cir": peers.CausalImportance,
        "log_cir": peers.LogCausalImportance,
        "csr": peers.CounterfactualSensitivity,
        "necessary": peers.Necessity,
    }
    key = f"rewards: {name}"
    if "bertscore" in (name, settings.get("task")) and importlib.util.find_spec("bert_score") is None:
        raise ValueError(f"{key} needs the bert-score library: pip install 'cepo[bertscore]'")
    takers: dict[str, tuple[type, ...]] = {"causal": (RewardConfig, CausalReward), "proxy": (ProxyReward,)}
    takers |= {each: (taker,) for each, taker in published.items()}
    takers["log_cir"] = (peers.CausalImportance, peers.LogCausalImportance)  # a subclass that passes settings on
    if name not in takers:
        if settings:
            raise ValueError(f"{key} takes no settings but weight; got {', '.join(settings)}")
        return plain[name]
    own = {"causal": ("guard", "task", "preset"), "proxy": ()}.get(name, ("guard",))
    guard, task, preset = (settings.pop(each, None) if each in own else None for each in ("guard", "task", "preset"))
    check_settings(key, settings, *takers[name], but=("config", "layout", "name", "task"), others=("weight", *own))
    try:
        layout = _layout(config, guard)
        if name == "proxy":
            return ProxyReward(**{"verdicts": config.verdicts, **settings})
        if name in published:
            return published[name](layout=layout, **settings)
        if task is not None and task not in TASKS:
            raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
        if preset not in (None, "paper"):
            raise ValueError(f"preset is {preset!r}; expected paper, or none")
        settings = {**(PAPER if preset else {}), **settings}
        return CausalReward(task=plain[task] if task else None, layout=layout, **settings)
    except ValueError as error:
        raise ValueError(f"{key} cannot be built: {error}") from error


def _with_verdicts(reward: Any, verdicts: Verdicts) -> Any:
    return reward if verdicts == STRICT else update_wrapper(partial(reward, verdicts=verdicts), reward)


def _layout(config: TrainConfig, guard: Guard | None = None) -> Layout:
    kind, verdicts = config.kind, config.verdicts
    if kind != "judge" and verdicts != STRICT:
        raise ValueError(f"verdicts is {verdicts!r}, but kind is {kind}; only a judge writes a verdict")
    if kind != "judge" and guard is None:
        return REASONER
    if kind != "judge":
        raise ValueError(f"guard is {guard!r}, but kind is {kind}; only a judge's criteria can hold a verdict")
    judge = TIES_JUDGE if config.data.get("ties") else JUDGE
    return replace(judge, verdicts=verdicts, guard=guard or judge.guard)


def _check_rank(source: ModelSource | None, functions: Sequence[Any]) -> None:
    """Raise ValueError for a nuisance rank above the embedding size, if known from files, before weights are read."""
    width = embedding_width(source) if source else None
    for function in functions:
        if width and hasattr(function, "config"):
            function.config.check_width(width)
