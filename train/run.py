"""Run a TRL trainer in a folder: checkpoints and resuming, metrics, progress bar and log."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from cepo.files import SETTINGS, append_jsonl, claim, make_folder, read_jsonl, replacing, write_jsonl
from cepo.fusion.settings import check_names
from cepo.train.bars import library_bars
from cepo.train.left_out import LEFT_OUT
from cepo.train.ranks import check_agreement, failing_together
from cepo.train.rewards.bound import nothing_learned
from cepo.train.trainer import uses_completions_again, write_no_card

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
_LOG = "log.txt"
_COMPLETE = "cepo_complete"  # written into a checkpoint when all of it is on disk
_STATE = "trainer_state.json"
# Files of a checkpoint that a trained model does not need; also shards of weights, which are saved whole as well.
_OF_TRAINING = ("optimizer*", "scheduler*", "rng_state*", "pytorch_model_fsdp*", "global_step*", "latest", "zero_to_*")
_CARD = "README.md"  # peft writes its blank template into each checkpoint
_OF_SUMMARY = ("train_", "total_flos")  # how names in the trainer's closing summary begin
_OF_LORA: dict[str, tuple[Any, int, float, str]] = {
    "r": (int, 1, math.inf, "an integer >= 1"),
    "lora_alpha": (int | float, 0, math.inf, "a number >= 0"),
    "lora_dropout": (int | float, 0, 1, "a number in [0, 1]"),
}
# The first of these that is logged is shown: correctness says more than format.
_TASK_REWARDS = (
    "causal/task",
    *(f"rewards/{name}/mean" for name in ("argmax_reward", "exact_match", "math_verify_reward", "bertscore_reward")),
    "rewards/format_reward/mean",
)


def train_to_end(build: Callable[[], Any], arguments: Any, settings: Mapping[str, Any], *, fresh: bool) -> Path:
    """Train to the last step, continuing from the last complete checkpoint if there is one, and write final/.

    A finished run trains nothing. If more steps are asked for, it continues, and its old final/ is removed at once, so
    that final/ is always of the last step.

    Args:
        build: makes the TRL trainer.
        arguments: the trainer's settings; `output_dir` is the run's folder.
        settings: everything that determines the trained weights, except the number of steps, see `claim`.
        fresh: start from scratch, and refuse an output that already holds checkpoints.

    Returns:
        Folder of the trained model.

    Raises:
        ValueError: on all ranks, for an output with other settings or more steps, or if ranks have different settings.
    """
    output, rank = Path(arguments.output_dir), arguments.process_index
    final = output / "final"
    settings = {**settings, "processes": arguments.world_size}
    check_agreement(settings)
    with failing_together():
        found = _claimed(output, settings, arguments.max_steps, fresh) if rank == 0 else None
    ((is_trained, is_written, checkpoint),) = broadcast_object_list([found])
    if is_written:
        return final
    with failing_together():
        if not (output / SETTINGS).is_file():
            raise ValueError(f"output {str(output)!r} is not what rank 0 sees; expected a folder that all ranks share")
    if not is_trained:
        checkpoint = run_trainer(build, output, checkpoint, rank=rank)
    with failing_together():
        if rank == 0:
            write_final(output, checkpoint)
    return final


def _claimed(output: Path, settings: Mapping[str, Any], max_steps: int, fresh: bool) -> tuple[bool, bool, Path | None]:
    """Claim the output for this run; return whether training is finished, whether final/ is written, the checkpoint."""
    final, checkpoint = output / "final", last_complete_checkpoint(output)
    if fresh and checkpoint is not None:
        raise ValueError(f"output {output} already holds checkpoints; move them away, or leave out --fresh")
    claim(
        output / SETTINGS,
        settings,
        results=[*output.glob("checkpoint-*"), final],
        written=[output / METRICS, output / LEFT_OUT],
    )
    if is_finished(final, max_steps):
        logger.warning("the run in %s is finished; nothing is trained", output)
        return True, True, checkpoint
    shutil.rmtree(final, ignore_errors=True)
    return checkpoint is not None and is_finished(checkpoint, max_steps), False, checkpoint


def run_trainer(build: Callable[[], Any], output: Path, checkpoint: Path | None, *, rank: int = 0) -> Path:
    """Train with one progress bar, and keep metrics.jsonl and log.txt in the output.

    log.txt holds what libraries print, warn and log during training, but not their progress bars: those of loading the
    model are shown as usual, and later ones are disabled in favour of ours. Other ranks than the first write only a
    log-RANK.txt. metrics.jsonl holds one line per logged step, each step once, even if a killed run is resumed.

    Args:
        build: makes the TRL trainer, which saves its checkpoints in the output.
        output: the run's folder.
        checkpoint: the checkpoint to resume from, or None.
        rank: this process's rank.

    Returns:
        The checkpoint of the last step.
    """
    make_folder(output)
    console = Console(file=sys.stderr)  # opened before the libraries' output is redirected
    console.quiet = rank != 0
    told = output / (_LOG if rank == 0 else f"log-{rank}.txt")
    console.print(f"starting; what the libraries print goes to {told}", highlight=False, soft_wrap=True)
    bars = {"disable": True} if console.quiet else {"file": console.file}
    with _printed_to(told):
        with _naming_lora(), library_bars(**bars):
            trainer = build()
            write_no_card(trainer)
        if checkpoint is not None:
            console.print(f"resuming from {checkpoint}", highlight=False, soft_wrap=True)
        with _progress(console) as progress, library_bars(disable=True):
            trainer.add_callback(_RunRecord(output, progress, trainer))
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except KeyboardInterrupt:
                kept = last_complete_checkpoint(output)
                place = f"continues from {kept}" if kept else "starts again, since no checkpoint is complete"
                raise KeyboardInterrupt(f"stopped; the same command {place}") from None
        trainer.accelerator.wait_for_everyone()
    if not console.quiet:
        warning = _nothing_learned([row for _, row in read_jsonl(output / METRICS)[0]])
        if warning is not None:
            console.print(warning, style="yellow", highlight=False, soft_wrap=True)
    reached = last_complete_checkpoint(output)
    assert reached is not None  # _RunRecord saves the last step
    return reached


def trainer_defaults(seed: int) -> dict[str, Any]:
    """Return our defaults for TRL trainers; TRL's own (bf16, gradient checkpointing) only cost time on a CPU."""
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
        "disable_tqdm": True,  # the log then gets printed values instead of a bar
    }


