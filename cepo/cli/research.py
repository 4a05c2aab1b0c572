"""The commands that measure scores and speed: ablate, bench."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cepo.cli import checks
from cepo.cli.shared import (
    Device,
    Dtype,
    OptionalModel,
    Raw,
    Threads,
    TrustRemoteCode,
    console,
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


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} holds {text.strip()!r}; expected numbers separated by commas") from None
