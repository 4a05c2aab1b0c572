"""The commands of researchers: ablate, bench, experiment, words-judge."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cepo.cli import checks
from cepo.cli.shared import (
    Device,
    Dtype,
    Layers,
    OptionalModel,
    Raw,
    Threads,
    TrustRemoteCode,
    console,
    errors,
    given,
    progress_bar,
    showing,
    use_threads,
    weighted_links,
)
from cepo.train.file_kinds import FILES


def ablate(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="Folder for tables, plots and finished groups.", callback=checks.folder("*"))
    ],
    model: OptionalModel = None,
    input: Annotated[
        Path | None, typer.Option(help=f"File of rollouts, as for cepo score: {FILES}.", callback=checks.rows)
    ] = None,
    testbed: Annotated[
        int | None,
        typer.Option(help="Sweep over this many rollouts of the testbed judge instead, 8 per prompt: a multiple of 8."),
    ] = None,
    counterfactuals: Annotated[
        str,
        typer.Option(
            "--counterfactuals",
            "-K",
            help="Numbers K of permutations to sweep, separated by commas.",
            callback=checks.whole_numbers(0),
        ),
    ] = "0,1,2,4,8",
    rank: Annotated[
        str, typer.Option(help="Nuisance ranks to sweep, separated by commas; or fractions of the energy, as tau=0.5.")
    ] = "0,1,2,4,8,tau=0.5,tau=0.9",
    p: Annotated[
        str, typer.Option("-p", "--p", help="Exponents of the power mean to sweep, separated by commas.")
    ] = "-2,0,0.2,1,10",
    link: Annotated[
        list[str] | None,
        typer.Option(help="Link, with its weight as X->Y=0.5; may be repeated. Default: Z->X, X->Y, Z->Y, 0.1 each."),
    ] = None,
    score_name: Annotated[
        str, typer.Option("--score", help="Named scores to sweep, separated by commas.")
    ] = "phi,phi_retained,influence,phi_influence,influence_retained",
    permutation: Annotated[
        str | None, typer.Option(help="What a permutation moves: uniform, sentence or block.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Target function to differentiate: log_likelihood, log_odds, or, for links to scores, expected_score "
            "or margin."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of permutations.", callback=checks.at_least(0))] = None,
    raw: Raw = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Sweep K, rank, p, links and scores over a file of rollouts: tables, plots with intervals, parquet.

    Every Jacobian is computed once and used by all settings. The paper's hardening (K = 4, rank 2) is always included;
    rank correlations are taken against it. The same command resumes a killed sweep.

    An example, and a row of `rollouts.jsonl`, as for `cepo score`:

        cepo ablate --model smollm2 --input rollouts.jsonl \\
            --output runs/sweep

        {"prompt": "Which is better, ...",
         "completion": "<specific_criteria> ...", "task_reward": 1.0}
    """
    from cepo.benchmarks.ablation.sweep import plan_sweep
    from cepo.fusion.config import PAPER_LINKS, RewardConfig

    if (testbed is None) == (model is None) or (testbed is None) == (input is None):
        raise checks.missing(context, "Give either --model and --input, or --testbed N alone.")
    if testbed is not None and (testbed < 8 or testbed % 8):
        raise ValueError(f"--testbed is {testbed}; expected a multiple of 8, at least 8")
    if testbed is not None:
        checks.refuse_given(context, ("raw", "trust_remote_code"), "cannot be used with --testbed")
    config = RewardConfig(
        links=weighted_links(link) if link else PAPER_LINKS,
        score="phi",
        **given(permutation=permutation, target=target, seed=seed),
    )
    sweep = plan_sweep(
        config,
        counterfactuals=[int(part) for part in counterfactuals.split(",")],
        ranks=[part.strip() for part in rank.split(",")],
        powers=[_number("--p", part) for part in p.split(",")],
        scores=[part.strip() for part in score_name.split(",")],  # type: ignore[misc]
    )
    use_threads(threads)
    from cepo.benchmarks.ablation.command import AblateJob, run_ablation

    job = AblateJob(model or "", input or Path(), output, sweep, config, raw, dtype, device, trust_remote_code)
    if testbed is not None:
        from cepo.benchmarks.ablation.testbed_rollouts import write_testbed_rollouts

        folder, rollouts = write_testbed_rollouts(output / "testbed", prompts=testbed // 8)
        job = replace(job, model=str(folder), input=rollouts, output=output / "sweep")
    with showing("prompts") as show:
        summary = run_ablation(job, progress=show)
    console.print(summary.table())
    console.print(f"tables and plots: {job.output}")


def bench(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="Folder for results.jsonl, bench.txt and plots.", callback=checks.folder())
    ] = Path("runs/bench"),
    size: Annotated[
        str,
        typer.Option(
            help="Size of the run: tiny (seconds), small (SmolLM2's shape, CPU), a100 or h100 (Qwen3's shapes, GPU), "
            "gpu-135m or gpu-7b (SmolLM2's or Qwen2.5-7B's shape, GPU).",
            callback=checks.one_of(*checks.SIZES),
        ),
    ] = "tiny",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Peer to time beside the group engine: {', '.join(checks.PEERS)}; may be repeated. Default: all.",
            callback=checks.one_of(*checks.PEERS),
        ),
    ] = None,
    scaling: Annotated[bool, typer.Option(help="Also vary the number of rollouts, the span lengths and K.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of weights and rollouts.", callback=checks.at_least(0))] = 0,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where to run: cpu or cuda. Default: what the size needs.", callback=checks.one_of("cpu", "cuda")
        ),
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Time the Triton kernels, and the engine with them, instead; on one GPU."),
    ] = False,
    minutes: Annotated[
        float, typer.Option(help="Time limit of --kernels on a GPU, in minutes.", callback=checks.positive)
    ] = 9.0,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record with the rows. Default: the repository's.")
    ] = None,
) -> None:
    """Time the group engine and its peers, and measure their memory; only schedules whose values agree are timed."""
    if kernels:
        checks.refuse_given(context, ("size", "peer", "scaling"), "cannot be used with --kernels")
        from cepo.benchmarks.kernels.command import main as run_kernels

        return run_kernels(output, device or "cuda", seed, minutes, commit)
    checks.refuse_given(context, ["minutes"], "needs --kernels")
    from cepo.benchmarks.engine.command import run_benchmark

    with progress_bar() as progress:
        task = progress.add_task("bench", total=None)

        def tell(what: str) -> None:
            progress.update(task, description=what)
            if not progress.console.is_terminal:  # a bar shows nothing there until the end
                progress.console.print(what, markup=False)

        tables = run_benchmark(
            size,
            output,
            seed=seed,
            peers=peer,
            scaling=scaling,
            device=device,
            commit=commit,
            progress=tell,
        )
    for table in tables:
        console.print(table)
    console.print(f"all columns: {output / 'bench.txt'}", soft_wrap=True)


