"""The command that makes pairs for reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cepo.cli import checks
from cepo.cli.judge_options import with_writer
from cepo.cli.shared import Threads, console, showing, use_threads
from cepo.eval.judges.settings import JudgeSettings
from cepo.files import counted
from cepo.train.file_kinds import SOURCES


@with_writer
def augment(
    context: typer.Context,
    writer: JudgeSettings,
    data: Annotated[
        str,
        typer.Option(help=f"Preferences (prompt, chosen, rejected): {SOURCES}; or testbed.", callback=checks.data),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for pairs.jsonl, report.html and the models' answers.",
            callback=checks.folder("pairs.jsonl", "writings.jsonl", "differences.jsonl", "report.html"),
        ),
    ],
    kinds: Annotated[str, typer.Option(help="Kinds of pairs to make, separated by commas, e.g. original,irrelevant.")],
    filter_model: Annotated[
        str | None,
        typer.Option(
            help="Reward model that drops the pairs it already gets right: folder or hub id. Default: no filter.",
            callback=checks.model,
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set. Default: train.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of preferences to read. Default: all.", callback=checks.at_least(1))
    ] = None,
    test_fraction: Annotated[
        float,
        typer.Option(
            help="Share of the prompts, from 0 to 1, whose pairs are marked for testing.",
            callback=checks.at_least(0, 1),
        ),
    ] = 0.02,
    threads: Threads = None,
) -> None:
    """Make more pairs from preferences, for reward models that follow causes and not cues.

    Kinds by rule: `original` (the preference itself), `irrelevant` (both responses under an unrelated prompt, a tie),
    `relevance`, `style`, `wrong-number`, `dropped-sentence`. Kinds that the writer makes, checked by a second call:

    - `degrade`, `upgrade`: the chosen response made worse, the rejected one better, one attribute at a time.
    - `irrelevant-by-writer`: as `irrelevant`, where the writer finds that neither response answers the prompt.
    - `aligned`, `paraphrase`: the rejected response made as good as the chosen one, the chosen one reworded; ties.

    docs/reward-models.md describes each.

    An example; a row of `preferences.jsonl`, and one of `runs/pairs/pairs.jsonl` (shortened):

        cepo augment --data preferences.jsonl --output runs/pairs \\
            --kinds original,degrade --writer smollm2

        {"prompt": "What is the capital of Australia?",
         "chosen": "Canberra.", "rejected": "Sydney, the largest city."}

        {"id": "7/degrade-0", "split": "train", "kind": "degrade",
         "tie": false, "prompt": "What is the capital ...",
         "chosen": "Canberra.", "rejected": "Melbourne.",
         "attribute": "accuracy", "weight": 0.7, "kept": true, ...}

    Prompts are split into training and test before pairs are made from them. A pair that cannot be read, fails a
    check, or is already right for the filter's model stays in the file with `"kept": false` and the reason; the tables
    count these. `cepo reward-model RECIPE --data runs/pairs/pairs.jsonl` trains on the others.

    The same command resumes a killed run. If a server left prompts unanswered, the exit code is 2, and the next run
    sends them again.
    """
    checks.refuse_split(context, data)
    from cepo.eval.augment.job import AugmentJob, chosen_kinds

    names = tuple(name.strip() for name in kinds.split(",") if name.strip())
    job = AugmentJob(data, output, names, writer, filter_model, split, limit, test_fraction)
    chosen_kinds(job)  # refuses what it can before torch is imported
    use_threads(threads)
    from cepo.eval.augment.command import augment as run
    from cepo.eval.report.tables import ConsoleTable

    with showing("augmenting") as show:
        summary = run(job, progress=show)
    for title, (header, rows) in summary.tables().items():
        console.print(ConsoleTable(header, rows, title))
    console.print(f"pairs: {output / 'pairs.jsonl'}", soft_wrap=True)
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)
    if summary.writer.used:
        console.print(f"{summary.writer.told}, {summary.writer.failed.total()} failed", highlight=False)
    if summary.writer.cut:
        console.print(f"cut: {counted(summary.writer.cut, 'answer')}; raise --max-new-tokens to let more finish")
    if summary.writer.failed:
        raise ValueError(
            f"{counted(summary.writer.failed.total(), 'prompt')} got no answer, and no pair of theirs is kept; run "
            "the same command again to send only these"
        )
