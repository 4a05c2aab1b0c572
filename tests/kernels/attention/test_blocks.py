"""Protects attention in plain PyTorch: block by block it equals the definition, and its graph keeps no weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cepo.kernels.attention import blocks
from cepo.kernels.attention.definition import prefix_attention
from cepo.kernels.attention.dispatch import attend

# Largest error over the largest true value. In half precision attention weights are rounded before each product.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def inputs(rollouts: int, past: int, tokens: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Return q (6 heads), past k, past v, k, v (2 heads) as leaves, and ragged lengths of the past."""
    generator = torch.Generator().manual_seed(past + tokens)
    shapes = [(6, tokens), (2, past), (2, past), (2, tokens), (2, tokens)]
    tensors = [
        torch.randn(rollouts, *shape, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]
    return tensors, torch.tensor([past, past // 3, 0][:rollouts])


def wide_gradients(tensors: list[Tensor], lengths_B: Tensor, cotangents: Tensor, **settings: float) -> list[Tensor]:
    """Return the output and its gradients by the definition in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = prefix_attention(*wide, lengths_B, **settings)  # type: ignore[arg-type]
    each = [
        torch.autograd.grad(output, wide, row.double(), retain_graph=True, materialize_grads=True) for row in cotangents
    ]
    return [output.detach(), *(torch.stack(rows) for rows in zip(*each, strict=True))]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(
    ("rollouts", "past", "tokens", "count", "softcap"),
    [(1, 0, 1, 1, None), (3, 9, 7, 2, None), (2, 0, 11, 3, 2.0), (1, 20, 5, 1, 1.0), (3, 4, 13, 2, None)],
)
@pytest.mark.parametrize("block", [1, 2**12, 2**23])
def test_blocks_equal_the_definition(
    block: int,
    rollouts: int,
    past: int,
    tokens: int,
    count: int,
    softcap: float | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In blocks of one query, of a few, and all at once; one cotangent at a time and batched."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    tensors, lengths_B = inputs(rollouts, past, tokens, dtype)
    settings = {"scale": 0.3, "softcap": softcap}
    output = attend(*tensors, lengths_B, **settings, kept_bytes=0)  # type: ignore[arg-type]
    cotangents = torch.randn(count, *output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def pull(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, tensors, cotangent, retain_graph=True, materialize_grads=True)

    batched = torch.func.vmap(pull)(cotangents)
    single = [torch.stack(rows) for rows in zip(*map(pull, cotangents), strict=True)]
    expected = wide_gradients(tensors, lengths_B, cotangents, **settings)  # type: ignore[arg-type]
    for got in ((output.detach(), *batched), (output.detach(), *single)):
        for found, true in zip(got, expected, strict=True):
            assert found.dtype == dtype
            if true.numel():
                assert (found.double() - true).abs().max() <= TOLERANCES[dtype] * true.abs().max()


def test_the_graph_keeps_the_inputs_alone() -> None:
    """Kept attention weights would be 64 x 64 for each head; and a past that asks for nothing gets no gradient."""
    tensors, lengths_B = inputs(1, 0, 64, torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        output = attend(*tensors, lengths_B, scale=0.3, kept_bytes=0)
    assert sum(kept) == sum(tensor.numel() for tensor in (*tensors, lengths_B))
    query, past_key, past_value, key, value = inputs(1, 5, 4, torch.float32)[0]
    of_past = [past_key.detach(), past_value.detach()]
    output = attend(query, *of_past, key, value, torch.tensor([5]), scale=0.3, kept_bytes=0)
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(output.sum(), [query, key, value]))
