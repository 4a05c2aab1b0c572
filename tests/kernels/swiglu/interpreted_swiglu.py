"""The Triton gated activation against float64; run by test_interpreter.py and, on a GPU, by tests/gpu/."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.kernels.checks import DTYPES, assert_gradients, normal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "count"), [((1, 1, 577), 1), ((2, 20, 100), 5), ((1, 40, 64), 2), ((3, 7, 5), 2)], ids=str
)
def test_swiglu_equals_the_definition(
    dtype: torch.dtype, shape: tuple[int, ...], count: int, launches: Counter[str]
) -> None:
    """Values and both gradients, of one block and of several, the last one ragged."""
    from cepo.kernels.swiglu.dispatch import swiglu

    inputs = [normal(i, *shape, dtype=dtype).requires_grad_() for i in range(2)]
    assert_gradients(swiglu, inputs, count)
    assert launches == {"swiglu_forward_kernel": 1, "swiglu_vjp_kernel": 1}


def test_swiglu_takes_halves_of_a_wider_tensor() -> None:
    from cepo.kernels.swiglu.dispatch import swiglu

    gate, up = (half.detach().requires_grad_() for half in normal(0, 3, 5, 200).chunk(2, dim=-1))
    assert not gate.is_contiguous()
    assert_gradients(swiglu, [gate, up], 2)


def test_swiglu_refuses_what_it_would_read_wrongly() -> None:
    from cepo.kernels.swiglu.dispatch import swiglu

    rows = normal(0, 4, 64)
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(rows, rows.half(), implementation="triton")
