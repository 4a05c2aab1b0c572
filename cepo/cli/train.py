"""The commands that train: demo, train, warm-start, reward-model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cepo.cli import checks
from cepo.cli.shared import Dtype, Threads, TrustRemoteCode, console, use_threads
from cepo.train.config import TrainConfig
from cepo.train.file_kinds import SOURCES
from cepo.train.recipe import read_recipe, read_yaml, reason_of

TrainingOutput = Annotated[
    Path | None,
    typer.Option(
        help="Folder for checkpoints, logs and the trained model.",
        callback=checks.folder("final", "checkpoint-*", "metrics.jsonl", "left_out.jsonl"),
    ),
]


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the model, metrics and report.html.", callback=checks.folder())
    ] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="Number of GRPO steps.", callback=checks.at_least(1))] = 40,
    seed: Annotated[
        int, typer.Option(help="Seed of warm-up, items, sampling and training.", callback=checks.at_least(0))
    ] = 16,
    without_causal: Annotated[
        bool, typer.Option("--without-causal", help="Train without the causal reward, for comparison.")
    ] = False,
) -> None:
    """Train a tiny judge with a causal reward and show what changed: CPU only, no download, about three minutes.

    The judge is warmed up to follow response length (or read from the cache), measured, trained with GRPO on format,
    argmax and exact causal rewards, and measured again. Prints a table of before and after; the page has the pictures.
    """
    from cepo.demo import run_demo

    page = run_demo(output, steps=steps, seed=seed, console=console, causal=not without_causal)
    console.print(f"page: {page}", soft_wrap=True)


def train(
    config: Annotated[
        Path, typer.Argument(help="Recipe (YAML) of the run; start from one in train/recipes/.", callback=checks.recipe)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to train: hub id, folder, .gguf file, smollm2 or a testbed's name.", callback=checks.model
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help=f"Data to train on: {SOURCES}; or testbed.", callback=checks.data)
    ] = None,
    output: TrainingOutput = None,
    max_steps: Annotated[int | None, typer.Option(help="Number of GRPO steps.", callback=checks.at_least(1))] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="Trainer: trl, or verl, for which only a configuration is written; nothing is trained.",
            callback=checks.one_of("trl", "verl"),
        ),
    ] = "trl",
    seed: Annotated[
        int | None, typer.Option(help="Seed of the data split, sampling and training.", callback=checks.at_least(0))
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set any other key, e.g. grpo.learning_rate=1e-5; may be repeated."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse an output that already holds checkpoints.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a judge or a reasoner with GRPO and exact causal rewards.

    An example, and a row of `preferences.jsonl`; for a reasoner, rows have `question` and `answer`:

        cepo train train/recipes/smollm2-cpu.yaml \\
            --data preferences.jsonl --output runs/judge

        {"prompt": "What is the capital of Australia?",
         "chosen": "Canberra.", "rejected": "Sydney, the largest city."}

    Output: final/ (the model), metrics.jsonl (a line per step), log.txt (what the libraries print). Options override
    the recipe. The same command, with the same data and weights, resumes a killed run from its last complete
    checkpoint.

    `--set data.ties=true` includes ties: rows in which neither response is better.

    Rewards are a list of `name`, `weight` and settings. Names: format, argmax, exact_match, math_verify, bertscore,
    causal; for comparison: proxy, cir, log_cir, csr, necessary. `--set rewards='[{name: format}, ...]'` replaces the
    whole list.

    `--set causal_loss.weight=0.5` adds the causal loss to GRPO's own; its other settings are in docs/glossary.md.

    `--engine verl` trains nothing: it writes verl.yaml and the data, and shows the command that starts verl.
    """
    named = {"model": model, "data.source": data, "output": output, "grpo.max_steps": max_steps, "seed": seed}
    overrides = _overrides(named, set_, trust_remote_code)
    run_config = read_recipe(TrainConfig, config, overrides)  # refused before torch is imported
    from cepo.train.grpo import train as run

    if engine == "verl":
        from cepo.train.verl.config import write_verl_run

        console.print(f"start it with: {write_verl_run(run_config, fresh=fresh)}", soft_wrap=True, highlight=False)
        return
    _tell(run(run_config, fresh=fresh))


