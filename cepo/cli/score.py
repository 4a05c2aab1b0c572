"""The command that scores a file of rollouts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cepo.cli import checks
from cepo.cli.shared import (
    Device,
    Dtype,
    Raw,
    Threads,
    TrustRemoteCode,
    console,
    given,
    showing,
    use_threads,
    weighted_links,
)
from cepo.train.file_kinds import FILES

_links = partial(typer.Option, rich_help_panel="Links and score")
_donors = partial(typer.Option, rich_help_panel="Donors")
_hardening = partial(typer.Option, rich_help_panel="Hardening")
_model = partial(typer.Option, rich_help_panel="Model")
_output = partial(typer.Option, rich_help_panel="Output")


def score(
    context: typer.Context,
    model: Annotated[
        str,
        _model(help="Model to read: hub id, folder, adapter folder, .gguf file, or smollm2.", callback=checks.model),
    ],
    input: Annotated[
        Path,
        typer.Option(help=f"File of rollouts, one per row: {FILES}.", callback=checks.rows),
    ],
    output: Annotated[
        Path, _output(help="JSONL file to write, one record per row of the input.", callback=checks.new_file)
    ],
    links: Annotated[
        list[str] | None,
        _links(
            "--link",
            help="Link or chain to score, such as X->Y, criteria->analysis->scores, chain (the format's own chain), "
            "Z->Y:total, X->Y@margin, or X->Y=0.5 with a weight; may be repeated.",
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="Format of the completions: judge or reasoning.", callback=checks.one_of("judge", "reasoning")
        ),
    ] = "judge",
    rationale_tag: Annotated[str, typer.Option(help="Tag around the rationale; reasoning only.")] = "think",
    answer_tag: Annotated[str, typer.Option(help="Tag around the answer; reasoning only.")] = "answer",
    guard: Annotated[
        str | None,
        typer.Option(
            help="Which early verdicts make a judgement malformed: standard (scores or a named winner in the criteria, "
            "scores in the analysis), strict (either, in criteria or analysis), criteria (either, in the criteria) or "
            "off. Default: standard."
        ),
    ] = None,
    verdicts: Annotated[
        str | None,
        typer.Option(
            help="Which written forms of a verdict are read: strict (the default) or lenient, see docs/formats.md."
        ),
    ] = None,
    ties: Annotated[
        bool,
        typer.Option(
            "--ties",
            help="Include ties; the prompt of every judged pair then allows equal scores.",
        ),
    ] = False,
    raw: Raw = False,
    score: Annotated[
        str | None,
        _links(
            help="Score S of a link: effect, explained or path, which compare a span with donors; or influence, phi "
            "(the paper's), phi_retained, phi_influence or influence_retained, from the gradient at the rollout."
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        _links(
            help="Measure to record in addition to those the score needs: phi, influence, angles, effect, path or "
            "order_leak; may be repeated."
        ),
    ] = None,
    leak_weight: Annotated[
        float | None,
        _links(
            help="How much of the order leak to subtract from S: S - weight * tanh(leak / 2), at least 0. The leak is "
            "how much less likely, in nats, the criteria become when the two responses are exchanged."
        ),
    ] = None,
    target: Annotated[
        str | None,
        _links(
            help="Target function to differentiate: log_likelihood, log_odds, or, for links to scores, "
            "expected_score or margin."
        ),
    ] = None,
    p: Annotated[float | None, _links("-p", "--p", help="Exponent of the power mean; may be inf or -inf.")] = None,
    task_weight: Annotated[float | None, _links(help="Weight of a row's task_reward in the power mean.")] = None,
    join: Annotated[
        float | None, _links(help="Exponent of the power mean over a chain's links; -inf takes the smallest.")
    ] = None,
    donors: Annotated[
        int | None,
        _donors(
            "--donor-count", help="Number K of donors: the same span of other prompts' rollouts, put in its place."
        ),
    ] = None,
    donors_file: Annotated[
        Path | None,
        _donors(
            "--donors",
            help=f"File of rollouts to draw donors from: {FILES}. Default: the input.",
            callback=checks.rows,
        ),
    ] = None,
    no_donor: Annotated[
        str | None, _donors(help="What a span without donors gets: zero, or permute (its own tokens permuted).")
    ] = None,
    nodes: Annotated[
        str | None,
        _donors(
            help="Number of nodes on the path to a donor, or auto (at most 32); for the score path and --also path. "
            "Each node costs about 1.5 times as much as the effects."
        ),
    ] = None,
    counterfactuals: Annotated[
        int | None, _hardening("--counterfactuals", "-K", help="Number K of permutations of each source span.")
    ] = None,
    permutation: Annotated[str | None, _hardening(help="What a permutation moves: uniform, sentence or block.")] = None,
    nuisance: Annotated[
        str | None,
        _hardening(
            help="What hardening removes: svd, the nuisance subspace; or mean, the mean counterfactual Jacobian."
        ),
    ] = None,
    rank: Annotated[int | None, _hardening(help="Rank r of the nuisance subspace.")] = None,
    energy: Annotated[
        float | None,
        _hardening(help="Choose the rank by the fraction, in (0, 1], of the energy that the nuisance subspace holds."),
    ] = None,
    seed: Annotated[
        int | None, _hardening(help="Seed of donors and permutations.", callback=checks.at_least(0))
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = None,
    engine: Annotated[
        str,
        _model(help="Engine: group, or autograd (the slower reference).", callback=checks.one_of("group", "autograd")),
    ] = "group",
    memory_gib: Annotated[
        float,
        _model(help="Memory the group engine may use in addition to the model's, in GiB.", callback=checks.positive),
    ] = 3.0,
    no_adapters: Annotated[bool, _model("--no-adapters", help="Switch the model's adapters off.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    ray: Annotated[
        int | None,
        _model(
            help="Number of Ray workers, each with one GPU or --threads CPUs (1 by default), on the cluster that Ray "
            "finds, else on this machine; needs the extra ray, see docs/scale.md. Default: no Ray.",
            callback=checks.at_least(1),
        ),
    ] = None,
    save_jacobians: Annotated[
        Path | None, _output(help="Write the matrices to this safetensors file.", callback=checks.new_file)
    ] = None,
    html: Annotated[
        Path | None, _output(help="Write the token heat maps to this file.", callback=checks.new_file)
    ] = None,
    batch_size: Annotated[
        int, _model(help="Number of rows scored together; what they share is run once.", callback=checks.at_least(1))
    ] = 8,
) -> None:
    """Score the links of a file of rollouts, and draw token heat maps with --html.

    An example, a row of `rollouts.jsonl`, and its record in `scores.jsonl` (shortened):

        cepo score --model smollm2 --input rollouts.jsonl \\
            --output scores.jsonl

        {"id": "7", "prompt": "Which is better, ...",
         "completion": "<specific_criteria> ...", "task_reward": 1.0}

        {"row": 0, "id": "7", "reward": 0.58, "malformed": null,
         "S": {"chain": 0.38}, "links": {
          "criteria->analysis": {"S": 0.38, "delta": 0.8, ...},
          "analysis->scores": {"S": 0.91, ...}}}

    A prompt is text, which becomes a user message in the chat template unless --raw is given, or a list of messages.
    Instead of prompt and completion, a row may hold `prompt_ids` and `completion_ids`; or `prompt`, `chosen`,
    `rejected` and `judge_output`, from which the judge's prompt is built (`label`: A, the default, or B, where the
    chosen response is shown; or tie, with --ties); or `messages`, the last of which is the completion. A
    `task_reward` in [0, 1] is fused with the links' scores.

    The same command resumes a killed run.
    """
    from cepo.fusion.config import RewardConfig
    from cepo.jacobian.reading.layout import Layout
    from cepo.jacobian.reading.reasoner import ReasonerLayout
    from cepo.train.prompts import JUDGE, REASONING_LITERALS, TIES_JUDGE

    if kind == "reasoning":
        checks.refuse_given(
            context, ("guard", "verdicts", "ties"), "cannot be used with --kind reasoning, which has no verdict"
        )
    else:
        tags = ("rationale_tag", "answer_tag")
        checks.refuse_given(context, tags, "needs --kind reasoning: the tags of judgements are fixed")
    if engine == "autograd":
        checks.refuse_given(context, ("memory_gib",), "needs --engine group: autograd has no memory limit")
    if ray is not None:
        checks.refuse_given(context, ("save_jacobians",), "cannot be used with --ray: one process writes the matrices")
    fields = given(
        links=weighted_links(links) if links else None,
        task_weight=task_weight,
        p=p,
        join=join,
        donors=donors,
        no_donor=no_donor,
        nodes=_nodes(nodes),
        counterfactuals=counterfactuals,
        permutation=permutation,
        rank=rank,
        energy=energy,
        nuisance=nuisance,
        score=score,
        target=target,
        seed=seed,
        also=also or None,
        leak_weight=leak_weight,
    )
    if energy is not None:
        fields.setdefault("rank", None)
    config = RewardConfig(**fields)
    layout: Layout = replace(TIES_JUDGE if ties else JUDGE, **given(guard=guard, verdicts=verdicts))
    if kind == "reasoning":
        layout = ReasonerLayout(rationale_tag, answer_tag, instructions=REASONING_LITERALS)
    for name, why in config.unread(layout).items():
        checks.refuse_given(context, [name, "donors_file"] if name == "donors" else [name], why)
    use_threads(threads)
    from cepo.eval.report.numbers import digits
    from cepo.eval.report.tables import ConsoleTable
    from cepo.eval.score.command import ScoreJob, score_file
    from cepo.files import counted

    job = ScoreJob(
        model=model,
        input=input,
        output=output,
        config=config,
        layout=layout,
        raw=raw,
        batch_size=batch_size,
        donors=donors_file,
        jacobians=save_jacobians,
        html=html,
        dtype=dtype,
        device=device,
        adapters=not no_adapters,
        engine=engine,  # type: ignore[arg-type]
        memory_gib=memory_gib,
        trust_remote_code=trust_remote_code,
        workers=ray,
        worker_threads=threads or 1,
    )
    with showing("scoring") as show:
        summary = score_file(job, progress=show)
    shown = {
        "rows": str(summary.rows),
        "from an earlier run": str(summary.resumed),
        "malformed": str(summary.malformed),
        "rows that could not be used": str(len(summary.broken)),
        **{f"mean {name}": digits(mean) for name, mean in summary.means.items()},
        **({"responses that could not be exchanged": str(summary.without_leak)} if config.reads_leak else {}),
        "time": f"{summary.seconds:.1f} s",
        "peak memory": f"{summary.peak_gib:.2f} GiB",
    }
    console.print(ConsoleTable(("what", "value"), list(shown.items()), str(output)))
    for reason, count in summary.reasons.items():
        console.print(f"malformed: {reason} ({count}x)", markup=False, highlight=False)
    others = summary.malformed - sum(summary.reasons.values())
    if others:
        console.print(f"malformed: other reasons, see the records ({others}x)", highlight=False)
    for warning in summary.warnings:
        console.print(f"warning: {warning}", highlight=False)
    if summary.malformed == summary.rows - len(summary.broken) > 0:
        console.print("warning: no completion is well-formed, so every reward is 0; see --kind and docs/formats.md")
    if summary.broken:
        named = "; ".join(summary.broken[:5]) + ("; ..." if len(summary.broken) > 5 else "")
        again = "run the same command again to score them alone"
        if config.reads_effects and donors_file is None:
            again = "name another --output: the rows are each other's donors, so all are scored again"
        raise ValueError(
            f"input {str(input)!r} has {counted(len(summary.broken), 'row')} that could not be used: {named}. "
            f"All other rows were scored; correct these and {again}"
        )


def _nodes(text: str | None) -> int | str | None:
    """Return the number of nodes, or the text if it is no number; RewardConfig refuses any but "auto"."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text
