"""Protects what only a GPU shows: compiled kernels and the engines on CUDA give the values that the CPU gives.

The tests of the kernels are those that run in Triton's interpreter elsewhere, with the same tolerances, here compiled
and on CUDA tensors. `python -m pytest tests/gpu -n 8` compiles in parallel.
"""
# ruff: noqa: F401 (imported tests and fixtures are collected here)

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.checks import DEVICE, INTERPRETED, launches, poison

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from cepo.benchmarks.engine.cases import base_keys, contenders, new_subject, worst_error
from cepo.benchmarks.engine.sizes import Shapes, random_workload
from cepo.fusion.config import RewardConfig
from cepo.fusion.score import score_rollouts
from cepo.jacobian.autograd import JacobianEngine
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.swaps import Swaps
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.jacobian.records import Group, Rollout
from cepo.kernels.attention.dispatch import attend
from cepo.kernels.launch import Implementation
from cepo.kernels.norm.dispatch import rms_norm
from cepo.kernels.swiglu.dispatch import swiglu
from tests.jacobian.group.interpreted_engine import (
    test_a_grpo_step_with_lora_is_rewarded_on_the_kernels,
    test_a_swap_follows_the_live_weights,
    test_everything_is_given_back_after_an_exception,
    test_numeric_targets_and_several_links_go_through_the_head,
    test_prompts_with_an_opening_and_counterfactuals,
    test_the_engine_on_kernels_equals_the_engine_without,
    with_lora,
)
from tests.jacobian.group.ragged import PAPER, assert_same, ragged_rollout
from tests.jacobian.group.test_paths import TOTAL
from tests.jacobian.group.test_paths import assert_same as assert_same_paths
from tests.jacobian.group.test_paths import request as path_request
from tests.jacobian.test_autograd import LINKS
from tests.kernels.attention.interpreted_attention import (
    test_attention_backward_under_func_vmap_is_one_launch_too,
    test_attention_equals_the_definition,
    test_attention_forms_only_the_gradients_that_are_asked,
    test_attention_takes_strides_and_an_expanded_past,
    test_the_older_vmap_is_refused_not_read_wrongly,
)
from tests.kernels.head.interpreted_head import (
    test_head_equals_the_definition,
    test_head_in_chunks_and_splits_of_the_vocabulary,
    test_head_of_a_confident_model_keeps_its_digits,
    test_head_refuses_what_it_would_read_wrongly,
)
from tests.kernels.norm.interpreted_norm import (
    test_rms_norm_equals_the_definition,
    test_rms_norm_reads_a_weight_of_another_dtype,
    test_rms_norm_takes_strides,
)
from tests.kernels.swiglu.interpreted_swiglu import (
    test_swiglu_equals_the_definition,
    test_swiglu_takes_halves_of_a_wider_tensor,
)
from tests.models import VOCABULARY, InDouble, judge_rollout, span, tiny_model

KERNELS: tuple[Implementation, ...] = ("torch",) if INTERPRETED else ("torch", "triton", "auto")
needs_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


def on_cpu(answer: Any) -> Any:
    """Return an answer with its matrices on the CPU."""
    return [
        {name: replace(record, jac_SD=record.jac_SD.cpu()) for name, record in records.items()} for records in answer
    ]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "lora"])
def test_the_engine_equals_the_oracle_in_float32(family: str, kernels: Implementation) -> None:
    """Ragged groups, grouped heads, per-head norms, LoRA: by plain PyTorch and by the kernels, to 1e-5."""
    shape = {"num_attention_heads": 1} if family == "gpt2" else {"head_dim": 16}  # the smallest that the kernels take
    model: Any = tiny_model("qwen3" if family == "lora" else family, dtype=torch.float32, **shape).to(DEVICE)
    model = with_lora(model) if family == "lora" else model
    engine, group = GroupEngine(model, kernels=kernels), Group(tuple(ragged_rollout(seed) for seed in range(4)))
    found = engine.jacobians(group, PAPER)
    assert engine.unserved is None
    assert all(record.jac_SD.device.type == DEVICE.type for records in found for record in records.values())
    assert_same(found, JacobianEngine(model).jacobians(group, PAPER), 1e-5)
    assert (engine.swaps == Swaps()) == (kernels == "torch")  # "auto" found nothing wrong with the kernels


