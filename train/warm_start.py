"""`cepo warm-start`: supervised examples of the judge's format, for a model that does not write it by itself."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cepo.files import read_jsonl
from cepo.jacobian.loading import load_model, resolve_model
from cepo.train.data import load_preferences
from cepo.train.grpo import (
    check_same_run,
    is_finished,
    keep_settings,
    last_complete_checkpoint,
    lora_config,
    run_callbacks,
    trainer_defaults,
)
from cepo.train.prompts import judged_prompt

logger = logging.getLogger(__name__)

_QUOTED = 6  # words of a text that an example by rule quotes


@dataclass(frozen=True)
class WarmStartJob:
    """What `cepo warm-start` was asked to do.

    Attributes:
        model: see `resolve_model`.
        data: JSONL file or hub data set of preference pairs, see `load_preferences`. Rows of a file may carry
            `judge_output`, a judgement to learn from, and `label`, "A" or "B", where the chosen response stood in it.
        output: folder of the model, its weights merged; checkpoints and metrics.jsonl lie in output/sft.
        steps: of training, at least 1.
        batch_size: examples a step, at least 1.
        learning_rate: > 0.
        rank: of the LoRA layers that are trained, at least 1.
        max_characters: leave out examples whose prompt is longer; None for no limit.
        dtype: of the weights.
        seed: of positions, order and LoRA.
        trust_remote_code: whether a hub repository's own code may run.
    """

    model: str
    data: str
    output: Path
    steps: int = 40
    batch_size: int = 2
    learning_rate: float = 5e-4
    rank: int = 16
    max_characters: int | None = None
    dtype: str = "float32"
    seed: int = 0
    trust_remote_code: bool = False


def warm_start(job: WarmStartJob) -> Path:
    """Train on completions alone, through TRL's SFTTrainer, and write the merged model; a killed run goes on.

    Returns:
        The output folder, which `--model` takes everywhere.

    Raises:
        ValueError: for data, settings or a model that cannot be used.
    """
    for name in ("steps", "batch_size", "rank", "learning_rate"):
        if not getattr(job, name) > 0:
            raise ValueError(f"{name} is {getattr(job, name)}; expected a positive number")
    if (job.output / "config.json").is_file():
        raise ValueError(f"output {str(job.output)!r} holds a model already; name another folder, or delete it")
    run = job.output / "sft"
    checkpoint = last_complete_checkpoint(run)
    settings = {name: value for name, value in asdict(job).items() if name not in ("output", "steps")}
    check_same_run(settings, run, checkpoint)
    source = resolve_model(job.model)
    examples = read_examples(job.data, seed=job.seed, max_characters=job.max_characters)
    model, tokenizer = load_model(source, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Resumed at its last step, the trainer would take one step more.
    if checkpoint is None or not is_finished(checkpoint, job.steps):
        keep_settings(settings, run)
        _train(job, model, tokenizer, examples, checkpoint)
        model, _ = load_model(source, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
    _write_merged(model, tokenizer, last_complete_checkpoint(run), job.output)
    return job.output


def _train(
    job: WarmStartJob, model: Any, tokenizer: Any, examples: list[dict[str, Any]], checkpoint: Path | None
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    run = job.output / "sft"
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(run),
            max_steps=job.steps,
            per_device_train_batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            lr_scheduler_type="cosine",
            completion_only_loss=True,
            max_length=None,
            **{**trainer_defaults(job.seed), "save_steps": 10},
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        peft_config=lora_config({"r": job.rank, "lora_alpha": 2 * job.rank}),
        callbacks=run_callbacks(run),
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _write_merged(model: Any, tokenizer: Any, adapter: Path | None, output: Path) -> None:
    from peft import PeftModel

    assert adapter is not None  # the trainer saves at its last step
    unfinished = output / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    # config.json last: where it is, all of the model is.
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    unfinished.rmdir()


def read_examples(source: str | Path, *, seed: int = 0, max_characters: int | None = None) -> list[dict[str, Any]]:
    """Return prompts and judgements to learn from, as messages.

    A row's own `judge_output` where it has one; else a judgement by rule, see `judgement_by_rule`.

    Args:
        source: see `WarmStartJob.data`.
        seed: of the positions, where no judgement fixes them.
        max_characters: leave out longer prompts; None for no limit.

    Returns:
        Rows of `prompt` (one user message) and `completion` (one of the assistant).

    Raises:
        ValueError: for data of which no row can be used.
    """
    rows = read_jsonl(source)[0] if Path(source).is_file() else []
    pairs = [(judged_prompt(row), row["judge_output"]) for _, row in rows if _is_example(row)]
    if pairs and max_characters is not None:
        pairs = [pair for pair in pairs if len(pair[0][0]["content"]) <= max_characters]
        if not pairs:
            raise ValueError(
                f"data {str(source)!r} has no judgement to learn from within max_characters {max_characters}"
            )
    elif not pairs:
        found = load_preferences(source, seed=seed, test_fraction=0.0, max_characters=max_characters)
        if found.skipped:
            logger.warning("%d row(s) of %s are left out", len(found.skipped), source)
        pairs = [(row["prompt"], judgement_by_rule(row)) for row in found.train]
    return [{"prompt": prompt, "completion": [{"role": "assistant", "content": text}]} for prompt, text in pairs]


def judgement_by_rule(row: Mapping[str, Any]) -> str:
    """Return a short judgement in the format: it quotes the pair and scores the better response higher.

    It teaches the form alone. Its criteria cause nothing: that is for the reward to change.

    Args:
        row: of `load_preferences`: query, response_a, response_b and label.
    """
    query, first, second = (_quote(row[name]) for name in ("query", "response_a", "response_b"))
    place = sum(map(ord, row["query"]))  # scores differ from pair to pair, and are the same on every run
    high, low = 7 + place % 3, 2 + place // 3 % 3
    scores = (high, low) if row["label"] == "A" else (low, high)
    return (
        f"<specific_criteria>\nAnswers what is asked: {query} (weight 3)\nIs correct and complete (weight 2)\n"
        f"</specific_criteria>\n<analysis>\nA begins: {first}. B begins: {second}. {row['label']} meets the criteria "
        f"better.\n</analysis>\n<scores>\n\\boxed{{{scores[0]}, {scores[1]}}}\n</scores>"
    )


def _is_example(row: Mapping[str, Any]) -> bool:
    return all(isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected", "judge_output"))


def _quote(text: str) -> str:
    """Return the first words of a text, without any sign that could be taken for the format's."""
    return " ".join(re.findall(r"[\w'-]+", text)[:_QUOTED]) or "nothing"
