"""The Triton RMS norm against the float64 definition; run by test_interpreter.py and, on a GPU, by tests/gpu/."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from tests.kernels.checks import DTYPES, assert_close, assert_gradients, normal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "count", "offset"),
    [
        ((1, 1, 577), 1, 1.0),
        ((2, 20, 100), 5, 0.0),
        ((2, 20, 100), 2, 1.0),
        ((1, 70, 64), 2, 0.0),
        ((3, 7, 5), 2, 1.0),
        ((20, 3, 128), 1, 0.0),
    ],
    ids=str,
)
def test_rms_norm_equals_the_definition(
    dtype: torch.dtype, shape: tuple[int, ...], count: int, offset: float, launches: Counter[str]
) -> None:
    """Values and gradients of the rows, whole and ragged tiles, the weight as it is and as 1 + w."""
    from cepo.kernels.norm.dispatch import rms_norm

    weight = normal(1, shape[-1], dtype=dtype)

    def norm(hidden_ND: Tensor, implementation: str) -> Tensor:
        scale = weight.to(hidden_ND.dtype)
        return rms_norm(hidden_ND, scale, epsilon=1e-5, offset=offset, implementation=implementation)

    assert_gradients(norm, [normal(0, *shape, dtype=dtype).requires_grad_()], count)
    assert launches == {"norm_forward_kernel": 1, "norm_vjp_kernel": 1}


def test_rms_norm_takes_strides() -> None:
    """Parts of wider rows, every second column, transposed rows, an expanded cotangent, a strided weight."""
    from cepo.kernels.norm.dispatch import rms_norm

    both = normal(0, 3, 5, 200)
    weight = normal(1, 96)[::2]

    def norm(hidden_ND: Tensor, implementation: str) -> Tensor:
        return rms_norm(hidden_ND, weight.to(hidden_ND.dtype), epsilon=1e-6, implementation=implementation)

    for hidden in (both[..., :48], both[..., 1:97:2], both.transpose(0, 1)[..., :48]):
        assert_gradients(norm, [hidden.detach().requires_grad_()], 2)
    leaf = both[..., :48].detach().requires_grad_()
    wide = leaf.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(norm(leaf, "triton").sum(), leaf)  # its cotangent has stride 0 everywhere
    assert_close(got, torch.autograd.grad(norm(wide, "torch").sum(), wide)[0])


@pytest.mark.parametrize(("rows", "weights"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_rms_norm_reads_a_weight_of_another_dtype(rows: torch.dtype, weights: torch.dtype) -> None:
    """As in models whose norms stay in float32: the weight is not rounded to the rows' dtype."""
    from cepo.kernels.norm.dispatch import rms_norm

    weight = normal(1, 64, dtype=weights)

    def norm(hidden_ND: Tensor, implementation: str) -> Tensor:
        scale = weight.double() if hidden_ND.dtype == torch.float64 else weight
        return rms_norm(hidden_ND, scale, epsilon=1e-5, implementation=implementation)

    assert_gradients(norm, [normal(0, 6, 64, dtype=rows).requires_grad_()], 2)


def test_rms_norm_refuses_what_it_would_read_wrongly() -> None:
    from cepo.kernels.norm.dispatch import rms_norm

    with pytest.raises(ValueError, match="a weight"):
        rms_norm(normal(0, 4, 64), normal(1, 63), epsilon=1e-5, implementation="triton")
