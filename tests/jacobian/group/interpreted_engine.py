"""The group engine on the Triton kernels: the same Jacobians, by the kernels, and nothing left behind.

Run in the interpreter by test_swaps.py, in a process of its own, and compiled on a GPU by tests/gpu/.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cepo.fusion.requests import reward_requests
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.swaps import Swaps, find_swaps, swapped
from cepo.jacobian.records import Group
from tests.jacobian.group.ragged import PAPER, assert_same, ragged_rollout
from tests.jacobian.test_autograd import link
from tests.kernels.checks import DEVICE, normal
from tests.models import judge_rollout, tiny_model

LAYERS = {"norm_forward_kernel", "norm_vjp_kernel", "swiglu_forward_kernel", "swiglu_vjp_kernel"}
ATTENTION = {f"attention_{name}_kernel" for name in ("forward", "delta", "query_vjp", "key_vjp")}
HEAD = {"head_forward_kernel", "head_probs_kernel"}
SIZE = {"head_dim": 16}  # the smallest that the attention takes
# One group of heads: the interpreter's time is that of the programs, and there is one for every group.
SMALL: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, **SIZE}


def with_lora(model: nn.Module) -> Any:
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted.train()


def state_of(model: nn.Module) -> list[tuple[str, dict[str, Any], Any]]:
    """What a swap could leave behind: every module's own attributes, and its class's forward."""
    return [(name, dict(module.__dict__), type(module).forward) for name, module in model.named_modules()]


@pytest.mark.parametrize("family", ["llama", "qwen3", "lora", "gemma"])
def test_the_engine_on_kernels_equals_the_engine_without(family: str, launches: Counter[str]) -> None:
    """The paper's links with the context's energy: 1e-5 in float32.

    A ragged group and two groups of heads (Llama), two layers and per-head norms (Qwen3), LoRA, norms of the form 1 + w
    (Gemma).
    """
    shape = {"llama": {"num_hidden_layers": 1, **SIZE}, "qwen3": {**SMALL, "num_hidden_layers": 2}}.get(family, SMALL)
    plain = tiny_model("qwen3" if family == "lora" else family, dtype=torch.float32, **shape).to(DEVICE)
    model = with_lora(plain) if family == "lora" else plain
    group = Group(tuple(ragged_rollout(seed) for seed in ((0, 3) if family == "llama" else (0,))))
    wanted = GroupEngine(model, kernels="torch").jacobians(group, PAPER)
    assert not launches
    engine = GroupEngine(model, kernels="triton")
    assert engine.unserved is None
    before = state_of(model)
    assert_same(engine.jacobians(group, PAPER), wanted, 1e-5)
    assert state_of(model) == before
    # Gemma's activation is a GELU: its MLP is left alone, its norms of the form 1 + w are not.
    swiglu = {"swiglu_forward_kernel", "swiglu_vjp_kernel"}
    assert set(launches) == (LAYERS | ATTENTION | HEAD) - (swiglu if family == "gemma" else set())


def test_prompts_with_an_opening_and_counterfactuals(launches: Counter[str]) -> None:
    """What runs without a graph, and ragged stages after one another, on the kernels too."""
    model = tiny_model("llama", dtype=torch.float32, max_position_embeddings=128, **SMALL).to(DEVICE)
    opening = [(7 * place + 5) % 40 for place in range(18)]
    rollouts = {}
    for number in range(2):
        own = [(11 * place + number + 3) % 40 for place in range(7 + number)]
        for seed in range(2):
            rollouts[len(rollouts)] = ragged_rollout(10 * number + seed, prompt=[*opening, *own], lead=18)
    groups = reward_requests(rollouts, PAPER, counterfactuals=1, permutation="uniform", seed=0, context_energy=False)
    requests = [request for group in groups for request in group.requests]
    plain, engine = (GroupEngine(model, kernels=kernels) for kernels in ("torch", "triton"))
    assert next(row.forward for row in engine.plan(requests).rows if row.segment == "opening") > 0
    for found, wanted in zip(engine.compute(requests), plain.compute(requests), strict=True):
        assert_same(found, wanted, 1e-5)
    assert set(launches) == LAYERS | ATTENTION | HEAD


def test_numeric_targets_and_several_links_go_through_the_head(launches: Counter[str]) -> None:
    """Margins, expected scores and log-odds as well, of one call."""
    model = tiny_model("llama", dtype=torch.float32, **SMALL).to(DEVICE)
    links = [link(text) for text in ("X->Y@margin", "Z->Y:total@expected_score", "X->Y@log_odds", "Z->X")]
    group = Group((judge_rollout(0),))
    engine = GroupEngine(model, kernels="triton")
    assert_same(engine.jacobians(group, links), JacobianEngine(model).jacobians(group, links), 2e-5)
    assert set(launches) >= HEAD


def test_everything_is_given_back_after_an_exception() -> None:
    """A layer that raises inside a swapped forward pass: forwards, attention, hooks are those from before."""
    model = tiny_model("llama", dtype=torch.float32, **SMALL).to(DEVICE)
    engine = GroupEngine(model, kernels="triton")
    assert engine.unserved is None
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("inside")))
    before = state_of(model)
    with pytest.raises(KeyError, match="inside"):
        engine.jacobians(Group((ragged_rollout(0),)), PAPER)
    assert state_of(model) == before
    assert model.config._attn_implementation == "eager"
    handle.remove()


def test_what_is_taken_over(caplog: pytest.LogCaptureFixture) -> None:
    """By what a module computes, not by its name: wrong norms, other activations, scaled logits are left alone."""
    with caplog.at_level(logging.INFO, logger="cepo"):
        model = tiny_model("qwen3", dtype=torch.float32, **SIZE)
        swaps = find_swaps(model, type(model).forward, "triton")
    norms, mlps = 2 * 4 + 1, 2
    assert len(swaps.forwards) == norms + mlps
    assert "kernels take over attention, the head, 9 norms, 2 MLPs" in caplog.text
    assert swaps.attention == swaps.head == "triton"

    class HalvedRMSNorm(type(model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(hidden_states)

    model.model.norm.__class__ = HalvedRMSNorm
    model.model.layers[0].input_layernorm.variance_epsilon = 0.1  # read when the trial is made: still a norm
    model.model.layers[0].mlp.act_fn = nn.GELU()
    model.model.layers[1].mlp.__dict__["forward"] = model.model.layers[1].mlp.forward  # somebody else's
    swaps = find_swaps(model, type(model).forward, "triton")
    taken = {module for module, _ in swaps.forwards}
    assert len(taken) == norms - 1
    assert not taken & {model.model.norm, model.model.layers[0].mlp, model.model.layers[1].mlp}
    capped = tiny_model("gemma2", dtype=torch.float32, **SIZE)  # its logits go through a tanh
    assert find_swaps(capped, type(capped).forward, "triton").head == "torch"
    biased = tiny_model("qwen3", dtype=torch.float32, **SIZE)
    biased.lm_head = nn.Linear(16, 40)
    assert find_swaps(biased, type(biased).forward, "triton").head == "torch"
    for narrow in (torch.bfloat16, torch.float16):
        model = tiny_model("qwen3", dtype=narrow, **SIZE)
        assert len(find_swaps(model, type(model).forward, "triton").forwards) == norms + mlps
    assert find_swaps(model, type(model).forward, "auto") == Swaps()


def test_a_swap_follows_the_live_weights() -> None:
    """Training changes the weights between two calls; the stand-in reads them each time."""
    model = tiny_model("llama", dtype=torch.float32, **SIZE).to(DEVICE)
    norm, rows = model.model.norm, normal(0, 3, 16)
    swaps = find_swaps(model, type(model).forward, "triton")
    for weight in (norm.weight.detach() * 2.0, norm.weight.detach() - 0.5):
        norm.weight = nn.Parameter(weight)
        wanted = norm(rows)
        with swapped(swaps):
            assert "forward" in norm.__dict__
            assert torch.allclose(norm(rows), wanted, rtol=1e-5, atol=1e-6)
        assert "forward" not in norm.__dict__


def test_a_grpo_step_with_lora_is_rewarded_on_the_kernels(
    launches: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real step of TRL's trainer: the rewards of plain PyTorch, and the live policy is left as it was.

    An untrained policy writes no judgement, so that generation is made to end in one; all else is TRL's.
    """
    pytest.importorskip("trl", reason="trl is an extra: pip install 'cepo[trl]'")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from cepo.train import testbed
    from cepo.train.rewards.causal import CausalReward

    tokenizer = testbed.build_tokenizer()
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, **SMALL}
    model = tiny_model("qwen3", dtype=torch.float32, **shape).to(DEVICE)
    item = testbed.generate_items(1, seed=5, cue_agreement=0.5)[0]
    written = torch.tensor([*tokenizer(item.completion)["input_ids"], tokenizer.eos_token_id])

    def generate(self: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, written.to(input_ids.device).expand(len(input_ids), -1)], dim=1)

    monkeypatch.setattr(type(model), "generate", generate)
    settings = {"counterfactuals": 1, "rank": 1, "score": "phi"}
    plain, on_kernels = (CausalReward(kernels=kernels, name=kernels, **settings) for kernels in ("torch", "triton"))  # type: ignore[arg-type]
    found: dict[str, list[float | None]] = {}

    def watched(reward: CausalReward) -> Any:
        def call(**given: Any) -> list[float | None]:
            before, launched = state_of(trainer.model), sum(launches.values())
            found[reward.__name__] = reward(**given)
            assert state_of(trainer.model) == before
            assert trainer.model.training
            assert (sum(launches.values()) > launched) == (reward is on_kernels)
            return found[reward.__name__]

        return call

    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=DEVICE.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=2,
        num_generations=2,
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[watched(plain), watched(on_kernels)],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": item.prompt}]}]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    plain.bind(trainer)
    on_kernels.bind(trainer)
    trainer.train()
    assert all(value is not None and value > 0.0 for value in found["torch"])
    assert found["triton"] == pytest.approx(found["torch"], rel=1e-4)
    assert set(launches) == LAYERS | ATTENTION | HEAD
