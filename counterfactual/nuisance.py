"""The nuisance subspace: directions to which the score is sensitive even if the source's tokens are permuted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from cepo.counterfactual.rank import check_rank
from cepo.kernels.spectral import project_out, top_right_vectors


def nuisance_bases(
    stacks: Sequence[Sequence[Tensor]], *, rank: int | None = None, energy: float | None = None
) -> list[Tensor]:
    """Return the top right singular vectors of each stack of counterfactual Jacobians.

    With the K matrices stacked to (K S, D), these are the first `rank` right singular vectors, or the fewest that hold
    the fraction `energy` of the squared Frobenius norm; see `top_right_vectors`. Directions below the rounding error
    are never included, so there can be fewer than asked for.

    Args:
        stacks: for each stack, K matrices (S, D); K may be 0.
        rank: r >= 0.
        energy: tau in (0, 1]. Give exactly one of rank and energy.

    Returns:
        One tensor (R, D) per stack, with orthonormal rows, float64, on the matrices' device; (0, 0) for an empty stack.

    Raises:
        ValueError: for both or neither of rank and energy, or one out of range.
    """
    check_rank(rank, energy)
    found = [torch.zeros(0, 0, dtype=torch.float64) for _ in stacks]
    stacked = {index: torch.cat(list(jacs_SD)) for index, jacs_SD in enumerate(stacks) if jacs_SD}
    if rank is not None:
        for index, basis_RD in zip(stacked, top_right_vectors(list(stacked.values()), rank), strict=True):
            found[index] = basis_RD
        return found
    for index, stack_ND in stacked.items():
        stack_ND = stack_ND.double()
        largest = stack_ND.abs().max()
        stack_ND = stack_ND / torch.where(largest > 0.0, largest, 1.0)  # squares neither overflow nor vanish
        wide = stack_ND.shape[0] < stack_ND.shape[1]
        energies_N = torch.linalg.eigvalsh(stack_ND @ stack_ND.T if wide else stack_ND.T @ stack_ND).flip(0)
        energies_N = energies_N.clamp_min(0.0)
        held_N = energies_N.cumsum(0) / energies_N.sum().clamp_min(torch.finfo(torch.float64).tiny)
        fewest = int((held_N < float(energy or 0.0) - 1e-12).sum()) + 1
        found[index] = top_right_vectors([stack_ND], min(fewest, len(energies_N)))[0]
    return found


def remove_nuisance(jac_SD: Tensor, basis_RD: Tensor) -> Tensor:
    """Return the residual J - (J V) V^T, in J's dtype; J itself for an empty basis, zeros if only rounding is left.

    Args:
        jac_SD: (S, D).
        basis_RD: (R, D) with orthonormal rows.
    """
    return _beyond_rounding(jac_SD, project_out(jac_SD, basis_RD)) if len(basis_RD) else jac_SD


def remove_mean(jac_SD: Tensor, jacs_SD: Sequence[Tensor]) -> Tensor:
    """Return J minus its Frobenius projection on the mean counterfactual Jacobian.

    The reference implementation of CE-PO does this instead of removing a subspace; offered for comparison.

    Args:
        jac_SD: (S, D).
        jacs_SD: K matrices (S, D); K may be 0.
    """
    if not jacs_SD:
        return jac_SD
    mean_SD = torch.stack([other_SD.double() for other_SD in jacs_SD]).mean(0)
    energy = float(mean_SD.square().sum())
    if energy == 0.0:
        return jac_SD
    coefficient = float((jac_SD.double() * mean_SD).sum()) / energy
    return _beyond_rounding(jac_SD, (jac_SD.double() - coefficient * mean_SD).to(jac_SD.dtype))


def angles_between(one_RD: Tensor, other_RD: Tensor) -> list[float]:
    """Return the principal angles between two subspaces with orthonormal rows, in degrees, ascending."""
    if not len(one_RD) or not len(other_RD):
        return []
    angles = np.rad2deg(subspace_angles(one_RD.cpu().double().numpy().T, other_RD.cpu().numpy().T))
    return sorted(float(angle) for angle in angles)


def _beyond_rounding(jac_SD: Tensor, residual_SD: Tensor) -> Tensor:
    """Return the residual, or zeros if it is within J's rounding: phi ignores size and would measure noise."""
    largest, left = (float(each_SD.abs().max()) if each_SD.numel() else 0.0 for each_SD in (jac_SD, residual_SD))
    known = 1e-12 if jac_SD.dtype == torch.float64 else 1e-6
    return residual_SD if left > known * largest else torch.zeros_like(residual_SD)