def require_trl() -> None:
    """Raise ValueError unless TRL, which training needs, is installed."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError("training needs TRL, which is an extra: pip install 'cepo[trl]'")


def lora_config(settings: Mapping[str, Any] | None) -> Any:
    """Return peft's LoraConfig, by default over all linear layers; None for None."""
    if settings is None:
        return None
    from peft import LoraConfig

    check_names("lora", settings, [item.name for item in dataclasses.fields(LoraConfig)])
    for name, (kind, least, most, expected) in _OF_LORA.items():  # peft itself looks only once the model is loaded
        value = settings.get(name, least)
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            raise ValueError(f"lora.{name} is {value!r}; expected {expected}")
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **settings})
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora is not a valid LoraConfig: {error}") from error


def last_complete_checkpoint(output: Path) -> Path | None:
    """Return the newest complete checkpoint, or None; a run that was killed during a save leaves a partial one."""
    complete = [folder for folder in output.glob("checkpoint-*") if (folder / _COMPLETE).is_file()]
    return max(complete, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=None)


def is_finished(folder: Path, max_steps: int) -> bool:
    """Return whether a checkpoint or a trained model is that of the last step.

    Args:
        folder: folder from `run_trainer` or `write_final`; without a trainer's state it is not finished.
        max_steps: the last step; 0 or less stands for the number of steps that the trainer planned.

    Raises:
        ValueError: if more steps have been taken.
    """
    if not (folder / _STATE).is_file():
        return False
    state = json.loads((folder / _STATE).read_text())
    taken, wanted = state["global_step"], max_steps if max_steps > 0 else state["max_steps"]
    if taken > wanted:
        raise ValueError(
            f"max_steps is {max_steps}, but the run in {folder.parent} has taken {taken} steps; expected at "
            f"least {taken}, or another output"
        )
    return bool(taken == wanted)


def write_final(output: Path, checkpoint: Path) -> Path:
    """Write OUTPUT/final, the last step's checkpoint without files that only training needs, and return it."""
    final = output / "final"
    ignore = shutil.ignore_patterns(*_OF_TRAINING, _COMPLETE, _CARD)
    with replacing(final) as unfinished:
        shutil.copytree(checkpoint, unfinished, ignore=ignore)
    return final


@contextlib.contextmanager
def _naming_lora() -> Iterator[None]:
    """Prefix peft's errors about the layers named by a LoraConfig with the recipe's key."""
    try:
        yield
    except ValueError as error:
        if re.search("target[ _]modules?", str(error), re.IGNORECASE) is None:
            raise
        raise ValueError(f"lora.target_modules does not fit the model: {error}") from error