def test_both_engines_equal_the_oracle_on_the_cpu_in_double() -> None:
    """Every link and target function, effects and paths, to 1e-10: no operation is another one on CUDA."""
    with InDouble():
        model = tiny_model("qwen3")
        group = Group(tuple(judge_rollout(seed) for seed in range(3)))
        rollouts = [ragged_rollout(seed) for seed in range(3)]
        asked = [path_request(rollouts, text, nodes=nodes) for text in TOTAL for nodes in (0, 2)]
        wanted, paths = JacobianEngine(model).jacobians(group, LINKS), list(JacobianEngine(model).paths(asked))
        model.to(DEVICE)
        for engine in (JacobianEngine(model), GroupEngine(model, kernels="torch")):
            assert_same(on_cpu(engine.jacobians(group, LINKS)), wanted, 1e-10)
            for found, oracle in zip(engine.paths(asked), paths, strict=True):
                assert_same_paths(found, oracle, 1e-10)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("family", ["llama", "lora"])
def test_paths_equal_the_oracle_in_float32(family: str, kernels: Implementation) -> None:
    """Values alone and with nodes, by plain PyTorch and by the kernels, to 1e-4 as on the CPU."""
    model: Any = tiny_model("qwen3" if family == "lora" else family, dtype=torch.float32, head_dim=16).to(DEVICE)
    model = with_lora(model) if family == "lora" else model
    rollouts = [ragged_rollout(seed) for seed in range(3)]
    asked = [path_request(rollouts, text, nodes=nodes) for text in ("criteria->analysis", "X->Y") for nodes in (0, 3)]
    engine = GroupEngine(model, kernels=kernels)
    for found, oracle in zip(engine.paths(asked), JacobianEngine(model).paths(asked), strict=True):
        assert_same_paths(found, oracle, 1e-4)
    assert (engine.swaps == Swaps()) == (kernels == "torch")


@pytest.mark.parametrize(
    "config",
    [
        RewardConfig.paper(counterfactuals=3),
        RewardConfig.paper(counterfactuals=3, score="influence_retained"),
        RewardConfig(links={"criteria->analysis->scores": 1.0}, score="effect", donors=2),
        RewardConfig(links={"criteria->analysis->scores": 1.0}, score="path", donors=2, nodes=2),
    ],
    ids=lambda config: config.score,
)
def test_rewards_equal_those_of_the_cpu(config: RewardConfig) -> None:
    """Permutations, nuisance subspaces, spectral shares, donors, chains and fusion as well, in double."""
    prompts = [[(5 * place + shift) % VOCABULARY for place in range(11)] for shift in (3, 4)]
    rollouts = [ragged_rollout(seed, prompt=prompt) for prompt in prompts for seed in range(2)]
    layout = JudgeLayout()
    with InDouble():
        model = tiny_model("llama")
        wanted = [one.reward for one in score_rollouts(rollouts, GroupEngine(model), config, layout)]
        on_device = GroupEngine(model.to(DEVICE), kernels="torch")
        found = [one.reward for one in score_rollouts(rollouts, on_device, config, layout)]
    assert found == pytest.approx(wanted, abs=1e-9)
    assert max(wanted) > 0.0


HEADS = {  # query heads, key heads, head size
    "SmolLM2-135M": (LlamaConfig, 9, 3, 64),
    "Qwen2.5-7B": (Qwen2Config, 14, 2, 128),
    "Qwen3-0.6B": (Qwen3Config, 16, 8, 128),
}


@needs_a_gpu
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", HEADS)
def test_the_engine_in_bfloat16_errs_as_plain_autograd_does(name: str, kernels: Implementation) -> None:
    """Against a float32 copy, at most twice the error of plain autograd in bfloat16; the heads of three models."""
    config, heads, key_heads, size = HEADS[name]
    shape: Any = {
        "vocab_size": 5000,
        "hidden_size": heads * size // 2 if config is Qwen3Config else heads * size,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 1024,
        **({"head_dim": size} if config is Qwen3Config else {}),
    }
    check = random_workload(5000, Shapes(3, 304, 64, 9, 1), 0)
    subject = new_subject(name, config(**shape), torch.bfloat16, DEVICE, check, 0)
    subject = replace(subject, engine=GroupEngine(subject.model, kernels=kernels))
    assert subject.engine.unserved is None
    assert (subject.engine.swaps == Swaps()) == (kernels == "torch")
    for case in contenders(subject, ()):
        error = worst_error(case.run(check, 3), subject.wanted, base_keys(case, check))
        assert error <= subject.tolerance, (case.name, error, subject.oracle_error)


