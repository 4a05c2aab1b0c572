"""An engine that tests of scores share."""

from __future__ import annotations

import pytest
import torch

from cepo.jacobian.autograd import JacobianEngine
from tests.models import tiny_model


@pytest.fixture(scope="module")
def engine() -> JacobianEngine:
    """Return an engine on a tiny float32 Llama."""
    torch.set_num_threads(1)
    return JacobianEngine(tiny_model("llama", dtype=torch.float32, attention="sdpa"))
