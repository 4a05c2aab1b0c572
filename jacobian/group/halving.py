"""When memory runs out, run half as much at once, with the same results."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

logger = logging.getLogger("cepo")

Item = TypeVar("Item")
Found = TypeVar("Found")

# Messages of PyTorch's allocators, of the CUDA driver, and of cuBLAS, which allocates from the driver.
_TOLD = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class AtOnce:
    """How much runs at once; each number is at least 1.

    Attributes:
        sequences: rollouts of a chunk, or branches of a path request.
        passes: cotangents of each sequence that go back through its own tokens.
        in_stem: cotangents, of all sequences together, that go back through what they share.
    """

    sequences: int
    passes: int = 1
    in_stem: int = 1

    def halved(self) -> AtOnce:
        """Return half of everything, rounded up."""
        return AtOnce((self.sequences + 1) // 2, (self.passes + 1) // 2, (self.in_stem + 1) // 2)

    def __str__(self) -> str:
        return f"{self.sequences} sequences, {self.passes} cotangents each, {self.in_stem} in what they share"


def run_in_parts(
    items: Sequence[Item], at_once: AtOnce, run: Callable[[Sequence[Item], AtOnce], Found]
) -> Iterator[Found]:
    """Yield what `run` returns for parts of the items; when memory runs out, that part and later ones are halved.

    Args:
        items: what is run, in order.
        at_once: how much to run at once at first.
        run: runs a part, this much at once; its results must not depend on either.

    Raises:
        RuntimeError: the out-of-memory error, if even one of everything is too much.
    """
    start = 0
    while start < len(items):
        part = items[start : start + at_once.sequences]
        try:
            found = run(part, at_once)
        except RuntimeError as error:
            used = AtOnce(len(part), at_once.passes, min(at_once.in_stem, max(1, len(part) * at_once.passes)))
            if not is_out_of_memory(error) or used == used.halved():
                raise
        else:
            yield found
            start += len(part)
            continue
        at_once = used.halved()
        logger.warning("out of memory with %s; continuing with %s", used, at_once)
        release_memory()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a device or the host ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(told in str(error) for told in _TOLD)


def release_memory() -> None:
    """Free what a failed attempt held; call it outside of the except block, whose traceback keeps tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
