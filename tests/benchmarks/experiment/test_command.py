"""Protects the training experiment: every arm is trained once, measured alike, and compared seed by seed."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cepo.benchmarks.experiment import command, recipe, run
from cepo.benchmarks.experiment.command import run_experiment
from cepo.benchmarks.experiment.recipe import BASELINE, RECIPE, UNTRAINED, Run, read_plan
from cepo.benchmarks.experiment.results import means_tables, paired_gains, write_page
from cepo.benchmarks.experiment.run import MEASURES, execute
from cepo.files import write_jsonl
from cepo.train import policy, testbed
from cepo.train.grpo import build_causal_loss, build_rewards, grpo_arguments
from cepo.train.policy import load_testbed_judge
from cepo.train.reasoner_testbed_models import load_testbed_reasoner

SMALL: dict[str, Any] = {"items": 24, "scored": 4}


@pytest.fixture
def barely_warm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Judges of two steps."""

    def load(judge: str, *, steps: int, seed: int, **_: object) -> object:
        return load_testbed_judge(judge, steps=2, seed=seed, cache=tmp_path / "cache")

    monkeypatch.setattr(policy, "load_testbed_judge", load)


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
    one = Run("hollow", "proxy", {"rewards": rewards}, seed=0, steps=1, folder=tmp_path / "proxy-0", **SMALL)
    execute(one)
    row = json.loads((one.folder / MEASURES).read_text())
    assert (row["world"], row["arm"], row["steps"]) == ("hollow", "proxy", 1)
    assert set(row["time"]) == {*run.PARTS, "cost"}
    assert 0.0 < row["time"]["rewards"] < row["time"]["step"]
    assert sum(row["modes"].values()) == pytest.approx(1.0)
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
    untrained = replace(one, arm=UNTRAINED, changes={}, folder=tmp_path / "untrained-0")
    execute(untrained)
    assert json.loads((untrained.folder / MEASURES).read_text())["steps"] == 0


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process that train nothing, and write an invented row."""

    def write(one: Run) -> None:
        (row,) = rows_of({one.arm: {one.seed: 0.5}})
        write_jsonl(one.folder / MEASURES, [{**row, "world": one.world}])

    monkeypatch.setattr(command, "execute", write)
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))


def test_results_are_added_to_and_never_replaced(
    invented: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later call for one seed keeps the other's rows; other settings or another world are refused by name."""
    output = tmp_path / "runs"

    def run_one(seed: int, **options: Any) -> list[int]:
        options = {"steps": 1, "arms": [UNTRAINED], "worlds": ["lazy"], **SMALL, **options}
        run_experiment(output, read_plan(output, seeds=[seed], **options), jobs=1)
        return [json.loads(line)["seed"] for line in (output / "results.jsonl").read_text().splitlines()]

    assert run_one(1) == [1]
    assert run_one(0) == [0, 1]
    written = (output / "lazy" / "untrained-1" / MEASURES).read_bytes()
    assert "World lazy" in (output / "report.html").read_text()
    for seed in (1, 2):  # also a new seed: its row would stand among runs of other lengths
        with pytest.raises(ValueError, match="holds results made with other settings: steps was 1 and"):
            run_one(seed, steps=2)
    other = tmp_path / "recipe.yaml"
    other.write_text(
        yaml.safe_dump(
            {"worlds": ["lazy"], "steps": 1, "seeds": [1], "arms": {UNTRAINED: [], "task": [{"name": "format"}]}}
        )
    )
    (output / "lazy" / "task-1" / "grpo").mkdir(parents=True)
    with pytest.raises(ValueError, match="no earlier run of this command wrote grpo"):
        run_one(1, recipe=other, arms=["task"])
    monkeypatch.setattr(policy, "testbed_fingerprint", lambda *_, **__: "another world")
    with pytest.raises(ValueError, match="made with other settings: warm_up was"):
        run_one(1)
    assert (output / "lazy" / "untrained-1" / MEASURES).read_bytes() == written


