"""Spectral share and projection, against their definitions in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cepo.kernels.spectral import frobenius_energy, project_out, spectral_shares, top_right_vectors

ROUNDING = 1e-12


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return a float64 matrix of standard normals."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(values: list[float], rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return a matrix that has these singular values and random directions."""
    left, right = (torch.linalg.qr(random_matrix(n, len(values), seed + n)).Q for n in (rows, columns))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def share_by_svd(jac_SD: Tensor) -> float:
    """Return sigma_1^2 over the sum of all sigma^2."""
    sigma_N = torch.linalg.svdvals(jac_SD.double() / jac_SD.double().abs().max())
    return float(sigma_N[0] ** 2 / (sigma_N**2).sum())


MATRICES = {
    "random": random_matrix(7, 11),
    "tall": random_matrix(300, 5),
    "wide": random_matrix(5, 300),
    "one row": random_matrix(1, 16),
    "one column": random_matrix(16, 1),
    "one number": torch.tensor([[-3.0]], dtype=torch.float64),
    "rank 1": random_matrix(6, 1) @ random_matrix(1, 9),
    "rank 2 of 20": random_matrix(20, 2) @ random_matrix(2, 30),
    "identity": torch.eye(12, dtype=torch.float64),
    "two equal": with_singular_values([2.0, 2.0, 1.0], 5, 6),
    "1% apart": with_singular_values([1.0, 0.99, 0.5, 0.1], 8, 9),
    "1e-6 apart": with_singular_values([1.0, 1.0 - 1e-6, 0.9, 0.1], 8, 9),
    "1e-13 apart": with_singular_values([1.0, 1.0 - 1e-13, 0.3], 8, 9),
    "one of many": with_singular_values([1.0, *[0.999] * 30], 40, 35),
    "tiny": 1e-150 * random_matrix(4, 6),
    "huge": 1e150 * random_matrix(4, 6),
    "at the end of the range": 1e300 * random_matrix(4, 6),
    "subnormal": torch.tensor([[5e-324, 0.0], [0.0, 5e-324]], dtype=torch.float64),
    "one entry": 7.0 * torch.eye(3, 4, dtype=torch.float64) * torch.tensor([0.0, 1.0, 0.0, 0.0]),
    "float32": random_matrix(6, 8).float(),
    "bfloat16": random_matrix(6, 8).bfloat16(),
}  # fmt: skip


@pytest.mark.parametrize("name", MATRICES)
def test_share_equals_svd(name: str) -> None:
    """phi is sigma_1^2 / ||J||_F^2, inside a certified interval that is as narrow as was asked for."""
    jac_SD = MATRICES[name]
    exact = share_by_svd(jac_SD)
    found = spectral_shares([jac_SD])[0]
    assert found.value == pytest.approx(exact, rel=1e-9)
    assert found.lower - ROUNDING <= exact <= found.upper + ROUNDING
    assert found.lower <= found.value <= found.upper <= 1.0
    assert found.upper - found.lower <= 1e-9 * found.upper
    assert 0 <= found.squarings <= 40


@pytest.mark.parametrize("name", ["random", "1% apart", "1e-6 apart", "identity", "wide", "one of many"])
def test_bounds_hold_at_every_stop(name: str) -> None:
    """Stopped after any number of squarings, the interval still holds the truth, and each squaring narrows it."""
    jac_SD = MATRICES[name]
    exact, widths = share_by_svd(jac_SD), []
    for limit in range(12):
        found = spectral_shares([jac_SD], max_squarings=limit, tolerance=1e-15)[0]
        assert found.squarings <= limit
        assert found.lower - ROUNDING <= exact <= found.upper + ROUNDING
        widths.append(found.upper - found.lower)
    assert widths[0] > 0.05
    assert all(after <= before + ROUNDING for before, after in pairwise(widths))
    assert widths[-1] < 0.01
    loose = spectral_shares([jac_SD], tolerance=0.1)[0]
    assert loose.upper - loose.lower <= 0.1 * loose.upper
    assert loose.squarings < spectral_shares([jac_SD])[0].squarings


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    decay=st.floats(0.0, 3.0),
    exponent=st.integers(-150, 150),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_share_equals_svd_on_any_shape(rows: int, columns: int, seed: int, decay: float, exponent: int) -> None:
    """Shape, spectrum and scale are free."""
    scales_D = torch.arange(1, columns + 1, dtype=torch.float64) ** -decay
    jac_SD = random_matrix(rows, columns, seed) * scales_D * 10.0**exponent
    exact, found = share_by_svd(jac_SD), spectral_shares([jac_SD])[0]
    assert found.value == pytest.approx(exact, rel=1e-9)
    assert found.lower - ROUNDING <= exact <= found.upper + ROUNDING


