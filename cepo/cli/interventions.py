"""The commands of `cepo eval` that ask for causes: sensitivity, cue-flips, causal."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cepo.cli import checks
from cepo.cli.evaluate import Output, finish
from cepo.cli.shared import (
    Device,
    Dtype,
    Layers,
    OptionalModel,
    Raw,
    Threads,
    TrustRemoteCode,
    console,
    showing,
    use_threads,
)
from cepo.eval.judges.reward import RewardSettings
from cepo.files import counted
from cepo.train.file_kinds import FILES, SOURCES

_NODES = (1, 2, 4, 8, 16)
"""Of `cepo.eval.causal.measures`, whose import would wait for torch."""


def sensitivity(
    context: typer.Context,
    reward_model: Annotated[
        str,
        typer.Option(
            help="Reward model: folder of cepo reward-model, or hub id of a sequence classifier with one output.",
            callback=checks.model,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help=f"Edits (prompt, chosen, rejected, attribute, attribute_words): {SOURCES}; or testbed.",
            callback=checks.data,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for rows.jsonl, summary.jsonl and report.html.",
            callback=checks.folder("rows.jsonl", "summary.jsonl", "report.html"),
        ),
    ],
    split: Annotated[str | None, typer.Option(help="Split of a hub data set. Default: train.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Number of edits to measure. Default: all; for the testbed, those of 100 responses.",
            callback=checks.at_least(1),
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the testbed's edits.", callback=checks.at_least(0))] = 0,
    threads: Threads = None,
    dtype: Dtype = RewardSettings.dtype,
    device: Device = RewardSettings.device,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Does a reward model's gradient fall on the attribute that was edited, or elsewhere?

    An edit is a pair in which one response is the other with one attribute made better or worse. Two things are shown
    for each edit: the exact gradient of the reward at the chosen response's tokens, with the share of its energy that
    falls on the attribute's tokens; and what each token contributed to the reward, relative to the rejected response.
    These attributions add up to the difference of the two rewards. The attribute's tokens are those that hold one of
    attribute_words; without that column, those that the edit changed. The page draws both as heat maps.

    An example, and a row of `edits.jsonl`:

        cepo eval sensitivity --reward-model runs/reward/final \\
            --data edits.jsonl --output runs/sensitivity

        {"prompt": "What is the capital of Australia?",
         "chosen": "Canberra.", "rejected": "Melbourne.",
         "attribute": "accuracy", "attribute_words": ["Canberra", "Melbourne"]}

    --data testbed has edits of one attribute alone, and edits that change other things too. Two ways to tell these
    apart are compared: leak, the share of the change that falls outside the attribute's tokens, and edit distance.

    The same command resumes a killed run.
    """
    checks.refuse_split(context, data)
    if data != "testbed":
        checks.refuse_given(context, ["seed"], "needs --data testbed: only its edits are drawn at random")
    use_threads(threads)
    from cepo.eval.sensitivity.command import SensitivityJob, run_sensitivity

    settings = RewardSettings(reward_model, seed, dtype, device, trust_remote_code=trust_remote_code)
    with showing("measuring") as show:
        summary = run_sensitivity(SensitivityJob(settings, data, output, split, limit), progress=show)
    for table in summary.tables():
        console.print(table)
    if summary.left_out:
        reasons = Counter(reason for _, reason in summary.left_out).most_common(8)
        shown = "; ".join(f"{reason} ({count}x)" for reason, count in reasons)
        console.print(f"left out, not edits: {counted(len(summary.left_out), 'row')}: {shown}", markup=False)
    finish(output, data, summary.failed, ())


def cue_flips(
    judge: Annotated[
        list[str],
        typer.Option(
            help="Judge to measure: able, lazy, hollow, decorative, copied, criteria, query, or the folder of a policy "
            "trained on the testbed; may be repeated.",
            callback=checks.testbed_judges,
        ),
    ],
    output: Output,
    items: Annotated[
        int, typer.Option(help="Number of items for each cue agreement (10% to 90%).", callback=checks.at_least(1))
    ] = 200,
    seed: Annotated[
        int, typer.Option(help="Seed of the items and of the judges' warm-up.", callback=checks.at_least(0))
    ] = 0,
    threads: Threads = None,
) -> None:
    """Does a judge of the testbed follow a spurious cue, the length of a response?

    The table shows each judge's accuracy where the longer response is the better one in 10%, 30%, 50%, 70% and 90% of
    the items. The testbed's own judges are warmed up first; each takes a minute or two and is then cached.

    An example:

        cepo eval cue-flips --judge lazy --judge able --output runs/flips

    The same command resumes a killed run.
    """
    use_threads(threads)
    from cepo.eval.cue_flips.command import FlipsJob, flip_table, measure_flips
    from cepo.eval.report.tables import ConsoleTable

    with showing("judging") as show:
        flips = measure_flips(FlipsJob(tuple(judge), output, items, seed), progress=show)
    header, rows = flip_table(flips)
    console.print(ConsoleTable(header, rows, "greedy accuracy"))
    console.print(f"report: {output / 'report.html'}")


