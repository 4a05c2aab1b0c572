"""`cepo train`: GRPO through TRL with exact causal rewards, from a YAML file, resumable."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import cepo
from cepo.jacobian.loading import ModelSource, embedding_width, resolve_model
from cepo.train.policy import TESTBED, load_data, load_policy

logger = logging.getLogger(__name__)

_TASKS = ("exact_match", "math_verify", "bertscore", "argmax")
_REWARDS = ("format", "causal", "proxy", *_TASKS)
_RUN = "run.json"  # the settings that a resumed run must share
_RECIPES = Path(cepo.__file__).parent / "train" / "recipes"
_COMPLETE = "cepo_complete"  # written into a checkpoint when all of it is on disk


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: hub id, folder, .gguf file, "smollm2" or "testbed".
        kind: "judge" (preference pairs) or "reasoning" (questions with answers).
        data: `source` and the loader's options, see `cepo.train.policy.load_data`.
        rewards: mappings with `name`, `weight` (default 1) and, for causal, CausalReward's settings; its `task` names a
            task reward and makes it the CE-PO form, `preset: paper` fills in the paper's values. Names: format, argmax,
            exact_match, math_verify, bertscore, proxy, causal.
        output: folder of the run: checkpoints, metrics.jsonl, final/.
        grpo: any field of TRL's GRPOConfig.
        lora: any field of peft's LoraConfig, or None to train all weights.
        dtype: dtype of the weights: float32, bfloat16, float16.
        seed: of everything.
        threads: CPU threads, or None for torch's choice; tiny models are fastest with one or two.
        testbed: the testbed judge's `judge` and `steps`.
        trust_remote_code: whether a hub repository's own code may run.
    """

    model: str
    data: Mapping[str, Any]
    rewards: Sequence[Mapping[str, Any]]
    output: str
    kind: str = "judge"
    grpo: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    dtype: str = "float32"
    seed: int = 0
    threads: int | None = None
    testbed: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("judge", "reasoning"):
            raise ValueError(f"kind is {self.kind!r}; expected judge or reasoning")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}; expected float32, bfloat16 or float16")
        if not isinstance(self.rewards, Sequence) or not self.rewards:
            raise ValueError("rewards is empty; expected a list of mappings such as {name: format}")
        for reward in self.rewards:
            if not isinstance(reward, Mapping) or reward.get("name") not in _REWARDS:
                raise ValueError(f"rewards holds {reward!r}; expected a mapping with a name of {', '.join(_REWARDS)}")


