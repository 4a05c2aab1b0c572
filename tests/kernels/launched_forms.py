"""Print what effects, paths and the paper's links launch on the shapes of SmolLM2 and Qwen3, as JSON: calls -> forms.

`TRITON_INTERPRET=1 python -m tests.kernels.launched_forms 90`, for the tiles of that architecture. A form is a kernel's
name and `form_of` its variant. One layer, a narrow MLP, and the heads that share one key head: more change no form.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from triton.runtime.interpreter import InterpretedFunction

from cepo.benchmarks.engine.sizes import SIZES
from cepo.fusion.config import RewardConfig
from cepo.fusion.score import score_rollouts
from cepo.jacobian.group.engine import GroupEngine
from cepo.jacobian.group.swaps import Swaps
from cepo.jacobian.reading.judge import JudgeLayout
from cepo.kernels.attention import forward, vjp
from cepo.kernels.compile import form_of
from cepo.kernels.head import log_odds
from cepo.kernels.launch import COUNTS, Tile, Variant
from cepo.kernels.norm import triton as norm
from cepo.kernels.swiglu import triton as swiglu
from tests.jacobian.group.ragged import ragged_rollout
from tests.kernels.checks import stay_patched
from tests.models import VOCABULARY

CALLS = {
    "effect": RewardConfig(links={"X->Y": 1.0}, score="effect", donors=1),
    "path": RewardConfig(links={"X->Y": 1.0}, score="path", donors=1, nodes=1),
    "paper": RewardConfig.paper(counterfactuals=0),
}


def models() -> Iterator[Any]:
    """Yield SmolLM2 and Qwen3, in the dtypes that they are run in."""
    smollm2, qwen3 = SIZES["small"].models["SmolLM2-135M"], SIZES["h100"].models["Qwen3-0.6B"]
    for config, dtype in ((smollm2, torch.float32), (qwen3, torch.bfloat16)):
        few = copy.deepcopy(config)
        few.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        few.num_attention_heads, few.num_key_value_heads = config.num_attention_heads // config.num_key_value_heads, 1
        few.num_hidden_layers, few.intermediate_size, few.vocab_size = 1, 64, 48  # multiples of 16, as theirs are
        torch.manual_seed(0)
        yield AutoModelForCausalLM.from_config(few, dtype=dtype).eval()


def record(into: set[tuple[str, str]]) -> None:
    """Add each launch of the interpreter to a set; refuse a number that the table says is a multiple of 16."""
    launch = InterpretedFunction.__getitem__

    def launched(kernel: Any, grid: Any) -> Any:
        run = launch(kernel, grid)

        def call(*given: Any, num_warps: int, num_stages: int, **constants: Any) -> Any:
            arguments = dict(zip(kernel.arg_names, given, strict=False))
            for name, value in arguments.items():
                assert not isinstance(value, int) or name in COUNTS or value % 16 == 0, (kernel.__name__, name, value)
            variant = Variant(kernel, given[0].dtype, constants, Tile(0, 0, num_warps, num_stages))
            into.add((kernel.__name__, form_of(variant)))
            return run(*given, num_warps=num_warps, num_stages=num_stages, **constants)

        return call

    InterpretedFunction.__getitem__ = launched


def main(arch: int) -> None:
    stay_patched()
    for module in (forward, vjp, log_odds, norm, swiglu):
        module.architecture = lambda device: arch  # type: ignore[attr-defined]
    launched: set[tuple[str, str]] = set()
    record(launched)
    prompts = [[(5 * place + shift) % VOCABULARY for place in range(11)] for shift in (3, 4)]
    rollouts = [ragged_rollout(seed, prompt=prompt) for seed, prompt in enumerate(prompts)]
    found: dict[str, set[tuple[str, str]]] = {name: set() for name in CALLS}
    for model in models():
        engine = GroupEngine(model, kernels="triton")
        assert engine.unserved is None, engine.unserved
        assert engine.swaps != Swaps()
        for name, config in CALLS.items():
            launched.clear()
            scored = score_rollouts(rollouts, engine, replace(config, seed=1), JudgeLayout())
            assert not any(one.malformed for one in scored)
            found[name] |= launched
    print(json.dumps({name: sorted(forms) for name, forms in found.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
