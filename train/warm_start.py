"""`cepo warm-start`: supervised training on the judge's format, for a model that does not write it yet."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cepo.files import SETTINGS, BrokenLine, Row, claim, content_hash, counted
from cepo.jacobian.loading import ModelSource, load_model, model_fingerprint, resolve_model
from cepo.jacobian.reading.judge import close_thought, write_judgement
from cepo.jacobian.reading.thought import template_opens_thought
from cepo.train.data import check_length, judge_row
from cepo.train.left_out import shown, write_left_out
from cepo.train.ranks import require_one_process
from cepo.train.rows import TIE, given, read_judgement
from cepo.train.run import (
    is_finished,
    last_complete_checkpoint,
    lora_config,
    require_trl,
    run_trainer,
    trainer_defaults,
)
from cepo.train.source import collect_rows

logger = logging.getLogger(__name__)

_PROBE = "cepo-answer-probe"
_QUOTED = 6  # words that a rule-made example quotes from a text


@dataclass(frozen=True)
class WarmStartJob:
    """The arguments of `cepo warm-start`.

    Attributes:
        model: see `resolve_model`.
        data: a file, a folder or a hub data set of preference pairs, see `load_preferences`. Rows may hold
            `judge_output`, a judgement to learn from, and `label`, see `read_judgement`.
        output: folder of the merged model; checkpoints and metrics.jsonl are in output/sft.
        steps: training steps, at least 1.
        batch_size: examples per step, at least 1.
        learning_rate: learning rate of the LoRA layers, above 0.
        rank: rank of the LoRA layers, at least 1.
        max_characters: leave out examples whose whole prompt, instructions included, is longer; None for no limit.
        ties: whether to include rows in which neither response is better, and let every prompt allow equal scores.
        dtype: dtype of the weights.
        seed: seed of the responses' positions, the row order and LoRA.
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
    ties: bool = False
    dtype: str = "float32"
    seed: int = 0
    trust_remote_code: bool = False


