"""The commands of `cepo eval`: rewardbench, robustness, best-of-n, sensitivity, cue-flips, causal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cepo.cli import checks
from cepo.cli.judge_options import with_judge
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
from cepo.eval.judges.settings import JudgeSettings

eval_app = typer.Typer(
    cls=checks.OptionNames,
    help="Evaluate a judge: is it right, is it robust, and does S measure what its criteria do?",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_NODES = (1, 2, 4, 8, 16)
"""Of `cepo.eval.causal.measures`, whose import would wait for torch."""
Output = Annotated[
    Path,
    typer.Option(help="Folder for judgements.jsonl, summary.jsonl and report.html.", callback=checks.folder),
]
Pairs = Annotated[
    str,
    typer.Option(
        help="rewardbench, rewardbench2, another data set, or a file of prompt, chosen, rejected.",
        callback=checks.data,
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of a hub data set. Default: the benchmark's own, or train.")]
Subset = Annotated[list[str] | None, typer.Option(help="Name of a subset to keep; may be repeated. Default: all.")]


@eval_app.command()
@with_judge
def rewardbench(
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
            help="Judge ties too, and tell the judge in every prompt that equal scores are allowed (like data.ties).",
        ),
    ] = False,
) -> None:
    """How often does a judge, or a reward model, prefer the better response?

    An example, and a row of `preferences.jsonl`:

        cepo eval rewardbench --model smollm2 --data preferences.jsonl \\
            --output runs/eval --limit 4 --max-new-tokens 64 --force-format

        {"prompt": "What is the capital of Australia?",
         "chosen": "Canberra.", "rejected": "Sydney, the largest city."}

    A judge that writes (--model) judges each pair in both orders. The tables show the accuracy in both orders at once,
    its mean over the orders, and that of one randomly drawn order (as in j1's evaluation); how much the verdict depends
    on the order; and the shares of ties and of judgements without a verdict, which count as wrong. All are given per
    subset and RewardBench section, with 95% intervals. Expected scores, over the probabilities of the digits, are added
    where the backend returns those. With --ties, rows in which neither response is better are judged as well, and the
    share of equal scores on them is shown beside that on preferences; they count towards no accuracy.

    A reward model (--reward-model) gives each response a reward. The tables show the accuracy with ties as wrong and
    with ties sharing the credit; what always choosing the longer or the shorter response would get; the accuracy by
    which response is longer; and RewardBench 2's own measure of its subset Ties.

    Run a killed command again with the same arguments, and it resumes. A larger --limit adds to what is there. Prompts
    that a server did not answer, and texts that are too long for a reward model, are listed, and the exit code is 2.
    """
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
    _finish(output, data, summary.collected.failed, summary.broken)


@eval_app.command()
@with_judge
def robustness(
    judge: JudgeSettings | RewardSettings,
    data: Pairs,
    output: Output,
    transformation: Annotated[
        list[str] | None,
        typer.Option(help="Name of a transformation; may be repeated. Default: all that apply to the data."),
    ] = None,
    split: Split = None,
    subset: Subset = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of pairs to draw at random. Default: all.", callback=checks.at_least(1))
    ] = None,
) -> None:
    """Does the judge still find the better response when nothing that matters has changed?

    Every pair is judged as it is, and again with both responses rewritten mechanically: quotes, typos, lookalike
    letters, links, text to ignore, comments in code, another format of the answer. The table shows the drop of accuracy
    on the same pairs, the share of verdicts that changed, and how often the judge is right under all transformations;
    below it, the accuracy with ties as half, that of the longer and of the shorter response, and that by which response
    is longer. The judge may be a reward model (--reward-model).

    Run a killed command again with the same arguments, and it resumes.
    """
    from cepo.eval.robustness.transformations import TRANSFORMATIONS, check_names

    names = tuple(transformation or TRANSFORMATIONS)
    check_names(names)
    from cepo.eval.robustness.command import RobustnessJob, measure_robustness

    with showing("judging") as show:
        job = RobustnessJob(judge, data, output, names, limit, split, tuple(subset or ()))
        found = measure_robustness(job, progress=show)
    for table in found.tables():
        console.print(table)
    if found.collected.forced:
        console.print(f"scores forced: {found.collected.forced} of {len(found.collected.records)} judgements")
    if found.idle:
        console.print(f"transformations that apply to no pair: {', '.join(found.idle)}")
    _finish(output, data, found.collected.failed, found.broken)


@eval_app.command("best-of-n")
@with_judge
def best_of_n(
    judge: JudgeSettings | RewardSettings,
    data: Annotated[
        Path,
        typer.Option(
            help="File of question, completions, and correct or answer; or of preference pairs.", callback=checks.data
        ),
    ],
    output: Output,
    n: Annotated[str, typer.Option("--n", help="Numbers of candidates, separated by commas, e.g. 1,2,4,8.")],
    draws: Annotated[
        int, typer.Option(help="Random orders of each question's solutions.", callback=checks.at_least(1))
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
) -> None:
    """How often is the judge's pick among N solutions right?

    A judge that writes (--model) picks one of N solutions by a knockout. The table compares it with a random pick, a
    majority vote and the oracle. A reward model (--reward-model) scores each solution once: its best of N is exact over
    all draws, ties broken evenly, and is shown beside the longest and the shortest solution. A row holds `question`,
    `completions` (a list) and `correct` (a list of booleans), or `answer` to verify the completions against. Preference
    pairs work too: the chosen solution is right, the rejected one wrong, and pairs with the same prompt are merged.

    Run a killed command again with the same arguments, and it resumes.
    """
    sizes = _whole_numbers(n)
    from cepo.eval.best_of_n.command import BestOfJob, measure_best_of

    job = BestOfJob(judge, data, output, sizes, draws, verify, limit)  # type: ignore[arg-type]
    with showing("judging") as show:
        picked = measure_best_of(job, progress=show)
    console.print(picked.table())
    _finish(output, str(data), picked.failed, picked.broken)


@eval_app.command()
def sensitivity(
    reward_model: Annotated[
        str,
        typer.Option(
            help="Folder that cepo reward-model wrote, or hub id of a sequence classifier with one output.",
            callback=checks.model,
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Edits: a file or data set of prompt, chosen, rejected, attribute, attribute_words; or testbed.",
            callback=checks.data,
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for rows.jsonl, summary.jsonl and report.html.", callback=checks.folder)
    ],
    split: Split = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Number of edits to measure. Default: all; for the testbed, of 100 responses.",
            callback=checks.at_least(1),
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the testbed's edits.")] = 0,
    threads: Threads = None,
    dtype: Dtype = RewardSettings.dtype,
    device: Device = RewardSettings.device,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Does a reward model's gradient fall on the attribute that was edited, or elsewhere?

    An edit is a pair in which one response is the other with one attribute made better or worse. Shown for each: the
    exact gradient of the reward at the chosen response's tokens (how much of its energy falls on the attribute's), and
    what each token did to the reward against the rejected response: attributions along the path between the two,
    which add up to the difference of the rewards. The attribute's tokens are those that hold one of attribute_words;
    without that column, those that the edit changed. The page shows both as heat maps. A row of edits:

        {"prompt": "What is the capital of Australia?",
         "chosen": "Canberra.", "rejected": "Melbourne.",
         "attribute": "accuracy", "attribute_words": ["Canberra", "Melbourne"]}

    With --data testbed, edits whose truth is known compare leak, the share of the change that falls outside the
    attribute's tokens, with plain edit distance.

    Run a killed command again with the same arguments, and it resumes.
    """
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
        console.print(f"left out: {len(summary.left_out)} row(s) that are not edits: {shown}", markup=False)
    _finish(output, data, summary.failed, ())


@eval_app.command("cue-flips")
def cue_flips(
    judge: Annotated[
        list[str],
        typer.Option(
            help="able, lazy, hollow, decorative, copied, criteria, query, or the folder of a policy trained there; "
            "may be repeated.",
            callback=checks.testbed_judges,
        ),
    ],
    output: Output,
    items: Annotated[int, typer.Option(help="Items per agreement of the cue.", callback=checks.at_least(1))] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the items and of the judges' warm-up.")] = 0,
    threads: Threads = None,
) -> None:
    """Does a judge of the testbed follow a spurious cue, the length of a response?

    The table shows each judge's accuracy where the longer response is the better one in 10%, 30%, 50%, 70% and 90% of
    the items. The testbed's own judges are warmed up first; each takes a minute or two and is then cached.

    Run a killed command again with the same arguments, and it resumes.
    """
    use_threads(threads)
    from cepo.eval.cue_flips.command import FlipsJob, flip_table, measure_flips
    from cepo.eval.report.tables import console_table

    with showing("judging") as show:
        flips = measure_flips(FlipsJob(tuple(judge), output, items, seed), progress=show)
    header, rows = flip_table(flips)
    console.print(console_table(*header, rows=rows, title="greedy accuracy"))
    console.print(f"report: {output / 'report.html'}")


@eval_app.command()
def causal(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="Folder for rows.jsonl, summary.jsonl and report.html.", callback=checks.folder)
    ],
    testbed: Annotated[
        bool, typer.Option("--testbed", help="Evaluate on a testbed judge, whose completions have a known mode.")
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
        Path | None, typer.Option(help="File of that model's judgements, as for cepo score.", callback=checks.data)
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Finish in minutes: 16 prompts of 6 completions, no certified pair."),
    ] = False,
    items: Annotated[
        int | None,
        typer.Option(
            help="Testbed prompts, at least 8, by default 48; or rows of the input to measure.",
            callback=checks.at_least(1),
        ),
    ] = None,
    completions: Annotated[
        int | None,
        typer.Option(
            help="Completions to sample per testbed prompt. Default: 8, or 6 with --quick.", callback=checks.at_least(2)
        ),
    ] = None,
    without_pair: Annotated[
        bool, typer.Option("--without-pair", help="Leave the certified pair of testbed judges out.")
    ] = False,
    most_nodes: Annotated[
        int,
        typer.Option(help="Largest number of nodes along a path: 1, 2, 4, 8 or 16; these are tried up to it."),
    ] = 16,
    estimates_only: Annotated[
        bool,
        typer.Option(
            "--estimates-only",
            help="Leave out scores that estimate no effect, and the controls; they cost most on a large model.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of judge, items, sampling and donors.")] = 0,
    raw: Raw = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Does S tell, within a prompt, the completion whose verdict came from its criteria?

    Every score, and every approximation of the effect, is compared with the exact effect of each completion's own spans
    (other donors, and more of them). With --testbed, several completions of each prompt are sampled from a judge whose
    completions have a known mode, evidence or length, which a score must tell apart within the prompt; controls (a
    certified pair of judges, hidden criteria, shuffled modes, redrawn parameters) must come out as they should.

    Run a killed command again with the same arguments, and it resumes.
    """
    if testbed == (model is not None) or testbed == (input is not None):
        raise ValueError("eval causal needs --model and --input, or --testbed alone")
    if most_nodes not in _NODES:
        raise ValueError(f"--most-nodes is {most_nodes}; expected one of {', '.join(map(str, _NODES))}")
    if testbed:
        checks.refuse_given(context, ("raw", "trust_remote_code"), "cannot be used with --testbed")
        if items is not None and items < 8:
            raise ValueError(f"--items is {items}; expected at least 8 with --testbed")
    else:
        of_testbed = ("world", "layers", "completions", "without_pair")
        checks.refuse_given(context, of_testbed, "needs --testbed")
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


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--n is {text!r}; expected whole numbers separated by commas, e.g. 1,2,4") from None


def _finish(output: Path, data: str, failed: Mapping[str, int], broken: Sequence[tuple[int, str]]) -> None:
    """Print where the page is, and end in an error if rows were lost: everything else is judged and shown by then.

    A tie that was not asked for is no loss: it is counted and left out.
    """
    from cepo.train.rows import UNASKED_TIE

    console.print(f"report: {output / 'report.html'}")
    lost = [(number, reason) for number, reason in broken if reason != UNASKED_TIE]
    if ties := len(broken) - len(lost):
        console.print(f"left out: {ties} row(s), each of which {UNASKED_TIE}", highlight=False, soft_wrap=True)
    broken, complaints = lost, []
    if broken:
        shown = "; ".join(f"row {number}: {reason}" for number, reason in broken[:5])
        more = "; ..." if len(broken) > 5 else ""
        complaints.append(f"data {data!r} has {len(broken)} row(s) that could not be used: {shown}{more}")
    if failed:
        shown = "; ".join(f"{reason} ({count}x)" for reason, count in list(failed.items())[:3])
        complaints.append(f"{sum(failed.values())} prompt(s) could not be judged: {shown}")
    if complaints:
        raise ValueError(
            f"{'. '.join(complaints)}. Everything else was judged; correct this and run the same command again"
        )
