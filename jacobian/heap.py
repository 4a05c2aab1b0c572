"""The C library's heap while an engine runs on a CPU: what was freed goes back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator

_TRIM, _MAPPED = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_RETURNED = 2**24
_USUAL = 2**25  # what glibc raises its threshold to by itself, at most


@contextlib.contextmanager
def returning_blocks() -> Iterator[None]:
    """Let blocks of at least 16 MiB be mapped one by one in this context, and unmapped when they are freed.

    By itself, glibc raises that threshold to the size of blocks that were freed, up to 32 MiB, and keeps such blocks in
    its heap, in pieces that later ones seldom fit: a process held up to half as much again as its tensors took. A
    block that is mapped anew costs page faults, about 1% of an engine's time. On the way out the threshold is the one
    that glibc reaches by itself. Other C libraries, and a threshold that the user has set, are left as they are.

    Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    mallopt = _function("mallopt")
    if mallopt is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    mallopt(_MAPPED, _RETURNED)
    mallopt(_TRIM, _RETURNED)
    try:
        yield
    finally:
        mallopt(_MAPPED, _USUAL)
        mallopt(_TRIM, 2 * _USUAL)


def return_freed() -> None:
    """Return what lies free in the heap to the system, where the C library can.

    The blocks of a graph that was freed seldom hold those of the next one: glibc asks for a few bytes more than it
    then keeps for an aligned block, and small objects take the gaps. Without this a process held two graphs at once.

    Source: malloc_trim(3).
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Callable[..., int] | None:
    """Return a function of glibc, or None where there is another C library."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
