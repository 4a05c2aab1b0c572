"""`cepo train` on two CPU ranks: one output, whole checkpoints, and the weights of a run that was never killed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import Trainer
from trl import GRPOTrainer

from cepo.files import read_jsonl
from cepo.jacobian.loading import load_model, resolve_model
from cepo.train import grpo, testbed, testbed_model
from cepo.train.config import TrainConfig
from cepo.train.grpo import load_config, train
from cepo.train.ranks import check_agreement, failing_together
from cepo.train.recipe import read_recipe
from cepo.train.reward_config import RewardModelConfig
from cepo.train.reward_model import train_reward_model
from cepo.train.run import last_complete_checkpoint
from cepo.train.warm_start import WarmStartJob, warm_start
from tests.paths import ROOT
from tests.two_ranks import run_on_two_ranks

SCALE = ROOT / "train" / "recipes" / "scale"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ITEMS = testbed.generate_items(8, seed=1, cue_agreement=0.9)  # those of the data below, with seed 0
STEPS = 4
TINY: dict[str, Any] = {
    "dtype": "float32",
    "threads": 1,
    "lora": None,
    "data": {"source": "testbed", "count": len(ITEMS), "test_count": 2},
    "grpo.use_vllm": False,
    "grpo.per_device_train_batch_size": 4,
    "grpo.gradient_accumulation_steps": 1,
    "grpo.num_generations": 2,
    "grpo.max_steps": STEPS,
    "grpo.learning_rate": 1e-3,
    "grpo.adam_epsilon": 1e-3,  # so that where a gradient is all but 0, its rounding is not the update
    "grpo.lr_scheduler_type": "constant",
    "grpo.warmup_steps": 0,
    "grpo.chat_template_kwargs": {},
    "grpo.save_steps": 1,
    "grpo.report_to": "none",
}


def config(folder: Path, recipe: str, name: str, **changes: Any) -> TrainConfig:
    """Return a recipe of ours with a tiny policy, tiny batches and few steps."""
    return load_config(
        SCALE / f"{recipe}.yaml", {**TINY, "model": str(folder / "judge"), "output": str(folder / name), **changes}
    )


def drawn(trainer: Any, prompt_ids: Any, *_: Any) -> Any:
    """Generate right judgements, for the prompt or another: drawn by torch, whose state a checkpoint holds."""
    tokenizer = testbed.build_tokenizer()
    completions = [[*tokenizer(item.completion)["input_ids"], tokenizer.eos_token_id] for item in ITEMS]
    return [completions[int(torch.randint(len(ITEMS), ()))] for _ in prompt_ids], None


def generating(case: Callable[[int, Path], None]) -> Callable[[int, Path], None]:
    """Return the case with `drawn` for generation; it runs in a process of its own."""

    def run(rank: int, folder: Path) -> None:
        GRPOTrainer._generate_single_turn = drawn
        case(rank, folder.parent)

    run.__name__ = case.__name__
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny policy; each launch has a folder of its own in it."""
    folder, tokenizer = tmp_path_factory.mktemp("ranks"), testbed.build_tokenizer()
    testbed_model.build_model(tokenizer, seed=0).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    return folder


def launch(folder: Path, name: str, *cases: Callable[[int, Path], None]) -> dict[str, str]:
    (folder / f"launch-{name}").mkdir()
    return run_on_two_ranks([generating(case) for case in cases], folder / f"launch-{name}")


# Agreement


def refuse() -> None:
    raise ValueError("no such row")


def case_ranks_agree_or_all_raise(rank: int, folder: Path) -> None:
    PartialState(cpu=True)
    check_agreement({"seed": 1})
    with pytest.raises(ValueError, match="rank 1 was started with other seed than rank 0"):
        check_agreement({"seed": rank, "data": "same"})
    expected = "no such row" if rank == 1 else "rank 1: no such row"
    with pytest.raises(ValueError, match=f"^{expected}$"), failing_together():
        {0: str, 1: refuse}[rank]()
    with pytest.raises(ValueError, match="rank 1 was started with other grpo, seed, data than rank 0"):
        train(config(folder, "ddp", "none", **{"seed": rank, "grpo.learning_rate": 0.1 * (rank + 1)}))
    assert not (folder / "none").exists()


# Data-parallel


def case_whole(rank: int, folder: Path) -> None:
    final = train(config(folder, "ddp", "whole"))
    assert final == folder / "whole" / "final"
    assert train(config(folder, "ddp", "whole")) == final  # nothing is trained
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        train(config(folder, "ddp", "whole", seed=1))


def case_killed_while_it_saves(rank: int, folder: Path) -> None:
    """Rank 1 is gone when rank 0 has written all that it writes."""
    save = Trainer._save_rng_state

    def saving(trainer: Any, output_dir: str) -> None:
        if rank == 1 and trainer.state.global_step == 3:
            os._exit(9)
        save(trainer, output_dir)

    Trainer._save_rng_state = saving
    train(config(folder, "ddp", "broken"))


