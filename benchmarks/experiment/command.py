"""`cepo experiment`: which reward makes a testbed judge's criteria cause its verdict, over seeds, at equal steps."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.table import Table

from cepo.benchmarks.experiment.recipe import Run
from cepo.benchmarks.experiment.results import Row, means_table, write_page
from cepo.benchmarks.experiment.run import MEASURES, claim_run, execute, shared_settings
from cepo.benchmarks.measure import environment
from cepo.files import claim, read_jsonl, write_jsonl


def run_experiment(
    output: Path, plan: Sequence[Run], *, jobs: int = 2, progress: Callable[[int, int], None] | None = None
) -> Table:
    """Train every arm from every seed, measure it, and write `results.jsonl` and `report.html`.

    A finished run is not repeated, and a killed one continues from its checkpoint, where settings, recipe and testbed
    are the same. Runs of other arms and seeds that the output holds stay among the results.

    Args:
        output: folder of the runs and the results.
        plan: from `read_plan`.
        jobs: processes side by side, one thread each.
        progress: called with (finished runs, all runs).

    Returns:
        A table: per arm, the mean over seeds of the main measures, and their range.

    Raises:
        ValueError: for an output of other settings.
    """
    finished = sorted(path.parent for path in output.glob(f"*/{MEASURES}"))
    claim(output / "settings.json", shared_settings(plan[0]), results=finished[:3])
    for run in plan:
        claim_run(run)
    done = 0
    # The judges before training first: they fill the cache that the other runs of their seed read.
    for stage in ([run for run in plan if not run.rewards], [run for run in plan if run.rewards]):
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for future in as_completed([pool.submit(execute, run) for run in stage]):
                future.result()
                done += 1
                if progress is not None:
                    progress(done, len(plan))
    rows = _read_rows(output, list(dict.fromkeys(run.arm for run in plan)))
    about = environment(torch.device("cpu"))
    write_jsonl(output / "results.jsonl", [{**row, **about} for row in rows])
    write_page(output / "report.html", rows, about["commit"])
    return means_table(rows)


def _read_rows(output: Path, arms: Sequence[str]) -> list[Row]:
    """Return the rows of all finished runs, of earlier calls too, by seed and in the order of the arms."""
    rows = [row for path in output.glob(f"*/{MEASURES}") for _, row in read_jsonl(path)[0]]
    order = {name: place for place, name in enumerate(arms)}
    return sorted(rows, key=lambda row: (row["seed"], order.get(row["arm"], len(order)), row["arm"]))
