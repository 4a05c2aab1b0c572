"""Protects what works where TRL is missing: all but training, which says what to install before anything is loaded."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cepo import CausalReward
from cepo.cli.app import main
from cepo.train import testbed, testbed_model
from tests.paths import ROOT
from tests.train.rewards.test_causal import rows

ITEMS = testbed.generate_items(3, seed=9, cue_agreement=0.5)
TESTBED = ROOT / "train" / "recipes" / "testbed.yaml"
REWARD_MODEL = ROOT / "train" / "recipes" / "reward-model-testbed.yaml"


@pytest.fixture(autouse=True)
def _without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("causal_trainer", "pair_trainer"):
        monkeypatch.delitem(sys.modules, f"cepo.train.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)


def cepo(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["cepo", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["train", TESTBED],
        ["reward-model", REWARD_MODEL],
        ["warm-start", "--data", "no such file"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_that_trains_names_the_extra_in_one_line(
    arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cepo(monkeypatch, *arguments, "--output", tmp_path / "run") == 2
    assert capsys.readouterr().err == "cepo: training needs TRL, which is an extra: pip install 'cepo[trl]'\n"
    assert not list(tmp_path.iterdir())


def test_rollouts_are_scored_and_judges_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, judge, source = testbed.build_tokenizer(), tmp_path / "judge", tmp_path / "in.jsonl"
    testbed_model.build_model(tokenizer, seed=0).save_pretrained(judge)
    tokenizer.save_pretrained(judge)
    given = [{"prompt": item.prompt, "completion": item.completion} for item in ITEMS]
    source.write_text("".join(json.dumps(row) + "\n" for row in given))
    asked = ("--model", judge, "--threads", 1)
    assert cepo(monkeypatch, "score", *asked, "--input", source, "--output", tmp_path / "scores.jsonl") == 0
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "which ?", "chosen": "this", "rejected": "that"}) + "\n")
    options = ("--data", pairs, "--output", tmp_path / "eval", "--max-new-tokens", 2)
    assert cepo(monkeypatch, "eval", "rewardbench", *asked, *options) == 0
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == len(ITEMS)


def test_a_reward_is_called_by_hand() -> None:
    """Anything with a trainer's attributes will do."""
    tokenizer = testbed.build_tokenizer()
    trainer = SimpleNamespace(
        model=testbed_model.build_model(tokenizer, seed=0),
        processing_class=tokenizer,
        reward_funcs=[],
        num_generations=1,
        args=SimpleNamespace(generation_batch_size=len(ITEMS)),
        accelerator=SimpleNamespace(num_processes=1),
        _tokenize_prompts=lambda prompts: (render(tokenizer, prompts), None, None),
    )
    reward = CausalReward(score="explained").bind(trainer)
    assert len(reward(**rows(tokenizer, ITEMS))) == len(ITEMS)


def render(tokenizer: Any, prompts: list[Any]) -> list[list[int]]:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return [tokenizer.apply_chat_template(prompt, **options)["input_ids"] for prompt in prompts]
