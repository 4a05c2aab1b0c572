"""Protects the training experiment: every arm is trained once, measured alike, and compared seed by seed."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cepo.benchmarks.experiment import command, recipe, run
from cepo.benchmarks.experiment.command import run_experiment
from cepo.benchmarks.experiment.recipe import BASELINE, RECIPE, UNTRAINED, Run, read_plan
from cepo.benchmarks.experiment.results import paired_gains, write_page
from cepo.benchmarks.experiment.run import MEASURES, execute
from cepo.train import policy, testbed
from cepo.train.grpo import TrainConfig, build_rewards
from cepo.train.policy import load_testbed_judge

SMALL: dict[str, Any] = {"items": 24, "scored": 4}


@pytest.fixture
def barely_warm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Judges of two steps, trained and measured in this process."""

    def load(judge: str, *, steps: int, seed: int, **_: object) -> object:
        return load_testbed_judge(judge, steps=2, seed=seed, cache=tmp_path / "cache")

    monkeypatch.setattr(policy, "load_testbed_judge", load)
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))


def test_an_arm_is_trained_and_measured_once_on_items_it_has_not_seen(
    barely_warm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run is kept; its items are not those that trained it; an untrained arm takes no step."""
    drawn: list[tuple[int, int, list[str]]] = []
    generate_items = testbed.generate_items

    def generate(count: int, *, seed: int, cue_agreement: float) -> Any:
        items = generate_items(count, seed=seed, cue_agreement=cue_agreement)
        drawn.append((count, seed, [item.prompt for item in items]))
        return items

    monkeypatch.setattr(testbed, "generate_items", generate)
    rewards = ({"name": "format"}, {"name": "proxy", "encoder": "testbed"})
    one = Run("proxy", rewards, seed=0, steps=1, folder=tmp_path / "proxy-0", **SMALL)
    execute(one)
    row = json.loads((one.folder / MEASURES).read_text())
    assert row["arm"] == "proxy"
    assert row["steps"] == 1
    assert 0.0 <= row["flipped"] <= 1.0
    # Item by item only the seed tells the two apart: another count gives other items, also from the same seed.
    trained = [one for one in drawn if one[0] == 512]
    measured = [one for one in drawn if one[0] == SMALL["items"]]
    assert (len(trained), len(measured)) == (1, 2)
    for _, seed, prompts in measured:
        assert seed != trained[0][1]
        assert not set(prompts) & set(trained[0][2])
    written = (one.folder / MEASURES).stat().st_mtime_ns
    execute(one)
    assert (one.folder / MEASURES).stat().st_mtime_ns == written
    untrained = replace(one, arm=UNTRAINED, rewards=(), folder=tmp_path / "untrained-0")
    execute(untrained)
    assert json.loads((untrained.folder / MEASURES).read_text())["steps"] == 0


def test_results_are_added_to_and_never_replaced(
    barely_warm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later call for one seed keeps the other's rows; other settings or another world are refused by name."""
    output = tmp_path / "runs"

    def run_one(seed: int, **options: Any) -> list[int]:
        run_experiment(
            output, read_plan(output, seeds=[seed], **{"steps": 1, "arms": [UNTRAINED], **SMALL, **options}), jobs=1
        )
        return [json.loads(line)["seed"] for line in (output / "results.jsonl").read_text().splitlines()]

    assert run_one(1) == [1]
    assert run_one(0) == [0, 1]
    written = (output / "untrained-1" / MEASURES).read_bytes()
    assert run_one(1) == [0, 1]
    assert "untrained, seed 0" in (output / "report.html").read_text()
    for seed in (1, 2):  # also a new seed: its row would stand among runs of other lengths
        with pytest.raises(
            ValueError, match="holds untrained-0, untrained-1, made with other settings: steps was 1 and"
        ):
            run_one(seed, steps=2)
    other = tmp_path / "recipe.yaml"
    other.write_text(yaml.safe_dump({"steps": 1, "seeds": [1], "arms": {UNTRAINED: [], "task": [{"name": "format"}]}}))
    (output / "task-1" / "grpo").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds grpo, which no earlier run of this command wrote"):
        run_one(1, recipe=other, arms=["task"])
    monkeypatch.setattr(policy, "testbed_fingerprint", lambda *_, **__: "another world")
    with pytest.raises(ValueError, match="made with other settings: world was"):
        run_one(1)
    assert (output / "untrained-1" / MEASURES).read_bytes() == written


def test_a_run_goes_on_only_with_its_own_rewards_and_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run's checkpoints are those of its rewards, its seed and the testbed's recipe."""
    one = Run("task", ({"name": "format"},), seed=0, steps=1, folder=tmp_path / "task-0", **SMALL)
    run.claim_run(one)
    (one.folder / "grpo").mkdir()
    run.claim_run(one)
    for changed, name in (
        (replace(one, rewards=({"name": "argmax"},)), "rewards"),
        (replace(one, seed=1), "seed"),
        (replace(one, scored=2), "scored"),
        (replace(one, arm="other"), "arm"),
    ):
        with pytest.raises(ValueError, match=f"made with other settings: {name} was"):
            run.claim_run(changed)
    changed_recipe = yaml.safe_load(recipe.TESTBED.read_text())
    changed_recipe["grpo"]["learning_rate"] = 1.0
    path = tmp_path / "testbed.yaml"
    path.write_text(yaml.safe_dump(changed_recipe))
    monkeypatch.setattr(run, "TESTBED", path)
    with pytest.raises(ValueError, match="testbed.grpo.learning_rate was 0.0003 and is 1.0"):
        run.claim_run(one)


def test_every_arm_of_the_recipe_can_be_built(tmp_path: Path) -> None:
    """A reward that cannot be built must not be found out after an hour."""
    arms = yaml.safe_load(RECIPE.read_text())["arms"]
    assert BASELINE in arms
    assert arms[UNTRAINED] == []
    for name, rewards in arms.items():
        if rewards:
            functions, _ = build_rewards(TrainConfig("testbed", {"source": "testbed"}, rewards, str(tmp_path)))
            assert len(functions) == len(rewards), name


def rows_of(arms: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """Return one row per arm and seed, with the value as its accuracy where length is flipped."""
    return [
        {
            "arm": arm,
            "seed": seed,
            "flipped": value,
            "turned": value,
            "in_distribution": 1.0,
            "steps": 1,
            "seconds": 1.0,
        }
        | {"tokens": 3.0, "malformed": 0.0, "links": {}}
        for arm, values in arms.items()
        for seed, value in values.items()
    ]


def test_gains_are_paired_by_seed() -> None:
    """The difference to the baseline is taken within a seed: 0.1 and 0.3, whatever the seeds' own level.

    By hand: the mean is 0.2, its standard error 0.1, and t is 12.706 for two seeds.
    """
    rows = rows_of({"task": {0: 0.1, 1: 0.6}, "causal": {0: 0.2, 1: 0.9}, "untrained": {0: 0.0, 1: 0.0}})
    ((name, gain),) = paired_gains(rows, "flipped").items()
    assert name == "causal"
    assert gain.value == pytest.approx(0.2)
    assert (gain.low, gain.high) == (pytest.approx(0.2 - 1.2706, abs=1e-4), pytest.approx(0.2 + 1.2706, abs=1e-4))


def test_gains_are_those_of_the_seeds_that_both_arms_have(tmp_path: Path) -> None:
    """Seeds stand in any order and some are missing: 3 and 1 are shared; no row is lost for it."""
    rows = rows_of(
        {"task": {1: 0.1, 2: 0.5, 3: 0.6}, "causal": {3: 0.9, 7: 0.0, 1: 0.2}, "alone": {8: 0.5}, "untrained": {9: 0.0}}
    )
    gains = paired_gains(rows, "flipped")
    assert list(gains) == ["causal", "alone"]
    assert gains["causal"].value == pytest.approx(0.2)
    assert gains["causal"].high == pytest.approx(0.2 + 1.2706, abs=1e-4)
    assert [gain.count for gain in gains.values()] == [2, 0]
    assert str(gains["alone"]) == "undetermined"
    write_page(tmp_path / "report.html", rows, None)
    page = (tmp_path / "report.html").read_text()
    for row in rows:
        assert f"{row['arm']}, seed {row['seed']}" in page
    assert "seeds shared with task" in page
    write_page(tmp_path / "report.html", [row for row in rows if row["arm"] != "task"], None)
    assert "alone, seed 8" in (tmp_path / "report.html").read_text()


def test_plans_that_cannot_work_are_refused(tmp_path: Path) -> None:
    """Before any training: a recipe without arms, an arm that it does not have."""
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 3\nseeds: [1]\n")
    with pytest.raises(ValueError, match="expected steps, seeds and arms"):
        read_plan(tmp_path, path)
    path.write_text("steps: 3\nseeds: []\narms: {untrained: []}\n")
    with pytest.raises(ValueError, match="has no seeds; expected at least one of each"):
        read_plan(tmp_path, path)
    with pytest.raises(ValueError, match="arms names X->Z; expected some of untrained"):
        read_plan(tmp_path, arms=["X->Z"])
    plan = read_plan(tmp_path, seeds=[7], steps=3, arms=["task"])
    assert [(one.arm, one.seed, one.steps) for one in plan] == [("untrained", 7, 3), ("task", 7, 3)]
    assert len({one.folder for one in read_plan(tmp_path)}) == 55