@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 4), (3, 0)])
def test_zero_matrix_has_no_share(shape: tuple[int, int]) -> None:
    """phi of a zero or empty matrix is 0 by definition."""
    found = spectral_shares([torch.zeros(*shape)])[0]
    assert (found.value, found.lower, found.upper) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_is_refused(bad: float) -> None:
    """A NaN never becomes a score."""
    jac_SD = random_matrix(3, 4)
    jac_SD[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        spectral_shares([jac_SD])[0]


def test_share_ignores_scale_rotation_and_transpose() -> None:
    """phi is a shape: it does not change with size, with a rotation of either side, nor with the sides swapped."""
    jac_SD = random_matrix(6, 9)
    rotation_DD = torch.linalg.qr(random_matrix(9, 9, 4)).Q
    value = spectral_shares([jac_SD])[0].value
    for other in (-17.0 * jac_SD, jac_SD.T, jac_SD @ rotation_DD, jac_SD.flip(0)):
        assert spectral_shares([other])[0].value == pytest.approx(value, rel=2e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_project_out(dtype: torch.dtype, tolerance: float, rank: int) -> None:
    """The residual is orthogonal to the basis to working precision, even where nearly all of J lies in its span."""
    basis_RD = torch.linalg.qr(random_matrix(10, 10, 3)).Q[:rank]
    for inside in (0.0, 1e4):
        jac_SD = (random_matrix(5, 10) + inside * random_matrix(5, rank, 7) @ basis_RD).to(dtype)
        residual_SD = project_out(jac_SD, basis_RD)
        assert residual_SD.dtype == dtype
        assert float((residual_SD.double() @ basis_RD.T).abs().sum()) < tolerance * 100 ** (dtype == torch.float64)
        expected_SD = jac_SD.double() - jac_SD.double() @ basis_RD.T @ basis_RD
        assert torch.allclose(residual_SD.double(), expected_SD, rtol=0, atol=tolerance * (1 + inside) * 10)
    if rank == 0:
        assert torch.equal(residual_SD, jac_SD)


def test_energy_is_summed_in_float64() -> None:
    """A million equal float32 squares add up exactly."""
    assert frobenius_energy(torch.full((1000, 1001), 0.1)) == pytest.approx(
        1001000 * float(np.float32(0.1)) ** 2, rel=1e-12
    )
    assert frobenius_energy(torch.full((2, 2), 1e30)) == pytest.approx(4e60, rel=1e-6)  # overflows in float32


def projector(basis_RD: Tensor) -> Tensor:
    """Return the projection onto the span of orthonormal rows."""
    return basis_RD.T @ basis_RD


def test_a_batch_equals_its_members() -> None:
    """Matrices of several sizes and orientations in one call give what each gives alone; zeros stay zeros."""
    shapes = [(5, 9), (9, 5), (5, 5), (1, 9), (5, 9), (12, 12), (5, 9), (50, 60), (41, 60), (30, 60), (200, 60)]
    jacs_SD = [random_matrix(*shape, seed) for seed, shape in enumerate(shapes)]
    jacs_SD[4] = torch.zeros(5, 9, dtype=torch.float64)
    jacs_SD += [random_matrix(48, 60, 90).float(), random_matrix(44, 60, 91).float()]
    for jac_SD, share in zip(jacs_SD, spectral_shares(jacs_SD), strict=True):
        alone = spectral_shares([jac_SD])[0]
        assert (share.value, share.lower, share.upper) == pytest.approx((alone.value, alone.lower, alone.upper), 1e-12)
        assert share.squarings == alone.squarings
    assert spectral_shares([]) == []
    for rank in (0, 1, 3):
        for jac_SD, basis_RD in zip(jacs_SD, top_right_vectors(jacs_SD, rank), strict=True):
            (alone_RD,) = top_right_vectors([jac_SD], rank)
            tolerance = 1e-10 if jac_SD.dtype == torch.float64 else 1e-7
            assert torch.allclose(projector(basis_RD), projector(alone_RD), rtol=0.0, atol=tolerance)
            assert len(basis_RD) == min(rank, int(torch.linalg.matrix_rank(jac_SD)))


def test_shares_of_one_batch_equal_scipy() -> None:
    """Certified intervals hold where wide, tall, degenerate, rank-1 and zero matrices are squared together."""
    shapes = [(40, 64), (64, 40), (150, 64), (33, 64), (4, 64)]
    jacs_SD = [random_matrix(*shape, seed) for seed, shape in enumerate(shapes)]
    jacs_SD += [random_matrix(38, 1, 5) @ random_matrix(1, 64, 6), torch.zeros(40, 64, dtype=torch.float64)]
    jacs_SD += [with_singular_values([1.0, second, 0.4, 0.1], 39, 64) for second in (1.0, 1.0 - 1e-9, 1.0 - 1e-4)]
    for jac_SD, found in zip(jacs_SD, spectral_shares(jacs_SD), strict=True):
        sigma_N = scipy.linalg.svdvals(jac_SD.numpy())
        exact = float(sigma_N[0] ** 2 / (sigma_N**2).sum()) if sigma_N[0] > 0.0 else 0.0
        assert found.lower - ROUNDING <= exact <= found.upper + ROUNDING
        assert found.lower <= found.value <= found.upper <= found.lower * (1.0 + 2e-9)


TOP_TWO = {
    "gap": [1.0, 0.6, 0.3],
    "two equal": [1.0, 1.0, 0.5],
    "1e-6 apart": [1.0, 1.0 - 1e-6, 0.5],
    "second near the third": [1.0, 0.6, 0.599],
    "falls fast": [1.0, 0.01, 0.003],
    "falls by six orders": [1.0, 1e-6, 1e-7],
    "rank 1": [1.0],
    "rank 2": [1.0, 0.3],
}  # fmt: skip


@pytest.mark.parametrize("shape", [(90, 96), (96, 48), (40, 300), (300, 40), (6, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_vectors_of_one_batch_equal_scipy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Easy and hard spectra in one batch: each basis is as near to SciPy's as its gap and its precision allow."""
    tail = [0.5**n for n in range(1, min(shape) + 1)]
    spectra = [[*top, *(top[2] * each for each in tail)][: min(shape)] if top[2:] else top for top in TOP_TWO.values()]
    stacks_ND = [with_singular_values(spectrum, *shape, seed).to(dtype) for seed, spectrum in enumerate(spectra)]
    stacks_ND.append(torch.zeros(shape, dtype=dtype))
    found = top_right_vectors(stacks_ND, 2)
    assert found[-1].shape == (0, shape[1])
    for name, stack_ND, basis_RD in zip(TOP_TWO, stacks_ND[:-1], found[:-1], strict=True):
        assert basis_RD.dtype == torch.float64
        assert torch.allclose(basis_RD @ basis_RD.T, torch.eye(len(basis_RD), dtype=torch.float64), atol=1e-12)
        _, sigma_N, right_ND = scipy.linalg.svd(stack_ND.double().numpy())
        if name == "rank 1":
            # What else rounding left in the matrix is below that of its Gram matrix.
            assert len(basis_RD) == 1
            assert abs(float(basis_RD[0] @ torch.from_numpy(right_ND[0]))) == pytest.approx(1.0, abs=1e-12)
            continue
        # ||A^T A v - s^2 v|| <= tolerance s_1 s turns the span by at most that over the gap of the squares.
        tolerance = 1e-10 if dtype == torch.float64 else 1e-6
        gap = (sigma_N[1] ** 2 - sigma_N[2] ** 2) / (sigma_N[0] * sigma_N[1])
        exact_DD = torch.from_numpy(right_ND[:2].T @ right_ND[:2])
        assert float((projector(basis_RD) - exact_DD).norm()) < 3.0 * tolerance / gap + 1e-10 / sigma_N[1]


@pytest.mark.parametrize("spectrum", ["flat", "steep", "gap", "pairs"])
def test_top_vectors_of_hard_spectra(spectrum: str) -> None:
    """Where the block iteration does not converge, the full decomposition answers; the residual tells."""
    generator = torch.Generator().manual_seed(0)
    size = 40
    sigma_N = {
        "flat": torch.linspace(1.0, 0.97, size),
        "steep": torch.logspace(0, -7, size),
        "gap": torch.cat([torch.tensor([1.0, 1e-5]), torch.full((size - 2,), 1e-7)]),
        "pairs": torch.linspace(1.0, 0.1, size // 2).repeat_interleave(2),
    }[spectrum].double()
    left_NN = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    right_ND = torch.linalg.qr(torch.randn(60, size, generator=generator, dtype=torch.float64)).Q.T
    matrix_ND = left_NN @ (sigma_N[:, None] * right_ND)
    (basis_RD,) = top_right_vectors([matrix_ND], 2)
    assert basis_RD.shape == (2, 60)
    assert torch.allclose(basis_RD @ basis_RD.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
    held = float((matrix_ND @ basis_RD.T).square().sum() / matrix_ND.square().sum())
    assert held == pytest.approx(float(sigma_N[:2].square().sum() / sigma_N.square().sum()), rel=1e-10)
    wanted_DD = right_ND[:2].T @ right_ND[:2]
    assert torch.allclose(basis_RD.T @ basis_RD, wanted_DD, atol=1e-6)
