"""Runs test cases on two processes of a gloo group, started once for all of them."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

Case = Callable[[int, Path], None]


def run_on_two_ranks(cases: Sequence[Case], folder: Path, *, seconds: float = 240.0) -> dict[str, str]:
    """Run each case on both ranks, in order, and return what went wrong by the case's name.

    A case asserts for itself. It gets its rank and a folder that both ranks share. After one that fails, the later ones
    are not run, since the ranks may no longer be in step.

    Args:
        cases: named functions.
        folder: an empty one, for the rendezvous and what the ranks report.
        seconds: after which the ranks are killed.
    """
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_run, args=(rank, cases, folder)) for rank in range(2)]
    for each in ranks:
        each.start()
    until = time.monotonic() + seconds
    for each in ranks:
        each.join(max(0.0, until - time.monotonic()))
        each.kill()
        each.join()
    problems = {}
    for case in cases:
        reports = [folder / f"{case.__name__}-{rank}" for rank in range(2)]
        found = [report.read_text() if report.exists() else "not finished" for report in reports]
        problems[case.__name__] = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(found) if text)
    return problems


def _run(rank: int, cases: Sequence[Case], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    limit = datetime.timedelta(seconds=60)  # of a collective that the other rank never joins
    AcceleratorState._reset_state(reset_partial_state=True)  # of a trainer in the process that was forked
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2, timeout=limit)
    for case in cases:
        try:
            case(rank, folder)
            problem = ""
        except BaseException:
            problem = traceback.format_exc()
        (folder / f"{case.__name__}-{rank}").write_text(problem)
        if problem:
            break
    os._exit(0)  # no destructor of a group that may have lost its other rank
