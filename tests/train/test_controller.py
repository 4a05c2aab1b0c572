"""Protects `weight: auto`: pressure rises while the task reward holds, falls when it falls, and survives a resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cepo.files import read_jsonl
from cepo.train.controller import MOST, Pressure, step
from cepo.train.grpo import build_rewards, load_config, train


def series(rewards: list[float]) -> list[Pressure]:
    states = [Pressure()]
    for reward in rewards:
        states.append(step(states[-1], reward))
    return states


def test_pressure_rises_while_the_task_reward_holds_up_to_its_bound() -> None:
    values = [state.value for state in series([0.8] * 100)]
    assert values[:10] == [1.0] * 10  # the average is not settled yet
    assert values[10:20] == pytest.approx([1.0 + 0.05 * n for n in range(1, 11)])
    assert values[-1] == MOST == max(values)


def test_pressure_falls_when_the_task_reward_falls_and_rises_again_when_it_is_back() -> None:
    states = series([0.8] * 30 + [0.2] * 10 + [0.8] * 60)
    values = [state.value for state in states]
    assert values[40] == pytest.approx(values[30] * 0.8**10)
    lowest = values.index(min(values))
    assert 40 <= lowest < 70  # until the average is within the slack of its best
    assert all(later > earlier for earlier, later in zip(values[lowest:], values[lowest + 1 :], strict=False))
    assert min(values) > 0.0


def test_the_average_is_a_plain_mean_at_first_and_one_lucky_start_is_not_the_best() -> None:
    states = series([1.0] + [0.5] * 9)
    assert states[-1].average == pytest.approx(0.55)
    assert states[-1].best == states[-1].average
    assert [state.best for state in states[:-1]] == [None] * 10
    assert all(state.value >= 1.0 for state in series([1.0] + [0.5] * 60))
    assert step(states[-1], float("nan")) == states[-1]


def write_config(folder: Path, judge: Path, **changes: Any) -> Path:
    config = {
        "model": str(judge),
        "output": str(folder / "run"),
        "threads": 1,
        "data": {"source": "testbed", "count": 16, "test_count": 4},
        "rewards": [
            {"name": "argmax"},
            {"name": "causal", "weight": "auto", "links": {"X->Y": 1.0}, "score": "influence", "p": "auto"},
        ],
        "causal_loss": {"weight": "auto"},
        "grpo": {
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 2,
            "save_steps": 1,
            "report_to": [],
        },
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def test_a_resumed_run_goes_on_with_the_pressure_of_an_uninterrupted_one(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three settings that can be auto, with a law that moves at the first step; one run stops after one of two."""
    monkeypatch.setattr("cepo.train.controller._DECAY", 0.0)
    names = ("causal/pressure", "causal/weight", "causal_loss/weight", "causal/p")
    config = load_config(write_config(tmp_path, judge), {})
    logged = {}
    for run, stops in (("whole", [2]), ("broken", [1, 2])):
        for stop in stops:
            output = str(tmp_path / run)
            train(replace(config, output=output, grpo={**config.grpo, "max_steps": stop}))
        rows = [row for _, row in read_jsonl(tmp_path / run / "metrics.jsonl")[0] if names[0] in row]
        logged[run] = [[row[name] for name in names] for row in rows]
        state = json.loads((tmp_path / run / "checkpoint-2" / "trainer_state.json").read_text())
        assert state["stateful_callbacks"]["ControlledPressure"]["attributes"]["steps"] == 2
    assert logged["whole"] == logged["broken"]
    assert len(logged["whole"]) == 2
    for place, values in enumerate(logged["whole"]):
        pressure = 1.0 + 0.05 * place
        assert values == pytest.approx([pressure, pressure, 0.5 * pressure, 1.0 - 0.8 * pressure])


def test_a_step_logs_the_weight_and_exponent_that_its_completions_were_paid_with(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second step trains on the first one's completions: only the loss's own weight can have changed."""
    monkeypatch.setattr("cepo.train.controller._DECAY", 0.0)
    config = load_config(write_config(tmp_path, judge), {"grpo.steps_per_generation": 2, "grpo.max_steps": 3})
    train(config)
    rows = [row for _, row in read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]]
    assert [row.get("causal/weight") for row in rows] == [1.0, None, 1.05]
    assert [row.get("causal/p") for row in rows] == pytest.approx([0.2, None, 0.16])
    assert [row["causal_loss/weight"] for row in rows] == [0.5, 0.525, 0.525]
    assert [row["causal/pressure"] for row in rows] == [1.0, 1.05, 1.05]


def test_auto_needs_a_task_reward_and_a_causal_one(judge: Path, tmp_path: Path) -> None:
    for rewards, complaint in (
        ([{"name": "format"}, {"name": "causal", "weight": "auto"}], "needs a task reward"),
        ([{"name": "argmax", "weight": "auto"}], "auto for a causal reward"),
    ):
        with pytest.raises(ValueError, match=complaint):
            build_rewards(load_config(write_config(tmp_path, judge, rewards=rewards), {}))
