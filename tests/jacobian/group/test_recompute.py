"""Protects what runs where memory is short: the same Jacobians, from a graph that keeps less."""

from __future__ import annotations

import pytest
import torch

from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.trial import Served
from cepo.jacobian.protocol import Request
from cepo.jacobian.records import Group
from tests.jacobian.group import test_engine, test_paths
from tests.jacobian.group.ragged import PAPER, SERVED, ragged_rollout
from tests.models import tiny_model


def served_by(engine: GroupEngine) -> Served:
    """Return the model as the engine runs it."""
    served = engine._tried()
    assert isinstance(served, Served), served
    return served


@pytest.mark.usefixtures("_in_double")
@pytest.mark.parametrize("family", SERVED)
def test_a_budget_that_everything_exceeds_changes_nothing(family: str) -> None:
    """Recomputed MLPs and attention give the oracle's Jacobians and paths to 1e-10."""
    model = tiny_model(family)
    short, oracle = GroupEngine(model, memory_budget=1.0), JacobianEngine(model)
    served, group = served_by(short), Group(tuple(ragged_rollout(seed) for seed in range(3)))
    assert short._fitting([Request(group, PAPER)], served)[0] is served.lean is not served
    wanted = oracle.jacobians(group, PAPER, context_energy=True)
    test_engine.assert_same(short.jacobians(group, PAPER, context_energy=True), wanted, 1e-10)
    asked = test_paths.request(group.rollouts, "criteria->analysis", nodes=2)
    (found,), (right,) = short.paths([asked]), oracle.paths([asked])
    test_paths.assert_same(found, right, 1e-10)


def test_its_graph_keeps_less() -> None:
    """MLPs are most of a graph of wide ones; without recomputation all of it is kept."""
    served = served_by(GroupEngine(tiny_model("llama", dtype=torch.float32, intermediate_size=256)))
    assert served.lean is not None
    assert served.lean.cost.saved_row < 0.5 * served.cost.saved_row
    assert served.lean.cost.saved_pair == 0 < served.cost.saved_pair
    assert served.lean.cost.working_row == served.cost.working_row == served.cost.saved_row