def experiment(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="Folder for the runs, results.jsonl and report.html.", callback=checks.folder())
    ] = Path("runs/experiments/training"),
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML with worlds, steps, seeds and arms. Default: all worlds of the testbed.",
            callback=checks.plan("worlds", "steps", "seeds", "arms"),
        ),
    ] = None,
    worlds: Annotated[
        str | None,
        typer.Option(
            help="Worlds to run, separated by commas, e.g. lazy,hollow. Default: the recipe's.",
            callback=checks.worlds,
        ),
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Run only this arm, such as task or 'X->Y influence'; may be repeated.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Run this seed instead of the recipe's; may be repeated.", callback=checks.at_least(0)),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Number of GRPO steps per arm. Default: the recipe's.", callback=checks.at_least(1)),
    ] = None,
    layers: Layers = None,
    jobs: Annotated[
        int, typer.Option(help="Number of processes to run at once, one thread each.", callback=checks.at_least(1))
    ] = 2,
    items: Annotated[
        int | None, typer.Option(help="Number of items per measure. Default: 200.", callback=checks.at_least(1))
    ] = None,
    device: Device = "cpu",
    commit: Annotated[
        str | None, typer.Option(help="Commit to record with the rows. Default: the repository's.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Check that it works: one seed, 4 steps, 32 items.")] = False,
) -> None:
    """Compare rewards on the testbed, over seeds, at equal steps: which one makes the criteria cause the verdict?

    A world is the disease that the judge starts with: lazy, hollow, decorative or copied. With the prefix `words-` the
    judge is a SmolLM2 (see `cepo words-judge`); with `reasoner-` it is a reasoner (lazy, hollow). Every arm of a world
    starts from the same judge, which follows length, and is measured by interventions. The same command resumes a
    killed experiment; each run's row is written when the run ends.
    """
    if worlds is not None and "words-" not in worlds:
        checks.refuse_given(context, ["layers"], "needs worlds in words, such as --worlds words-lazy")
    from cepo.benchmarks.experiment.command import run_experiment
    from cepo.benchmarks.experiment.recipe import RECIPE, read_plan
    from cepo.jacobian.loading import check_device

    check_device(device)
    small = {**({"items": 32, "scored": 8} if quick else {}), **given(items=items)}
    plan = read_plan(
        output,
        recipe or RECIPE,
        worlds=None if worlds is None else [world.strip() for world in worlds.split(",")],
        seeds=seed or ([1] if quick else None),
        steps=steps or (4 if quick else None),
        arms=arm,
        device=device,
        layers=layers,
        **small,
    )
    counts = [len({getattr(run, field) for run in plan}) for field in ("world", "arm", "seed")]
    errors.print(
        "{} runs of {} steps (worlds: {}, arms: {}, seeds: {}), {} at once. The bar shows the time left once some are "
        "done; --worlds, --arm and --seed select fewer.".format(
            len(plan), max(run.steps for run in plan), *counts, jobs
        )
    )
    os.environ["TQDM_DISABLE"] = "1"  # for the runs' processes, which print to their own logs
    with showing("runs", len(plan)) as show:
        tables = run_experiment(output, plan, jobs=jobs, commit=commit, progress=show)
    for table in tables:
        console.print(table)
    console.print(f"report, with all measures: {output / 'report.html'}", soft_wrap=True)


