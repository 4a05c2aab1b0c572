"""The controller of `weight: auto`: the causal pressure rises while the task reward holds, and falls when it drops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

_SLACK = 0.05  # how far the average task reward may be below its best before the pressure falls
_DECAY = 0.9  # of the exponential average of the task reward
_RISE = 0.05  # added to the pressure while the task reward holds
_FALL = 0.8  # multiplies the pressure otherwise
MOST = 4.0
"""The largest pressure."""


@dataclass(frozen=True)
class Pressure:
    """The state of the controller.

    Attributes:
        value: the pressure, in (0, MOST]; it starts at 1.
        average: exponential average of the task reward, bias-corrected; None before the first.
        best: the highest average so far; None until the average has settled, see `step`.
        steps: number of task rewards seen.
    """

    value: float = 1.0
    average: float | None = None
    best: float | None = None
    steps: int = 0


def step(pressure: Pressure, task_reward: float) -> Pressure:
    """Return the pressure after one more task reward.

    Additive increase and multiplicative decrease: the pressure falls faster than it rises. During the first
    1 / (1 - decay) rewards the average is a plain mean, no best is recorded, and the pressure stays; otherwise one
    lucky batch at the start could set a best that is never reached again.

    Args:
        pressure: the pressure before.
        task_reward: mean over the step's completions; ignored if not finite.
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
    """A setting that depends on the pressure.

    Attributes:
        name: name of its value in the logs.
        value: returns its value at a pressure.
        turn: sets it to a value.
    """

    name: str
    value: Callable[[float], float]
    turn: Callable[[float], None]


class ControlledPressure(TrainerCallback, ExportableState):
    """Updates the pressure after every optimiser step and sets the knobs; its state is saved in checkpoints.

    Args:
        knobs: the settings to control.
        observe: returns the task rewards since its last call; without any, the pressure stays.
        log: called with a name and a value, for the pressure as it was during the step, and for each knob if the step
            sampled completions, since a reward's weight enters when they are scored and not when they are used again.

    Attributes:
        pressure: the controller's state.
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
        observed = self._observe()
        for knob in self._knobs if observed else ():
            self._log(knob.name, knob.value(self.pressure.value))
        rewards = [reward for reward in observed if math.isfinite(reward)]
        if rewards:
            self.pressure = step(self.pressure, sum(rewards) / len(rewards))
        self._turn()

    def _turn(self) -> None:
        for knob in self._knobs:
            knob.turn(knob.value(self.pressure.value))
