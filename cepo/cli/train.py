"""The commands that train: demo, train, warm-start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cepo.cli.shared import Dtype, Threads, TrustRemoteCode, console, use_threads


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model, the metrics and report.html.")] = Path(
        "runs/demo"
    ),
    steps: Annotated[int, typer.Option(help="GRPO steps.", min=1)] = 40,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    without_causal: Annotated[
        bool, typer.Option("--without-causal", help="Leave the causal reward out, to compare with.")
    ] = False,
) -> None:
    """The main job on the embedded testbed: no download, CPU, a few minutes, a report with pictures.

    A tiny judge that has learned to follow response length is warmed up (or read from the cache), scored, trained with
    GRPO on format + argmax + exact causal reward, and scored again. What the report shows is what happened.
    """
    from cepo.demo import run_demo

    report = run_demo(output, steps=steps, seed=seed, console=console, causal=not without_causal)
    console.print(f"report: {report}")


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; the recipes in train/recipes/ are a start.")],
    model: Annotated[str | None, typer.Option(help="Hub id, folder, .gguf file, smollm2 or testbed.")] = None,
    data: Annotated[str | None, typer.Option(help="JSONL file or hub data set id.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="GRPO steps.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other key, e.g. --set grpo.learning_rate=1e-5; YAML values.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse to go on from checkpoints in the output.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """GRPO with exact causal rewards on a real model and a preference or reasoning data set.

    Data: rows of `prompt`, `chosen`, `rejected` for a judge; of `question`, `answer` for a reasoner.
    Rewards: a list of `name`, `weight` and settings; names: format, argmax, exact_match, math_verify, bertscore, proxy,
    causal. `--set rewards='[{name: format}, ...]'` replaces the list whole.

    Started again with the same output, it goes on from the last complete checkpoint.
    """
    from cepo.train.grpo import load_config
    from cepo.train.grpo import train as run

    named = {"model": model, "data.source": data, "output": output, "grpo.max_steps": max_steps, "seed": seed}
    overrides: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    for pair in set_ or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set is {pair!r}; expected KEY=VALUE, such as grpo.learning_rate=1e-5")
        overrides[key] = _yaml_value(value)
    if trust_remote_code:
        overrides["trust_remote_code"] = True
    console.print(f"trained model: {run(load_config(config, overrides), fresh=fresh)}")


def warm_start(
    data: Annotated[str, typer.Option(help="JSONL file or hub data set of prompt, chosen, rejected.")],
    output: Annotated[Path, typer.Option(help="Folder of the model, for --model of the other commands.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file or smollm2.")] = "smollm2",
    steps: Annotated[int, typer.Option(help="Steps of training.", min=1)] = 40,
    batch_size: Annotated[int, typer.Option(help="Examples a step.", min=1)] = 2,
    learning_rate: Annotated[float, typer.Option(help="Of the LoRA layers that are trained and then merged.")] = 5e-4,
    rank: Annotated[int, typer.Option(help="Of these layers.", min=1)] = 16,
    max_characters: Annotated[int | None, typer.Option(help="Leave out longer prompts, instructions and all.")] = None,
    dtype: Dtype = "float32",
    threads: Threads = None,
    seed: Annotated[int, typer.Option(help="Of positions, order and LoRA.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Supervised examples of the judge's format, for a model that does not write it; then `cepo train`.

    A row's own `judge_output` is learned where it has one (with `label`, A or B: where the chosen response stood; A if
    absent). Else a short judgement is made by rule: it quotes the pair and scores the chosen response higher. That
    teaches the form alone.

    Killed and started again with the same arguments, it goes on from the last checkpoint.
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
        dtype=dtype,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    console.print(f"model: {run(job)}")


def _yaml_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set holds {text!r}, which is not YAML: {error}") from None
    try:
        return float(value) if isinstance(value, str) else value  # YAML reads 1e-5 as text
    except ValueError:
        return value
