"""`cepo experiment`: which reward makes a testbed judge's criteria cause its verdict, by world, over seeds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from cepo.benchmarks.experiment.recipe import Run
from cepo.benchmarks.experiment.results import Row, means_tables, write_page
from cepo.benchmarks.experiment.run import MEASURES, claim_run, execute, shared_settings
from cepo.benchmarks.measure import environment
from cepo.eval.report.tables import ConsoleTable
from cepo.files import claim, read_jsonl, write_jsonl

_SHOWN = 3  # failed runs named in an error


def run_experiment(
    output: Path,
    plan: Sequence[Run],
    *,
    jobs: int = 2,
    commit: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ConsoleTable]:
    """Train every arm in every world from every seed, measure it, and write `results.jsonl` and `report.html`.

    A finished run is not repeated, and a killed one continues from its checkpoint, where settings, recipe and testbed
    are the same. Runs of other worlds, arms and seeds that the output holds stay among the results, which are written
    anew after each run. A run that fails does not stop the others.

    Args:
        output: folder of the results; the runs are in a folder for each world.
        plan: from `read_plan`.
        jobs: processes side by side, one CPU thread each; on a GPU they share its memory.
        commit: of this code, where there is no repository to ask.
        progress: called with (finished runs, all runs).

    Returns:
        A table per world: per arm, the mean over seeds of the main measures, and their range.

    Raises:
        ValueError: for an output of other settings, before anything is run; for runs that failed, after all others.
    """
    finished = sorted(path.parent for path in output.glob(f"*/*/{MEASURES}"))
    claim(output / "settings.json", shared_settings(plan[0]), results=finished[:3])
    for run in plan:
        claim_run(run)
    about = environment(torch.device(plan[0].device), commit)
    done = 0
    failed: dict[str, str] = {}
    for stage in _stages(plan):
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(execute, run): run for run in stage}
            for future in as_completed(waiting):
                error = future.exception()
                if error is not None:
                    run = waiting[future]
                    failed[f"{run.world}, {run.arm}, seed {run.seed}"] = f"{type(error).__name__}: {error}"
                write_jsonl(output / "results.jsonl", [{**row, **about} for row in _read_rows(output, plan)])
                done += 1
                if progress is not None:
                    progress(done, len(plan))
    rows = _read_rows(output, plan)
    if rows:
        write_page(output / "report.html", rows, about["commit"])
    if failed:
        told = "; ".join(f"{run} ({reason})" for run, reason in list(failed.items())[:_SHOWN])
        raise ValueError(f"{len(failed)} of {len(plan)} runs failed, and the same command repeats them: {told}")
    return means_tables(rows)


def _stages(plan: Sequence[Run]) -> list[list[Run]]:
    """Return the runs in groups, of which each is finished before the next is started.

    The judges before training come first: they fill the cache that the other runs of their world and seed read. A judge
    in words serves all seeds and is made under a lock, so its runs are one group, the longest of them first.
    """
    before, trained = [run for run in plan if not run.changes], [run for run in plan if run.changes]
    return [trained + before] if plan[0].in_words else [before, trained]


def _read_rows(output: Path, plan: Sequence[Run]) -> list[Row]:
    """Return the rows of all finished runs, of earlier calls too, in the order of the plan's worlds, seeds and arms."""
    rows = [row for path in output.glob(f"*/*/{MEASURES}") for _, row in read_jsonl(path)[0]]
    worlds, arms = (
        list(dict.fromkeys([*first, *sorted(row[name] for row in rows)]))
        for name, first in (("world", [run.world for run in plan]), ("arm", [run.arm for run in plan]))
    )
    return sorted(rows, key=lambda row: (worlds.index(row["world"]), row["seed"], arms.index(row["arm"])))
