"""The command line of `cepo eval`: rewardbench, robustness, causal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cepo.cli.shared import (
    ApiKeyFile,
    Backend,
    BaseUrl,
    BatchSize,
    Concurrency,
    Device,
    Dtype,
    ForceFormat,
    MaxNewTokens,
    Raw,
    Retries,
    Temperature,
    Threads,
    Timeout,
    TrustRemoteCode,
    console,
    progress_bar,
    use_threads,
)

eval_app = typer.Typer(
    help="Is the judge right, is it robust, is its causal signal true?",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@eval_app.command()
def rewardbench(
    model: Annotated[
        str,
        typer.Option(help="Hub id, folder, adapter folder, .gguf file, smollm2; with --base-url the server's name."),
    ],
    data: Annotated[
        str,
        typer.Option(help="rewardbench, rewardbench2, another hub data set, or a JSONL of prompt, chosen, rejected."),
    ],
    output: Annotated[Path, typer.Option(help="Folder for judgements.jsonl, summary.jsonl and report.html.")],
    split: Annotated[str | None, typer.Option(help="Split of a hub data set; default: the benchmark's own.")] = None,
    subset: Annotated[list[str] | None, typer.Option(help="Only this subset; repeat it.")] = None,
    limit: Annotated[int | None, typer.Option(help="So many rows, drawn by the seed.")] = None,
    backend: Backend = None,
    base_url: BaseUrl = None,
    api_key_file: ApiKeyFile = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    retries: Retries = 5,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    force_format: ForceFormat = False,
    raw: Raw = False,
    batch_size: BatchSize = 16,
    seed: Annotated[int, typer.Option(help="Seed of the draws, the sampling and the intervals.")] = 0,
    threads: Threads = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """How often does a generative judge prefer the better response?

    Each pair is judged in both orders. The tables tell the accuracy in both orders at once, its mean over them, and of
    one drawn order as j1's evaluation has it; how far the verdict follows the place; ties and judgements without a
    verdict, which count as wrong; per subset and RewardBench section, with 95% intervals. Beside the written scores
    stand expected ones, over the probabilities of the digits, where the backend tells them.

    Killed and started again with the same arguments, it goes on where it stopped; a greater --limit adds to what is
    there. Prompts that a server did not answer are listed, judged anew by the next run, and make the exit code 2.
    """
    from cepo.eval.judges.settings import JudgeSettings
    from cepo.eval.rewardbench.command import RewardBenchJob, run_rewardbench

    use_threads(threads)
    judge = JudgeSettings(
        model=model,
        backend=backend or ("transformers" if base_url is None else "server"),  # type: ignore[arg-type]
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        force_format=force_format,
        raw=raw,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        base_url=base_url,
        api_key=_api_key(api_key_file) if base_url is not None else None,
        concurrency=concurrency,
        timeout_s=timeout,
        retries=retries,
    )
    job = RewardBenchJob(judge, data, output, split, limit, tuple(subset or ()))
    with progress_bar() as progress:
        task = progress.add_task("judging", total=None)
        summary = run_rewardbench(
            job,
            progress=lambda done, total, speed: progress.update(
                task, description=f"judging {speed}".rstrip(), completed=done, total=total
            ),
        )
    for table in summary.tables():
        console.print(table)
    if summary.unread > 0.5:
        console.print(
            f"{summary.unread:.0%} of the judgements have no verdict: try a greater --max-new-tokens, or --force-format"
        )
    console.print(f"report: {output / 'report.html'}")
    _complain(data, summary.not_judged, summary.broken)


@eval_app.command()
def causal(
    output: Annotated[Path, typer.Option(help="Folder for rows.jsonl, summary.jsonl and report.html.")],
    testbed: Annotated[
        bool, typer.Option("--testbed", help="The testbed's four judges, whose inner workings are known.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, adapter folder, .gguf file, or smollm2.")] = None,
    input: Annotated[Path | None, typer.Option(help="JSONL of that model's judgements, as for cepo score.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Minutes: one pair of judges, 60 items, 4 resamples, 200 bootstrap draws.")
    ] = False,
    items: Annotated[
        int | None,
        typer.Option(help="Testbed items each judge judges, at least 8; or rows of the input that are read.", min=1),
    ] = None,
    resamples: Annotated[
        int | None, typer.Option(help="Criteria sampled for each judgement; 8, or 4 with --quick.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of judges, items, sampling, permutations and intervals.")] = 0,
    raw: Raw = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Does S measure what the criteria really do to the scores?

    Each judgement's criteria are changed in nine ways (resampled from the judge, swapped, cut, masked ...), the judge
    itself goes on, and the change of its scores is the ground truth. Every definition of S and simpler measures are
    compared with it by rank correlation. With --testbed, judges that interventions certify (one follows its criteria,
    one ignores them) must be told apart, and controls (masked criteria, redrawn parameters, permuted labels) must fail.

    Killed and started again with the same arguments, it goes on where it stopped.
    """
    use_threads(threads)
    from dataclasses import replace

    from cepo.eval.causal.command import CausalJob, run_causal
    from cepo.eval.causal.report import console_tables

    if testbed == (model is not None) or testbed == (input is not None):
        raise ValueError("eval causal needs --model and --input, or --testbed alone")
    if dtype not in ("float64", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is {dtype!r}; expected float64, float32, bfloat16 or float16")
    job = CausalJob(
        output=output,
        model=model,
        input=input,
        seed=seed,
        raw=raw,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if quick:
        job = replace(job, items=60, pairs=1, resamples=4, controlled=12, draws=200)
    job = replace(job, items=items or job.items, resamples=resamples or job.resamples)
    with progress_bar() as progress:
        task = progress.add_task("causal", total=None)
        summary = run_causal(
            job,
            progress=lambda what, done, total: progress.update(task, description=what, completed=done, total=total),
        )
    for table in console_tables(summary):
        console.print(table)
    for name, reason in summary.refused.items():
        console.print(f"no AUC for {name}: {reason}")
    for warning in summary.warnings:
        console.print(warning)
    for group, name in summary.best.items():
        console.print(f"agrees best with interventions, {group}: {name}")
    console.print(f"report: {output / 'report.html'}")


@eval_app.command()
def robustness(
    output: Annotated[Path, typer.Option(help="Folder for judgements.jsonl, summary.jsonl and report.html.")],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder, adapter folder, .gguf file, smollm2, or a server's name for it.")
    ] = None,
    input: Annotated[
        str | None,
        typer.Option("--input", "--data", help="JSONL file or hub data set; see below for what a row holds."),
    ] = None,
    transformation: Annotated[
        list[str] | None, typer.Option(help="Only this one; repeat it. Default: all that apply to the input.")
    ] = None,
    best_of: Annotated[
        str | None, typer.Option("--best-of", help="Instead: best-of-N at these N, such as 1,2,4,8.")
    ] = None,
    testbed: Annotated[
        str | None,
        typer.Option(
            help="Instead: flip the testbed's cue for these judges: able, lazy, criteria, decorative, or folders of "
            "policies trained there, with commas between."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Pairs or questions to take, drawn by the seed; testbed: items, default 200.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Best-of: orders in which each question's solutions come.")] = 1,
    verify: Annotated[
        str, typer.Option(help="Best-of: how solutions are held against answer, math or exact.")
    ] = "math",
    split: Annotated[str | None, typer.Option(help="Split of a hub data set; default: the benchmark's own.")] = None,
    subset: Annotated[list[str] | None, typer.Option(help="Only this subset of the pairs; repeat it.")] = None,
    backend: Backend = None,
    base_url: BaseUrl = None,
    api_key_file: ApiKeyFile = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    force_format: ForceFormat = False,
    raw: Raw = False,
    batch_size: BatchSize = 16,
    concurrency: Concurrency = 8,
    timeout: Timeout = 300.0,
    retries: Retries = 5,
    threads: Threads = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the pairs taken, of who is shown first, and of every draw.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Does the judge still find the better response when nothing that matters has changed?

    **Transformations** (the default): every pair is judged as it is and again with both responses rewritten
    mechanically: quotes, typos, lookalike letters, links, text to ignore, comments in code, another format of the
    answer. Shown are the drop of accuracy on the same pairs, the share of verdicts that changed, and how often the
    judge is right under all of them. A row holds `prompt`, `chosen` and `rejected`, and may hold `subset`;
    `rewardbench` and `rewardbench2` are known by these names.

    **--best-of 1,2,4**: the judge picks one of N solutions by a knockout, beside a random pick, a majority vote and the
    oracle. Rows hold `question`, `completions` and `correct` (or `answer`, to verify against), or are pairs whose
    chosen solution is right; pairs of one question are put together.

    **--testbed lazy,able**: the accuracy of the testbed's judges where the longer response is the better one in 10% to
    90% of the items. Judges are warmed up first, a minute or two each, and kept.

    Killed and started again with the same arguments, it goes on where it stopped.
    """
    use_threads(threads)
    if best_of is not None and (testbed is not None or transformation):
        raise ValueError("--best-of, --testbed and --transformation ask for different things; give one of them")
    if testbed is not None:
        if model is not None or input is not None or transformation:
            raise ValueError("--testbed brings its own judges and items; leave out --model, --input, --transformation")
        _cue_flips(testbed, output, limit, seed)
        return
    if model is None or input is None:
        raise ValueError("robustness needs --model and --input, or --testbed alone")
    if best_of is not None and (split is not None or subset):
        raise ValueError("--best-of reads a JSONL file without splits or subsets; leave out --split and --subset")
    from cepo.eval.judges.settings import JudgeSettings

    judge = JudgeSettings(
        model=model,
        backend=backend or ("transformers" if base_url is None else "server"),  # type: ignore[arg-type]
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        force_format=force_format,
        raw=raw,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        base_url=base_url,
        api_key=_api_key(api_key_file) if base_url is not None else None,
        concurrency=concurrency,
        timeout_s=timeout,
        retries=retries,
    )
    with progress_bar() as progress:
        task = progress.add_task("judging", total=None)

        def show(done: int, total: int, speed: str) -> None:
            progress.update(task, description=f"judging {speed}", completed=done, total=total)

        if best_of is not None:
            from cepo.eval.best_of_n.command import BestOfJob, measure_best_of

            sizes = tuple(_whole("--best-of", part) for part in best_of.split(","))
            picked = measure_best_of(
                BestOfJob(judge, Path(input), output, sizes, draws, verify, limit, seed),  # type: ignore[arg-type]
                progress=show,
            )
            console.print(picked.table())
            failed, broken = picked.failed, picked.broken
        else:
            from cepo.eval.robustness.command import RobustnessJob, measure_robustness
            from cepo.eval.robustness.transformations import TRANSFORMATIONS

            names = tuple(transformation or TRANSFORMATIONS)
            found = measure_robustness(
                RobustnessJob(judge, input, output, names, limit, split, tuple(subset or ()), seed),
                progress=show,
            )
            console.print(found.table())
            if found.forced:
                console.print(f"forced, for want of a verdict: {found.forced} of {found.judgements}")
            if found.idle:
                console.print(f"applies to no pair: {', '.join(found.idle)}")
            failed, broken = found.failed, found.broken
    console.print(f"report: {output / 'report.html'}")
    _complain(input, failed, broken)


def _cue_flips(testbed: str, output: Path, limit: int | None, seed: int) -> None:
    from cepo.eval.cue_flips.command import FlipsJob, flip_table, measure_flips

    judges = tuple(name.strip() for name in testbed.split(","))
    job = FlipsJob(judges, output, seed=seed) if limit is None else FlipsJob(judges, output, limit, seed)
    with progress_bar() as progress:
        task = progress.add_task("testbed", total=None)
        flips = measure_flips(
            job,
            progress=lambda judge, done, total, _: progress.update(
                task, description=judge, completed=done, total=total
            ),
        )
    from cepo.eval.report.tables import console_table

    header, rows = flip_table(flips)
    table = console_table(*header)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    console.print(f"report: {output / 'report.html'}")


def _api_key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("OPENAI_API_KEY")
    if not file.is_file():
        raise ValueError(f"--api-key-file is {str(file)!r}, which is no file; expected one with the key in it")
    return file.read_text(encoding="utf-8").strip()


def _whole(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} holds {text.strip()!r}; expected whole numbers with commas between them") from None


def _complain(input: str, failed: Mapping[str, int], broken: Sequence[tuple[int, str]]) -> None:
    """End in an error where rows were lost, after all others are done and shown."""
    complaints = []
    if broken:
        shown = "; ".join(f"line {number}: {reason}" for number, reason in broken[:5])
        more = "; ..." if len(broken) > 5 else ""
        complaints.append(f"input {input!r} has {len(broken)} line(s) that could not be used: {shown}{more}")
    if failed:
        shown = "; ".join(f"{reason} ({count}x)" for reason, count in list(failed.items())[:3])
        complaints.append(f"{sum(failed.values())} prompt(s) could not be judged: {shown}")
    if complaints:
        raise ValueError(
            f"{'. '.join(complaints)}. Everything else was judged; mend this and run the same command again"
        )
