"""What is left of a Jacobian after a subspace is removed, and how much of it the top direction holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpectralShare:
    """phi = sigma_1^2 / ||J||_F^2 with the certified interval it was read from; all zero for a zero matrix."""

    value: float
    lower: float
    upper: float
    squarings: int


def project_out(jac_SD: Tensor, basis_RD: Tensor) -> Tensor:
    """Return J - (J V) V^T: the rows of J with their component in the span of the basis removed.

    The second pass removes what rounding of the first left behind, so the residual is orthogonal to working precision.

    Args:
        jac_SD: (S, D), float32 or float64.
        basis_RD: (R, D) with orthonormal rows, R >= 0.

    Returns:
        Tensor (S, D) of J's dtype.
    """
    basis_RD = basis_RD.to(jac_SD.dtype)
    once_SD = jac_SD - (jac_SD @ basis_RD.T) @ basis_RD
    return once_SD - (once_SD @ basis_RD.T) @ basis_RD


def frobenius_energy(jac_SD: Tensor) -> float:
    """Return ||J||_F^2, summed in float64 (a float32 sum of a million squares drifts in the fourth digit)."""
    return float(jac_SD.double().square().sum())


def spectral_share(jac_SD: Tensor, *, tolerance: float = 1e-9, max_squarings: int = 64) -> SpectralShare:
    """Return phi(J) = sigma_1^2 / ||J||_F^2 by repeated squaring of the Gram matrix.

    With M = J J^T / tr(J J^T) (the smaller side), eigenvalues l_i that sum to 1 and p = 2^k,
    (||M^p||_F^2 / tr M^p)^(1/p) <= l_1 <= ||M^p||_F^(1/p): the lower side is a weighted mean of l_i^p, the upper one
    the 2p-norm. Neither needs a gap between l_1 and l_2. M is squared, rescaled to trace 1 with the scale kept as a
    logarithm, until the interval is narrower than `tolerance` relative to phi; the geometric mean is returned.

    Args:
        jac_SD: (S, D), finite, any float dtype; computed in float64.
        tolerance: relative width at which to stop, > 0.
        max_squarings: hard stop; the interval reached is returned and stays valid up to rounding.

    Returns:
        SpectralShare with value in (0, 1], or all zeros for a zero or empty matrix.

    Raises:
        ValueError: if the matrix holds a NaN or an infinity.
    """
    jac_SD = jac_SD.detach().double()
    if not bool(torch.isfinite(jac_SD).all()):
        raise ValueError("jac_SD holds a NaN or an infinity; expected a finite Jacobian")
    largest = float(jac_SD.abs().max()) if jac_SD.numel() else 0.0
    if largest == 0.0:
        return SpectralShare(0.0, 0.0, 0.0, 0)
    jac_SD = jac_SD / largest  # so that squares neither overflow nor vanish
    gram_NN = jac_SD @ jac_SD.T if jac_SD.shape[0] <= jac_SD.shape[1] else jac_SD.T @ jac_SD
    power_NN = gram_NN / gram_NN.trace()
    log_scale = 0.0  # M^p = exp(log_scale) * power_NN, with tr power_NN = 1
    for squarings in range(max_squarings + 1):
        p = 2.0**squarings
        log_norm = math.log(float(power_NN.norm()))
        upper = min(1.0, math.exp((log_scale + log_norm) / p))
        lower = min(upper, math.exp((log_scale + 2.0 * log_norm) / p))
        if upper - lower <= tolerance * upper:
            break
        power_NN = power_NN @ power_NN
        trace = float(power_NN.trace())
        power_NN = power_NN / trace
        log_scale = 2.0 * log_scale + math.log(trace)
    return SpectralShare(math.sqrt(lower * upper), lower, upper, squarings)
