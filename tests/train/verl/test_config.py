"""What `cepo train --engine verl` writes, and what it refuses; none of this needs verl."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from cepo.cli.app import main
from cepo.train.config import TrainConfig
from cepo.train.grpo import load_config
from cepo.train.verl.config import verl_settings, write_verl_run
from tests.paths import ROOT

GRPO = {"num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 5}
REWARDS = ({"name": "format"}, {"name": "argmax", "weight": 0.5}, {"name": "causal", "weight": 0.3})


def config(judge: Path, output: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "model": str(judge),
        "data": {"source": "testbed", "count": 8, "test_count": 2},
        "rewards": REWARDS,
        "output": str(output),
        "grpo": GRPO,
    }
    return TrainConfig(**{**settings, **changes})


def test_batches_are_counted_in_prompts_and_paths_are_absolute(judge: Path, tmp_path: Path) -> None:
    """TRL counts completions, verl prompts: 8 x 2 completions of 4 per prompt are 4 prompts."""
    line = write_verl_run(config(judge, tmp_path / "run"))
    assert line == f"python -m verl.trainer.main_ppo --config-path={tmp_path / 'run'} --config-name=verl"
    told = yaml.safe_load((tmp_path / "run" / "verl.yaml").read_text())
    assert told["defaults"] == ["ppo_trainer", "_self_"]
    assert told["data"]["train_batch_size"] == told["actor_rollout_ref"]["actor"]["ppo_mini_batch_size"] == 4
    assert told["actor_rollout_ref"]["rollout"]["n"] == 4
    assert told["actor_rollout_ref"]["actor"]["strategy"] == "fsdp2"
    assert told["trainer"]["total_training_steps"] == 5
    assert told["trainer"]["total_epochs"] * 2 >= 5  # an epoch has two steps
    recipe = told["actor_rollout_ref"]["cepo_recipe"]
    assert load_config(recipe, {}).rewards == list(REWARDS)


def test_rows_have_verls_columns_and_the_judges_prompt(judge: Path, tmp_path: Path) -> None:
    write_verl_run(config(judge, tmp_path))
    rows = pyarrow.parquet.read_table(tmp_path / "train.parquet").to_pylist()
    assert len(rows) == 8
    assert [message["role"] for message in rows[0]["prompt"]] == ["user"]
    assert {row["reward_model"]["ground_truth"] for row in rows} == {"A", "B"}
    assert rows[3]["extra_info"]["index"] == 3
    assert rows[3]["extra_info"]["thought_opened"] is False
    assert len(pyarrow.parquet.read_table(tmp_path / "test.parquet")) == 2


def test_what_verl_lacks_is_refused_by_name_all_at_once(judge: Path, tmp_path: Path) -> None:
    given = config(
        judge,
        tmp_path / "run",
        grpo={**GRPO, "vllm_mode": "colocate", "lr_scheduler_type": "linear"},
        lora={"r": 4, "lora_dropout": 0.1},
        causal_loss={"weight": 0.5},
        threads=1,
        rewards=({"name": "argmax"}, {"name": "cir"}, {"name": "causal", "weight": "auto", "shuffle": True}),
    )
    names = (
        "grpo.vllm_mode, grpo.lr_scheduler_type='linear', lora.lora_dropout, causal_loss, threads, rewards: cir, "
        "rewards: causal.weight=auto, rewards: causal.shuffle"
    )
    with pytest.raises(ValueError, match=f"no counterpart of {names}; change them"):
        write_verl_run(given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rewards": ({"name": "argmax"},)}, "rewards holds 0 causal rewards"),
        ({"grpo": {**GRPO, "num_generations": 3}}, "not a whole number of prompts of num_generations=3"),
        ({"grpo": {**GRPO, "num_generations": 16}}, "generates for 1 prompt at a time"),
        ({"model": "smollm2"}, "a GGUF file"),
    ],
)
def test_runs_that_cannot_work_are_refused(changes: dict[str, Any], reason: str, judge: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        write_verl_run(config(judge, tmp_path, **changes))


def test_an_output_with_checkpoints_of_another_run_is_refused(judge: Path, tmp_path: Path) -> None:
    """verl resumes from whatever checkpoint it finds there."""
    write_verl_run(config(judge, tmp_path))
    (tmp_path / "global_step_1").mkdir()
    write_verl_run(config(judge, tmp_path, grpo={**GRPO, "max_steps": 9}))  # longer, and otherwise the same
    with pytest.raises(ValueError, match=r"grpo.learning_rate was not set and is 0.1"):
        write_verl_run(config(judge, tmp_path, grpo={**GRPO, "learning_rate": 0.1}))
    with pytest.raises(ValueError, match="already holds checkpoints"):
        write_verl_run(config(judge, tmp_path), fresh=True)


@pytest.mark.parametrize("recipe", ["j1-nano-causal", "ce-po-reasoning"])
def test_our_recipes_have_counterparts(recipe: str, tmp_path: Path) -> None:
    found = verl_settings(load_config(ROOT / "train" / "recipes" / f"{recipe}.yaml", {}))
    assert found["actor_rollout_ref.model.lora_rank"] == 16
    assert found["actor_rollout_ref.actor.fsdp_config.model_dtype"] == "bf16"
    # each reward is standardised by us, or their sum by verl
    assert found["algorithm.norm_adv_by_std_in_grpo"] is (recipe == "ce-po-reasoning")


def test_the_command_shows_what_starts_verl(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of preferences becomes verl's two files."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": "", "data": {}, "output": "", "rewards": REWARDS, "grpo": GRPO}))
    rows = [{"prompt": f"question {n} ?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--engine", "verl", "--model", judge, "--data", tmp_path / "pairs.jsonl", "--output", tmp_path / "run")
    pairs = {"source": str(tmp_path / "pairs.jsonl"), "test_fraction": 0.0}
    with pytest.raises(ValueError, match="no row to test on"):
        write_verl_run(config(judge, tmp_path / "run", data=pairs))
    monkeypatch.setattr(sys, "argv", ["cepo", "train", str(recipe), *map(str, options)])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code
    assert len(pyarrow.parquet.read_table(tmp_path / "run" / "train.parquet")) > 30
    assert "start it with: python -m verl.trainer.main_ppo" in capsys.readouterr().out
