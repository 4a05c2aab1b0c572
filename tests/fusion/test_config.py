"""Protects the one set of defaults: RewardConfig's, under the same names in CausalReward, recipes and commands."""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from cepo import PAPER_LINKS, CausalReward, RewardConfig, argmax_reward
from cepo.cli.app import app, main
from cepo.train.config import TrainConfig
from cepo.train.grpo import _build_reward

FIELDS = {field.name for field in fields(RewardConfig)}
ROOT = Path(__file__).parents[2]
RECIPES = sorted([*ROOT.glob("train/recipes/**/*.yaml"), *ROOT.glob("benchmarks/recipes/*.yaml")])


def causal_entries(node: Any) -> list[dict[str, Any]]:
    """Return every reward named causal anywhere in a recipe."""
    if isinstance(node, dict):
        own = [node] if node.get("name") == "causal" else []
        return own + [entry for value in node.values() for entry in causal_entries(value)]
    return [entry for value in node for entry in causal_entries(value)] if isinstance(node, list) else []


def command(name: str) -> Any:
    return typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]


def test_defaults_are_what_we_recommend_and_the_preset_is_the_papers() -> None:
    """Written out once more on purpose: a default that changes must change here and in the CHANGELOG."""
    recommended, paper = RewardConfig(), RewardConfig.paper(seed=3)
    assert (dict(recommended.links), recommended.score, recommended.counterfactuals) == ({"chain": 1.0}, "effect", 0)
    assert (recommended.donors, recommended.no_donor, recommended.nodes) == (3, "zero", "auto")
    assert recommended.join == -math.inf
    assert (recommended.task_weight, recommended.p, recommended.rank, recommended.energy) == (0.7, 0.2, 2, None)
    assert (recommended.permutation, recommended.nuisance, recommended.target) == ("uniform", "svd", "log_likelihood")
    assert (recommended.seed, recommended.also) == (0, ())
    assert not recommended.reads_hardening
    assert dict(paper.links) == dict(PAPER_LINKS) == {"Z->X": 0.1, "X->Y": 0.1, "Z->Y": 0.1}
    assert (paper.score, paper.counterfactuals, paper.rank, paper.seed) == ("phi", 4, 2, 3)
    assert (paper.task_weight, paper.p) == (0.7, 0.2)
    assert not paper.reads_influence


def test_causal_reward_takes_a_config_or_its_fields() -> None:
    """Neither gives the defaults; both, old positional links and unknown fields are refused by name."""
    assert CausalReward().config == RewardConfig()
    assert CausalReward(links={"Z->X": 1.0}, p=1.0).config == RewardConfig(links={"Z->X": 1.0}, p=1.0)
    paper = RewardConfig.paper()
    assert CausalReward(paper, task=argmax_reward).config is paper
    with pytest.raises(ValueError, match=r"config is .*, p=1.0; expected a RewardConfig, or its fields by name, not"):
        CausalReward(paper, p=1.0)
    with pytest.raises(ValueError, match=r"config is \{'X->Y': 1.0\}; expected a RewardConfig"):
        CausalReward({"X->Y": 1.0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="influence"):
        CausalReward(influence=True)
    own = set(inspect.signature(CausalReward.__init__).parameters) - {"self", "config", "fields"}
    assert not own & FIELDS


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"counterfactuals": 4, "rank": 3, "nodes": 2}, ["counterfactuals=4", "rank=3", "nodes=2"]),
        ({"counterfactuals": 4, "rank": 3, "also": ("phi",)}, []),
        ({"counterfactuals": 4, "score": "phi", "donors": 5}, ["donors=5"]),
        ({"score": "phi", "permutation": "block", "seed": 1}, ["permutation='block'", "seed=1"]),
        ({"permutation": "block", "no_donor": "permute", "seed": 1}, []),
        ({"links": {"X->Y": 1.0}, "join": 0.0}, ["join=0.0"]),
        ({"links": {"X->Y": 1.0}, "p": 1.0, "task_weight": 0.0}, ["p=1.0"]),
        ({"nodes": 2, "also": ("path",)}, []),
    ],
)
def test_settings_that_nothing_reads_are_named(
    settings: dict[str, Any], unread: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What differs from its default and changes nothing is told, with what would read it."""
    with caplog.at_level(logging.WARNING):
        CausalReward(**settings)
    assert [line.partition(" changes nothing: it is read only ")[0] for line in caplog.messages] == unread


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_only_fields_of_the_config(path: Path) -> None:
    """Every causal entry is built; what it names are RewardConfig's fields and CausalReward's own arguments."""
    own = set(inspect.signature(CausalReward.__init__).parameters) - {"self", "config", "fields"}
    recipe = yaml.safe_load(path.read_text())
    for entry in causal_entries(recipe):
        assert set(entry) <= FIELDS | own | {"weight", "preset"}
        settings = {key: value for key, value in entry.items() if key not in ("name", "weight")}
        named = {key: value for key, value in settings.items() if key in FIELDS}
        kind = recipe.get("kind") or ("reasoning" if "reasoner" in path.stem else "judge")
        run = TrainConfig(model="testbed", data={"source": "testbed"}, rewards=[entry], output="unused", kind=kind)
        reward = _build_reward("causal", dict(settings), run)
        wanted = RewardConfig.paper(**named) if settings.get("preset") == "paper" else RewardConfig(**named)
        assert reward.config == wanted


def test_commands_take_their_defaults_from_the_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No option of `cepo score` and `cepo ablate` that is a field has its own default; the help shows the field's."""
    monkeypatch.setenv("COLUMNS", "200")
    score = {option.name: option for option in command("score").params}
    assert set(score) >= FIELDS
    assert {score[name].default for name in FIELDS} == {None}
    ablate = {option.name: option.default for option in command("ablate").params}
    assert {ablate[name] for name in ("permutation", "target", "seed")} == {None}
    for name in ("score", "ablate"):
        monkeypatch.setattr("sys.argv", ["cepo", name, "--help"])
        with pytest.raises(SystemExit):
            main()
        shown = capsys.readouterr().out
        assert f"[default: {RewardConfig().permutation}]" in shown
        assert f"[default: {RewardConfig().target}]" in shown
        assert ("[default: chain=1]" in shown) == (name == "score")
    assert {option.default for option in command("score").params if option.name in FIELDS} == {None}


def test_cepo_score_without_options_is_the_config_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What reaches the job is RewardConfig(); energy takes the place of rank."""
    found: list[RewardConfig] = []
    rows = tmp_path / "rows.jsonl"
    rows.touch()

    def capture(job: Any, **_: Any) -> Any:
        found.append(job.config)
        raise ValueError("captured")

    monkeypatch.setattr("cepo.eval.score.command.score_file", capture)
    for options in ([], ["--energy", "0.9", "-K", "4", "--also", "phi", "--also", "angles", "--link", "Z->X=0.5"]):
        arguments = ["score", "--model", "m", "--input", str(rows), "--output", "o", *options]
        monkeypatch.setattr("sys.argv", ["cepo", *arguments])
        with pytest.raises(SystemExit):
            main()
    assert found == [
        RewardConfig(),
        RewardConfig(links={"Z->X": 0.5}, rank=None, energy=0.9, counterfactuals=4, also=["phi", "angles"]),
    ]
