"""GRPO on two CPU ranks, by DDP, FSDP2 and ZeRO-3: the rewards and the steps of one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from trl import GRPOConfig

from cepo import CausalReward, argmax_reward
from cepo.jacobian.sharding import readable, sharding_of
from cepo.train import testbed, testbed_model
from cepo.train.causal_loss import CausalLoss
from cepo.train.causal_trainer import CausalTrainer
from cepo.train.policy import items_dataset
from cepo.train.rewards.peers import Necessity
from tests.two_ranks import run_on_two_ranks

ITEMS = testbed.generate_items(12, seed=5, cue_agreement=0.5)
STEPS = 3


def run(folder: Path, processes: int, *, lora: bool = False, sharded: Any = "auto", **settings: Any) -> dict[str, Any]:
    """Train for three steps of eight completions, two of each prompt: its gold one, and that of another prompt.

    Three of the 24 are cut, so that the ranks have different numbers of well-formed ones.
    """
    tokenizer = testbed.build_tokenizer()
    torch.manual_seed(0)
    reward, other = CausalReward(score="explained", sharded=sharded), Necessity()
    kept: dict[str, Any] = {"causal": [], "necessary": []}
    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=8 // processes,
        num_generations=2,
        max_steps=STEPS,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        **settings,
    )
    if "fsdp" in settings:  # accelerate shards on no CPU, so it is told of another device
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = CausalTrainer(
        model=testbed_model.build_model(tokenizer, seed=0).double(),
        reward_funcs=[argmax_reward, keeping(reward, kept["causal"]), keeping(other, kept["necessary"])],
        args=arguments,
        train_dataset=items_dataset(ITEMS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
        causal_loss=CausalLoss(weight=0.1, objective="divergence"),
    )
    reward.bind(trainer)
    other.bind(trainer)
    gold = {item.prompt: [*tokenizer(item.completion)["input_ids"], tokenizer.eos_token_id] for item in ITEMS}
    order = list(gold)

    def generate(prompt_ids: Any, *_: Any) -> Any:
        prompts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompt_ids]
        others = [order[(order.index(prompt) + place % 2) % len(order)] for place, prompt in enumerate(prompts)]
        cut = [place % 2 and order.index(prompt) >= 9 for place, prompt in enumerate(prompts)]
        return [gold[other][: 5 if is_cut else None] for other, is_cut in zip(others, cut, strict=True)], None

    trainer._generate_single_turn = generate
    trainer.train()
    assert sharding_of(trainer.model) == (
        "fsdp2" if "fsdp" in settings else "zero3" if "deepspeed" in settings else "none"
    )
    with readable(trainer.model, "gather"):
        weights = [weight.detach().clone() for weight in trainer.model.parameters()]
    logged = {name: value for log in trainer.state.log_history for name, value in log.items() if "seconds" not in name}
    metrics = {name: value for name, value in logged.items() if name.startswith("causal")}
    return {**kept, "weights": weights, "metrics": metrics}


def keeping(reward: Any, kept: list[Any]) -> Any:
    def call(**columns: Any) -> Any:
        values = reward(**columns)
        kept.append(values)
        return values

    call.__name__ = reward.__name__
    return call


FSDP: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]},
}


def case_ddp(rank: int, folder: Path) -> None:
    torch.save(run(folder, 2), folder / f"ddp-{rank}.pt")


def case_fsdp2_in_step(rank: int, folder: Path) -> None:
    torch.save(run(folder, 2, sharded="step", **FSDP), folder / f"in_step-{rank}.pt")


def case_fsdp2_gathered_lora(rank: int, folder: Path) -> None:
    torch.save(run(folder, 2, lora=True, sharded="gather", **FSDP), folder / f"lora-{rank}.pt")


def case_zero3_in_step(rank: int, folder: Path) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles one
    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
    zero = {**sizes, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    torch.save(run(folder, 2, sharded="step", deepspeed=zero), folder / f"zero3-{rank}.pt")


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
CASES = [case_ddp]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which both ranks have left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    problems = run_on_two_ranks(CASES, folder)
    assert not any(problems.values()), "\n".join(problems.values())
    return folder


@pytest.mark.parametrize("names", [["ddp"]], ids="+".join)
def test_rewards_and_steps_are_those_of_one_process(names: list[str], folder: Path, tmp_path: Path) -> None:
    """Each rank sees half of the prompts: donors not gathered, or another rank's weights, would give other values."""
    if names == ["zero3"] and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is an extra, pip install 'cepo[deepspeed]': make test-deepspeed")
    alone = run(tmp_path, 1, lora=names == ["lora"])
    for name in names:
        ranks = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)]
        for reward in ("causal", "necessary"):
            together = [one + other for one, other in zip(*(rank[reward] for rank in ranks), strict=True)]
            assert together[0] == alone[reward][0]  # to the last bit
            assert len(together) == STEPS
            assert len(set(together[0])) > 3
            found, wanted = (torch.tensor(rows, dtype=torch.float64) for rows in (together, alone[reward]))
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # TRL's advantages are in float32
        for rank in ranks:
            assert rank["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
        for weights in zip(alone["weights"], *(rank["weights"] for rank in ranks), strict=True):
            assert torch.equal(weights[1], weights[2])
            torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-7)
