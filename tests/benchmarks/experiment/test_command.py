"""Protects the training experiment: every arm is trained once, measured alike, and compared seed by seed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import cepo.benchmarks.experiment.command as training
from cepo.benchmarks.experiment.command import RECIPE, Arm, _gains, _read_plan, run_arm, run_training
from cepo.train.grpo import TrainConfig, build_rewards
from cepo.train.policy import load_testbed_judge


@pytest.fixture
def barely_warm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(judge: str, *, steps: int, seed: int, **_: object) -> object:
        return load_testbed_judge(judge, steps=2, seed=seed, cache=tmp_path / "cache")

    monkeypatch.setattr(training, "load_testbed_judge", load)
    monkeypatch.setattr("cepo.train.policy.load_testbed_judge", load)


def test_an_arm_is_trained_and_measured_once(barely_warm: None, tmp_path: Path) -> None:
    """A finished run is kept, and an untrained arm takes no step."""
    rewards = ({"name": "format"}, {"name": "proxy", "encoder": "testbed"})
    arm = Arm("proxy", rewards, seed=0, steps=1, folder=tmp_path / "proxy-0", items=24, scored=4)
    run_arm(arm)
    row = json.loads((arm.folder / "measures.json").read_text())
    assert row["arm"] == "proxy"
    assert row["steps"] == 1
    assert 0.0 <= row["flipped"] <= 1.0
    written = (arm.folder / "measures.json").stat().st_mtime_ns
    run_arm(arm)
    assert (arm.folder / "measures.json").stat().st_mtime_ns == written
    untrained = replace(arm, name="untrained", rewards=(), folder=tmp_path / "untrained-0")
    run_arm(untrained)
    assert json.loads((untrained.folder / "measures.json").read_text())["steps"] == 0


def test_results_are_added_to_and_never_replaced(barely_warm: None, tmp_path: Path) -> None:
    """A later call for one seed keeps the other's rows; other settings in the same folder are refused by name."""
    for seed in (0, 1):
        run_arm(Arm("untrained", (), seed=seed, steps=1, folder=tmp_path / f"untrained-{seed}", items=24, scored=4))
    run_training(tmp_path, seeds=[1], steps=1, arms=["untrained"], items=24, scored=4, jobs=1)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1]
    assert "untrained, seed 0" in (tmp_path / "report.html").read_text()
    with pytest.raises(ValueError, match="holds a run of 'untrained', seed 1, with other settings .steps 1, now 2"):
        run_training(tmp_path, seeds=[1], steps=2, arms=["untrained"], items=24, scored=4, jobs=1)
    assert (tmp_path / "untrained-1" / "measures.json").is_file()


def test_every_arm_of_the_recipe_can_be_built(tmp_path: Path) -> None:
    """A reward that cannot be built must not be found out after an hour."""
    arms = yaml.safe_load(RECIPE.read_text())["arms"]
    assert training.BASELINE in arms
    assert arms[training.UNTRAINED] == []
    for name, rewards in arms.items():
        if rewards:
            functions, _ = build_rewards(TrainConfig("testbed", {"source": "testbed"}, rewards, str(tmp_path)))
            assert len(functions) == len(rewards), name


def test_gains_are_paired_by_seed() -> None:
    """The difference to the baseline is taken within a seed: 0.1 and 0.3, whatever the seeds' own level."""
    rows = [
        {"arm": arm, "seed": seed, "flipped": value}
        for arm, values in {"task": (0.1, 0.6), "causal": (0.2, 0.9), "untrained": (0.0, 0.0)}.items()
        for seed, value in enumerate(values)
    ]
    ((name, gain),) = _gains(rows, "flipped")
    assert name == "causal"
    assert gain.value == pytest.approx(0.2)
    assert (gain.low, gain.high) == (pytest.approx(0.1), pytest.approx(0.3))


def test_plans_that_cannot_work_are_refused(tmp_path: Path) -> None:
    """Before any training: a recipe without arms, an arm that it does not have."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 3\nseeds: [1]\n")
    with pytest.raises(ValueError, match="expected steps, seeds and arms"):
        _read_plan(tmp_path, recipe, None, None, None, 24, 4)
    with pytest.raises(ValueError, match="arms names X->Z; expected some of untrained"):
        _read_plan(tmp_path, RECIPE, None, None, ["X->Z"], 24, 4)
    plan = _read_plan(tmp_path, RECIPE, [7], 3, ["task"], 24, 4)
    assert [(arm.name, arm.seed, arm.steps) for arm in plan] == [("untrained", 7, 3), ("task", 7, 3)]
    assert len({arm.folder for arm in _read_plan(tmp_path, RECIPE, None, None, None, 24, 4)}) == 55
