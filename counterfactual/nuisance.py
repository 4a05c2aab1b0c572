"""The nuisance subspace: directions in which the score moves even when the source's tokens are scrambled."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from cepo.kernels.spectral import project_out


def nuisance_basis(jacs_SD: Sequence[Tensor], *, rank: int | None = None, energy: float | None = None) -> Tensor:
    """Return the top right singular vectors of the stacked counterfactual Jacobians.

    With the K matrices stacked to (K S, D): V holds the first `rank` right singular vectors, or the fewest that hold
    the fraction `energy` of the squared Frobenius norm. Found by the eigenvectors of the smaller Gram matrix in
    float64, and orthonormalised; directions below its rounding are never included, so fewer can come back than asked.

    Args:
        jacs_SD: K matrices (S, D); K may be 0.
        rank: r >= 0.
        energy: tau in (0, 1]. Exactly one of rank and energy.

    Returns:
        Tensor (R, D) with orthonormal rows, float64, on the matrices' device; R = 0 where there is nothing to remove.

    Raises:
        ValueError: for both or neither of rank and energy, or one out of range.
    """
    check_rank(rank, energy)
    if not jacs_SD:
        return torch.zeros(0, 0, dtype=torch.float64)
    stack_ND = torch.cat([jac_SD.double() for jac_SD in jacs_SD])
    wide = stack_ND.shape[0] < stack_ND.shape[1]
    gram_NN = stack_ND @ stack_ND.T if wide else stack_ND.T @ stack_ND
    energies_N, vectors_NN = torch.linalg.eigh(gram_NN)
    energies_N, vectors_NN = energies_N.flip(0).clamp_min(0.0), vectors_NN.flip(1)
    rounding = max(stack_ND.shape) * torch.finfo(torch.float64).eps * float(energies_N[0])
    available = int((energies_N > rounding).sum())
    if energy is not None:
        held_N = energies_N.cumsum(0) / energies_N.sum().clamp_min(torch.finfo(torch.float64).tiny)
        rank = int((held_N < energy - 1e-12).sum()) + 1
    count = min(rank or 0, available)
    basis_RD = vectors_NN[:, :count].T @ stack_ND if wide else vectors_NN[:, :count].T
    return torch.linalg.qr(basis_RD.T).Q.T if count else stack_ND.new_zeros(0, stack_ND.shape[1])


def remove_nuisance(jac_SD: Tensor, basis_RD: Tensor) -> Tensor:
    """Return the residual J - (J V) V^T, in J's dtype; J itself for an empty basis."""
    return project_out(jac_SD, basis_RD) if len(basis_RD) else jac_SD


def remove_mean(jac_SD: Tensor, jacs_SD: Sequence[Tensor]) -> Tensor:
    """Return J less its Frobenius projection on the mean counterfactual Jacobian.

    What the reference implementation of CE-PO does instead of the subspace; offered to compare with.

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
    return (jac_SD.double() - coefficient * mean_SD).to(jac_SD.dtype)


def principal_angles(basis_RD: Tensor, jac_SD: Tensor) -> list[float]:
    """Return the principal angles between the nuisance subspace and the Jacobian's own top subspace of equal rank.

    All near 0 means that hardening removes the signal itself; near 90 that the two have nothing in common.

    Args:
        basis_RD: orthonormal rows.
        jac_SD: the base Jacobian.

    Returns:
        Angles in degrees, ascending, min(R, rank of J) of them.
    """
    own_RD = nuisance_basis([jac_SD], rank=len(basis_RD))
    if not len(own_RD):
        return []
    angles = np.rad2deg(subspace_angles(basis_RD.cpu().double().numpy().T, own_RD.cpu().numpy().T))
    return sorted(float(angle) for angle in angles)


def check_rank(rank: int | None, energy: float | None) -> None:
    """Raise ValueError unless exactly one of rank (an integer >= 0) and energy (in (0, 1]) is given."""
    if (rank is None) == (energy is None):
        raise ValueError(f"rank is {rank} and energy is {energy}; expected exactly one of them")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
        raise ValueError(f"rank is {rank!r}; expected an integer >= 0")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"energy is {energy}; expected a fraction in (0, 1]")