def test_a_run_goes_on_only_with_its_own_rewards_and_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run's checkpoints are those of its rewards, its seed and the testbed's recipe."""
    task = {"rewards": [{"name": "format"}]}
    one = Run("lazy", "task", task, seed=0, steps=1, folder=tmp_path / "task-0", **SMALL)
    run.claim_run(one)
    (one.folder / "grpo").mkdir()
    run.claim_run(one)
    for changed, name in (
        (replace(one, changes={"rewards": [{"name": "argmax"}]}), "changes.rewards.1.name"),
        (replace(one, changes={**task, "causal_loss": {"weight": 1.0}}), "changes.causal_loss.weight"),
        (replace(one, world="hollow"), "world"),
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


NAMES = ("testbed-training.yaml", "testbed-words.yaml", "testbed-reasoner.yaml")


@pytest.mark.parametrize("path", [RECIPE, *map(RECIPE.with_name, NAMES)])
def test_every_arm_of_the_recipes_can_be_built(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward or loss that cannot be built must not be found out after an hour; runs train on the CPU."""
    monkeypatch.setattr(
        run, "_with_encoder", lambda reward, _: {**reward, "encoder": "x"} if "encoder" in reward else reward
    )
    plan = read_plan(tmp_path, path, seeds=[1])
    assert {BASELINE, UNTRAINED} <= {one.arm for one in plan}
    for one in plan:
        if one.arm == UNTRAINED:
            assert one.changes == {}
            continue
        config = run.training(one)
        functions, _ = build_rewards(config)
        assert len(functions) == len(one.changes["rewards"]), one.arm
        assert config.testbed["reasoner" if one.reasons else "judge"] == one.judge
        testbed_of = {"words": "testbed-words", "reasoner": "testbed-reasoner"}
        assert config.model == testbed_of.get(one.world.partition("-")[0], "testbed")
        assert grpo_arguments(config).use_cpu
        assert (build_causal_loss(config) is None) == ("causal_loss" not in one.changes), one.arm


def test_an_arm_may_change_the_loss_and_grpo_beside_its_rewards(tmp_path: Path) -> None:
    """What an arm sets reaches the training, and what no training knows is refused before anything runs."""
    path = tmp_path / "recipe.yaml"
    arm = {"rewards": [{"name": "format"}], "causal_loss": {"weight": 0.25}, "grpo": {"beta": 0.1, "max_steps": 9}}
    path.write_text(yaml.safe_dump({"worlds": ["copied"], "steps": 3, "seeds": [1], "arms": {"loss": arm}}))
    untrained, one = read_plan(tmp_path, path)
    assert untrained.arm == UNTRAINED
    config = run.training(one)
    assert config.causal_loss == {"weight": 0.25}
    assert (config.grpo["beta"], config.grpo["max_steps"], config.grpo["num_generations"]) == (0.1, 9, 8)
    for changed, told in (
        ({**arm, "lora": {}}, "arm 'loss' holds lora"),
        ({**arm, "rewards": []}, "arm 'loss' has no rewards"),
    ):
        path.write_text(yaml.safe_dump({"worlds": ["copied"], "steps": 3, "seeds": [1], "arms": {"loss": changed}}))
        with pytest.raises(ValueError, match=told):
            read_plan(tmp_path, path)


