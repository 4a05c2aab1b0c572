"""`cepo demo`: train a judge with a causal reward on the embedded testbed, with a report of the results."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

import cepo
from cepo.eval.report.figures import history
from cepo.eval.report.numbers import digits
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import ConsoleTable
from cepo.eval.testbed_measures import ITEMS, SCORED, measure_judge
from cepo.files import Row, make_folder, read_jsonl, write_text
from cepo.jacobian.loading import load_model, resolve_model
from cepo.train.grpo import load_config, train
from cepo.train.policy import load_testbed_judge
from cepo.train.ranks import require_one_process
from cepo.train.run import METRICS, require_trl

RECIPE = Path(cepo.__file__).parent / "train" / "recipes" / "testbed.yaml"
RESULTS = Path(cepo.__file__).parent / "benchmarks" / "results"
_RECORDED = "testbed-worlds.jsonl"  # the experiment on seeds that were not used to choose the reward
_UNTRAINED, _CAUSAL, _TASK = "untrained", "effect chain", "task"  # its arms
_SHARES: dict[str, str] = {
    "accuracy, length right in 90% of items": "in_distribution",
    "accuracy, length right in 10% (flipped)": "flipped",
    "verdict turned by the criterion alone": "turned",
    "S: effect of the chain": "S",
}
# For each figure, the names of its curves in the report and in metrics.jsonl.
_CURVES = {
    "Rewards (mean over the step's completions)": {
        "format": "rewards/format_reward/mean",
        "argmax": "rewards/argmax_reward/mean",
        "causal (S)": "rewards/causal/mean",
    },
    "Completion length, tokens": {"mean": "completions/mean_length"},
    "Seconds per step": {"whole step": "time/step", "rewards": "time/rewards"},
}

_TESTBED = (
    "The query names a situation, the criteria name the aspect that decides in it, the analysis quotes each response's "
    "word for that aspect, and the scores follow. Response length is a spurious cue. Accuracies are greedy. For the "
    "verdicts turned, another criterion is forced and the judge continues by itself. If S rises while they do not, the "
    "judge games the measure."
)


def run_demo(output: Path, *, steps: int, seed: int, console: Console, causal: bool = True) -> Path:
    """Warm up a judge, measure it, train it with GRPO, measure it again, and show what changed.

    Writes report.html, measures.json and the trained model (grpo/final). A killed demo continues from its last
    checkpoint; a finished one starts again.

    Args:
        output: folder of the results.
        steps: GRPO steps, at least 1.
        seed: seed of the warm-up, items, sampling and training.
        console: console for progress and the table of before and after.
        causal: False omits the causal reward, for comparison.

    Returns:
        Path of the report.

    Raises:
        ValueError: for an output with an unfinished demo of other settings, in a distributed run, or without TRL.
    """
    require_trl()
    require_one_process("cepo demo")
    started = time.perf_counter()
    run = output / "grpo"
    if (output / "measures.json").is_file():
        shutil.rmtree(run, ignore_errors=True)
        (output / "measures.json").unlink()
    make_folder(output)
    disable_progress_bar()  # transformers' bar for loading weights
    config = load_config(RECIPE, {"output": str(run), "grpo.max_steps": steps, "seed": seed})
    if not causal:
        config = replace(config, rewards=[reward for reward in config.rewards if reward["name"] != "causal"])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with _spinner(console) as show:
        show("warming up the judge (or reading it from the cache)")
        model, tokenizer = load_testbed_judge(
            config.testbed["judge"],
            steps=config.testbed["steps"],
            seed=seed,
            progress=lambda step, loss: show(f"warming up the judge: step {step}, loss {loss:.3f}"),
        )
        show("measuring the judge before training")
        found, maps_before = measure_judge(model, tokenizer, seed=seed, items=ITEMS, scored=SCORED)
        before = asdict(found)
    trained = train(config)
    with _spinner(console) as show:
        show("measuring the judge after training")
        model, _ = load_model(resolve_model(str(trained)))
        found, maps_after = measure_judge(model, tokenizer, seed=seed, items=ITEMS, scored=SCORED)
        after = asdict(found)
    seconds = time.perf_counter() - started
    recorded = _recorded(_CAUSAL if causal else _TASK)
    others = _other_seeds(*recorded, seed=seed, steps=steps)
    title = f"Before and after {steps} GRPO steps, seed {seed}"
    write_report(
        output / "report.html",
        title="cepo demo: a judge rewarded for criteria that cause its scores",
        summary={},
        notes=[others],
        figures={title: _picture(before, after, recorded[1]), **_curves(run / METRICS)},
        tables={
            f"Behaviour ({ITEMS} items; S, malformed and tokens: {SCORED} samples)": (
                ("", "before", "after"),
                _behaviour(before, after),
            ),
            "This run": (
                ("", ""),
                [
                    ("judge", f"Qwen3-shaped, {model.num_parameters():,} weights, warmed up to follow length"),
                    ("training", "GRPO (TRL), on items where the longer response is right 90% of the time"),
                    ("rewards", ", ".join(f"{reward['name']} × {reward['weight']:g}" for reward in config.rewards)),
                    ("time", f"{seconds:.0f} s"),
                    ("testbed", _TESTBED),
                ],
            ),
        },
        heat_maps={"Before training": maps_before, "After training": maps_after},
    )
    measures = {"seed": seed, "steps": steps, "seconds": seconds, "before": before, "after": after}
    write_text(output / "measures.json", json.dumps(measures, indent=2) + "\n")
    rows = [(label, *map(digits, values)) for label, values in _compared(before, after).items()]
    console.print(ConsoleTable(("", "before", "after"), rows, title))
    console.print(others, highlight=False)
    return output / "report.html"


def _compared(before: Row, after: Row) -> dict[str, tuple[float, float]]:
    return {label: (before[name], after[name]) for label, name in _SHARES.items()}


def _recorded(arm: str) -> tuple[dict[int, Row], dict[int, Row]]:
    """Return the rows of the recorded experiment by seed: before training, and after training with an arm's rewards."""
    rows = [row for _, row in read_jsonl(RESULTS / _RECORDED)[0] if row["world"] == "lazy"]
    before, after = ({row["seed"]: row for row in rows if row["arm"] == name} for name in (_UNTRAINED, arm))
    return {seed: before[seed] for seed in after}, after


