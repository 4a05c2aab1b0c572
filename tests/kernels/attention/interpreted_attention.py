"""The Triton attention against the float64 definition; run by test_interpreter.py and, on a GPU, by tests/gpu/."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import Tensor

from tests.kernels.checks import DEVICE, assert_close, batched_gradients, normal


def attention_inputs(
    rollouts: int, heads: int, key_heads: int, past: int, tokens: int, size: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Return q, past k, past v, k, v as leaves, and ragged lengths of the past (the first whole, the last empty)."""
    shapes = [(heads, tokens), (key_heads, past), (key_heads, past), (key_heads, tokens), (key_heads, tokens)]
    tensors = [normal(i, rollouts, *shape, size, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    lengths_B = torch.tensor([past, past // 3, 0][:rollouts], device=DEVICE)
    return tensors, lengths_B


def attention_oracle(tensors: list[Tensor], lengths_B: Tensor, cotangents: Tensor, **settings: float) -> list[Tensor]:
    """Return the output and the C gradients of each input by the definition in float64."""
    from cepo.kernels.attention.definition import prefix_attention

    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = prefix_attention(*wide, lengths_B, **settings)  # type: ignore[arg-type]
    each = [
        torch.autograd.grad(output, wide, row.double(), retain_graph=True, materialize_grads=True) for row in cotangents
    ]
    return [output.detach(), *(torch.stack(rows) for rows in zip(*each, strict=True))]


# Each crosses the edges of the tiles of its dtype and head size (see FORWARD_TILES, QUERY_TILES, KEY_TILES).
ATTENTION_CASES = [
    # dtype, rollouts, heads, key heads, past, tokens, head size, cotangents, softcap
    (torch.float32, 1, 1, 1, 0, 1, 64, 1, None),
    (torch.float32, 2, 3, 1, 35, 1, 96, 2, None),
    (torch.float32, 3, 2, 2, 33, 20, 64, 1, None),
    (torch.float32, 1, 1, 1, 35, 34, 128, 5, None),
    (torch.float32, 1, 1, 1, 100, 20, 64, 2, None),
    (torch.float32, 1, 1, 1, 20, 100, 64, 1, None),
    (torch.float32, 2, 2, 1, 35, 20, 128, 2, 5.0),
    (torch.float16, 1, 8, 1, 70, 20, 128, 2, None),
    (torch.float16, 2, 3, 1, 70, 45, 64, 3, None),
    (torch.float16, 1, 2, 2, 30, 70, 96, 1, 5.0),
    (torch.bfloat16, 1, 8, 1, 70, 17, 64, 3, None),
    (torch.bfloat16, 3, 3, 1, 66, 25, 96, 2, None),
    (torch.bfloat16, 1, 1, 1, 150, 70, 128, 1, None),
    (torch.bfloat16, 1, 1, 1, 20, 150, 64, 1, None),
]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: "-".join(map(str, case)).removeprefix("torch."))
def test_attention_equals_the_definition(case: tuple, launches: Counter[str]) -> None:
    """Values and the gradients of all five inputs, under C cotangents in one launch of each kernel."""
    from cepo.kernels.attention.dispatch import attend

    dtype, rollouts, heads, key_heads, past, tokens, size, count, softcap = case
    tensors, lengths_B = attention_inputs(rollouts, heads, key_heads, past, tokens, size, dtype)
    settings = {"scale": size**-0.5, "softcap": softcap}
    output = attend(*tensors, lengths_B, **settings, implementation="triton")
    cotangents = normal(9, count, *output.shape, dtype=dtype)
    gradients = batched_gradients(output, tensors, cotangents)
    expected = attention_oracle(tensors, lengths_B, cotangents, **settings)
    names = ("output", "q", "past k", "past v", "k", "v")
    for name, got, true in zip(names, (output, *gradients), expected, strict=True):
        assert got.dtype == dtype
        assert_close(got.detach(), true, name)
    assert launches == {
        "attention_forward_kernel": 1,
        "attention_delta_kernel": 1,
        "attention_query_vjp_kernel": 1,
        "attention_key_vjp_kernel": 2 if past else 1,
    }


def test_attention_takes_strides_and_an_expanded_past(launches: Counter[str]) -> None:
    """Token-major memory, a past expanded over rollouts, cotangents expanded over everything or with a strided head."""
    from cepo.kernels.attention.dispatch import attend

    query = normal(0, 2, 10, 2, 64).transpose(1, 2).requires_grad_()
    past_key = normal(1, 1, 1, 33, 64).expand(2, 1, 33, 64).detach().requires_grad_()
    past_value = normal(2, 1, 33, 1, 128)[..., ::2].transpose(1, 2).expand(2, 1, 33, 64).detach().requires_grad_()
    key = normal(3, 2, 10, 1, 64).transpose(1, 2).requires_grad_()
    value = normal(4, 2, 1, 64, 10).mT.detach().requires_grad_()
    tensors, lengths_B = [query, past_key, past_value, key, value], torch.tensor([33, 7], device=DEVICE)
    output = attend(*tensors, lengths_B, scale=0.1, implementation="triton")
    for cotangents in (torch.ones(1, device=DEVICE).expand(2, *output.shape), normal(5, 2, 2, 2, 64, 10).mT):
        expected = attention_oracle(tensors, lengths_B, cotangents, scale=0.1)
        assert_close(output.detach(), expected[0])
        for got, true in zip(batched_gradients(output, tensors, cotangents), expected[1:], strict=True):
            assert_close(got, true)
    assert launches["attention_forward_kernel"] == 1


def test_attention_forms_only_the_gradients_that_are_asked(launches: Counter[str]) -> None:
    """A detached past costs no launch, and neither does a query that requires no gradient."""
    from cepo.kernels.attention.dispatch import attend

    tensors, lengths_B = attention_inputs(2, 2, 1, 20, 9, 64, torch.float32)
    wanted = {0, 4}
    mixed = [tensor if i in wanted else tensor.detach() for i, tensor in enumerate(tensors)]
    output = attend(*mixed, lengths_B, scale=0.125, implementation="triton")
    cotangents = normal(9, 1, *output.shape)
    expected = attention_oracle(tensors, lengths_B, cotangents, scale=0.125)
    got = torch.autograd.grad(output, [tensors[0], tensors[4]], cotangents[0])
    assert_close(got[0], expected[1][0])
    assert_close(got[1], expected[5][0])
    assert launches["attention_key_vjp_kernel"] == 1
    mixed = [*(tensor.detach() for tensor in tensors[:4]), tensors[4]]
    only_value = attend(*mixed, lengths_B, scale=0.125, implementation="triton")
    launches.clear()
    assert_close(torch.autograd.grad(only_value, tensors[4], cotangents[0])[0], expected[5][0])
    assert launches == {"attention_delta_kernel": 1, "attention_key_vjp_kernel": 1}


def test_attention_backward_under_func_vmap_is_one_launch_too(launches: Counter[str]) -> None:
    """torch.func.vmap, nested as well, reaches the VJP's own rule; the batch may lie on any axis."""
    from cepo.kernels.attention.dispatch import attend

    tensors, lengths_B = attention_inputs(1, 2, 1, 10, 9, 64, torch.float32)
    output = attend(*tensors, lengths_B, scale=0.125, implementation="triton")
    cotangents = normal(9, 4, *output.shape)
    expected = attention_oracle(tensors, lengths_B, cotangents, scale=0.125)

    def gradients(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, tensors, cotangent, retain_graph=True)

    for got in (
        torch.func.vmap(gradients, in_dims=2)(cotangents.movedim(0, 2)),
        [g.flatten(0, 1) for g in torch.func.vmap(torch.func.vmap(gradients))(cotangents.unflatten(0, (2, 2)))],
    ):
        for mine, true in zip(got, expected[1:], strict=True):
            assert_close(mine, true)
    assert launches["attention_query_vjp_kernel"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: (2, 1, 20, 32)}, "past keys and values"),
        ({3: (2, 1, 8, 64)}, "segment keys and values"),
        ({0: (2, 3, 9, 64), 1: (2, 2, 20, 64), 2: (2, 2, 20, 64), 3: (2, 2, 9, 64), 4: (2, 2, 9, 64)}, "multiple of J"),
        (dict.fromkeys(range(5), (2, 1, 9, 144)), "head sizes 16 to 128"),
        ({5: (3,)}, "past_lengths_B"),
    ],
)
def test_attention_refuses_what_it_would_read_wrongly(change: dict[int, tuple[int, ...]], message: str) -> None:
    from cepo.kernels.attention.dispatch import attend

    tensors, lengths_B = attention_inputs(2, 2, 1, 20, 9, 64, torch.float32)
    arguments = [*tensors, lengths_B]
    for place, shape in change.items():
        arguments[place] = torch.zeros(shape, dtype=arguments[place].dtype, device=DEVICE)
    with pytest.raises(ValueError, match=re.escape(message)):
        attend(*arguments, scale=0.125, implementation="triton")
    with pytest.raises(ValueError, match="float64"):
        attend(*(tensor.double() for tensor in tensors), lengths_B, scale=0.125, implementation="triton")


def test_the_older_vmap_is_refused_not_read_wrongly() -> None:
    """`is_grads_batched` would hand the kernels tensors without storage: an error, never numbers."""
    from cepo.kernels.attention.dispatch import attend

    tensors, lengths_B = attention_inputs(1, 1, 1, 0, 5, 64, torch.float32)
    output = attend(*tensors, lengths_B, scale=0.125, implementation="triton")
    with pytest.raises(RuntimeError):
        torch.autograd.grad(output, tensors[0], normal(9, 2, *output.shape), is_grads_batched=True)
