"""The command that scores a file of rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cepo.cli.shared import (
    Device,
    Dtype,
    Raw,
    Threads,
    TrustRemoteCode,
    console,
    given,
    progress_bar,
    use_threads,
    weighted_links,
)


def score(
    model: Annotated[str, typer.Option(help="Hub id, folder, adapter folder, .gguf file, or smollm2.")],
    input: Annotated[Path, typer.Option(help="JSONL of rollouts; what a row holds is told above.")],
    output: Annotated[Path, typer.Option(help="JSONL to write, one record for each line of the input.")],
    links: Annotated[
        list[str] | None,
        typer.Option(
            "--link", help="A link, such as X->Y, Z->Y:total, X->Y@margin or X->Y=0.5 (its weight); repeat for more."
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="judge or reasoning.")] = "judge",
    rationale_tag: Annotated[str, typer.Option(help="Reasoning: tag around the rationale.")] = "think",
    answer_tag: Annotated[str, typer.Option(help="Reasoning: tag around the answer.")] = "answer",
    counterfactuals: Annotated[
        int | None, typer.Option("--counterfactuals", "-K", help="Number K of permutations of each source span.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank r of the nuisance subspace.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Fraction in (0, 1] of the energy that the nuisance subspace holds; sets its rank."),
    ] = None,
    permutation: Annotated[str | None, typer.Option(help="uniform, sentence or block.")] = None,
    nuisance: Annotated[
        str | None, typer.Option(help="svd, or mean, as in the reference implementation of CE-PO.")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="influence, phi (the paper's), phi_retained, phi_influence or influence_retained."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="Measure to record beside what the score reads: phi, influence or angles; repeat for more."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="log_likelihood, log_odds, expected_score or margin (the last two: links to scores)."),
    ] = None,
    p: Annotated[
        float | None, typer.Option("-p", "--p", help="Exponent of the power mean, inf and -inf included.")
    ] = None,
    task_weight: Annotated[float | None, typer.Option(help="Weight of a row's task_reward.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the permutations.")] = None,
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
    from cepo.fusion.config import RewardConfig
    from cepo.jacobian.reading.reasoner import ReasonerLayout
    from cepo.train.prompts import JUDGE, REASONING_LITERALS

    if kind not in ("judge", "reasoning"):
        raise ValueError(f"--kind is {kind!r}; expected judge or reasoning")
    if dtype not in ("float64", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is {dtype!r}; expected float64, float32, bfloat16 or float16")
    fields = given(
        links=weighted_links(links) if links else None,
        task_weight=task_weight,
        p=p,
        counterfactuals=counterfactuals,
        permutation=permutation,
        rank=rank,
        energy=energy,
        nuisance=nuisance,
        score=score,
        target=target,
        seed=seed,
        also=also or None,
    )
    if energy is not None:
        fields.setdefault("rank", None)
    config = RewardConfig(**fields)
    layout = JUDGE if kind == "judge" else ReasonerLayout(rationale_tag, answer_tag, instructions=REASONING_LITERALS)
    from cepo.eval.score.command import ScoreJob, score_file

    job = ScoreJob(
        model=model,
        input=input,
        output=output,
        config=config,
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
    from cepo.eval.report.tables import console_table

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