@needs_a_gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("asked_for", ["jacobians", "paths"])
def test_a_real_lack_of_memory_halves_the_chunk(
    asked_for: str, kernels: Implementation, caplog: pytest.LogCaptureFixture
) -> None:
    """With less memory than 16 rollouts need at once, and enough for one, the answers are the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval().to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 1000, (64,), generator=generator).tolist()
    spans = {
        "prompt": span("prompt", range(2, 62)),
        "criteria": span("criteria", range(66, 200)),
        "analysis": span("analysis", range(204, 240)),
        "scores": span("scores", range(244, 250)),
    }
    completions = torch.randint(3, 1000, (16, 188), generator=generator).tolist()
    group = Group(tuple(Rollout(tuple(prompt), tuple(row), spans) for row in completions))
    engine, alone = (GroupEngine(model, memory_budget=budget, kernels=kernels) for budget in (1e15, 1.0))
    assert engine.unserved is alone.unserved is None
    paths = path_request(group.rollouts, "criteria->analysis", count=1, nodes=2)

    def answer_of(engine: GroupEngine) -> Any:
        return engine.jacobians(group, PAPER) if asked_for == "jacobians" else next(engine.paths([paths]))

    wanted, together_bytes = peak_of(lambda: answer_of(engine))
    _, alone_bytes = peak_of(lambda: answer_of(alone))
    assert alone_bytes < 0.4 * together_bytes
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(0.5 * (alone_bytes + together_bytes) / total)
    try:
        with caplog.at_level(logging.WARNING, logger="cepo"):
            found = answer_of(engine)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with" in caplog.text
    if asked_for == "jacobians":
        assert_same(found, wanted, 1e-5)
    else:
        assert_same_paths(found, wanted, 1e-4)


def peak_of(run: Callable[[], Any]) -> tuple[Any, int]:
    """Return an answer and the most bytes that were allocated meanwhile; unused blocks are given back before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    answer = run()
    peak = torch.cuda.max_memory_allocated()
    gc.collect()
    torch.cuda.empty_cache()
    return answer, peak


@pytest.fixture
def large_draws() -> Iterator[Callable[..., Tensor]]:
    """Return a function that draws bfloat16 normals on the GPU, and give the memory back."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    yield lambda *shape: torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.empty_cache()


@needs_a_gpu
@pytest.mark.parametrize("operation", ["attention", "norm", "swiglu"])
def test_more_cotangents_than_an_int32_counts_elements(operation: str, large_draws: Callable[..., Tensor]) -> None:
    """The gradients of the last cotangent, 2^31 elements after the first, are those of it among two, to the bit."""
    draw = large_draws
    if operation == "attention":
        shapes = [(16, 1024), (2, 0), (2, 0), (2, 1024), (2, 1024)]
        inputs = [draw(1, *shape, 128) for shape in shapes]
        lengths_B = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        leaves = [tensor.requires_grad_() for tensor in (inputs[0], *inputs[3:])]
        output = attend(*inputs, lengths_B, scale=0.1, implementation="triton")
    elif operation == "norm":
        leaves = [draw(2048, 1024).requires_grad_()]
        output = rms_norm(leaves[0], draw(1024), epsilon=1e-6, implementation="triton")
    else:
        leaves = [draw(2048, 1024).requires_grad_() for _ in range(2)]
        output = swiglu(*leaves, implementation="triton")
    count = 2**31 // output.numel() + 2
    last = draw(*output.shape)
    cotangents = last.new_zeros(count, *output.shape)
    cotangents[-1] = last
    pull = torch.func.vmap(lambda row: torch.autograd.grad(output, leaves, row, retain_graph=True))
    for many, two in zip(pull(cotangents), pull(cotangents[-2:]), strict=True):
        assert many.numel() > 2**31 or operation == "attention"  # keys have fewer heads than queries
        assert two[1].any()
        assert torch.equal(many[-2:], two)
        assert not many[0].any()