def warm_start(job: WarmStartJob) -> Path:
    """Train with a loss on completions only, through TRL's SFTTrainer, and write the merged model.

    A killed run continues from its last checkpoint; a finished one trains nothing.

    Returns:
        The output folder, which all commands accept as `--model`.

    Raises:
        ValueError: for data, settings or a model that cannot be used, or an output with other ones.
    """
    require_trl()
    require_one_process("cepo warm-start")
    for name in ("steps", "batch_size", "rank", "learning_rate"):
        if not getattr(job, name) > 0:
            raise ValueError(f"{name} is {getattr(job, name)}; expected a positive number")
    run, finished = job.output / "sft", job.output / "config.json"
    source = resolve_model(job.model)
    examples, left_out = read_examples(job.data, seed=job.seed, max_characters=job.max_characters, ties=job.ties)
    settings = {
        "command": "warm-start",
        **{name: getattr(job, name) for name in ("steps", "batch_size", "learning_rate", "rank", "dtype", "seed")},
        "weights": model_fingerprint(source),
        "data": content_hash(examples),
    }
    claim(run / SETTINGS, settings, results=[*run.glob("checkpoint-*"), finished])
    if finished.is_file():
        logger.warning("%s holds the model of this run already; nothing is trained", job.output)
        return job.output
    checkpoint = last_complete_checkpoint(run)
    write_left_out(run, left_out)
    if checkpoint is None or not is_finished(checkpoint, job.steps):
        checkpoint = run_trainer(lambda: _trainer(job, source, examples), run, checkpoint)
    model, tokenizer = load_model(source, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
    _write_merged(model, tokenizer, checkpoint, job.output)
    return job.output


def _trainer(job: WarmStartJob, source: ModelSource, examples: list[dict[str, Any]]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load_model(source, dtype=job.dtype, trust_remote_code=job.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(job.output / "sft"),
            max_steps=job.steps,
            per_device_train_batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            lr_scheduler_type="cosine",
            completion_only_loss=True,
            max_length=None,
            **{**trainer_defaults(job.seed), "save_steps": 10},
        ),
        train_dataset=Dataset.from_list(examples_in_thought(examples, tokenizer)),
        processing_class=tokenizer,
        peft_config=lora_config({"r": job.rank, "lora_alpha": 2 * job.rank}),
    )


def _write_merged(model: Any, tokenizer: Any, adapter: Path, output: Path) -> None:
    from peft import PeftModel

    unfinished = output / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    # config.json is moved last, so that it marks a complete model.
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    unfinished.rmdir()


def read_examples(
    source: str | Path, *, seed: int = 0, max_characters: int | None = None, ties: bool = False
) -> tuple[list[dict[str, Any]], list[BrokenLine]]:
    """Return prompts and judgements to learn from, as messages, and the rows that were left out.

    A judgement is the row's own `judge_output`, or else made by `judgement_by_rule`. The number of each, and the rows
    that were left out, are logged.

    Args:
        source: see `WarmStartJob.data`.
        seed: seed of the responses' positions in rule-made examples.
        max_characters: leave out longer prompts; None for no limit.
        ties: see `WarmStartJob`.

    Returns:
        Rows of `prompt` (one user message) and `completion` (one of the assistant); and number and reason of each row
        that was left out.

    Raises:
        ValueError: for data without a usable row.
    """
    by_rule = 0

    def convert(row: Row, _: str) -> Row:
        nonlocal by_rule
        if given(row, "judge_output") is not None:
            prompt, text = read_judgement(row, ties=ties)
            if not text.strip():
                raise ValueError("column 'judge_output' is blank")
            close_thought(text)  # raises if it was cut off inside its thought, and so has no verdict
            return check_length(_example(prompt, text), max_characters)
        pair = judge_row(row, seed, ties=ties)
        example = check_length(_example(pair["prompt"], judgement_by_rule(pair)), max_characters)
        by_rule += 1
        return example

    examples, left_out = collect_rows(source, convert)
    told = (
        f"{counted(len(examples) - by_rule, 'judgement')} of the rows' own, {by_rule} by rule, "
        f"{counted(len(left_out), 'row')} left out"
    )
    logger.warning("examples from %s: %s%s", source, told, f": {shown(left_out)}" if left_out else "")
    return examples, left_out


def examples_in_thought(examples: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Return the examples as they are, or as token ids for a model whose chat template opens a thought.

    Such a template adds the opening tag only to a prompt without an answer, so TRL, which renders prompt and completion
    together, would leave it out. Here the ids are those of generation, and each completion closes the thought, which is
    that of the row's own judgement or empty.

    Args:
        examples: from `read_examples`.
        tokenizer: the model's tokenizer.

    Returns:
        Rows of `prompt` and `completion`, or of `input_ids` and `completion_mask` (1 at the tokens to learn).
    """
    if not template_opens_thought(tokenizer):
        return examples
    rows = []
    for example in examples:
        prompt, (answer,) = example["prompt"], example["completion"]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        prompt_ids = list(tokenizer.apply_chat_template(prompt, **options)["input_ids"])
        ending = tokenizer.apply_chat_template([*prompt, {**answer, "content": _PROBE}], tokenize=False)
        text = f"{close_thought(answer['content'])}{ending.rpartition(_PROBE)[2] or tokenizer.eos_token}"
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        rows.append({"input_ids": prompt_ids + ids, "completion_mask": [0] * len(prompt_ids) + [1] * len(ids)})
    return rows


def judgement_by_rule(row: Mapping[str, Any]) -> str:
    """Return a short judgement that quotes the pair and scores the better response higher, or both the same on a tie.

    It teaches only the format: its criteria do not cause its scores, which is what the causal reward is for.

    Args:
        row: from `load_preferences`: query, response_a, response_b and label.
    """
    query, first, second = (_quote(row[name]) for name in ("query", "response_a", "response_b"))
    place = sum(map(ord, row["query"]))  # scores differ from pair to pair, and are the same on every run
    high, low = 7 + place % 3, 2 + place // 3 % 3
    even = (high + low) // 2
    scores = {"A": (high, low), "B": (low, high), TIE: (even, even)}[row["label"]]
    winner = "Neither" if row["label"] == TIE else row["label"]
    return write_judgement(
        f"Answers what is asked: {query} (weight 3)\nIs correct and complete (weight 2)",
        f"A begins: {first}. B begins: {second}. {winner} meets the criteria better.",
        scores,
    )


def _example(prompt: list[dict[str, str]], text: str) -> Row:
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}


def _quote(text: str) -> str:
    """Return the first words of a text, without any character that could be read as part of the format."""
    return " ".join(re.findall(r"[\w'-]+", text)[:_QUOTED]) or "nothing"
