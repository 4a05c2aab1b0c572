"""The commands that train on testbeds to test claims: experiment, reward-experiment, words-judge."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cepo.cli import checks
from cepo.cli.shared import (
    Device,
    Layers,
    Threads,
    console,
    errors,
    given,
    showing,
    use_threads,
)

Seeds = Annotated[
    list[int] | None,
    typer.Option(help="Run this seed instead of the recipe's; may be repeated.", callback=checks.at_least(0)),
]
Commit = Annotated[str | None, typer.Option(help="Commit to record with the rows. Default: the repository's.")]


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
    seed: Seeds = None,
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
    commit: Commit = None,
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
    seed: Seeds = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Number of optimiser steps per arm. Default: the training recipe's.", callback=checks.at_least(1)
        ),
    ] = None,
    commit: Commit = None,
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