def causal(
    context: typer.Context,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for rows.jsonl, summary.jsonl and report.html.",
            callback=checks.folder("parts", "rows.jsonl", "summary.jsonl", "report.html"),
        ),
    ],
    testbed: Annotated[
        bool, typer.Option("--testbed", help="Evaluate on a testbed judge, where the cause of each verdict is known.")
    ] = False,
    world: Annotated[
        str,
        typer.Option(
            help="Testbed judge: lazy, hollow, decorative, copied, able, criteria or query; in words: words-lazy ...",
            callback=checks.one_of(*checks.WORLDS),
        ),
    ] = "lazy",
    layers: Layers = None,
    model: OptionalModel = None,
    input: Annotated[
        Path | None,
        typer.Option(help=f"File of judgements by the model, as for cepo score: {FILES}.", callback=checks.rows),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Finish in minutes: 16 prompts, 6 completions each, without the certified pair."),
    ] = False,
    items: Annotated[
        int | None,
        typer.Option(
            help="Number of testbed prompts (at least 8), or of input rows, from the first. Default: 48, or 16 with "
            "--quick.",
            callback=checks.at_least(1),
        ),
    ] = None,
    completions: Annotated[
        int | None,
        typer.Option(
            help="Number of completions per testbed prompt. Default: 8, or 6 with --quick.", callback=checks.at_least(2)
        ),
    ] = None,
    without_pair: Annotated[
        bool, typer.Option("--without-pair", help="Leave out the certified pair of testbed judges.")
    ] = False,
    most_nodes: Annotated[
        int,
        typer.Option(help="Largest number of nodes along a path that is tried: 1, 2, 4, 8 or 16."),
    ] = 16,
    estimates_only: Annotated[
        bool,
        typer.Option(
            "--estimates-only",
            help="Leave out the controls and the scores that do not estimate an effect, which are most of the cost.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Seed of judge, items, sampling and donors.", callback=checks.at_least(0))
    ] = 0,
    raw: Raw = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Does S single out, within a prompt, the completions whose verdict came from their criteria?

    Every score, and every approximation of the effect, is compared with the exact effect of each completion's own
    spans, measured with other donors and more of them. With --testbed, several completions of each prompt are sampled
    from a judge. Each is known to follow evidence or length (its mode), and a score must tell the two apart within the
    prompt. Controls (a certified pair of judges, hidden criteria, shuffled modes, randomised weights) must come out as
    expected.

    An example, and a row of `judged.jsonl`, which `cepo score` takes too (shortened):

        cepo eval causal --model smollm2 --input judged.jsonl \\
            --output runs/causal

        {"prompt": "What is the capital of Australia?",
         "chosen": "Canberra.", "rejected": "Sydney.",
         "judge_output": "<specific_criteria> ..."}

    The same command resumes a killed run.
    """
    if testbed == (model is not None) or testbed == (input is not None):
        raise checks.missing(context, "Give either --model and --input, or --testbed alone.")
    if most_nodes not in _NODES:
        raise ValueError(f"--most-nodes is {most_nodes}; expected one of {', '.join(map(str, _NODES))}")
    if testbed:
        checks.refuse_given(context, ("raw", "trust_remote_code"), "cannot be used with --testbed")
        if items is not None and items < 8:
            raise ValueError(f"--items is {items}; expected at least 8 with --testbed")
    else:
        of_testbed = ("world", "layers", "completions", "without_pair")
        checks.refuse_given(context, of_testbed, "needs --testbed")
    if not world.startswith("words-"):
        checks.refuse_given(context, ["layers"], "needs a world in words, such as --world words-lazy")
    use_threads(threads)
    from cepo.eval.causal.command import CausalJob, run_causal
    from cepo.eval.causal.report import console_tables

    job = CausalJob(
        output=output,
        model=model,
        input=input,
        world=world,
        layers=layers,
        pair=not without_pair,
        most_nodes=most_nodes,
        estimates_only=estimates_only,
        seed=seed,
        raw=raw,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if quick:
        job = replace(job, items=16, completions=6, pair=False, controlled=8)
    job = replace(job, items=items or job.items, completions=completions or job.completions)
    with showing() as show:
        summary = run_causal(job, progress=lambda what, done, total: show(done, total, what))
    for table in console_tables(summary):
        console.print(table)
    for name, reason in summary.refused.items():
        console.print(f"no figure for {name}: {reason}")
    for warning in summary.warnings:
        console.print(warning)
    console.print(f"report: {output / 'report.html'}")
