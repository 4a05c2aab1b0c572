"""Decide whether the progress bars of libraries are drawn: next to our own bar they would only scroll past it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


@contextlib.contextmanager
def library_bars(**options: Any) -> Iterator[None]:
    """Make libraries create their tqdm bars with these options, such as `disable=True`, inside the block."""
    plain = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(plain, **options)
    try:
        yield
    finally:
        tqdm.__init__ = plain
