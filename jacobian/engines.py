"""An engine by its name, as commands and rewards take it."""

from __future__ import annotations

from typing import Any, Literal, get_args

from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.protocol import Engine
from cepo.kernels.launch import Implementation

EngineName = Literal["group", "autograd"]


def new_engine(
    name: EngineName,
    model: Any,
    *,
    adapters: bool = True,
    memory_budget: float | None = None,
    kernels: Implementation = "auto",
) -> Engine:
    """Return the group engine for a model, or the oracle, which has neither a memory budget nor kernels.

    Raises:
        ValueError: for an unknown name, or as the engine.
    """
    check_engine(name)
    if name == "autograd":
        return JacobianEngine(model, adapters=adapters)
    return GroupEngine(model, adapters=adapters, memory_budget=memory_budget, kernels=kernels)


def check_engine(name: str) -> None:
    """Raise ValueError unless `name` is the name of an engine."""
    if name not in get_args(EngineName):
        raise ValueError(f"engine is {name!r}; expected one of {', '.join(get_args(EngineName))}")
