"""A batch of Jacobians with a subspace removed from each, the energies before and after, and bounds of phi."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cepo.kernels.launch import Implementation, unit_last, use_triton
from cepo.kernels.spectral import spectral_shares

MAX_RANK = 64
MAX_SIDE = 8192


@dataclass(frozen=True)
class Projected:
    """What is left of N matrices: residual (N, S, D), ||J||_F^2 and ||residual||_F^2 of each, (N,) float64."""

    residual_NSD: Tensor
    energy_N: Tensor
    residual_energy_N: Tensor


@dataclass(frozen=True)
class Bounded(Projected):
    """The same with bounds of phi = sigma_1^2 / ||.||_F^2 of each residual, (N,) float64."""

    lower_N: Tensor
    upper_N: Tensor


def project_out_batch(jac_NSD: Tensor, basis_NRD: Tensor, *, implementation: Implementation = "auto") -> Projected:
    """Return J - (J V) V^T of each matrix with its energies; `spectral.project_out` for N matrices at once.

    As there, a second pass removes what rounding of the first left behind. Energies are float32 sums over a tile of a
    few rows, added in float64. Nothing is differentiated: J is a gradient already.

    Args:
        jac_NSD: N matrices, float32 (half precisions are widened as they are read), or float64 without Triton. Padded
            rows of zeros stay zeros and add nothing.
        basis_NRD: the bases, orthonormal rows (or zero rows, to pad ranks), R up to 64 for Triton, R >= 0. Expanded
            over N where all matrices share one.
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.

    Returns:
        Projected, the residual in float32 or wider.

    Raises:
        ValueError: if shapes don't fit together, or Triton is asked for and can't serve them.
        RuntimeError: if Triton is needed and is missing, or the device is too old.
    """
    on_triton = use_triton(implementation, jac_NSD, basis_NRD)
    jac_NSD, basis_NRD = jac_NSD.detach(), basis_NRD.detach()
    if jac_NSD.ndim != 3 or basis_NRD.ndim != 3 or jac_NSD.shape[::2] != basis_NRD.shape[::2]:
        seen = (tuple(jac_NSD.shape), tuple(basis_NRD.shape))
        raise ValueError(f"expected matrices (N, S, D) and bases (N, R, D), got {seen}")
    if on_triton:
        from cepo.kernels.projection.triton import project_out_energies

        if basis_NRD.shape[1] > MAX_RANK:
            raise ValueError(f"Triton takes ranks up to {MAX_RANK}, got {basis_NRD.shape[1]}; use 'torch'")
        with torch.cuda.device_of(jac_NSD):
            residual_NSD, energies_N2 = project_out_energies(unit_last(jac_NSD), unit_last(basis_NRD.float()))
        return Projected(residual_NSD, energies_N2[:, 0], energies_N2[:, 1])
    wide = torch.promote_types(jac_NSD.dtype, torch.float32)
    jac_NSD, basis_NRD = jac_NSD.to(wide), basis_NRD.to(wide)
    once_NSD = jac_NSD - (jac_NSD @ basis_NRD.mT) @ basis_NRD
    residual_NSD = once_NSD - (once_NSD @ basis_NRD.mT) @ basis_NRD
    energies = [matrix.double().square().sum((1, 2)) for matrix in (jac_NSD, residual_NSD)]
    return Projected(residual_NSD, *energies)


def project_out_bounded(
    jac_NSD: Tensor,
    basis_NRD: Tensor,
    *,
    tolerance: float = 1e-5,
    max_squarings: int = 32,
    implementation: Implementation = "auto",
) -> Bounded:
    """Return `project_out_batch` with `spectral_bounds` of the residuals: all that a link's score needs, in one call.

    Args:
        jac_NSD: as in `project_out_batch`.
        basis_NRD: as there.
        tolerance: as in `spectral_bounds`.
        max_squarings: as there.
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.

    Raises:
        ValueError: as there.
        RuntimeError: as there.
    """
    left = project_out_batch(jac_NSD, basis_NRD, implementation=implementation)
    settings = {"tolerance": tolerance, "max_squarings": max_squarings}
    bounds = spectral_bounds(left.residual_NSD, **settings, implementation=implementation)  # type: ignore[arg-type]
    return Bounded(left.residual_NSD, left.energy_N, left.residual_energy_N, *bounds)


def spectral_bounds(
    matrix_NSD: Tensor,
    *,
    tolerance: float = 1e-5,
    max_squarings: int = 32,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Return a lower and an upper bound of phi = sigma_1^2 / ||.||_F^2 of each matrix, at most `tolerance` apart.

    The definition is `spectral.spectral_shares`, which squares Gram matrices in float64. In Triton products are exact
    in float32, and sums are float32 over a tile and float64 over tiles: a bound errs by the rounding of the first Gram
    matrix, seen below 2e-6 of phi, since the p-th root shrinks what the squarings add.

    Args:
        matrix_NSD: N matrices, finite, float32 (half precisions are widened), or float64 without Triton. Padded rows of
            zeros change nothing.
        tolerance: relative width of the interval at which to stop, > 0.
        max_squarings: hard stop, >= 0; the interval reached is returned.
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.

    Returns:
        (lower, upper), (N,) float64 each, in (0, 1]; zeros for a zero matrix. A matrix with a NaN or an infinity has
        NaN from Triton.

    Raises:
        ValueError: for other shapes or settings, or a NaN or an infinity without Triton, or if Triton is asked for and
            can't serve them (the smaller side up to 8,192).
        RuntimeError: if Triton is needed and is missing, or the device is too old.
    """
    on_triton = use_triton(implementation, matrix_NSD)
    if matrix_NSD.ndim != 3 or 0 in matrix_NSD.shape:
        raise ValueError(f"expected matrices (N, S, D), none of the three 0, got {tuple(matrix_NSD.shape)}")
    if not tolerance > 0 or max_squarings < 0:
        raise ValueError(f"tolerance is {tolerance} and max_squarings {max_squarings}; expected > 0 and >= 0")
    if on_triton:
        from cepo.kernels.projection.gram import share_bounds

        if min(matrix_NSD.shape[1:]) > MAX_SIDE:
            seen = tuple(matrix_NSD.shape)
            raise ValueError(f"Triton takes matrices whose smaller side is up to {MAX_SIDE}, got {seen}; use 'torch'")
        with torch.cuda.device_of(matrix_NSD):
            return share_bounds(unit_last(matrix_NSD.detach().float()), tolerance, max_squarings)
    shares = spectral_shares(list(matrix_NSD), tolerance=tolerance, max_squarings=max_squarings)
    bounds_N2 = [[share.lower, share.upper] for share in shares]
    lower_N, upper_N = torch.tensor(bounds_N2, dtype=torch.float64, device=matrix_NSD.device).unbind(1)
    return lower_N, upper_N
