"""One run of an experiment: train an arm in a world from a seed, measure the judge, and keep the row."""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cepo.benchmarks.experiment.recipe import TESTBED, TESTBED_REASONER, TESTBED_WORDS, Run
from cepo.eval.reasoner_measures import measure_reasoner
from cepo.eval.testbed_measures import Measures, measure_judge
from cepo.files import claim, read_jsonl, write_jsonl
from cepo.jacobian.loading import load_model, resolve_model
from cepo.train import policy
from cepo.train.grpo import TrainConfig, load_config, train
from cepo.train.recipe import read_yaml
from cepo.train.run import METRICS
from cepo.train.testbed_words import read_certificate, words_settings

MEASURES = "measures.json"
PARTS = ("generation", "rewards", "policy_update", "step")
"""Parts of an optimiser step whose seconds are recorded."""


def execute(run: Run) -> None:
    """Train and measure in this process, on one CPU thread, unless the run is finished; TRL's output is in `log.txt`.

    Raises:
        ValueError: for a folder that holds a run with other settings or content.
    """
    claim_run(run)
    done = run.folder / MEASURES
    if done.is_file():
        return
    torch.set_num_threads(1)
    started = time.perf_counter()
    with (run.folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            if run.changes:
                model, tokenizer = load_model(resolve_model(str(train(training(run)))), device=run.device)
            else:
                model, tokenizer = _untrained(run)
            model.to(run.device)
            measures = _measure(run, model, tokenizer)
        except Exception:
            traceback.print_exc()
            raise
    row = {
        "world": run.world,
        "arm": run.arm,
        "seed": run.seed,
        "steps": run.steps if run.changes else 0,
        "seconds": round(time.perf_counter() - started, 1),
        **asdict(measures),
        "time": step_seconds(run.folder / "grpo" / METRICS) if run.changes else {},
        **({"certificate": _certificate(run)} if run.in_words else {}),
        "settings": {name: getattr(run, name) for name in ("changes", "items", "scored")},
    }
    write_jsonl(done, [row])


def _measure(run: Run, model: Any, tokenizer: Any) -> Measures:
    lengths = {"seed": run.seed, "items": run.items, "scored": run.scored}
    if run.reasons:
        return measure_reasoner(model, tokenizer, task=_recipe(run)["data"]["task"], **lengths)
    measures, _ = measure_judge(model, tokenizer, **lengths)
    return measures


def training(run: Run) -> TrainConfig:
    """Return the training of a run: the testbed's recipe with what the arm and the world change."""
    recipe = _recipe(run)
    settings = {
        "bf16": False,
        "gradient_checkpointing": False,
        **recipe["grpo"],
        "max_steps": run.steps,
        "report_to": "none",
        "use_cpu": run.device == "cpu",
        **run.changes.get("grpo", {}),
    }
    overrides = {
        "output": str(run.folder / "grpo"),
        "seed": run.seed,
        "testbed": {**recipe["testbed"], _kind(run): run.judge},
        "rewards": [_with_encoder(reward, run) for reward in run.changes["rewards"]],
        **{name: value for name, value in run.changes.items() if name not in ("rewards", "grpo")},
        **{f"grpo.{name}": value for name, value in settings.items()},
    }
    return load_config(_shared(run), overrides)


def step_seconds(metrics: Path) -> dict[str, float]:
    """Return the median seconds of each part of an optimiser step, see `cepo.train.timing`.

    `cost` is the median of rewards / policy_update within a step. A causal loss is paid inside the policy update.
    """
    rows = [row for _, row in read_jsonl(metrics)[0] if "time/step" in row]
    if not rows:
        return {}
    seconds = {part: round(statistics.median(row[f"time/{part}"] for row in rows), 4) for part in PARTS}
    return {
        **seconds,
        "cost": round(statistics.median(row["time/rewards"] / row["time/policy_update"] for row in rows), 4),
    }


def claim_run(run: Run) -> None:
    """Make the run's folder its own, or refuse it by the name of what differs: settings, recipe or testbed."""
    own = {"world": run.world, "arm": run.arm, "changes": run.changes, "seed": run.seed}
    results = [run.folder / MEASURES, run.folder / "grpo"]
    claim(run.folder / "settings.json", {**shared_settings(run), **own}, results=results)


def shared_settings(run: Run) -> dict[str, Any]:
    """Return what all runs of an output share: lengths, the testbed's recipe, and the content of its worlds."""
    recipe = _recipe(run)
    return {
        "command": "experiment",
        "steps": run.steps,
        "items": run.items,
        "scored": run.scored,
        "warm_up": policy.policy_fingerprint(recipe["model"], seed=0, testbed_judge=recipe["testbed"]),
        "testbed": {name: value for name, value in recipe.items() if name not in ("output", "rewards", "seed")},
    }


def _shared(run: Run) -> Path:
    return TESTBED_WORDS if run.in_words else TESTBED_REASONER if run.reasons else TESTBED


def _kind(run: Run) -> str:
    """Return the name of the setting that says what training starts from."""
    return "reasoner" if run.reasons else "judge"


def _recipe(run: Run) -> dict[str, Any]:
    loaded: dict[str, Any] = read_yaml(_shared(run).read_text())
    if run.layers is not None:
        loaded["testbed"]["layers"] = run.layers
    return loaded


def _untrained(run: Run) -> tuple[Any, Any]:
    recipe = _recipe(run)
    judge = {**recipe["testbed"], _kind(run): run.judge}
    return policy.load_policy(recipe["model"], dtype="float32", seed=run.seed, testbed_judge=judge)


def _certificate(run: Run) -> dict[str, Any]:
    """Return what interventions said of the judge that training starts from."""
    found = read_certificate(words_settings({**_recipe(run)["testbed"], "judge": run.judge}), policy.CACHE)
    return {name: found[name] for name in ("measures", "uncertified")}


def _with_encoder(reward: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Return the reward, its encoder "testbed" replaced by the folder of the judge before training.

    No sentence encoder knows the testbed's words; the judge's own mean hidden state is the nearest thing.
    """
    if reward.get("encoder") != "testbed":
        return dict(reward)
    model, _ = _untrained(run)
    return {**reward, "encoder": str(Path(model.config._name_or_path))}
