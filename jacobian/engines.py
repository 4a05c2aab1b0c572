"""Make an engine by its name, for commands and rewards."""

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
    """Return an engine for a model.

    Args:
        name: "group", or "autograd" for the oracle, which ignores `memory_budget` and `kernels`.
        model: a causal LM, PEFT-wrapped or not.
        adapters: see `HeldModel`.
        memory_budget: see `GroupEngine`.
        kernels: see `GroupEngine`.

    Raises:
        ValueError: for an unknown name, and as the engine's constructor.
    """
    check_engine(name)
    if name == "autograd":
        return JacobianEngine(model, adapters=adapters)
    return GroupEngine(model, adapters=adapters, memory_budget=memory_budget, kernels=kernels)


def check_engine(name: str) -> None:
    """Raise ValueError unless `name` is the name of an engine."""
    if name not in get_args(EngineName):
        raise ValueError(f"engine is {name!r}; expected one of {', '.join(get_args(EngineName))}")
