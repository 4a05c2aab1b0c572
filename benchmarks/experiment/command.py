"""Experiment: which reward makes a testbed judge's criteria cause its verdict, over seeds, at equal steps."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table

import cepo
from cepo.benchmarks.measure import environment
from cepo.eval.report.figures import forest
from cepo.eval.report.page import write_report
from cepo.eval.report.tables import console_table
from cepo.eval.statistics import Estimate, estimate, mean, mean_difference
from cepo.eval.testbed_measures import ITEMS, SCORED, measure_judge
from cepo.files import make_folder, write_text
from cepo.jacobian.loading import load_model, resolve_model
from cepo.train.grpo import load_config, train
from cepo.train.policy import CACHE, load_testbed_judge

RECIPE = Path(cepo.__file__).parent / "benchmarks" / "recipes" / "testbed-training.yaml"
_TESTBED = Path(cepo.__file__).parent / "train" / "recipes" / "testbed.yaml"
BASELINE, UNTRAINED = "task", "untrained"
MEASURES = {
    "flipped": "accuracy where length is flipped",
    "turned": "verdict turned by the criterion alone",
    "in_distribution": "accuracy in distribution",
    "tokens": "completion tokens",
    "malformed": "malformed",
    "influence": "influence of X->Y",
    "phi": "phi of X->Y",
}
_KEPT = 2  # digits behind the point of a table


@dataclass(frozen=True)
class Arm:
    """One run: rewards, seed, steps, and the folder that holds it.

    Attributes:
        name: of the rewards.
        rewards: as in `TrainConfig`; none for the judge before training.
        seed: of everything.
        steps: of GRPO.
        folder: where the run lives.
        items: items behind each measure.
        scored: sampled judgements whose links are scored.
    """

    name: str
    rewards: tuple[Mapping[str, Any], ...]
    seed: int
    steps: int
    folder: Path
    items: int = ITEMS
    scored: int = SCORED


def run_training(
    output: Path,
    *,
    recipe: Path = RECIPE,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    arms: Sequence[str] | None = None,
    items: int = ITEMS,
    scored: int = SCORED,
    jobs: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Train every arm from every seed, measure it, and write `results.jsonl` and `report.html`.

    A run that is finished is not repeated; one that was killed goes on from its checkpoint. Runs of other arms and
    seeds that the output holds stay among the results.

    Args:
        output: folder of the runs and the results.
        recipe: YAML with steps, seeds and arms.
        seeds: instead of the recipe's.
        steps: of GRPO, instead of the recipe's.
        arms: only these.
        items: items behind each measure.
        scored: sampled judgements whose links are scored.
        jobs: processes side by side, one thread each.
        progress: called with (runs done, runs in all).

    Returns:
        A table: the mean over seeds of every measure, and its range.

    Raises:
        ValueError: for a recipe or an argument that cannot work.
    """
    plan = _read_plan(output, recipe, seeds, steps, arms, items, scored)
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; expected at least 1")
    make_folder(output)
    for arm in plan:
        _check_same_run(arm)
    done = 0
    # The judges before training first: they fill the cache that all other runs of their seed read.
    for stage in ([arm for arm in plan if not arm.rewards], [arm for arm in plan if arm.rewards]):
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for finished in as_completed([pool.submit(run_arm, arm) for arm in stage]):
                finished.result()
                done += 1
                if progress is not None:
                    progress(done, len(plan))
    # With the runs of earlier calls: a call for one arm leaves the others' results in place.
    rows = [json.loads(path.read_text()) for path in output.glob("*/measures.json")]
    order = {name: place for place, name in enumerate(dict.fromkeys(arm.name for arm in plan))}
    rows.sort(key=lambda row: (row["seed"], order.get(row["arm"], len(order)), row["arm"]))
    about = environment(torch.device("cpu"))
    write_text(output / "results.jsonl", "".join(json.dumps({**row, **about}) + "\n" for row in rows))
    _write_report(output / "report.html", rows, about)
    return _table(rows)


