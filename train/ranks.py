"""Training on several ranks (torchrun, accelerate launch): either all ranks continue, or all raise."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import gather_object


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Make every rank raise on leaving if any rank raised inside, so that none waits for one that has ended.

    Raises:
        ValueError: on a rank that did not raise itself, with the rank that did and its reason.
    """
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        raised = error
    reasons = gather_object([None if raised is None else str(raised)])
    if raised is not None:
        raise raised
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise ValueError(f"rank {rank}: {reason}")


def check_agreement(settings: Mapping[str, Any]) -> None:
    """Raise ValueError on every rank unless all were started with the same settings, data and weights."""
    of_ranks = gather_object([settings])
    for rank, others in enumerate(of_ranks):
        differing = [name for name in others if others[name] != of_ranks[0][name]]
        if differing:
            raise ValueError(
                f"rank {rank} was started with other {', '.join(differing)} than rank 0; expected the same recipe, "
                "options, data and weights on all"
            )


def require_one_process(command: str) -> None:
    """Raise ValueError if a launcher started this process as one of several ranks."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:
        raise ValueError(f"{command} runs in one process, but {count} were started; start it without a launcher")
