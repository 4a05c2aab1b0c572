"""Tiny random models and hand-built rollouts that several test files share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from cepo.jacobian.records import Digit, Rollout, Span

VOCABULARY = 40
WIDTH = 16
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: tuple[str, ...] = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "gemma", "gemma2", "mistral-sliding")


def tiny_config(family: str, *, tied: bool = False, **options: Any) -> Any:
    """Return the config of a two-layer model of the family, 16 wide."""
    shape = {**_SHAPE, "tie_word_embeddings": tied, **options}
    wide_heads = {"head_dim": 6}  # 4 heads of 6 in 16 dimensions: the projections are not square
    match family:
        case "llama":
            return LlamaConfig(**shape)
        case "qwen2":
            return Qwen2Config(**shape)
        case "qwen3":
            return Qwen3Config(**{**wide_heads, **shape})
        case "mistral":
            return MistralConfig(**{**wide_heads, **shape}, sliding_window=None)
        case "mistral-sliding":
            return MistralConfig(**{**wide_heads, **shape}, sliding_window=9)
        case "gemma":
            return GemmaConfig(**{**wide_heads, **shape})
        case "gemma2":
            return Gemma2Config(
                **{**wide_heads, **shape},
                sliding_window=9,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                query_pre_attn_scalar=6,
            )
        case "gpt2":
            names = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"}
            names |= {"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
            shape.pop("num_key_value_heads")
            return GPT2Config(**{names.get(key, key): value for key, value in shape.items()})
    raise ValueError(family)


def tiny_model(
    family: str = "llama",
    *,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attention: str = "eager",
    **options: Any,
) -> nn.Module:
    """Return a model in eval mode whose weights are random and large enough to be far from linear."""
    config = tiny_config(family, tied=tied, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(torch.float64)
    randomise(model, seed)
    return model.to(dtype).eval()


class InDouble(TorchFunctionMode):
    """Makes every cast to float32 one to float64.

    transformers casts to float32 inside norms, softmax and rotary tables, whatever the model's dtype is, so a float64
    model is exact to seven digits only, and finite differences of it are noise. Inside this context it is float64.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def randomise(model: nn.Module, seed: int, *, scale: float = 0.35) -> None:
    """Overwrite every parameter: matrices with noise, vectors with noise around what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            parameter.copy_(noise * scale if parameter.dim() > 1 else parameter + 0.2 * noise)


def span(
    name: str,
    positions: Sequence[int],
    movable: Sequence[int] | None = None,
    sentences: Sequence[int] | None = None,
) -> Span:
    """Return a span whose tokens all move, in one sentence, unless told otherwise."""
    moved = tuple(positions if movable is None else movable)
    return Span(name, tuple(positions), moved, tuple(sentences) if sentences is not None else (0,) * len(moved), name)


JUDGE_POSITIONS = {
    "prompt": (1, 2, 3, 5, 6),  # 0, 4, 7 and 8 are the chat template's
    "criteria": (10, 11, 12, 13),
    "analysis": (16, 17, 18),
    "scores": (20, 22, 23),
}


def judge_rollout(
    seed: int = 0,
    *,
    prompt_seed: int = 100,
    positions: dict[str, tuple[int, ...]] | None = None,
    changed: dict[int, int] | None = None,
) -> Rollout:
    """Return a judge's rollout of 26 random tokens, some of them changed: 9 of the prompt, and scores of one and of two
    digit tokens. The first score could have become longer at the token after it."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, VOCABULARY, (9,), generator=torch.Generator().manual_seed(prompt_seed)).tolist()
    completion = torch.randint(3, VOCABULARY, (17,), generator=generator).tolist()
    ids = [(changed or {}).get(position, token) for position, token in enumerate(prompt + completion)]
    where = {**JUDGE_POSITIONS, **(positions or {})}
    digits = [(3 + number, float(number)) for number in range(10)]

    def digit(position: int, written: float, longer: float = 0.0) -> Digit:
        others = [(token, longer + number) for token, number in digits if token != ids[position]]
        return Digit(position, tuple(sorted([*others, (ids[position], written)])))

    first, tens, ones = where["scores"]
    return Rollout(
        tuple(ids[:9]),
        tuple(ids[9:]),
        {name: span(name, where[name]) for name in where},
        ((digit(first, 4.0), digit(first + 1, 0.0, 36.0)), (digit(tens, 1.0), digit(ones, 9.0, 9.0))),
    )