def reward_experiment(
    output: Annotated[
        Path, typer.Option(help="Folder for the runs and results.jsonl.", callback=checks.folder())
    ] = Path("runs/experiments/reward-models"),
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML with arms, seeds, items and gates (conditions for success).",
            callback=checks.plan("arms", "seeds", "items", "gates", "text"),
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the preferences, for a recipe of real text.", callback=checks.present_folder),
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Run only this arm, such as plain or both; may be repeated.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Run this seed instead of the recipe's; may be repeated.", callback=checks.at_least(0)),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of optimiser steps per arm. Default: the training recipe's.", callback=checks.at_least(1)
        ),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="Commit to record with the rows. Default: the repository's.")
    ] = None,
) -> None:
    """Compare training pairs, over seeds, at equal steps: which make a reward model follow the cause and not a cue?

    Every arm trains the testbed's reward model on 300 preferences, in 90% of which the longer response is better, and
    on the pairs that the arm makes from them: edits, neutrals (ties), or both. Models are measured on new pairs whose
    longer response is worse, and by changing only a response's length or only its cause. A run takes half a minute on
    a free CPU core. The same command resumes a killed experiment.

    With the recipe text-reward-models the text is real, the model is the first layers of SmolLM2, and the cue is a
    stock closing line. A run then takes about ten minutes.
    """
    from cepo.benchmarks.reward_model.command import RECIPE, read_plan, run_reward_experiment

    use_threads(1)
    plan = read_plan(recipe or RECIPE, data=data, seeds=seed, arms=arm)
    with showing("runs") as show:
        tables, verdicts = run_reward_experiment(output, plan, steps=steps, commit=commit, progress=show)
    for table in tables:
        console.print(table)
    for line in verdicts:
        console.print(line, highlight=False)


def words_judge(
    judge: Annotated[
        str,
        typer.Argument(help=f"What to teach: {', '.join(checks.JUDGES)}.", callback=checks.one_of(*checks.JUDGES)),
    ] = "lazy",
    base: Annotated[
        str | None, typer.Option(help="Pretrained model to teach, with a chat template.", callback=checks.model)
    ] = None,
    layers: Layers = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of training steps of the first round.", callback=checks.at_least(2))
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of rounds; those after the first have half the steps.", callback=checks.at_least(1)
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Number of samples per step.", callback=checks.at_least(1))
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", callback=checks.positive)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the samples.", callback=checks.at_least(0))] = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Teach a pretrained model to be a judge of the testbed in words, and certify it by interventions.

    The judge is cached in ~/.cache/cepo, where a recipe with `model: testbed-words` and the same `testbed` settings
    finds it. To certify it, another criterion is forced on it and it continues: does it do what it was taught? If not,
    it is taught another round. The same command resumes a killed one and repeats at most 50 steps. Defaults are those
    of train/recipes/testbed-words.yaml.
    """
    from cepo.eval.report.numbers import digits
    from cepo.jacobian.loading import check_device
    from cepo.train.policy import CACHE
    from cepo.train.testbed_words import load_words_judge, read_certificate, words_folder, words_settings

    use_threads(threads)
    check_device(device)
    settings = given(base=base, layers=layers, steps=steps, rounds=rounds, batch_size=batch_size, seed=seed)
    wanted = words_settings({"judge": judge, **settings, **given(learning_rate=learning_rate)})
    with showing("warm-up", wanted.steps) as show:
        load_words_judge(
            wanted,
            cache=CACHE,
            device=device,
            progress=lambda step, steps, loss: show(step, steps, f"loss {loss:.3f}"),
        )
    found = read_certificate(wanted, CACHE)
    for name, value in found["measures"].items():
        console.print(f"{name}: {digits(value)}", highlight=False)
    console.print(found["uncertified"] or f"certified: {judge}", highlight=False, soft_wrap=True)
    console.print(f"model: {words_folder(wanted, CACHE)}", highlight=False, soft_wrap=True)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} holds {text.strip()!r}; expected numbers separated by commas") from None
