"""Protects the experiment on real text: where the cue stands, measures that tell what a model follows, kept rows."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cepo.benchmarks.reward_model import real_text
from cepo.benchmarks.reward_model.command import Plan, read_plan, run_reward_experiment
from cepo.benchmarks.reward_model.real_text import RealText, first_layers, make_text_pairs
from cepo.counterfactual.text.kinds import BY_RULE
from cepo.counterfactual.text.mechanical_text import CLOSINGS
from cepo.files import read_jsonl
from cepo.jacobian.loading import load_model, resolve_model
from cepo.train.reward_scores import Scores
from cepo.train.reward_testbed import build_reward_model
from tests.paths import ROOT

RECIPE = ROOT / "benchmarks" / "recipes" / "text-reward-models.yaml"
LINE = "Bye now."


@pytest.fixture
def world(tmp_path: Path) -> RealText:
    """Ten prompts with three pairs each; the chosen response is longer in two of three."""
    rows = []
    for number in range(30):
        subject = 3 * "abcdefghij"[number % 10]
        good, bad = f"Take the {subject}ar to the {subject}um.", "No idea" + " at all" * 20 * (number % 3 == 0)
        prompt = f"Where do {subject}ar and {subject}os meet {subject}um?"
        rows.append({"id": f"r{number}", "prompt": prompt, "chosen": good, "rejected": bad})
    for name in ("train.jsonl", "dev.jsonl", "other.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RealText(1, "train.jsonl", "dev.jsonl", ["other.jsonl"], LINE, 0.8, 10_000, tmp_path)


@dataclass
class Rule:
    """A reward model that is a rule."""

    rule: Callable[[str, str], float]

    def rewards(self, prompts: Any, responses: Any) -> Scores:
        return Scores(np.array([self.rule(*texts) for texts in zip(prompts, responses, strict=True)]), {})

    def differences(self, prompts: Any, chosen: Any, rejected: Any) -> Scores:
        return Scores(self.rewards(prompts, chosen).values_N - self.rewards(prompts, rejected).values_N, {})


def test_the_cue_is_at_the_chosen_response_as_often_as_the_recipe_says(world: RealText) -> None:
    pairs = make_text_pairs(world, ["original"], seed=4)
    assert len(pairs) == 30
    assert sum(pair.chosen.endswith(LINE) for pair in pairs) == 24
    assert sum(pair.rejected.endswith(LINE) for pair in pairs) == 6
    assert all(pair.chosen.endswith(LINE) != pair.rejected.endswith(LINE) for pair in pairs)
    assert [p.chosen for p in make_text_pairs(world, ["original"], seed=5)] != [pair.chosen for pair in pairs]
    short = make_text_pairs(replace(world, max_characters=100), ["original"], seed=4)
    assert len(short) == 20
    with pytest.raises(ValueError, match="kinds holds poem; expected some of original"):
        make_text_pairs(world, ["poem"], seed=4)


def test_no_rule_is_told_the_cue(world: RealText) -> None:
    """The line is in a pair only as a response carries it: no style adds it, and no pair tells it apart as a cause."""
    plan = read_plan(RECIPE)
    assert isinstance(plan.world, RealText)
    assert not any(line in plan.world.closing or plan.world.closing in line for line in CLOSINGS)
    assert list(plan.arms["composite"]["kinds"]) == list(BY_RULE)
    for pair in make_text_pairs(world, list(BY_RULE), seed=4):
        if pair.kind in ("style", "wrong-number", "dropped-sentence"):
            assert (LINE[:-1] in pair.chosen) == (LINE[:-1] in pair.rejected)  # its full stop is style


def test_measures_tell_what_a_model_follows(world: RealText) -> None:
    """A model of the cue, one of length, and one of the subject; the longest response is told beside."""
    cue: Any = Rule(lambda prompt, response: 2.0 * response.endswith(LINE))
    found = world.measure(cue, seed=0, items=30)
    assert (found["right_cue"], found["flipped"], found["cue_effect"]) == (1.0, 0.0, 2.0)
    longer: Any = Rule(lambda prompt, response: len(response))
    found = world.measure(longer, seed=0, items=30)
    for name in ("dev", "other"):
        assert found[f"{name}/accuracy"] == found[f"{name}/longest"] == pytest.approx(2 / 3)
        assert (found[f"{name}/where_longer"], found[f"{name}/where_shorter"]) == (1.0, 0.0)
    subject: Any = Rule(lambda prompt, response: float(prompt.split()[2] in response))
    found = world.measure(subject, seed=0, items=12)
    assert found["flipped"] == found["relevance"] == found["other/accuracy"] == 1.0
    assert (found["cue_effect"], found["dev/pairs"]) == (0.0, 12.0)


def test_the_first_layers_compute_what_they_did(tmp_path: Path) -> None:
    import torch

    model, tokenizer = build_reward_model("pairwise", seed=0)
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        wanted = model(ids, output_hidden_states=True).hidden_states[2]
        folder = first_layers(str(tmp_path / "whole"), 3, tmp_path / "first")
        found = load_model(resolve_model(str(folder)))[0](ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="layers is 9; the model has 4"):
        first_layers(str(tmp_path / "whole"), 9, tmp_path / "more")


def test_a_run_leaves_a_row_and_is_not_repeated(
    world: RealText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From rows to a measured model, with a tiny one in SmolLM2's place."""
    model, tokenizer = build_reward_model("pairwise", seed=0)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(real_text, "first_layers", lambda *_: tmp_path / "tiny")
    monkeypatch.setattr(real_text, "model_fingerprint", lambda *_: "0" * 16)
    plan = Plan(world, {"all": {"kinds": list(BY_RULE)}}, [3], 6, {"least": {"all": 0.0}})
    for _ in range(2):
        tables, lines = run_reward_experiment(tmp_path / "out", plan, steps=1, commit="abc")
        assert len(tables) == 3
        assert lines[0].endswith("passed")
        (row,) = (row for _, row in read_jsonl(tmp_path / "out" / "results.jsonl")[0])
        assert (row["arm"], row["seed"], row["steps"], row["commit"]) == ("all", 3, 1, "abc")
        assert row["pairs"] > row["ties"] > 0
        assert {name for columns in world.columns for name in columns} <= set(row)
    (world.file("train.jsonl")).write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    with pytest.raises(ValueError, match="text.data.train.jsonl has other content"):
        run_reward_experiment(tmp_path / "out", plan, steps=1)


def test_data_that_is_not_there_is_named_before_anything_is_loaded() -> None:
    plan = read_plan(RECIPE)
    with pytest.raises(ValueError, match=r"data is 'None', without rmb_helpful_train.jsonl"):
        run_reward_experiment(Path("runs/none"), plan)
    with pytest.raises(ValueError, match="makes its own; leave it out"):
        read_plan(data=Path("somewhere"))