def load_config(path: str | Path, overrides: Mapping[str, Any]) -> TrainConfig:
    """Return the run that a YAML file describes, with dotted overrides such as {"grpo.max_steps": 2} applied.

    Raises:
        ValueError: if the file cannot be read, or holds a key that does not exist.
    """
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        recipes = ", ".join(f"train/recipes/{name.name}" for name in sorted(_RECIPES.glob("*.yaml")))
        raise ValueError(f"config {str(path)!r} cannot be read: {error.strerror}; recipes: {recipes}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read as YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"config {str(path)!r} holds a {type(loaded).__name__}; expected a mapping")
    for key, value in overrides.items():
        place, *rest = key.split(".")
        if rest:
            if not isinstance(loaded.get(place) or {}, Mapping):
                came = type(loaded[place]).__name__
                raise ValueError(f"{key} cannot be set: {place} is a {came}; expected a mapping, or {place} set whole")
            inner = dict(loaded.get(place) or {})
            inner[".".join(rest)] = value
            loaded[place] = inner
        else:
            loaded[place] = value
    known = {item.name for item in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(loaded) - known)
    if unknown:
        raise ValueError(
            f"config {str(path)!r} holds the unknown key {', '.join(unknown)}; expected {', '.join(known)}"
        )
    missing = [name for name in ("model", "data", "rewards", "output") if not loaded.get(name)]
    if missing:
        raise ValueError(f"config {str(path)!r} lacks {', '.join(missing)}")
    return TrainConfig(**loaded)


def train(config: TrainConfig, *, fresh: bool = False) -> Path:
    """Run GRPO, from the last complete checkpoint in the output folder where there is one.

    Everything that can be checked without weights is checked first: settings, data, rewards, the model's path.

    Args:
        config: the run.
        fresh: start from nothing even where checkpoints are; they must then be moved away first.

    Returns:
        Folder of the trained model (the adapter, with LoRA).

    Raises:
        ValueError: for anything about the run that cannot work.
    """
    import torch
    from trl import GRPOTrainer

    from cepo.train.timing import time_steps

    output = Path(config.output)
    arguments = grpo_arguments(config)
    functions, weights = build_rewards(config)
    arguments.reward_weights = weights
    lora = lora_config(config.lora)
    source = resolve_model(config.model) if config.model != TESTBED else None
    _check_rank(source, functions)
    checkpoint = last_complete_checkpoint(output)
    if fresh and checkpoint is not None:
        raise ValueError(f"output {str(output)!r} already holds checkpoints; move them away, or go on without --fresh")
    check_same_run(_settings(config), output, checkpoint)
    if checkpoint is not None and is_finished(checkpoint, arguments.max_steps):
        # Resumed at its last step, the trainer would take one step more.
        logger.warning("the run in %s is finished; nothing is trained", output)
        return _final_from(checkpoint, output)
    data = load_data(config.kind, config.data, seed=config.seed)
    if not len(data.train):
        raise ValueError(f"data leaves no row to train on ({len(data.test)} to test on); lower data.test_fraction")
    if data.skipped:
        shown = "; ".join(f"line {number}: {reason}" for number, reason in data.skipped[:5])
        logger.warning("%d row(s) of %s were skipped: %s", len(data.skipped), config.data["source"], shown)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, tokenizer = load_policy(
        config.model,
        dtype=config.dtype,
        seed=config.seed,
        testbed_judge=config.testbed,
        trust_remote_code=config.trust_remote_code,
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=functions,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.test if arguments.eval_strategy != "no" and len(data.test) else None,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=run_callbacks(output),
    )
    for function in functions:
        if hasattr(function, "bind"):
            function.bind(trainer)
    time_steps(trainer)
    if trainer.is_world_process_zero():
        keep_settings(_settings(config), output)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    final = output / "final"
    unfinished = output / "final.tmp"
    trainer.save_model(str(unfinished))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(str(unfinished))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
    trainer.accelerator.wait_for_everyone()
    return final


def grpo_arguments(config: TrainConfig) -> Any:
    """Return TRL's GRPOConfig for the run; raises ValueError for a field it does not have or refuses."""
    from trl import GRPOConfig

    known = {item.name for item in dataclasses.fields(GRPOConfig)}
    unknown = sorted(set(config.grpo) - known)
    if unknown:
        raise ValueError(f"grpo holds {', '.join(unknown)}, which TRL's GRPOConfig does not have")
    for item in dataclasses.fields(GRPOConfig):
        value = config.grpo.get(item.name)
        is_number = isinstance(item.default, int | float) and not isinstance(item.default, bool)
        if is_number and value is not None and not isinstance(value, int | float):
            raise ValueError(f"grpo.{item.name} is {value!r}; expected a number")
    try:
        arguments = GRPOConfig(output_dir=config.output, **{**trainer_defaults(config.seed), **config.grpo})
    except (ValueError, TypeError) as error:
        raise ValueError(f"grpo is not a valid GRPOConfig: {error}") from error
    if arguments.save_total_limit is not None and arguments.save_total_limit < 2:
        raise ValueError("grpo.save_total_limit is 1; expected at least 2, or a kill during a save loses both")
    return arguments


def trainer_defaults(seed: int) -> dict[str, Any]:
    """Return what our runs set for any trainer of TRL; its own defaults suit a GPU: bf16 and checkpointing only cost
    time on a CPU.
    """
    import torch

    cuda = torch.cuda.is_available()
    return {
        "use_cpu": not cuda,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": cuda,
        "logging_steps": 1,
        "report_to": "tensorboard",
        "save_steps": 50,
        "save_total_limit": 2,
        "seed": seed,
    }


def build_rewards(config: TrainConfig) -> tuple[list[Any], list[float]]:
    """Return the reward functions and their weights."""
    functions, weights = [], []
    for reward in config.rewards:
        settings = dict(reward)
        name, weight = settings.pop("name"), settings.pop("weight", 1.0)
        if not isinstance(weight, int | float) or not weight >= 0:
            raise ValueError(f"rewards: the weight of {name} is {weight!r}; expected a number >= 0")
        functions.append(_build_reward(name, settings, config.kind))
        weights.append(float(weight))
    return functions, weights


def last_complete_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint whose every file was written, or None; a kill during a save leaves a partial one."""
    complete = [folder for folder in output.glob("checkpoint-*") if (folder / _COMPLETE).is_file()]
    return max(complete, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=None)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that a run cannot change on its way: all but its length and what it writes where."""
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    free = ("max_steps", "save_steps", "save_total_limit", "logging_steps", "report_to", "log_completions")
    grpo = {key: value for key, value in settings["grpo"].items() if key not in free}
    return {**settings, "grpo": grpo, "output": None}


def check_same_run(settings: Mapping[str, Any], output: Path, checkpoint: Path | None) -> None:
    """Refuse to go on from a checkpoint of other settings, by the names of those that differ; see `keep_settings`."""
    if checkpoint is None or not (output / _RUN).is_file():
        return
    before = json.loads((output / _RUN).read_text())
    changed = [key for key in settings if settings[key] != before.get(key)]
    if changed:
        raise ValueError(
            f"output {str(output)!r} holds a run with another {', '.join(changed)}; "
            "choose another output, or move it away"
        )


def keep_settings(settings: Mapping[str, Any], output: Path) -> None:
    """Write the settings that a run in this folder must share when it goes on."""
    output.mkdir(parents=True, exist_ok=True)
    _write_text(output / _RUN, json.dumps(settings, indent=2) + "\n")


def is_finished(checkpoint: Path, max_steps: int) -> bool:
    """Return whether a checkpoint is that of the last step; max_steps <= 0: the step that its trainer planned."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return bool(state["global_step"] >= (max_steps if max_steps > 0 else state["max_steps"]))


def _final_from(checkpoint: Path, output: Path) -> Path:
    """Return final/, made from the last checkpoint where a kill came between the two."""
    final = output / "final"
    if not final.is_dir():
        ignore = shutil.ignore_patterns("optimizer*", "scheduler*", "rng_state*", "trainer_state.json", _COMPLETE)
        unfinished = output / "final.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(checkpoint, unfinished, ignore=ignore)
        os.replace(unfinished, final)
    return final


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def run_callbacks(output: Path) -> list[Any]:
    """Return the callbacks that mark complete checkpoints and keep metrics.jsonl, one line a logged step."""
    from transformers import TrainerCallback

    metrics = output / "metrics.jsonl"

    class RunRecord(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.is_world_process_zero:
                return
            # Lines after the checkpoint that is resumed from are about to be written again.
            output.mkdir(parents=True, exist_ok=True)
            lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
            kept = [line for line in lines if _step_of(line) <= state.global_step]
            _write_text(metrics, "".join(kept) if state.global_step else "")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if state.is_world_process_zero:
                with metrics.open("a") as file:
                    file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = output / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and folder.is_dir():
                (folder / _COMPLETE).touch()

    return [RunRecord()]


def _build_reward(name: str, settings: dict[str, Any], kind: str) -> Any:
    from cepo.fusion.config import PAPER
    from cepo.train.prompts import JUDGE, REASONER
    from cepo.train.rewards import task as task_rewards
    from cepo.train.rewards.causal import CausalReward, TaskReward
    from cepo.train.rewards.proxy import ProxyReward

    plain: dict[str, TaskReward] = {
        "format": task_rewards.format_reward,
        "argmax": task_rewards.argmax_reward,
        "exact_match": task_rewards.exact_match,
        "math_verify": task_rewards.math_verify_reward,
        "bertscore": task_rewards.bertscore_reward,
    }
    try:
        if name == "proxy":
            return ProxyReward(**settings)
        if name == "causal":
            task = settings.pop("task", None)
            if task is not None and task not in _TASKS:
                raise ValueError(f"task is {task!r}; expected one of {', '.join(_TASKS)}")
            preset = settings.pop("preset", None)
            if preset not in (None, "paper"):
                raise ValueError(f"preset is {preset!r}; expected paper, or none")
            settings = {**(PAPER if preset else {}), **settings}
            settings.setdefault("layout", JUDGE if kind == "judge" else REASONER)
            return CausalReward(task=plain[task] if task else None, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rewards: {name} cannot be built: {error}") from error
    if settings:
        raise ValueError(f"rewards: {name} takes no settings but weight; got {', '.join(settings)}")
    return plain[name]


def lora_config(settings: Mapping[str, Any] | None) -> Any:
    """Return peft's LoraConfig over all linear layers unless the settings say otherwise; None of None."""
    if settings is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **settings})
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora is not a valid LoraConfig: {error}") from error


def _check_rank(source: ModelSource | None, functions: Sequence[Any]) -> None:
    """Refuse a nuisance rank above the embedding size where the files on disk tell it, before weights are read."""
    width = embedding_width(source) if source else None
    for function in functions:
        if width and hasattr(function, "config"):
            function.config.check_width(width)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return float("inf")