class _RunRecord(TrainerCallback):
    """Marks complete checkpoints, keeps metrics.jsonl, and moves the progress bar."""

    def __init__(self, output: Path, progress: Progress, trainer: Any) -> None:
        self._output, self._progress, self._trainer = output, progress, trainer
        self._save_is_due = False
        self._bar = progress.add_task("training", total=None)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        self._progress.update(self._bar, total=state.max_steps, completed=state.global_step)
        if optimizer is not None and state.global_step:
            _follow_schedule(optimizer, lr_scheduler)
            _follow_order(train_dataloader, int(state.epoch))
        metrics = self._output / METRICS
        if state.is_world_process_zero and metrics.is_file():
            # Lines of steps after the checkpoint are dropped, since they will be written again.
            lines, _cut_short = read_jsonl(metrics)
            kept = [line for _, line in lines if line["step"] <= state.global_step]
            write_jsonl(metrics, kept if state.global_step else [])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._progress.update(self._bar, completed=state.global_step)
        # A resume between two steps on the same completions would sample them anew, and end with other weights.
        self._save_is_due |= control.should_save
        control.should_save = self._save_is_due and not uses_completions_again(self._trainer)
        if state.global_step >= state.max_steps:
            control.should_save = True  # whatever save_strategy is
        self._save_is_due &= not control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if shown := _shown(logs or {}):
            self._progress.update(self._bar, description=f"training: {shown}")
            if not self._progress.console.is_terminal:  # without a terminal, the bar is shown only at the end
                line = f"step {state.global_step} of {state.max_steps}: {shown}"
                self._progress.console.print(line, highlight=False, soft_wrap=True)
        # The trainer's closing summary would be a second line of the last step; log.txt has it. It also holds the means
        # of steps after the last logged one, if there are any.
        kept = {name: value for name, value in (logs or {}).items() if not name.startswith(_OF_SUMMARY)}
        if state.is_world_process_zero and kept.keys() - {"epoch"}:
            append_jsonl(self._output / METRICS, [{"step": state.global_step, **kept}])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder, trainer = self._output / f"checkpoint-{state.global_step}", self._trainer
        if state.global_step >= state.max_steps and _saves_shards(trainer):
            trainer._save(str(folder), state_dict=trainer.accelerator.get_state_dict(trainer.model))
        trainer.accelerator.wait_for_everyone()  # each rank writes some files
        if state.is_world_process_zero and folder.is_dir():
            (folder / _COMPLETE).touch()


def _saves_shards(trainer: Any) -> bool:
    """Return whether checkpoints hold the weights only in shards."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    return plugin is not None and "FULL" not in str(plugin.state_dict_type)


def _follow_schedule(optimizer: Any, scheduler: Any) -> None:
    """Set the learning rates to the schedule's, which depends on the number of steps.

    A finished run that continues with more steps was saved with the last learning rate, 0, so its next step would
    change nothing.
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    factors = getattr(scheduler, "lr_lambdas", ())
    for place, (group, base, factor) in enumerate(
        zip(optimizer.param_groups, scheduler.base_lrs, factors, strict=False)
    ):
        group["lr"] = scheduler._last_lr[place] = base * factor(scheduler.last_epoch)


def _follow_order(loader: Any, epochs: int) -> None:
    """Advance the sampler by this many epochs.

    TRL's sampler for GRPO draws each epoch's order from one generator, so a resumed run would repeat the first order.
    """
    sampler = loader.batch_sampler
    while sampler is not None and not hasattr(sampler, "repeat_count"):
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
    for _ in range(epochs if sampler is not None else 0):
        collections.deque(sampler, maxlen=0)


def _shown(logs: Mapping[str, float]) -> str:
    """Return the values to show in the progress bar: task reward and causal reward, or a warm start's loss."""
    task = [name for name in _TASK_REWARDS if name in logs][:1]
    names = {"task reward": task, "causal reward": ["rewards/causal/mean"], "loss": [] if task else ["loss"]}
    return ", ".join(f"{label} {logs[name]:.3g}" for label, found in names.items() for name in found if name in logs)


def _nothing_learned(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Return a warning if no completion of the run earned any reward, with what was wrong with them."""
    steps = [row for row in metrics if "reward" in row]
    if not steps or any(row["reward"] or row.get("reward_std") for row in steps):
        return None
    shares = {"malformed": "causal/malformed", "cut off at the maximum length": "completions/clipped_ratio"}
    told = [
        f"{sum(row[name] for row in steps) / len(steps):.0%} of the completions were {label}"
        for label, name in shares.items()
        if all(name in row for row in steps)
    ]
    return nothing_learned("", ", ".join(told))


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)


@contextlib.contextmanager
def _printed_to(path: Path) -> Iterator[None]:
    """Redirect to a file what libraries print, warn and log."""
    with path.open("a", encoding="utf-8") as log, contextlib.ExitStack() as restored:
        streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in getattr(logger, "handlers", ()):
                # Exactly this class: logging's subclasses write to files, or look up sys.stderr each time.
                if type(handler) is logging.StreamHandler and handler.stream in streams:
                    restored.callback(handler.setStream, handler.stream)
                    handler.setStream(log)
        restored.enter_context(contextlib.redirect_stdout(log))
        restored.enter_context(contextlib.redirect_stderr(log))
        yield
