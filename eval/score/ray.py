"""`cepo score --ray N`, and a callable class for `ray.data.map_batches`: rows scored by several processes or machines.

The records equal those of one process up to rounding, since all workers draw from the same donors.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pyarrow

from cepo.eval.score.rows import Line, line_of
from cepo.eval.score.scorer import Scoring, batches_of, donor_pools, open_engine, open_reader, score_lines
from cepo.files import json_line
from cepo.fusion.score import Pools
from cepo.jacobian.loading import resolve_model

_BLOCKS = 10_000  # upper bound: Ray Data keeps track of each block in the driver


def score_on_ray(
    scoring: Scoring, lines: Mapping[int, Line], pools: Pools | None, *, workers: int, threads: int, batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of each batch of lines as workers finish it, in no particular order.

    Runs on the cluster that Ray finds (a running `ray.init`, RAY_ADDRESS, `ray start` on this machine), or else on this
    machine. Ray restarts a worker that dies, and reassigns its rows.

    Args:
        scoring: how rows are scored; each machine loads the model by the same name.
        lines: lines by row number.
        pools: donor candidates from all rows; None if no donors are used.
        workers: number of worker processes, each with its own copy of the model.
        threads: CPUs per worker, at least 1; with a CUDA device each worker also has a GPU of its own.
        batch_size: rows that a worker scores together.

    Raises:
        ValueError: with a worker's reason, if it refuses its model or settings.
    """
    import ray.data

    blocks = batches_of(lines, max(batch_size, len(lines) // _BLOCKS))
    tables = [
        pyarrow.table({"row": block, "line": [json.dumps(asdict(lines[row])) for row in block]}) for block in blocks
    ]
    with _cluster(workers * threads + 1):  # Ray's readers and writers starve if the workers take every CPU
        scored = ray.data.from_arrow(tables).map_batches(
            _LineScorer,
            fn_constructor_args=[scoring, pools],
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=threads,
            num_gpus=1 if scoring.device == "cuda" else None,
        )
        try:
            for table in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield [json.loads(record) for record in table["record"].to_pylist()]
        except ray.exceptions.RayError as error:
            _, raised, reason = str(error).rpartition("\nValueError: ")
            if not raised:
                raise
            raise ValueError(f"a Ray worker cannot score: {reason}") from error


class CepoScorer:
    """Score rows in `ray.data.Dataset.map_batches(CepoScorer, batch_format="pyarrow", ...)`.

    Args:
        scoring: how rows are scored.
        pools: donor candidates; None to read them from the file `scoring.donors`.

    Raises:
        ValueError: if the score needs donors and neither `pools` nor `scoring.donors` is given; a worker cannot draw
            them from the input, of which it sees only a part.
    """

    def __init__(self, scoring: Scoring, pools: Pools | None = None) -> None:
        if pools is None and scoring.donors is None and scoring.config.reads_effects:
            raise ValueError(
                "donors is None, and a worker does not see all rows to draw them from; name a file of rollouts by "
                "Scoring(donors=...)"
            )
        self.scoring = scoring
        source = resolve_model(scoring.model)
        self.reader, self.engine = open_reader(scoring, source), open_engine(scoring, source)
        self.pools = donor_pools(scoring, [], self.reader, origin=None) if pools is None else pools

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """Return the batch with a column `record`: for each row, the JSON line that `cepo score` would write.

        Args:
            batch: rows as for `cepo score`, optionally with their number in a column `row`.

        Raises:
            ValueError: for a batch in another format.
        """
        if not isinstance(batch, pyarrow.Table):
            raise ValueError(f'batch is a {type(batch).__name__}; expected map_batches(..., batch_format="pyarrow")')
        rows = batch.to_pylist()
        numbers = [row.get("row") for row in rows]
        places = ["row without a number" if number is None else f"row {number}" for number in numbers]
        lines = [line_of(row, place, layout=self.scoring.layout) for place, row in zip(places, rows, strict=True)]
        return batch.append_column("record", self._records(numbers, lines))

    def _records(self, numbers: list[int | None], lines: list[Line]) -> pyarrow.Array:
        found = dict(score_lines(self.scoring, lines, self.reader, self.engine, self.pools, rows=numbers))
        return pyarrow.array([json_line(found[place]) for place in range(len(lines))], pyarrow.string())


class _LineScorer(CepoScorer):
    """Score lines that `cepo score` has read, with donors from Ray's object store."""

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        lines = [Line(**json.loads(line)) for line in batch["line"].to_pylist()]
        return pyarrow.table({"record": self._records(batch["row"].to_pylist(), lines)})


def check_ray(scoring: Scoring, workers: int) -> None:
    """Raise ValueError unless Ray is installed and the number of workers and the device are valid."""
    if workers < 1:
        raise ValueError(f"--ray is {workers}; expected at least 1 worker")
    if scoring.device not in ("cpu", "cuda"):
        raise ValueError(
            f"device is {scoring.device!r}; expected cpu or cuda with --ray: Ray assigns each worker its GPU"
        )
    if importlib.util.find_spec("ray") is None:
        raise ValueError("--ray needs Ray, which is an extra: pip install 'cepo[ray]'")


@contextmanager
def _cluster(cpus: int) -> Iterator[None]:
    """Use the connected cluster, or else one that Ray finds, or else start one here with at least `cpus` CPUs."""
    import ray.data

    before = ray.data.DataContext.get_current()
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(num_cpus=max(cpus, os.cpu_count() or 1), logging_level=logging.WARNING)
        except ValueError:  # Ray found a cluster, which has its own number of CPUs
            try:
                ray.init(logging_level=logging.WARNING)
            except ConnectionError as error:
                raise ValueError(
                    f"--ray cannot reach Ray's cluster, see RAY_ADDRESS and `ray status`: {error}"
                ) from error
    quiet = before.copy()
    quiet.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        with ray.data.DataContext.current(quiet):
            yield
    finally:
        if started:
            ray.shutdown()
