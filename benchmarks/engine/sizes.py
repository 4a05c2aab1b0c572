"""The benchmark's sizes by name: models, rollouts, and the points of each scaling axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from cepo.benchmarks.engine.peers import Workload
from cepo.jacobian.records import Rollout, Span


@dataclass(frozen=True)
class Shapes:
    """The lengths of a workload, in tokens.

    Attributes:
        G: number of rollouts per prompt.
        Lz: length of the prompt.
        Lx: length of the rationale.
        Ly: length of the answer.
        K: number of counterfactuals.
        opening: leading tokens of the prompt outside all spans, which no link differentiates.
        prompts: number of prompts, which share their opening.
    """

    G: int
    Lz: int
    Lx: int
    Ly: int
    K: int
    opening: int = 0
    prompts: int = 1


@dataclass(frozen=True)
class Size:
    """The models and workloads of a size.

    Attributes:
        models: configuration of each model by name; weights are random.
        dtype: dtype of the weights.
        shapes: the workloads.
        check: small workload on which values are compared and every case is warmed up before it is timed. Its rollouts
            and permutations are among those of `shapes`.
        static: workload with a static opening.
        scaling_base: the workload of which one length at a time is scaled.
        scaling: points by axis of `Shapes`; measured on the first model.
        alone: number of rollouts to time if a case runs one at a time, with its seconds scaled to all; None for all.
        cuda: whether a GPU is needed.
    """

    models: Mapping[str, Any]
    dtype: torch.dtype
    shapes: tuple[Shapes, ...]
    check: Shapes
    static: Shapes
    scaling_base: Shapes
    scaling: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    alone: int | None = None
    cuda: bool = False


def random_workload(vocabulary: int, shapes: Shapes, seed: int) -> Workload:
    """Return rollouts of random token ids; with one prompt, those of a smaller G are the first of a larger G.

    Args:
        vocabulary: vocabulary size V.
        shapes: lengths.
        seed: seed of the token ids and of the permutations.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())

    opening = draw(shapes.opening)
    prompts = [opening + draw(shapes.Lz - shapes.opening) for _ in range(shapes.prompts)]
    spans = {
        "prompt": _span("prompt", shapes.opening, shapes.Lz),
        "rationale": _span("rationale", shapes.Lz, shapes.Lz + shapes.Lx),
        "answer": _span("answer", shapes.Lz + shapes.Lx, shapes.Lz + shapes.Lx + shapes.Ly),
    }
    rollouts = [Rollout(prompt, draw(shapes.Lx + shapes.Ly), spans) for prompt in prompts for _ in range(shapes.G)]
    return Workload(tuple(rollouts), shapes.K, seed)


def _span(name: str, start: int, end: int) -> Span:
    positions = tuple(range(start, end))
    return Span(name, positions, positions, (0,) * len(positions), "")


_TINY = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
_SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)


def _qwen3(width: int, inner: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )


_QWEN2_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    rope_theta=1000000.0,
)


_GPU = Size(
    models={"Qwen3-0.6B": _qwen3(1024, 3072), "Qwen3-1.7B": _qwen3(2048, 6144)},
    dtype=torch.bfloat16,
    shapes=(Shapes(8, 1024, 256, 9, 4), Shapes(16, 1024, 256, 9, 4)),
    check=Shapes(2, 1024, 256, 9, 1),
    static=Shapes(8, 1024, 64, 9, 4, opening=700, prompts=4),
    scaling_base=Shapes(8, 1024, 256, 9, 1),
    scaling={"G": (2, 4, 8, 16), "Lz": (256, 512, 1024, 2048), "Lx": (64, 128, 256, 512), "K": (1, 2, 4)},
    alone=2,
    cuda=True,
)


def _one_model(name: str, config: Any, shapes: Shapes) -> Size:
    """Return a size for a GPU with one model in bfloat16, small enough to take about a minute."""
    check = replace(shapes, G=2, K=1)
    static = replace(shapes, opening=700, prompts=2)
    scaling = {"G": (2, 4, 8), "K": (1, 2, 4)}
    return Size({name: config}, torch.bfloat16, (shapes,), check, static, check, scaling, alone=2, cuda=True)


SIZES: dict[str, Size] = {
    "tiny": Size(
        models={"tiny": _TINY},
        dtype=torch.float32,
        shapes=(Shapes(3, 24, 8, 3, 2),),
        check=Shapes(3, 24, 8, 3, 2),
        static=Shapes(2, 48, 8, 3, 1, opening=32, prompts=2),
        scaling_base=Shapes(2, 16, 8, 3, 1),
        scaling={"G": (2, 4), "Lz": (16, 32), "Lx": (8, 16), "K": (1, 2)},
    ),
    "small": Size(
        models={"SmolLM2-135M": _SMOLLM2},
        dtype=torch.float32,
        shapes=(Shapes(8, 256, 64, 9, 4),),
        check=Shapes(2, 256, 64, 9, 1),
        static=Shapes(2, 1024, 64, 9, 1, opening=700, prompts=2),
        scaling_base=Shapes(4, 128, 32, 9, 1),
        scaling={"G": (2, 4, 8), "Lz": (64, 128, 256), "Lx": (16, 32, 64), "K": (1, 2)},
        alone=1,
    ),
    "a100": _GPU,
    "h100": _GPU,
    "gpu-135m": _one_model("SmolLM2-135M", _SMOLLM2, Shapes(8, 1024, 256, 9, 4)),
    "gpu-7b": _one_model("Qwen2.5-7B", _QWEN2_7B, Shapes(4, 1024, 256, 9, 2)),
}