def test_worlds_in_words_have_a_recipe_and_an_output_of_their_own(tmp_path: Path) -> None:
    """A pretrained judge is trained with other lengths and rates, so its rows never stand beside the small ones'."""
    with pytest.raises(ValueError, match="worlds names lazy, words-lazy, of different testbeds"):
        read_plan(tmp_path, worlds=["lazy", "words-lazy"])
    plan = read_plan(tmp_path, worlds=["words-hollow"], seeds=[1], arms=["task"], device="cuda")
    one = plan[0]
    assert [[run.arm for run in stage] for stage in command._stages(plan)] == [["task", UNTRAINED]]
    assert (one.judge, one.in_words, one.device) == ("hollow", True, "cuda")
    (_, whole) = read_plan(tmp_path, worlds=["words-hollow"], seeds=[1], arms=["task"], layers=30)
    few, all_layers = run.training(replace(whole, layers=None)), run.training(whole)
    assert (few.testbed["layers"], all_layers.testbed["layers"]) == (8, 30)
    assert few.grpo["bf16"]
    assert run.shared_settings(whole)["warm_up"] != run.shared_settings(one)["warm_up"]
    with pytest.raises(ValueError, match=r"layers is 3 for lazy; expected worlds in words"):
        read_plan(tmp_path, worlds=["lazy"], layers=3)
    found = {"measures": {"quotes_swap": 0.975}, "uncertified": "the hollow judge is not certified: turned is 0.30"}
    rows = [{**row, "world": "words-hollow", "certificate": found} for row in rows_of({"task": {1: 0.5}})]
    write_page(tmp_path / "page.html", rows, None)
    page = (tmp_path / "page.html").read_text()
    assert "not certified: turned is 0.30" in page
    assert "quotes_swap 0.975" in page


def test_a_reasoner_is_measured_by_its_own_interventions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row stands in the same columns: the cue is the hint, and what is swapped is the thought."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is an extra: pip install 'cepo[reasoning]'")

    def load(wanted: Any, **options: Any) -> Any:
        return load_testbed_reasoner(replace(wanted, steps=1), **{**options, "cache": tmp_path / "cache"})

    monkeypatch.setattr(policy, "load_testbed_reasoner", load)
    (one,) = read_plan(tmp_path, worlds=["reasoner-hollow"], seeds=[1], steps=1, arms=[UNTRAINED], items=12, scored=2)
    execute(one)
    row = json.loads((one.folder / MEASURES).read_text())
    assert set(row["modes"]) == {"evidence", "hint", "hollow", "other"}
    assert sum(row["modes"].values()) == pytest.approx(1.0)
    assert 0.0 <= row["turned"] <= row["swaps_followed"] <= 1.0


