"""Protects `cepo reward-experiment`: equal training but for the data, rows that stay, and gates that can fail."""

from dataclasses import replace
from pathlib import Path

import pytest

from cepo.benchmarks.reward_model import command
from cepo.benchmarks.reward_model.command import Plan, read_plan, run_reward_experiment, verdicts
from cepo.benchmarks.reward_model.testbed import Testbed
from cepo.files import read_jsonl
from cepo.train.reward_data import load_pairs

PLAN = read_plan()


def test_arms_differ_in_their_data_alone() -> None:
    """And hold what their names say: so many pairs, ties that are ties, or (the control) none that is."""
    runs = {arm: PLAN.world.training(Path("runs/none"), changes, 61, None) for arm, changes in PLAN.arms.items()}
    assert len({str(replace(run, data={"source": "testbed"})) for run in runs.values()}) == 1
    pairs = {arm: load_pairs(run.data, seed=61).train for arm, run in runs.items()}
    counts = {arm: (len(of_arm), sum(pair.tie for pair in of_arm)) for arm, of_arm in pairs.items()}
    assert counts["plain"] == (300, 0)
    assert counts["four times the pairs"] == (1200, 0)
    assert counts["RRM"] == (1200, 300)
    assert counts["edits"] == (900, 0)
    assert counts["IQN"][0] - 300 == counts["IQN"][1] > 270
    assert counts["both"] == (counts["IQN"][0] + 600, counts["IQN"][1])
    for arm, wanted in (("both", True), ("both, wrong ties", False)):
        assert {pair.checks["is_tie"] for pair in pairs[arm] if pair.tie} == {wanted}


def test_a_row_is_kept_and_a_finished_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(Testbed(), {"plain": {"kinds": ["original"], "count": 40}}, [5], 12, {"most": {"plain": 2.0}})
    _, lines = run_reward_experiment(tmp_path, plan, steps=1, commit="abc")
    assert lines[0].endswith("passed")
    (row,) = (row for _, row in read_jsonl(tmp_path / "results.jsonl")[0])
    assert (row["arm"], row["seed"], row["steps"], row["pairs"], row["commit"]) == ("plain", 5, 1, 40, "abc")
    assert 0.0 <= row["flipped"] <= 1.0
    with (tmp_path / "results.jsonl").open("a") as results:
        results.write('{"arm": "pl')  # of a run that was killed; the next row was written behind it, and lost
    plan = replace(plan, seeds=[5, 6])
    run_reward_experiment(tmp_path, plan, steps=1)
    rows, broken = read_jsonl(tmp_path / "results.jsonl")
    assert ([row["seed"] for _, row in rows], broken) == ([5, 6], [])
    monkeypatch.setattr(command, "_run", lambda *_: pytest.fail("a finished run was repeated"))
    run_reward_experiment(tmp_path, plan, steps=1)
    with pytest.raises(ValueError, match="training.steps was 1 and is 2"):
        run_reward_experiment(tmp_path, plan, steps=2)
    with pytest.raises(ValueError, match="holds arm 'plain' with other data"):
        run_reward_experiment(tmp_path, replace(plan, arms={"plain": {"kinds": ["original"]}}), steps=1)
    with pytest.raises(ValueError, match="arms names poem"):
        read_plan(arms=["poem"])


def test_gates_can_fail() -> None:
    rows = [
        {"arm": arm, "seed": seed, "flipped": value}
        for arm, values in {"both": (1.0, 0.8), "plain": (0.3, 0.6), "four": (0.9, 0.9)}.items()
        for seed, value in enumerate(values)
    ]
    gates = {"least": {"both": 0.95}, "most": {"plain": 0.4}, "above": {"both": "four"}}
    assert [line.rsplit(" ", 1)[1] for line in verdicts(rows, gates)] == ["FAILED"] * 3
    assert verdicts(rows[:4], {"above": gates["above"]}) == []
    gates = {"least": {"both": 0.9}, "most": {"plain": 0.45}, "above": {"four": "plain"}}
    assert [line.rsplit(" ", 1)[1] for line in verdicts(rows, gates)] == ["passed"] * 3
