"""The command line: demo, train, score, ablate, bench; eval is in `cepo.cli_eval`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cepo.cli_eval import eval_app
from cepo.cli_shared import Device, Dtype, Raw, Threads, TrustRemoteCode, console, errors, progress_bar, use_threads

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(eval_app, name="eval")


def _show_version(wanted: bool) -> None:
    if wanted:
        names = ("cepo", "torch", "transformers", "trl", "peft", "triton")
        console.print(", ".join(f"{name} {_installed(name)}" for name in names), highlight=False, soft_wrap=True)
        raise typer.Exit


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Exact d(score)/d(criteria) rewards for language-model judges and reasoners."""


def main() -> None:
    """Run the command line; an argument that cannot work ends in one paragraph on stderr and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except ValueError as error:
        errors.print(f"cepo: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


@app.command()
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


@app.command()
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


@app.command("warm-start")
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


@app.command()
def score(
    model: Annotated[str, typer.Option(help="Hub id, folder, adapter folder, .gguf file, or smollm2.")],
    input: Annotated[Path, typer.Option(help="JSONL of rollouts; what a row holds is told above.")],
    output: Annotated[Path, typer.Option(help="JSONL to write, one record for each line of the input.")],
    link: Annotated[
        list[str] | None,
        typer.Option(
            help="A link, such as X->Y, Z->Y:total, X->Y@margin or X->Y=0.5 (its weight); repeat it. "
            "Default: Z->X, X->Y, Z->Y, 0.1 each."
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="judge or reasoning.")] = "judge",
    rationale_tag: Annotated[str, typer.Option(help="Reasoning: tag around the rationale.")] = "think",
    answer_tag: Annotated[str, typer.Option(help="Reasoning: tag around the answer.")] = "answer",
    counterfactuals: Annotated[int, typer.Option("--counterfactuals", "-K", help="K permutations of each source.")] = 4,
    rank: Annotated[int, typer.Option(help="Rank r of the nuisance subspace.")] = 2,
    energy: Annotated[float | None, typer.Option(help="tau in (0, 1]: choose the rank by energy instead.")] = None,
    permutation: Annotated[str, typer.Option(help="uniform, sentence or block.")] = "uniform",
    nuisance: Annotated[str, typer.Option(help="svd, or mean (the reference implementation's).")] = "svd",
    score_name: Annotated[
        str,
        typer.Option(
            "--score", help="influence, phi (the paper's), phi_retained, phi_influence or influence_retained."
        ),
    ] = "influence",
    target: Annotated[
        str, typer.Option(help="log_likelihood, log_odds, expected_score or margin (the last two: links to scores).")
    ] = "log_likelihood",
    p: Annotated[float, typer.Option("-p", "--p", help="Exponent of the power mean; inf and -inf too.")] = 0.2,
    task_weight: Annotated[float, typer.Option(help="Weight of a row's task_reward.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the permutations.")] = 0,
    raw: Raw = False,
    save_jacobians: Annotated[Path | None, typer.Option(help="safetensors file for the matrices.")] = None,
    html: Annotated[Path | None, typer.Option(help="File for the token heat maps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows read and written at once; changes no result.")] = 8,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    engine: Annotated[str, typer.Option(help="group, or autograd (the oracle, slower).")] = "group",
    memory_gib: Annotated[float, typer.Option(help="What the group engine may add to the model's memory, GiB.")] = 4.0,
    no_adapters: Annotated[bool, typer.Option("--no-adapters", help="Score with the adapters switched off.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Link scores of rollouts; token heat maps with --html, the matrices with --save-jacobians.

    A row of the input holds `prompt_ids` and `completion_ids`; or `prompt` (text, put through the chat template as a
    user message unless --raw, or a list of messages) and `completion`; or a preference row `prompt`, `chosen`,
    `rejected` with the judge's own `judge_output` (and `label`, A or B: where the chosen response was shown; A if
    absent), whose judge prompt is then built. `task_reward` in [0, 1], where a row has it, is fused with the links.

    Killed and started again with the same arguments, it goes on where it stopped.
    """
    use_threads(threads)
    from cepo.fusion.engine import PAPER_LINKS, RewardConfig
    from cepo.jacobian.layouts import ReasonerLayout
    from cepo.train.causal import JUDGE
    from cepo.train.prompts import REASONING_LITERALS

    if kind not in ("judge", "reasoning"):
        raise ValueError(f"--kind is {kind!r}; expected judge or reasoning")
    if dtype not in ("float64", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is {dtype!r}; expected float64, float32, bfloat16 or float16")
    reward = RewardConfig(
        links=_weighted_links(link) if link else dict(PAPER_LINKS),
        task_weight=task_weight,
        p=p,
        counterfactuals=counterfactuals,
        permutation=permutation,  # type: ignore[arg-type]
        rank=rank if energy is None else None,
        energy=energy,
        nuisance=nuisance,
        score=score_name,  # type: ignore[arg-type]
        target=target,
        seed=seed,
    )
    layout = JUDGE if kind == "judge" else ReasonerLayout(rationale_tag, answer_tag, instructions=REASONING_LITERALS)
    from cepo.eval.score import ScoreJob, score_file

    job = ScoreJob(
        model=model,
        input=input,
        output=output,
        config=reward,
        layout=layout,
        raw=raw,
        batch_size=batch_size,
        jacobians=save_jacobians,
        html=html,
        dtype=dtype,
        device=device,
        adapters=not no_adapters,
        engine=engine,  # type: ignore[arg-type]
        memory_gib=memory_gib,
        trust_remote_code=trust_remote_code,
    )
    with progress_bar() as progress:
        task = progress.add_task("scoring", total=None)
        summary = score_file(job, progress=lambda done, total: progress.update(task, completed=done, total=total))
    from cepo.eval.summaries import console_table

    table = console_table("what", "value", title=str(output))
    table.add_row("rows", str(summary.rows))
    table.add_row("from an earlier run", str(summary.resumed))
    table.add_row("malformed", str(summary.malformed))
    table.add_row("lines that could not be used", str(len(summary.broken)))
    for name, mean in summary.means.items():
        table.add_row(f"mean {name}", f"{mean:.6f}")
    table.add_row("time", f"{summary.seconds:.1f} s")
    table.add_row("peak memory", f"{summary.peak_gib:.2f} GiB")
    console.print(table)
    for reason, count in summary.reasons.items():
        console.print(f"malformed: {reason} ({count}x)", markup=False, highlight=False)
    if summary.broken:
        shown = "; ".join(reason for _, reason in summary.broken[:5]) + ("; ..." if len(summary.broken) > 5 else "")
        raise ValueError(
            f"input {str(input)!r} has {len(summary.broken)} line(s) that could not be used: {shown}. All other rows "
            "were scored; mend these lines and run the same command again to score them alone"
        )


@app.command()
def ablate(
    output: Annotated[Path, typer.Option(help="Folder for tables, plots and the groups that are done.")],
    model: Annotated[str | None, typer.Option(help="Hub id, folder, adapter folder, .gguf file, or smollm2.")] = None,
    input: Annotated[Path | None, typer.Option(help="JSONL of rollouts, as for cepo score.")] = None,
    testbed: Annotated[
        int | None,
        typer.Option(help="Instead of both: so many rollouts of the testbed judge, 8 a prompt."),
    ] = None,
    counterfactuals: Annotated[str, typer.Option("--counterfactuals", "-K", help="The K to sweep.")] = "0,1,2,4,8",
    rank: Annotated[str, typer.Option(help="Ranks r to sweep, or energies as tau=0.5.")] = "0,1,2,4,8,tau=0.5,tau=0.9",
    p: Annotated[str, typer.Option("-p", "--p", help="Exponents of the power mean to sweep.")] = "-2,0,0.2,1,10",
    link: Annotated[
        list[str] | None, typer.Option(help="As for cepo score; repeat it. Default: Z->X, X->Y, Z->Y, 0.1 each.")
    ] = None,
    score_name: Annotated[
        str, typer.Option("--score", help="Named scores to sweep.")
    ] = "phi,phi_retained,influence,phi_influence,influence_retained",
    pool: Annotated[str, typer.Option(help="none, or none,group to measure what pooling loses.")] = "none",
    permutation: Annotated[str, typer.Option(help="uniform, sentence or block.")] = "uniform",
    target: Annotated[str, typer.Option(help="log_likelihood, log_odds, expected_score or margin.")] = "log_likelihood",
    seed: Annotated[int, typer.Option(help="Seed of permutations and bootstrap.")] = 0,
    raw: Raw = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Sweep K, rank, p, links and scores over a file of rollouts: tables, plots with intervals, parquet.

    Every Jacobian is computed once and used by all settings. The reference (K = 4, rank 2, exact) is always among them,
    and rank correlations are against it. Killed and started again with the same arguments, it goes on.
    """
    use_threads(threads)
    from cepo.benchmarks.ablate import AblateJob, check_sweep, run_ablation
    from cepo.fusion.engine import PAPER_LINKS

    if (testbed is None) == (model is None) or (testbed is None) == (input is None):
        raise ValueError("ablate needs --model and --input, or --testbed N alone")
    if testbed is not None and (testbed < 8 or testbed % 8):
        raise ValueError(f"--testbed is {testbed}; expected a multiple of 8")
    job = AblateJob(
        model=model or "",
        input=input or Path(),
        output=output,
        links=_weighted_links(link) if link else dict(PAPER_LINKS),
        counterfactuals=tuple(int(_number("--counterfactuals", part)) for part in counterfactuals.split(",")),
        ranks=tuple(part.strip() for part in rank.split(",")),
        powers=tuple(_number("--p", part) for part in p.split(",")),
        scores=tuple(part.strip() for part in score_name.split(",")),  # type: ignore[misc]
        pools=tuple(part.strip() for part in pool.split(",")),  # type: ignore[misc]
        permutation=permutation,  # type: ignore[arg-type]
        target=target,
        seed=seed,
        raw=raw,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    check_sweep(job)
    if testbed is not None:
        from cepo.benchmarks.testbed_rollouts import write_testbed_rollouts

        # Resolved, so that the folder spelled another way is the same sweep.
        folder, rollouts = write_testbed_rollouts((output / "testbed").resolve(), prompts=testbed // 8)
        job = replace(job, model=str(folder), input=rollouts, output=output / "sweep")
    with progress_bar() as progress:
        task = progress.add_task("prompts", total=None)
        summary = run_ablation(job, progress=lambda done, total: progress.update(task, completed=done, total=total))
    console.print(summary.table())
    fidelity = summary.fidelity_table()
    if fidelity is not None:
        console.print(fidelity)
    console.print(f"tables and plots: {job.output}")


@app.command()
def bench(
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl, bench.txt and the plots.")] = Path(
        "runs/bench"
    ),
    size: Annotated[
        str, typer.Option(help="tiny (seconds), small (SmolLM2's shape, 2 cores), a100 or h100 (Qwen3 shapes).")
    ] = "tiny",
    peer: Annotated[list[str] | None, typer.Option(help="Only these peers; repeat it. Default: all.")] = None,
    scaling: Annotated[bool, typer.Option(help="Also how cost grows with G, Lz, Lx and K.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of weights and rollouts.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: what the size is for.")] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="The Triton kernels and the engine on them instead; one GPU, 9 minutes.")
    ] = False,
) -> None:
    """Throughput and memory of the group engine beside its peers, timed only where the values agree."""
    if kernels:
        from cepo.benchmarks.kernels import main as run_kernels

        return run_kernels(output, "tiny" if device == "cpu" else "qwen3", device or "cuda", seed=seed)
    from cepo.benchmarks.throughput import run_benchmark

    with progress_bar() as progress:
        task = progress.add_task("bench", total=None)
        table = run_benchmark(
            size,
            output,
            seed=seed,
            peers=peer,
            scaling=scaling,
            device=device,
            progress=lambda what: progress.update(task, description=what),
        )
    console.print(table)


@app.command()
def experiment(
    output: Annotated[Path, typer.Option(help="Folder of the runs, results.jsonl and report.html.")] = Path(
        "runs/experiments/training"
    ),
    recipe: Annotated[
        Path | None, typer.Option(help="YAML with steps, seeds and arms; the testbed's if absent.")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Only this arm of the recipe, such as task or 'X->Y influence'; repeat it.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed; repeat it.", min=0)] = None,
    steps: Annotated[int | None, typer.Option(help="GRPO steps of every arm.", min=1)] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side, one thread each.", min=1)] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, 4 steps, 32 items: shows that it works.")] = False,
) -> None:
    """Which reward makes the criteria cause the verdict? Several rewards, several seeds, equal steps, on the testbed.

    Every arm starts from the same judge, which follows length. What counts is measured by interventions. Killed and
    started again, it goes on where it stopped.
    """
    from cepo.benchmarks.training import RECIPE, run_training
    from cepo.eval.measures import ITEMS, SCORED

    with progress_bar() as progress:
        task = progress.add_task("runs", total=None)
        table = run_training(
            output,
            recipe=recipe or RECIPE,
            seeds=seed or ([1] if quick else None),
            steps=steps or (4 if quick else None),
            arms=arm,
            items=32 if quick else ITEMS,
            scored=8 if quick else SCORED,
            jobs=jobs,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(table)
    console.print(f"report: {output / 'report.html'}")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} holds {text.strip()!r}; expected numbers with commas between them") from None


def _weighted_links(texts: list[str]) -> dict[str, float]:
    links: dict[str, float] = {}
    for text in texts:
        name, equals, weight = text.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            raise ValueError(f"--link is {text!r}, whose weight is no number; expected e.g. 'X->Y=0.5'") from None
        if name.strip() in links:
            raise ValueError(f"--link names {name.strip()!r} twice; expected once, with one weight")
        links[name.strip()] = value
    return links


def _yaml_value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set holds {text!r}, which is not YAML: {error}") from None
    try:
        return float(value) if isinstance(value, str) else value  # YAML reads 1e-5 as text
    except ValueError:
        return value
