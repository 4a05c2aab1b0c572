"""The Triton kernels of layers and projection, interpreted, against float64; run by test_interpreter.py."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from tests.kernels.checks import DTYPES, assert_close, assert_gradients, batched_gradients, normal

LAYER_CASES = [
    (dtype, shape, count)
    for dtype in DTYPES
    for shape, count in (((1, 1, 577), 1), ((2, 63, 100), 5), ((1, 577, 64), 2), ((3, 7, 5), 2), ((20, 3, 128), 1))
]


@pytest.mark.parametrize(("dtype", "shape", "count"), LAYER_CASES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_equals_the_definition(
    dtype: torch.dtype, shape: tuple[int, ...], count: int, offset: float, launches: Counter[str]
) -> None:
    """Alone, as for heads, and after the residual was added, with cotangents of the norm, of the sum and of both."""
    from cepo.kernels.layers.door import add_rms_norm, rms_norm

    weight = normal(1, shape[-1])
    hidden = normal(0, *shape, dtype=dtype).requires_grad_()

    def alone(hidden_ND: Tensor, implementation: str) -> Tensor:
        scale = weight.to(hidden_ND.dtype)
        return rms_norm(hidden_ND, scale, epsilon=1e-5, offset=offset, implementation=implementation)

    weight = weight.to(dtype).double()
    assert_gradients(alone, [hidden], count)
    assert launches == {"norm_forward_kernel": 1, "norm_vjp_kernel": 1}
    launches.clear()
    residual = normal(2, *shape, dtype=dtype).requires_grad_()
    outputs = add_rms_norm(hidden, residual, weight.to(dtype), epsilon=1e-5, offset=offset, implementation="triton")
    # The sum is rounded to the dtype before it is normed: the oracle norms that very sum.
    assert_close(outputs[1].detach(), hidden.detach().double() + residual.detach().double(), "sum")
    leaf = outputs[1].detach().double().requires_grad_()
    normed = rms_norm(leaf, weight, epsilon=1e-5, offset=offset)
    assert_close(outputs[0].detach(), normed.detach(), "normed")
    cotangents = [normal(3 + i, count, *shape, dtype=dtype) for i in range(2)]
    for used in ([0], [1], [0, 1]):
        got = batched_gradients([outputs[i] for i in used], [hidden, residual], *(cotangents[i] for i in used))
        true = torch.zeros(count, *shape, dtype=torch.float64)
        if 0 in used:
            rows = [torch.autograd.grad(normed, leaf, row.double(), retain_graph=True)[0] for row in cotangents[0]]
            true += torch.stack(rows)
        if 1 in used:
            true += cotangents[1].double()
        for gradient in got:
            assert_close(gradient, true, f"gradient from outputs {used}")
    assert launches == {"norm_forward_kernel": 1, "norm_vjp_kernel": 2}


@pytest.mark.parametrize(("dtype", "shape", "count"), LAYER_CASES, ids=str)
def test_swiglu_equals_the_definition(
    dtype: torch.dtype, shape: tuple[int, ...], count: int, launches: Counter[str]
) -> None:
    from cepo.kernels.layers.door import swiglu

    inputs = [normal(i, *shape, dtype=dtype).requires_grad_() for i in range(2)]
    assert_gradients(swiglu, inputs, count)
    assert launches == {"swiglu_forward_kernel": 1, "swiglu_vjp_kernel": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rollouts", "heads", "tokens", "size", "count", "angles"),
    [
        (2, 3, 1, 64, 5, "rollouts"),
        (1, 1, 577, 64, 2, "tokens"),
        (2, 2, 63, 96, 2, "one"),
        (1, 8, 100, 128, 1, "rollouts"),
    ],
)
def test_rotation_equals_the_definition(
    dtype: torch.dtype,
    rollouts: int,
    heads: int,
    tokens: int,
    size: int,
    count: int,
    angles: str,
    launches: Counter[str],
) -> None:
    """With cosines and sines that differ between the halves too: the transposed map, not only the negative angle."""
    from cepo.kernels.layers.door import rotate

    shape = {"rollouts": (rollouts,), "one": (1,), "tokens": ()}[angles]
    angle = normal(1, *shape, tokens, size)

    def turned(heads_BHTE: Tensor, implementation: str) -> Tensor:
        cos, sin = (values.to(dtype).to(heads_BHTE.dtype) for values in (angle.cos(), angle.sin()))
        return rotate(heads_BHTE, cos, sin, implementation=implementation)

    token_major = normal(0, rollouts, tokens, heads, size, dtype=dtype).transpose(1, 2).requires_grad_()
    assert_gradients(turned, [token_major], count)
    assert launches == {"rotate_kernel": 2}


def test_layers_take_strides(launches: Counter[str]) -> None:
    """Halves of a wider tensor, transposed rows, expanded cotangents, every second column."""
    from cepo.kernels.layers.door import rms_norm, rotate, swiglu

    both = normal(0, 3, 5, 200)
    gate, up = (half.detach().requires_grad_() for half in both.chunk(2, dim=-1))
    assert not gate.is_contiguous()
    assert_gradients(swiglu, [gate, up], 2)
    weight = normal(1, 96)[::2]

    def norm(hidden_ND: Tensor, implementation: str) -> Tensor:
        return rms_norm(hidden_ND, weight.to(hidden_ND.dtype), epsilon=1e-6, implementation=implementation)

    for hidden in (both[..., :48], both[..., 1:97:2], both.transpose(0, 1)[..., :48]):
        assert_gradients(norm, [hidden.detach().requires_grad_()], 2)
    leaf = both[..., :48].detach().requires_grad_()
    wide = leaf.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(norm(leaf, "triton").sum(), leaf)  # its cotangent has stride 0 everywhere
    assert_close(got, torch.autograd.grad(norm(wide, "torch").sum(), wide)[0])
    heads = normal(2, 2, 3, 5, 64)[..., ::2].requires_grad_()
    angle = normal(3, 5, 64)[..., ::2]

    cos, sin = angle.cos(), angle.sin()
    got = rotate(heads, cos, sin, implementation="triton")
    assert_close(got.detach(), rotate(heads.detach().double(), cos.double(), sin.double()))
    assert launches["rotate_kernel"] == 1


def test_layers_refuse_what_they_would_read_wrongly() -> None:
    from cepo.kernels.layers.door import add_rms_norm, rms_norm, rotate, swiglu

    rows = normal(0, 4, 64)
    with pytest.raises(ValueError, match="a weight"):
        rms_norm(rows, normal(1, 63), epsilon=1e-5, implementation="triton")
    with pytest.raises(ValueError, match="a residual"):
        add_rms_norm(rows, rows[:3], normal(1, 64), epsilon=1e-5, implementation="triton")
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(rows, rows.half(), implementation="triton")
    with pytest.raises(ValueError, match="cosines and sines"):
        rotate(normal(2, 2, 1, 4, 64), normal(3, 3, 64), normal(3, 3, 64), implementation="triton")
    with pytest.raises(ValueError, match="E even"):
        rotate(normal(2, 2, 1, 4, 63), normal(3, 4, 63), normal(3, 4, 63), implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("number", "rows", "size", "rank"),
    [(1, 1, 64, 1), (3, 63, 100, 2), (1, 577, 63, 17), (2, 100, 577, 40), (2, 9, 64, 0)],
)
def test_projection_equals_the_definition(
    dtype: torch.dtype, number: int, rows: int, size: int, rank: int, launches: Counter[str]
) -> None:
    """Residual, both energies, and a residual that is orthogonal to the basis to float32's precision."""
    from cepo.kernels.projection.door import project_out_batch

    jac = normal(0, number, rows, size, dtype=dtype)
    basis = torch.linalg.qr(normal(1, number, size, rank, dtype=torch.float64)).Q.mT.float()
    got = project_out_batch(jac, basis, implementation="triton")
    true = project_out_batch(jac.double(), basis.double())
    assert_close(got.residual_NSD, true.residual_NSD, "residual")
    for mine, theirs in ((got.energy_N, true.energy_N), (got.residual_energy_N, true.residual_energy_N)):
        assert mine.dtype == torch.float64
        assert float(((mine - theirs).abs() / theirs).max()) < 1e-6
    assert rank == 0 or float((got.residual_NSD @ basis.mT).abs().max()) < 1e-6 * float(jac.abs().max()) * size**0.5
    assert launches == {"project_out_kernel": 1}


