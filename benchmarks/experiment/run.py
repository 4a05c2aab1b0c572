"""One run of an experiment: train an arm from a seed, measure the judge, and keep the row."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from cepo.benchmarks.experiment.recipe import TESTBED, Run
from cepo.eval.testbed_measures import measure_judge
from cepo.files import claim, write_jsonl
from cepo.jacobian.loading import load_model, resolve_model
from cepo.train import policy
from cepo.train.grpo import load_config, train

MEASURES = "measures.json"


def execute(run: Run) -> None:
    """Train and measure in this process, on one thread, unless the run is finished; TRL's output goes to `log.txt`.

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
        if run.rewards:
            overrides = {
                "output": str(run.folder / "grpo"),
                "seed": run.seed,
                "rewards": [_with_encoder(reward, run.seed) for reward in run.rewards],
                "grpo.max_steps": run.steps,
                "grpo.report_to": "none",
            }
            model, tokenizer = load_model(resolve_model(str(train(load_config(TESTBED, overrides)))))
        else:
            model, tokenizer = _untrained(run.seed)
        measures, _ = measure_judge(model, tokenizer, seed=run.seed, items=run.items, scored=run.scored)
    row = {
        "arm": run.arm,
        "seed": run.seed,
        "steps": run.steps if run.rewards else 0,
        "seconds": round(time.perf_counter() - started, 1),
        **asdict(measures),
        "settings": {name: getattr(run, name) for name in ("rewards", "seed", "steps", "items", "scored")},
    }
    write_jsonl(done, [row])


def claim_run(run: Run) -> None:
    """Make the run's folder its own, or refuse it by the name of what differs: settings, recipe or testbed."""
    own = {"arm": run.arm, "rewards": run.rewards, "seed": run.seed}
    results = [run.folder / MEASURES, run.folder / "grpo"]
    claim(run.folder / "settings.json", {**shared_settings(run), **own}, results=results)


def shared_settings(run: Run) -> dict[str, Any]:
    """Return what all runs of an output share: lengths, the testbed's recipe, and the content of its world."""
    recipe = _recipe()
    return {
        "command": "experiment",
        "steps": run.steps,
        "items": run.items,
        "scored": run.scored,
        "world": policy.policy_fingerprint(None, seed=0, testbed_judge=recipe["testbed"]),
        "testbed": {name: value for name, value in recipe.items() if name not in ("output", "rewards", "seed")},
    }


def _recipe() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(TESTBED.read_text())
    return loaded


def _untrained(seed: int) -> tuple[Any, Any]:
    return policy.load_policy(policy.TESTBED, dtype="float32", seed=seed, testbed_judge=_recipe()["testbed"])


def _with_encoder(reward: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the reward, its encoder "testbed" replaced by the folder of the judge before training.

    No sentence encoder knows the testbed's words; the judge's own mean hidden state is the nearest thing.
    """
    if reward.get("encoder") != "testbed":
        return dict(reward)
    model, _ = _untrained(seed)
    return {**reward, "encoder": str(Path(model.config._name_or_path))}