def test_a_run_that_fails_stops_no_other_and_is_named(
    invented: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad run among hundreds costs its own row alone; the same command repeats it."""
    broken, write = True, command.execute

    def fail(one: Run) -> None:
        if one.seed == 1 and broken:
            raise RuntimeError("out of luck")
        write(one)

    monkeypatch.setattr(command, "execute", fail)
    plan = read_plan(tmp_path, worlds=["lazy"], seeds=[1, 2], steps=1, arms=[UNTRAINED], **SMALL)
    with pytest.raises(ValueError, match="1 of 2 runs failed.*lazy, untrained, seed 1 .RuntimeError: out of luck"):
        run_experiment(tmp_path, plan, jobs=1)
    seeds = [json.loads(line)["seed"] for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert seeds == [2]
    broken = False
    run_experiment(tmp_path, plan, jobs=1)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["world"], row["seed"]) for row in rows] == [("lazy", 1), ("lazy", 2)]


def test_seconds_are_medians_over_steps(tmp_path: Path) -> None:
    """One slow step, the first as a rule, says nothing of the others; lines without times are left out."""
    steps = [{f"time/{part}": value for part in run.PARTS} for value in (9.0, 1.0, 2.0)]
    steps[0]["time/policy_update"] = 1.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*steps, {"train_loss": 1.0}]))
    assert run.step_seconds(tmp_path / "metrics.jsonl") == {
        **dict.fromkeys(run.PARTS, 2.0),
        "policy_update": 1.0,
        "cost": 1.0,
    }


def rows_of(arms: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """Return one row per arm and seed, with the value as its accuracy where length is flipped."""
    return [
        {
            "world": "lazy",
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
    ((name, (gain, p)),) = paired_gains(rows, "flipped").items()
    assert name == "causal"
    assert gain.value == pytest.approx(0.2)
    assert p == 0.5  # two of the four sign patterns are as far from 0
    assert (gain.low, gain.high) == (pytest.approx(0.2 - 1.2706, abs=1e-4), pytest.approx(0.2 + 1.2706, abs=1e-4))


def test_gains_are_those_of_the_seeds_that_both_arms_have(tmp_path: Path) -> None:
    """Seeds stand in any order and some are missing: 3 and 1 are shared; no row is lost for it."""
    rows = rows_of(
        {"task": {1: 0.1, 2: 0.5, 3: 0.6}, "causal": {3: 0.9, 7: 0.0, 1: 0.2}, "alone": {8: 0.5}, "untrained": {9: 0.0}}
    )
    gains = paired_gains(rows, "flipped")
    assert list(gains) == ["causal", "alone"]
    assert gains["causal"][0].value == pytest.approx(0.2)
    assert gains["causal"][0].high == pytest.approx(0.2 + 1.2706, abs=1e-4)
    assert [gain.count for gain, _ in gains.values()] == [2, 0]
    assert str(gains["alone"][0]) == "undetermined: no shared seed"
    write_page(tmp_path / "report.html", rows, None)
    page = (tmp_path / "report.html").read_text()
    told = re.sub(r"<[^>]+>|\s+", " ", page).split("Every run")[-1]
    cells = re.findall(r"lazy +(\w+) +(\d) ", told)
    assert cells == [(row["arm"], str(row["seed"])) for row in rows]
    assert "difference to task" in page
    write_page(tmp_path / "report.html", [row for row in rows if row["arm"] != "task"], None)
    assert "difference to task" not in (tmp_path / "report.html").read_text()


def test_an_arm_is_compared_with_its_own_shuffle_and_worlds_stand_apart(tmp_path: Path) -> None:
    """The control is the same rewards on the wrong completions; two worlds' rows are never averaged."""
    arms = {"task": {1: 0.0, 2: 0.0}, "path": {1: 0.5, 2: 0.7}, "path shuffled": {1: 0.2, 2: 0.9}}
    rows = rows_of(arms)
    ((_, (gain, _)),) = paired_gains(rows, "turned", baseline="path shuffled", arms=["path"]).items()
    assert gain.value == pytest.approx(0.05)
    other = [{**row, "world": "hollow", "turned": 1.0} for row in rows]
    write_page(tmp_path / "report.html", [*rows, *other], None)
    page = re.sub(r">\s+<", "><", (tmp_path / "report.html").read_text())
    assert "1 of 2" in page
    assert "0 of 2" in page
    lazy, hollow = means_tables([*rows, *other])
    assert (lazy.title.split(":")[0], hollow.title.split(":")[0]) == ("world lazy", "world hollow")
    assert [cells[0] for cells in lazy.rows] == [*arms]
    assert "0.600 (0.500 to 0.700)" in [cells[3] for cells in lazy.rows]


def test_plans_that_cannot_work_are_refused(tmp_path: Path) -> None:
    """Before any training: a recipe without arms, an arm that it does not have."""
    path = tmp_path / "recipe.yaml"
    path.write_text("worlds: [lazy]\nsteps: 3\nseeds: [1]\n")
    with pytest.raises(ValueError, match="expected worlds, steps, seeds and arms"):
        read_plan(tmp_path, path)
    path.write_text("worlds: [lazy]\nsteps: 3\nseeds: []\narms: {untrained: []}\n")
    with pytest.raises(ValueError, match="has no seeds; expected at least one of each"):
        read_plan(tmp_path, path)
    with pytest.raises(ValueError, match="arms names X->Z; expected some of untrained"):
        read_plan(tmp_path, arms=["X->Z"])
    with pytest.raises(ValueError, match="worlds names moon; expected some of able, lazy, hollow"):
        read_plan(tmp_path, worlds=["moon"])
    plan = read_plan(tmp_path, seeds=[7], worlds=["copied"], steps=3, arms=["task"])
    assert [(one.world, one.arm, one.seed, one.steps) for one in plan] == [
        ("copied", "untrained", 7, 3),
        ("copied", "task", 7, 3),
    ]
    plan = read_plan(tmp_path)
    assert len({one.folder for one in plan}) == len(plan) == 10 * 4 * len({one.arm for one in plan})
    assert not {one.seed for one in plan} & set(range(1, 16))  # the seeds that chose