def _other_seeds(before: Mapping[int, Row], after: Mapping[int, Row], *, seed: int, steps: int) -> str:
    """Return a text that summarises the recorded seeds."""
    (taken,) = {row["steps"] for row in after.values()}
    flipped, turned = (
        f"{_mean(before, name):.2f} to {_mean(after, name):.2f} on average (it ended between "
        f"{min(row[name] for row in after.values()):.2f} and {max(row[name] for row in after.values()):.2f})"
        for name in ("flipped", "turned")
    )
    other_steps = "" if steps == taken else f", where this run took {steps}"
    return (
        f"This is one run, with seed {seed}. In all {len(after)} recorded runs with these rewards (seeds "
        f"{min(after)} to {max(after)}, {taken} steps each{other_steps}), accuracy where length is flipped went from "
        f"{flipped}, and verdicts turned by the criterion alone from {turned}."
    )


def _mean(rows: Mapping[int, Row], name: str) -> float:
    return sum(row[name] for row in rows.values()) / len(rows)


def _picture(before: Row, after: Row, recorded: Mapping[int, Row]) -> Figure:
    """Draw an arrow from before to after for each measure, above a tick for each recorded seed after training."""
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.subplots()
    for place, (label, (left, right)) in enumerate(_compared(before, after).items()):
        axes.annotate("", (right, place), (left, place), arrowprops={"arrowstyle": "->", "color": "C0", "lw": 1.5})
        axes.plot(left, place, "o", color="C0", markerfacecolor="white", label="before" if place == 0 else None)
        axes.plot(right, place, "o", color="C0", label="after" if place == 0 else None)
        axes.plot(
            [row[_SHARES[label]] for row in recorded.values()],
            [place + 0.3] * len(recorded),
            "|",
            color="0.55",
            label="after, recorded seeds" if place == 0 else None,
        )
    axes.set_yticks(range(len(_SHARES)), list(_SHARES))
    axes.set_ylim(len(_SHARES) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, frameon=False)
    return figure


def _curves(metrics: Path) -> dict[str, Figure]:
    logs = [log for _, log in read_jsonl(metrics)[0]]
    found = {}
    for caption, names in _CURVES.items():
        lines = {
            label: [(float(log["step"]), log[name]) for log in logs if log.get(name) is not None]
            for label, name in names.items()
        }
        found[caption] = history({label: points for label, points in lines.items() if points})
    return found


def _behaviour(before: Row, after: Row) -> list[tuple[str, str, str]]:
    more = {"criteria swaps followed": "swaps_followed", "malformed": "malformed", "completion tokens": "tokens"}
    values = {**_compared(before, after), **{label: (before[name], after[name]) for label, name in more.items()}}
    return [(label, digits(left), digits(right)) for label, (left, right) in values.items()]


@contextlib.contextmanager
def _spinner(console: Console) -> Iterator[Callable[[str], None]]:
    """Show the current step and its elapsed time; yield a function that sets the step's description."""
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("")
        yield lambda text: progress.update(task, description=text)
