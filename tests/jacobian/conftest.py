"""Fixtures of all tests of Jacobians: one thread, and transformers without its casts to float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.models import InDouble


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def _in_double() -> Iterator[None]:
    with InDouble():
        yield