def test_projection_of_what_lies_in_the_subspace_and_strides() -> None:
    """A matrix 1e-4 off its subspace keeps two digits of the residual. Expanded basis, strided matrix."""
    from cepo.kernels.projection.door import project_out_batch

    basis = torch.linalg.qr(normal(0, 64, 4, dtype=torch.float64)).Q.mT.float()
    off = normal(1, 2, 20, 128, dtype=torch.float64)[..., ::2] * 1e-4
    inside = normal(2, 2, 20, 4, dtype=torch.float64) @ basis.double()
    jac = torch.stack([inside + off] * 2, dim=-1).float()[..., 0]
    assert jac.stride(-1) == 2
    shared = basis.expand(2, 4, 64)
    got = project_out_batch(jac, shared, implementation="triton").residual_NSD
    true = project_out_batch(jac.double(), shared.double()).residual_NSD
    assert float((got - true).abs().max()) < 1e-2 * float(true.abs().max())
    with pytest.raises(ValueError, match="bases"):
        project_out_batch(jac, shared[:1], implementation="triton")
    with pytest.raises(ValueError, match="ranks up to 64"):
        project_out_batch(jac, torch.zeros(2, 65, 64), implementation="triton")


BOUND_CASES = [
    *((dtype, 20, 100) for dtype in DTYPES),
    (torch.float32, 100, 20),
    (torch.float32, 1, 64),
    (torch.float32, 70, 90),  # several tiles of the Gram matrix, the last ones ragged
]


