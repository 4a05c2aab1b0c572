"""A batch of Jacobians with a subspace removed from each, and the energies before and after, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cepo.kernels.launch import Implementation, unit_last, use_triton

MAX_RANK = 64


@dataclass(frozen=True)
class Projected:
    """What is left of N matrices: residual (N, S, D), ||J||_F^2 and ||residual||_F^2 of each, (N,) float64."""

    residual_NSD: Tensor
    energy_N: Tensor
    residual_energy_N: Tensor


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
        from cepo.kernels.triton_projection import project_out_energies

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
