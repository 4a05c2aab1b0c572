"""Log how long each part of an optimiser step takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


def time_steps(trainer: Any) -> None:
    """Make a TRL trainer log how many seconds each part of an optimiser step takes.

    Logs `time/step` (the whole step), `time/generation` (sampling), `time/rewards` (all reward functions) and
    `time/policy_update` (forward, backward and optimiser). The rest of a step is TRL's own work: old and reference
    log-probabilities, padding, logging.
    """
    spent: dict[str, float] = {}

    def timing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

        return timed

    for name in ("_generate", "_calculate_rewards", "_prepare_inputs"):
        setattr(trainer, name, timing(name, getattr(trainer, name)))

    class StepTimes(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            spent.clear()
            spent["began"] = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = time.perf_counter() - spent["began"]
            for name, seconds in {
                "step": step,
                "generation": spent.get("_generate", 0.0),
                "rewards": spent.get("_calculate_rewards", 0.0),
                "policy_update": step - spent.get("_prepare_inputs", 0.0),
            }.items():
                trainer._metrics["train"][f"time/{name}"].append(seconds)

    trainer.add_callback(StepTimes())