def case_resumed(rank: int, folder: Path) -> None:
    train(config(folder, "ddp", "broken"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """Return the output of an uninterrupted data-parallel run."""
    problems = launch(folder, "whole", case_ranks_agree_or_all_raise, case_whole)
    assert not any(problems.values()), "\n".join(problems.values())
    return folder / "whole"


def test_a_run_is_one_output_and_goes_on_from_a_whole_checkpoint_to_the_same_weights(whole: Path, folder: Path) -> None:
    broken = folder / "broken"
    assert [row["step"] for _, row in read_jsonl(whole / "metrics.jsonl")[0]] == [*range(1, STEPS + 1)]
    written = {
        "checkpoint-3",
        "checkpoint-4",
        "final",
        "log.txt",
        "log-1.txt",
        "metrics.jsonl",
        "settings.json",
        "left_out.jsonl",
    }
    lock = ".settings.json.lock"  # a process that multiprocessing ended leaves it, unlocked
    assert {path.name for path in whole.iterdir()} - {lock} == written
    assert {f"rng_state_{rank}.pth" for rank in range(2)} <= {path.name for path in (whole / "checkpoint-4").iterdir()}
    problems = launch(folder, "killed", case_killed_while_it_saves)
    assert all(problems.values())
    assert (broken / "checkpoint-3" / "trainer_state.json").is_file()
    assert last_complete_checkpoint(broken) == broken / "checkpoint-2"
    problems = launch(folder, "resumed", case_resumed)
    assert not any(problems.values()), "\n".join(problems.values())
    trained, resumed, untrained = weights(whole), weights(broken), load_file(folder / "judge" / "model.safetensors")
    assert all(torch.equal(trained[name], resumed[name]) for name in untrained)
    assert any(not torch.equal(trained[name], untrained[name]) for name in untrained)


# Reward models


def reward_model(output: Path, batch_size: int) -> RewardModelConfig:
    recipe = ROOT / "train" / "recipes" / "reward-model-testbed.yaml"
    settings: dict[str, Any] = {
        "output": str(output),
        "data.count": 12,
        "reward.max_steps": 2,
        "reward.per_device_train_batch_size": batch_size,
        "reward.adam_epsilon": 1e-3,
        "reward.save_steps": 1,
        "reward.report_to": "none",
    }
    return read_recipe(RewardModelConfig, recipe, settings)


def case_reward_model(rank: int, folder: Path) -> None:
    train_reward_model(reward_model(folder / "reward", 2))
    with pytest.raises(ValueError, match="warm-start runs in one process, but 2 were started"):
        warm_start(WarmStartJob(model="none", data="none", output=folder / "none"))


def test_a_reward_model_of_two_ranks_is_that_of_one_process(folder: Path, tmp_path: Path) -> None:
    """Each rank sees half of a step's pairs; a warm start refuses ranks before it reads anything."""
    problems = launch(folder, "reward", case_reward_model)
    assert not any(problems.values()), "\n".join(problems.values())
    train_reward_model(reward_model(tmp_path / "alone", 4))
    found, expected = weights(folder / "reward"), weights(tmp_path / "alone")
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5)


# In shards


def case_fsdp2(rank: int, folder: Path) -> None:
    arguments = grpo.grpo_arguments

    def on_a_cpu(config: TrainConfig) -> Any:
        found = arguments(config)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate shards on no CPU
        return found

    grpo.grpo_arguments = on_a_cpu
    for steps in (2, STEPS):
        train(config(folder, "fsdp2", "fsdp2", **{"grpo.max_steps": steps}))


def case_zero3(rank: int, folder: Path) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles one
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)  # joins the group that is there
    for steps in (2, STEPS):
        train(config(folder, "zero3", "zero3", **{"grpo.max_steps": steps}))


@pytest.mark.parametrize("case", [case_fsdp2, case_zero3], ids=["fsdp2", "zero3"])
def test_shards_end_in_whole_safetensors(case: Any, folder: Path, request: pytest.FixtureRequest) -> None:
    """Stopped after two steps and resumed: the weights of the run on one whole policy a rank."""
    if case is case_zero3 and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is an extra, pip install 'cepo[deepspeed]': make test-deepspeed")
    name = case.__name__.removeprefix("case_")
    problems = launch(folder, name, case)
    assert not any(problems.values()), "\n".join(problems.values())
    whole = request.getfixturevalue("whole")
    found, expected = weights(folder / name), weights(whole)
    assert set(expected) <= set(found) <= {*expected, "lm_head.weight"}  # tied: once, or twice the same
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5)
    load_model(resolve_model(str(folder / name / "final")))
    assert {path.name for path in (folder / name / "final").iterdir()} == {
        path.name for path in (whole / "final").iterdir()
    }
