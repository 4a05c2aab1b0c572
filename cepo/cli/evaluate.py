"""The commands of `cepo eval` that ask whether a judge is right: rewardbench, robustness, best-of-n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cepo.cli import checks
from cepo.cli.judge_options import with_judge
from cepo.cli.shared import Threads, console, showing, use_threads
from cepo.eval.judges.reward import RewardSettings
from cepo.eval.judges.settings import JudgeSettings
from cepo.eval.robustness.transformations import TRANSFORMATIONS, check_names
from cepo.train.file_kinds import SOURCES

Output = Annotated[
    Path,
    typer.Option(
        help="Folder for judgements.jsonl, summary.jsonl and report.html.",
        callback=checks.folder("judgements.jsonl", "summary.jsonl", "report.html"),
    ),
]
Pairs = Annotated[
    str,
    typer.Option(
        help=f"Preferences (prompt, chosen, rejected): rewardbench, rewardbench2, or {SOURCES}.",
        callback=checks.data,
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of a hub data set. Default: the benchmark's own, or train.")]
Subset = Annotated[list[str] | None, typer.Option(help="Name of a subset to keep; may be repeated. Default: all.")]


def _known_transformations(names: list[str] | None) -> list[str] | None:
    check_names(names or [])
    return names


@with_judge
def rewardbench(
    context: typer.Context,
    judge: JudgeSettings | RewardSettings,
    data: Pairs,
    output: Output,
    split: Split = None,
    subset: Subset = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of rows to draw at random. Default: all.", callback=checks.at_least(1))
    ] = None,
    ties: Annotated[
        bool,
        typer.Option(
            "--ties",
            help="Include ties, and tell the judge in every prompt that equal scores are allowed.",
        ),
    ] = False,
    threads: Threads = None,
) -> None:
    """How often does a judge, or a reward model, prefer the better response?

    An example, and a row of `preferences.jsonl`:

        cepo eval rewardbench --model smollm2 --data preferences.jsonl \\
            --output runs/eval --limit 4 --max-new-tokens 64 --force-format

        {"prompt": "What is the capital of Australia?",
         "chosen": "Canberra.", "rejected": "Sydney, the largest city."}

    A generative judge (--model) judges each pair in both orders. The tables show how often it is right in both orders,
    on average over the two, and in one drawn at random (as in j1's evaluation); how much the verdict depends on the
    order; and the shares of ties and of judgements without a verdict, both of which count as wrong. All are given per
    subset and RewardBench section, with 95% intervals. Expected scores, from the probabilities of the digits, are added
    if the backend returns these. With --ties, rows in which neither response is better are judged too: the share of
    equal scores is shown for them and for preferences, and they do not count in any accuracy.

    A reward model (--reward-model) gives each response a reward. The tables show its accuracy, with ties counted as
    wrong and with ties sharing the credit; the accuracy of always choosing the longer or the shorter response; its
    accuracy where the better response is the longer and where it is the shorter; and RewardBench 2's own measure for
    its subset Ties.

    The same command resumes a killed run, and with a larger --limit it adds to a finished one. Prompts that a server
    did not answer, and texts that are too long for a reward model, are listed, and the exit code is 2.
    """
    checks.refuse_split(context, data)
    use_threads(threads)
    from cepo.eval.rewardbench.command import RewardBenchJob, run_rewardbench

    with showing("judging") as show:
        job = RewardBenchJob(judge, data, output, split, limit, tuple(subset or ()), ties)
        summary = run_rewardbench(job, progress=show)
    for table in summary.tables():
        console.print(table)
    if summary.unread > 0.5:
        console.print(
            f"{summary.unread:.0%} of the judgements have no verdict: try a larger --max-new-tokens, or --force-format"
        )
    finish(output, data, summary.collected.failed, summary.broken)


@with_judge
def robustness(
    context: typer.Context,
    judge: JudgeSettings | RewardSettings,
    data: Pairs,
    output: Output,
    transformation: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a transformation; may be repeated. Default: all that apply to the data.",
            callback=_known_transformations,
        ),
    ] = None,
    split: Split = None,
    subset: Subset = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of pairs to draw at random. Default: all.", callback=checks.at_least(1))
    ] = None,
    threads: Threads = None,
) -> None:
    """Does the judge still find the better response when nothing that matters has changed?

    Every pair is judged as it is, and again with both responses rewritten mechanically: quotes, typos, lookalike
    letters, links, text to ignore, comments in code, another format of the answer. The first table shows the drop in
    accuracy on the same pairs, the share of verdicts that changed, and how often the judge is right under all
    transformations. The second shows the accuracy with ties as half, the accuracy of always choosing the longer or the
    shorter response, and the judge's accuracy where the better response is the longer and where it is the shorter. The
    judge may be a reward model (--reward-model).

    An example, and a row of `preferences.jsonl`:

        cepo eval robustness --model smollm2 --data preferences.jsonl \\
            --output runs/robust --max-new-tokens 64 --force-format

        {"prompt": "What is the capital of Australia?",
         "chosen": "Canberra.", "rejected": "Sydney, the largest city."}

    The same command resumes a killed run.
    """
    checks.refuse_split(context, data)
    use_threads(threads)
    from cepo.eval.robustness.command import RobustnessJob, measure_robustness

    with showing("judging") as show:
        names = tuple(transformation or TRANSFORMATIONS)
        job = RobustnessJob(judge, data, output, names, limit, split, tuple(subset or ()))
        found = measure_robustness(job, progress=show)
    for table in found.tables():
        console.print(table)
    if found.collected.forced:
        console.print(f"scores forced: {found.collected.forced} of {len(found.collected.records)} judgements")
    if found.idle:
        console.print(f"transformations that apply to no pair: {', '.join(found.idle)}")
    finish(output, data, found.collected.failed, found.broken)


@with_judge
def best_of_n(
    judge: JudgeSettings | RewardSettings,
    data: Annotated[
        Path,
        typer.Option(
            help=f"Questions with completions and correct or answer, or preferences: {SOURCES}.",
            callback=checks.data,
        ),
    ],
    output: Output,
    n: Annotated[
        str,
        typer.Option(
            "--n", help="Numbers of candidates, separated by commas, e.g. 1,2,4,8.", callback=checks.whole_numbers(1)
        ),
    ],
    draws: Annotated[
        int, typer.Option(help="Number of random orders of each question's solutions.", callback=checks.at_least(1))
    ] = 1,
    verify: Annotated[
        str,
        typer.Option(
            help="How solutions are compared with the answer: math or exact.", callback=checks.one_of("math", "exact")
        ),
    ] = "math",
    limit: Annotated[
        int | None,
        typer.Option(help="Number of questions to draw at random. Default: all.", callback=checks.at_least(1)),
    ] = None,
    threads: Threads = None,
) -> None:
    """How often is the judge's pick among N solutions right?

    A generative judge (--model) picks one of N solutions in a knockout tournament. The table compares it with a random
    pick, a majority vote and the oracle (right if any solution is). A reward model (--reward-model) scores each
    solution once: its best of N is exact over all draws, ties broken evenly, and is compared with always picking the
    longest or the shortest solution. A row holds `question`, `completions` (a list) and either `correct` (a list of
    booleans) or `answer`, to verify the completions against. Preferences work too: the chosen solution is right, the
    rejected one wrong, and pairs with the same prompt are merged.

    An example, and a row of `questions.jsonl`:

        cepo eval best-of-n --model smollm2 --data questions.jsonl \\
            --output runs/best --n 1,2

        {"question": "How much is 7 + 5?",
         "completions": ["It is 12.", "It is 13."], "correct": [true, false]}

    The same command resumes a killed run.
    """
    use_threads(threads)
    from cepo.eval.best_of_n.command import BestOfJob, measure_best_of

    sizes = tuple(map(int, n.split(",")))
    job = BestOfJob(judge, data, output, sizes, draws, verify, limit)  # type: ignore[arg-type]
    with showing("judging") as show:
        picked = measure_best_of(job, progress=show)
    console.print(picked.table())
    finish(output, str(data), picked.failed, picked.broken)


def finish(output: Path, data: str, failed: Mapping[str, int], broken: Sequence[tuple[int, str]]) -> None:
    """Print the path of the report; end in an error if rows were lost, after everything else was judged and shown.

    Ties without --ties, and rows that `cepo augment` did not keep, are not an error: they are counted and left out.
    """
    from cepo.files import counted
    from cepo.train.rows import NOT_KEPT, UNASKED_TIE

    console.print(f"report: {output / 'report.html'}")
    lost = [(number, reason) for number, reason in broken if not reason.startswith((UNASKED_TIE, NOT_KEPT))]
    ties = [reason for _, reason in broken if reason.startswith(UNASKED_TIE)]
    if ties:
        told = f"left out: {counted(len(ties), 'row')}, each of which {ties[0]}"
        console.print(told, highlight=False, soft_wrap=True)
    if dropped := sum(reason.startswith(NOT_KEPT) for _, reason in broken):
        console.print(f"left out: {counted(dropped, 'row')} with kept: false", highlight=False, soft_wrap=True)
    broken, complaints = lost, []
    if broken:
        shown = "; ".join(f"row {number}: {reason}" for number, reason in broken[:5])
        more = "; ..." if len(broken) > 5 else ""
        complaints.append(f"data {data!r} has {counted(len(broken), 'row')} that could not be used: {shown}{more}")
    if failed:
        shown = "; ".join(f"{reason} ({count}x)" for reason, count in list(failed.items())[:3])
        complaints.append(f"{counted(sum(failed.values()), 'prompt')} could not be judged: {shown}")
    if complaints:
        raise ValueError(
            f"{'. '.join(complaints)}. Everything else was judged; correct this and run the same command again"
        )