def reward_model(
    config: Annotated[
        Path,
        typer.Argument(
            help="Recipe (YAML) of the run; start from train/recipes/reward-model-*.yaml.", callback=checks.recipe
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Model to train: hub id, folder, .gguf file, smollm2 or testbed.", callback=checks.model),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help=f"Pairs to train on: {SOURCES}; or testbed.", callback=checks.data),
    ] = None,
    output: TrainingOutput = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Number of optimiser steps.", callback=checks.at_least(1))
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the split, a new head and training.", callback=checks.at_least(0))
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set any other key, e.g. reward.learning_rate=1e-5; may be repeated."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse an output that already holds checkpoints.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a reward model on preferences and ties: Bradley-Terry, or pairwise (token A or B).

    An example; a row of `pairs.jsonl`, with `"tie": true` where neither response is better, and a line of
    `runs/reward/metrics.jsonl` (shortened):

        cepo reward-model train/recipes/reward-model-smollm2-cpu.yaml \\
            --data pairs.jsonl --output runs/reward

        {"prompt": "What is the capital of Australia?",
         "chosen": "Canberra.", "rejected": "Sydney, the largest city."}

        {"step": 5, "loss": 0.61, "accuracy": 0.71, "margin": 0.24, ...}

    `margin` is the mean reward of the chosen responses minus that of the rejected ones. Output: final/ (the model, for
    `cepo eval --reward-model`), metrics.jsonl, left_out.jsonl (pairs that are too long, or equal once encoded),
    log.txt (what the libraries print). docs/reward-models.md lists all columns of the data.

    Options override the recipe. The same command, with the same data and weights, resumes a killed run from its last
    complete checkpoint.
    """
    named = {"model": model, "data.source": data, "output": output, "reward.max_steps": max_steps, "seed": seed}
    overrides = _overrides(named, set_, trust_remote_code)
    from cepo.train.reward_config import RewardModelConfig

    run_config = read_recipe(RewardModelConfig, config, overrides)  # refused before torch is imported
    from cepo.train.reward_model import train_reward_model

    _tell(train_reward_model(run_config, fresh=fresh))


def warm_start(
    data: Annotated[
        str, typer.Option(help=f"Preferences (prompt, chosen, rejected): {SOURCES}.", callback=checks.data)
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for the trained model, which any --model option takes.", callback=checks.folder("sft")
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Model to train: hub id, folder, .gguf file or smollm2.", callback=checks.model)
    ] = "smollm2",
    steps: Annotated[int, typer.Option(help="Number of training steps.", callback=checks.at_least(1))] = 40,
    batch_size: Annotated[int, typer.Option(help="Number of examples per step.", callback=checks.at_least(1))] = 2,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of the LoRA layers.", callback=checks.positive)
    ] = 5e-4,
    rank: Annotated[
        int, typer.Option(help="Rank of the LoRA layers, which are merged at the end.", callback=checks.at_least(1))
    ] = 16,
    max_characters: Annotated[
        int | None,
        typer.Option(
            help="Leave out rows whose prompt, instructions included, has more characters. Default: no limit.",
            callback=checks.at_least(1),
        ),
    ] = None,
    ties: Annotated[
        bool,
        typer.Option("--ties", help="Include ties, and tell the judge in every prompt that equal scores are allowed."),
    ] = False,
    dtype: Dtype = "float32",
    threads: Threads = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the responses' positions, the row order and LoRA.", callback=checks.at_least(0))
    ] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Teach a model the judge's format with supervised examples, before `cepo train`.

    An example, and a row of `preferences.jsonl`:

        cepo warm-start --data preferences.jsonl --output runs/warm

        {"prompt": "What is the capital of Australia?",
         "chosen": "Canberra.", "rejected": "Sydney, the largest city."}

    If a row has a `judge_output`, the model learns that text; `label` (A or B, A by default) says where it saw the
    chosen response. For other rows, a short judgement is made by rule: it quotes the pair and scores the chosen
    response higher, which teaches only the format. The number of each kind is shown. With --ties, a row in which
    neither response is better (`tie: true`, or `label: tie`) gets equal scores; without it, such rows are left out.
    The same command, with the same data and weights, resumes a killed run from its last checkpoint.
    """
    from cepo.train.warm_start import WarmStartJob
    from cepo.train.warm_start import warm_start as run

    use_threads(threads)
    job = WarmStartJob(
        model=model,
        data=data,
        output=output,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        rank=rank,
        max_characters=max_characters,
        ties=ties,
        dtype=dtype,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    console.print(f"model: {run(job)}")


def _tell(trained: Path) -> None:
    """Print the path of the trained model, on one rank only."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        console.print(f"trained model: {trained}")


def _overrides(named: Mapping[str, Any], pairs: list[str] | None, trust_remote_code: bool) -> dict[str, Any]:
    """Return the recipe's entries that options override."""
    named = {**named, "trust_remote_code": trust_remote_code or None}
    overrides: dict[str, Any] = {
        key: str(value) if isinstance(value, Path) else value for key, value in named.items() if value is not None
    }
    options = {key: "data" if key == "data.source" else key.rpartition(".")[2] for key in overrides}
    given = {key: f"--{option.replace('_', '-')}" for key, option in options.items()}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set is {pair!r}; expected KEY=VALUE, such as seed=1")
        for other, option in given.items():
            if key == other or other.startswith(f"{key}."):
                raise ValueError(f"--set {pair} and {option} both set {other}; leave one out")
        overrides[key] = _yaml_value(value)
        given[key] = f"--set {pair}"
    return overrides


def _yaml_value(text: str) -> Any:
    try:
        value = read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set holds {text!r}, which is not YAML: {reason_of(error)}") from None
    try:
        return float(value) if isinstance(value, str) else value  # YAML reads 1e-5 as text
    except ValueError:
        return value