@pytest.mark.parametrize(("dtype", "rows", "size"), BOUND_CASES, ids=str)
def test_spectral_bounds_are_those_of_the_definition(
    dtype: torch.dtype, rows: int, size: int, launches: Counter[str]
) -> None:
    """Against float64: a flat spectrum, one direction, two nearly equal ones, tiny entries, a zero matrix."""
    from cepo.kernels.projection.door import spectral_bounds

    flat = normal(0, rows, size, dtype=torch.float64)
    left, right = normal(1, rows, 1, dtype=torch.float64), normal(2, 1, size, dtype=torch.float64)
    pair = left @ right + 0.99 * left.flip(0) @ right.roll(size // 2, 1)
    scale = 1e-3 if dtype == torch.float16 else 1e-25
    matrices = torch.stack([flat, left @ right, pair, flat * scale, 0 * flat]).to(dtype)
    lower, upper = spectral_bounds(matrices, implementation="triton")
    for place, matrix in enumerate(matrices):
        exact = torch.linalg.svdvals(matrix.double()).square()
        phi = float(exact[0] / exact.sum().clamp_min(1e-300))
        assert 0.0 <= float(lower[place]) <= float(upper[place]) <= 1.0
        assert float(upper[place] - lower[place]) <= 1e-5 * float(upper[place])
        assert float(lower[place]) * (1 - 2e-6) <= phi <= float(upper[place]) * (1 + 2e-6)
    true = spectral_bounds(matrices.double(), implementation="torch")
    for mine, theirs in zip((lower, upper), true, strict=True):
        assert float(((mine - theirs).abs() / theirs.clamp_min(1e-300)).max()) <= 1.2e-5
    alone = [spectral_bounds(matrix[None], implementation="triton") for matrix in matrices]
    assert torch.equal(torch.cat([one for one, _ in alone]), lower)  # whatever stands beside it
    assert set(launches) == {"gram_kernel"}


def test_bounds_of_residuals_and_refusals(launches: Counter[str]) -> None:
    """Projection and bounds in one call equal the plain path's; strides; a matrix that is not finite says so."""
    from cepo.kernels.projection.door import project_out_bounded, spectral_bounds

    jac = normal(0, 3, 40, 130)[..., ::2]
    basis = torch.linalg.qr(normal(1, 3, 65, 4, dtype=torch.float64)).Q.mT.float()
    got = project_out_bounded(jac, basis, implementation="triton")
    true = project_out_bounded(jac.double(), basis.double(), implementation="torch")
    assert_close(got.residual_NSD, true.residual_NSD, "residual")
    for name in ("energy_N", "residual_energy_N", "lower_N", "upper_N"):
        mine, theirs = getattr(got, name), getattr(true, name)
        assert mine.dtype == torch.float64
        assert float(((mine - theirs) / theirs).abs().max()) < 1.2e-5, name
    assert launches["project_out_kernel"] == 1
    assert launches["gram_kernel"] >= 2
    broken = jac.clone()
    broken[1, 0, 0] = float("inf")
    lower, upper = spectral_bounds(broken, implementation="triton")
    assert lower.isnan().tolist() == upper.isnan().tolist() == [False, True, False]
    for wrong in (jac[0], jac[:, :0]):
        with pytest.raises(ValueError, match=r"matrices \(N, S, D\)"):
            spectral_bounds(wrong, implementation="triton")
    with pytest.raises(ValueError, match="tolerance is 0"):
        spectral_bounds(jac, tolerance=0.0, implementation="triton")