def run_arm(arm: Arm) -> None:
    """Train and measure one arm in this process, on one thread, unless it is done; TRL's chatter goes to `log.txt`."""
    done = arm.folder / "measures.json"
    if done.is_file():
        return
    arm.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    started = time.perf_counter()
    with (arm.folder / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        overrides = {
            "output": str(arm.folder / "grpo"),
            "seed": arm.seed,
            "rewards": [_with_encoder(reward, arm.seed) for reward in arm.rewards],
            "grpo.max_steps": arm.steps,
            "grpo.disable_tqdm": True,
            "grpo.report_to": "none",
        }
        if arm.rewards:
            model, tokenizer = load_model(resolve_model(str(train(load_config(_TESTBED, overrides)))))
        else:
            model, tokenizer = _before(arm.seed)
        measures, _ = measure_judge(model, tokenizer, seed=arm.seed, items=arm.items, scored=arm.scored)
    row = {
        "arm": arm.name,
        "seed": arm.seed,
        "steps": arm.steps if arm.rewards else 0,
        "seconds": round(time.perf_counter() - started, 1),
        **asdict(measures),
        "settings": _settings(arm),
    }
    write_text(done, json.dumps(row) + "\n")


def _check_same_run(arm: Arm) -> None:
    done = arm.folder / "measures.json"
    if not done.is_file():
        return
    before, now = json.loads(done.read_text())["settings"], _settings(arm)
    changed = [f"{key} {before.get(key)!r}, now {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"output {str(arm.folder.parent)!r} holds a run of {arm.name!r}, seed {arm.seed}, with other settings "
            f"({'; '.join(changed)}); name another output, or move it away"
        )


def _read_plan(
    output: Path,
    recipe: Path,
    seeds: Sequence[int] | None,
    steps: int | None,
    arms: Sequence[str] | None,
    items: int,
    scored: int,
) -> list[Arm]:
    try:
        loaded = yaml.safe_load(recipe.read_text())
        named = {str(name): tuple(rewards) for name, rewards in loaded["arms"].items()}
        seeds, steps = list(seeds or loaded["seeds"]), steps or int(loaded["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"recipe {str(recipe)!r} cannot be used: {error!r}; expected steps, seeds and arms") from None
    unknown = sorted(set(arms or ()) - set(named))
    if unknown:
        raise ValueError(f"arms names {', '.join(unknown)}; expected some of {', '.join(named)}")
    chosen = [name for name in named if not arms or name in arms or name == UNTRAINED]
    return [
        Arm(name, named[name], seed, steps, output / f"{re.sub('[^A-Za-z0-9]+', '-', name)}-{seed}", items, scored)
        for seed in seeds
        for name in chosen
    ]


def _settings(arm: Arm) -> dict[str, Any]:
    """Return what a finished run must share to count as this one."""
    rewards = json.loads(json.dumps(arm.rewards))
    return {"rewards": rewards, "seed": arm.seed, "steps": arm.steps, "items": arm.items, "scored": arm.scored}


def _with_encoder(reward: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the reward, its encoder "testbed" replaced by the folder of the judge before training.

    No sentence encoder knows the testbed's words; the judge's own mean hidden state is the nearest thing.
    """
    if reward.get("encoder") != "testbed":
        return dict(reward)
    model, _ = _before(seed)
    return {**reward, "encoder": str(model.config._name_or_path)}


def _before(seed: int) -> tuple[Any, Any]:
    settings = yaml.safe_load(_TESTBED.read_text())["testbed"]
    return load_testbed_judge(settings["judge"], steps=settings["steps"], seed=seed, cache=CACHE)


def _value(row: Mapping[str, Any], measure: str) -> float:
    if measure in row:
        return float(row[measure])
    return float(row["links"].get("X->Y", {}).get(measure, float("nan")))


def _by_arm(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["arm"], {})[row["seed"]] = _value(row, measure)
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = ("flipped", "turned", "in_distribution")
    title = f"mean over {len({row['seed'] for row in rows})} seeds (range); the other measures are in the report"
    table = console_table("arm", *(measure.replace("_", " ") for measure in shown), title=title)
    for cells in _cells(rows, shown):
        table.add_row(*cells)
    return table


def _cells(rows: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> list[list[str]]:
    columns = {measure: _by_arm(rows, measure) for measure in measures}
    arms = columns[measures[0]]
    return [[arm, *(_range(list(columns[measure][arm].values())) for measure in measures)] for arm in arms]


def _range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.{_KEPT}f} ({min(values):.{_KEPT}f} to {max(values):.{_KEPT}f})"


def _gains(rows: Sequence[Mapping[str, Any]], measure: str) -> list[tuple[str, Estimate]]:
    """Return each arm's paired difference to the baseline arm, seed by seed."""
    found = _by_arm(rows, measure)
    seeds = list(found[BASELINE])
    return [
        (arm, estimate(mean_difference, [values[seed] for seed in seeds], [found[BASELINE][seed] for seed in seeds]))
        for arm, values in found.items()
        if arm not in (BASELINE, UNTRAINED)
    ]


def _write_report(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    figures = {}
    for measure in ("flipped", "turned"):
        label = MEASURES[measure]
        arms = _by_arm(rows, measure)
        means = [(arm, estimate(mean, list(values.values()))) for arm, values in arms.items()]
        figures[f"{label}: mean over seeds, 95% bootstrap interval over seeds"] = forest(means, axis=label)
        if BASELINE in arms:
            gains = _gains(rows, measure)
            figures[f"{label}: difference to format + argmax alone, paired by seed"] = forest(
                gains, axis=f"difference in {label}", reference=0.0
            )
    seeds = sorted({row["seed"] for row in rows})
    each = [
        [f"{row['arm']}, seed {row['seed']}", *(f"{_value(row, measure):.3f}" for measure in MEASURES)] for row in rows
    ]
    write_report(
        path,
        title="Which reward makes the criteria cause the verdict?",
        summary={
            "seeds": ", ".join(map(str, seeds)),
            "GRPO steps": str(max(row["steps"] for row in rows)),
            "seconds in all": f"{sum(row['seconds'] for row in rows):.0f}",
            "commit": str(about["commit"]),
        },
        figures=figures,
        tables={
            "Means over seeds (range)": (["arm", *MEASURES.values()], _cells(rows, list(MEASURES))),
            "Every run": (["run", *MEASURES.values()], each),
        },
        notes=[
            "All arms start from the testbed's lazy judge, which follows length, and train on items where length is "
            "right 90% of the time. 'Turned' forces another criterion and lets the judge go on: the fraction of items "
            "whose verdict the criterion alone turned. It is an intervention: no reward reads it.",
            f"Intervals are over {len(seeds)} seeds only: read them as a range, not as a test."
            if len(seeds) > 1
            else "One seed: there are no intervals.",
        ],
    )
