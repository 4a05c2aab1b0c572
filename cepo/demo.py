"""`cepo demo`: the main job end to end on the embedded testbed, with a report of what happened."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import cepo
from cepo.eval.report.figures import history
from cepo.eval.report.page import write_report
from cepo.eval.testbed_measures import FIELDS, ITEMS, LINKS, SCORED, Measures, measure_judge
from cepo.jacobian.loading import load_model, resolve_model
from cepo.train.grpo import load_config, train
from cepo.train.policy import load_testbed_judge

RECIPE = Path(cepo.__file__).parent / "train" / "recipes" / "testbed.yaml"
_PANELS = {
    "Rewards (mean over the step's completions)": (
        "rewards/format_reward/mean",
        "rewards/argmax_reward/mean",
        "rewards/causal/mean",
    ),
    "Links of the sampled judgements": (
        "causal/X->Y/influence",
        "causal/X->Y/phi",
        "causal/X->Y/retained",
    ),
    "Completion length, tokens": ("completions/mean_length",),
    "Seconds": ("causal/seconds", "step_time"),
}


def run_demo(output: Path, *, steps: int, seed: int, console: Console, causal: bool = True) -> Path:
    """Warm up, measure, train with GRPO, measure again, and write `report.html`, `measures.json` and the model.

    A demo that was killed goes on from its last checkpoint; one that was finished starts anew.

    Args:
        output: folder to write.
        steps: GRPO steps.
        seed: of everything.
        console: where progress is shown.
        causal: False leaves the causal reward out, to compare with.

    Returns:
        Path of the report.
    """
    started = time.perf_counter()
    run = output / "grpo"
    if (output / "measures.json").is_file():
        shutil.rmtree(run, ignore_errors=True)
        (output / "measures.json").unlink()
    output.mkdir(parents=True, exist_ok=True)
    config = load_config(RECIPE, {"output": str(run), "grpo.max_steps": steps, "seed": seed})
    if not causal:
        config = replace(config, rewards=[reward for reward in config.rewards if reward["name"] != "causal"])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("warming up the judge (or reading it from the cache)")
        model, tokenizer = load_testbed_judge(
            config.testbed["judge"],
            steps=config.testbed["steps"],
            seed=seed,
            progress=lambda step, loss: progress.update(
                task, description=f"warming up the judge: step {step}, loss {loss:.3f}"
            ),
        )
        progress.update(task, description="measuring the judge before training")
        before, maps_before = measure_judge(model, tokenizer, seed=seed, items=ITEMS, scored=SCORED)
    trained = train(config)
    model, _ = load_model(resolve_model(str(trained)))
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        progress.add_task("measuring the judge after training")
        after, maps_after = measure_judge(model, tokenizer, seed=seed, items=ITEMS, scored=SCORED)
    seconds = time.perf_counter() - started
    write_report(
        output / "report.html",
        title="cepo demo: a judge rewarded for criteria that cause its scores",
        summary={
            "judge": f"Qwen3-shaped, {model.num_parameters():,} weights, warmed up to follow length",
            "training": f"{steps} GRPO steps, TRL, on items where the longer response is right 90% of the time",
            "rewards": ", ".join(_described(reward) for reward in config.rewards),
            "seed": str(seed),
            "time": f"{seconds:.0f} s",
        },
        figures=_figures(run / "metrics.jsonl"),
        tables=_tables(before, after),
        heat_maps={"Before training": maps_before, "After training": maps_after},
        notes=[
            "In the testbed the query names a situation, the criteria name the aspect that decides there, the analysis "
            "quotes each response's word for it, and the scores follow. Response length is a spurious cue, right 90% "
            "of the time in distribution, 10% where flipped.",
            "Accuracies are greedy; 'criteria swaps followed' forces another criterion and lets the judge go on. A "
            "score S that rises while these two do not is a signal satisfied in form: read them together.",
        ],
    )
    measures = {"seed": seed, "steps": steps, "seconds": seconds, "before": asdict(before), "after": asdict(after)}
    unfinished = output / "measures.json.tmp"
    unfinished.write_text(json.dumps(measures, indent=2) + "\n")
    os.replace(unfinished, output / "measures.json")
    return output / "report.html"


def _described(reward: Mapping[str, Any]) -> str:
    text = f"{reward['name']} × {reward['weight']:g}"
    if reward["name"] != "causal":
        return text
    hardening = f"K = {reward['counterfactuals']}, rank = {reward['rank']}"
    return f"{text} ({reward['score']} of {', '.join(reward['links'])}, {hardening})"


def _figures(metrics: Path) -> dict[str, Figure]:
    logs = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = {}
    for panel, names in _PANELS.items():
        lines = {name: [(float(log["step"]), float(log[name])) for log in logs if name in log] for name in names}
        found[panel] = history({name: points for name, points in lines.items() if points})
    return found


def _tables(before: Measures, after: Measures) -> dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]]:
    rows = [
        ("accuracy, length agrees with the label 90%", "in_distribution"),
        ("accuracy, flipped (agrees 10%)", "flipped"),
        ("criteria swaps followed", "swaps_followed"),
        ("verdict turned by the criterion alone", "turned"),
        ("malformed", "malformed"),
        ("completion tokens", "tokens"),
    ]
    behaviour = [(label, f"{getattr(before, name):.3f}", f"{getattr(after, name):.3f}") for label, name in rows]
    links = [
        (f"{link}, {field}", _shown(before, link, field), _shown(after, link, field))
        for link in LINKS
        for field in FIELDS
    ]
    header = ("", "before", "after")
    return {
        f"Behaviour ({ITEMS} items a row; malformed and tokens: {SCORED} samples)": (header, behaviour),
        f"Link records (means over {SCORED} sampled judgements)": (header, links),
    }


def _shown(measures: Measures, link: str, field: str) -> str:
    return f"{measures.links[link][field]:.4f}" if link in measures.links else "none scored"
