"""The controller of `weight: auto`: more causal pressure while the task reward holds, less when it falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

_SLACK = 0.05  # how far the average task reward may lie below its best before pressure falls
_DECAY = 0.9  # of the exponential average of the task reward
_RISE = 0.05  # what is added to the pressure while the task reward holds
_FALL = 0.8  # what the pressure is multiplied by when it does not
MOST = 4.0
"""The largest pressure."""


@dataclass(frozen=True)
class Pressure:
    """What the controller remembers.

    Attributes:
        value: the pressure, in (0, MOST]; 1 is the setting from which it starts.
        average: exponential average of the task reward, without the bias towards its start; None before the first.
        best: the highest average so far; None before the average is settled.
        steps: number of task rewards seen.
    """

    value: float = 1.0
    average: float | None = None
    best: float | None = None
    steps: int = 0


def step(pressure: Pressure, task_reward: float) -> Pressure:
    """Return the pressure after one more task reward.

    Additive increase and multiplicative decrease: pressure falls faster than it rises.
    Over the first 1 / (1 - decay) rewards the average is a plain mean, nothing is called the best, and the pressure
    stays: one lucky batch at the start would set a best that is never reached again.

    Args:
        pressure: before.
        task_reward: mean over the step's completions; one that is not finite changes nothing.
    """
    if not math.isfinite(task_reward):
        return pressure
    steps = pressure.steps + 1
    before = task_reward if pressure.average is None else pressure.average
    average = before + max(1.0 - _DECAY, 1.0 / steps) * (task_reward - before)
    if steps < round(1.0 / (1.0 - _DECAY)):
        return Pressure(pressure.value, average, None, steps)
    best = average if pressure.best is None else max(pressure.best, average)
    if average >= best - _SLACK:
        return Pressure(min(MOST, pressure.value + _RISE), average, best, steps)
    return Pressure(pressure.value * _FALL, average, best, steps)


@dataclass(frozen=True)
class Knob:
    """What the pressure acts on.

    Attributes:
        name: of its value in the logs.
        value: its value at a pressure.
        turn: sets it.
    """

    name: str
    value: Callable[[float], float]
    turn: Callable[[float], None]


class ControlledPressure(TrainerCallback, ExportableState):
    """Turns knobs after every optimiser step; its state is saved in checkpoints and restored from them.

    Args:
        knobs: what to turn.
        observe: returns the task rewards that came in since it was last asked; none leaves the pressure as it is.
        log: takes the name and value of the pressure and of each knob during the step.

    Attributes:
        pressure: what it remembers now.
    """

    def __init__(
        self,
        knobs: Sequence[Knob],
        observe: Callable[[], Sequence[float]],
        log: Callable[[str, float], None],
    ) -> None:
        self._knobs, self._observe, self._log = knobs, observe, log
        self.pressure = Pressure()

    def state(self) -> dict[str, Any]:
        """Return what transformers writes into a checkpoint's trainer_state.json."""
        return {"args": {}, "attributes": asdict(self.pressure)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.pressure = Pressure(**state.stateful_callbacks[type(self).__name__]["attributes"])
        self._turn()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._log("causal/pressure", self.pressure.value)
        for knob in self._knobs:
            self._log(knob.name, knob.value(self.pressure.value))
        rewards = [reward for reward in self._observe() if math.isfinite(reward)]
        if rewards:
            self.pressure = step(self.pressure, sum(rewards) / len(rewards))
        self._turn()

    def _turn(self) -> None:
        for knob in self._knobs:
            knob.turn(knob.value(self.pressure.value))
