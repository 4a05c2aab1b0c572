"""What is left of a Jacobian after a subspace is removed, and how much of it the top direction holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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


def spectral_shares(
    jacs_SD: Sequence[Tensor], *, tolerance: float = 1e-9, max_squarings: int = 64
) -> list[SpectralShare]:
    """Return phi(J) = sigma_1^2 / ||J||_F^2 of each matrix by repeated squaring of its Gram matrix, all in one batch.

    With M = J J^T / tr(J J^T) (the smaller side), eigenvalues l_i that sum to 1 and p = 2^k,
    (||M^p||_F^2 / tr M^p)^(1/p) <= l_1 <= ||M^p||_F^(1/p): the lower side is a weighted mean of l_i^p, the upper one
    the 2p-norm. Neither needs a gap between l_1 and l_2. M is squared, rescaled to trace 1 with the scale kept as a
    logarithm, until the interval is narrower than `tolerance` relative to phi; the geometric mean is returned. A matrix
    is done when its own interval is narrow, so that its result does not depend on the others.

    Args:
        jacs_SD: matrices (S, D), finite, any float dtype, S may differ; computed in float64.
        tolerance: relative width at which to stop, > 0.
        max_squarings: hard stop; the interval reached is returned and stays valid up to rounding.

    Returns:
        For each a SpectralShare with value in (0, 1], or all zeros for a zero or empty matrix.

    Raises:
        ValueError: if a matrix holds a NaN or an infinity.
    """
    found = [SpectralShare(0.0, 0.0, 0.0, 0)] * len(jacs_SD)
    for indices, gram_BNN in _grams(jacs_SD):
        power_BNN = gram_BNN / _trace(gram_BNN)[:, None, None]
        log_scale_B = power_BNN.new_zeros(len(indices))  # M^p = exp(log_scale) * power, with tr power = 1
        waiting = list(range(len(indices)))
        for squarings in range(max_squarings + 1):
            p = 2.0**squarings
            log_norm_B = torch.linalg.matrix_norm(power_BNN).log()
            upper_B = ((log_scale_B + log_norm_B) / p).exp().clamp_max(1.0)
            lower_B = torch.minimum(upper_B, ((log_scale_B + 2.0 * log_norm_B) / p).exp())
            narrow = (upper_B - lower_B <= tolerance * upper_B).tolist()
            bounds = list(zip(lower_B.tolist(), upper_B.tolist(), strict=True))
            done = [place for place in range(len(waiting)) if narrow[place] or squarings == max_squarings]
            for place in done:
                lower, upper = bounds[place]
                found[indices[waiting[place]]] = SpectralShare(math.sqrt(lower * upper), lower, upper, squarings)
            keep = [place for place in range(len(waiting)) if place not in set(done)]
            if not keep:
                break
            waiting = [waiting[place] for place in keep]
            power_BNN, log_scale_B = power_BNN[keep], log_scale_B[keep]
            power_BNN = power_BNN @ power_BNN
            trace_B = _trace(power_BNN)
            power_BNN = power_BNN / trace_B[:, None, None]
            log_scale_B = 2.0 * log_scale_B + trace_B.log()
    return found


def top_right_vectors(stacks_ND: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Return the top right singular vectors of each matrix, by a block iteration on its Gram matrix, all in one batch.

    Subspace iteration with the fourth power of the smaller Gram matrix, a few more columns than asked for, and
    Rayleigh-Ritz. A matrix is done when ||G v - l v|| <= 1e-11 l_1 for each vector asked for; one that isn't after 40
    rounds (a flat spectrum, or one that falls by more than four orders) is left to a full eigendecomposition.
    Directions below the rounding of the Gram matrix are never returned, so there can be fewer than asked.

    Args:
        stacks_ND: matrices (N, D), finite, N may differ; computed in float64.
        rank: r >= 0.

    Returns:
        For each (R, D) with orthonormal rows, float64, R <= rank.
    """
    found = [stack_ND.new_zeros(0, stack_ND.shape[1], dtype=torch.float64) for stack_ND in stacks_ND]
    for indices, gram_BNN in _grams(stacks_ND) if rank else ():
        size = gram_BNN.shape[1]
        width = min(size, rank + _OVERSAMPLED)
        values_BR, vectors_BNR = _block_iteration(gram_BNN, width, min(rank, width))
        wanted_BNR = vectors_BNR[:, :, :rank]
        miss_BR = torch.linalg.vector_norm(gram_BNN @ wanted_BNR - wanted_BNR * values_BR[:, None, :rank], dim=1)
        poor = (miss_BR.amax(1) > _RESIDUAL * values_BR[:, 0]).tolist()
        for place, index in enumerate(indices):
            values_R, vectors_NR = values_BR[place, :rank], wanted_BNR[place]
            if poor[place]:
                values_N, vectors_NN = torch.linalg.eigh(gram_BNN[place])
                values_R, vectors_NR = values_N.flip(0)[:rank], vectors_NN.flip(1)[:, :rank]
            stack_ND = stacks_ND[index].double()
            rounding = max(stack_ND.shape) * torch.finfo(torch.float64).eps * float(values_R[0])
            vectors_NR = vectors_NR[:, : int((values_R > rounding).sum())]
            basis_RD = vectors_NR.T @ stack_ND if _is_wide(stack_ND) else vectors_NR.T
            found[index] = torch.linalg.qr(basis_RD.T).Q.T
    return found


# More columns than asked for: the iteration converges by the first eigenvalue left out, not by the next one.
_OVERSAMPLED = 8
_ROUNDS = 40
_RESIDUAL = 1e-11
# Entries of the Gram matrices of one batch: 1 GiB in float64.
_BATCH_ENTRIES = 2**27


def _block_iteration(gram_BNN: Tensor, width: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the top `width` Ritz values, descending, and vectors of a batch of Gram matrices."""
    scaled_BNN = gram_BNN / _trace(gram_BNN)[:, None, None]
    fourth_BNN = scaled_BNN @ scaled_BNN
    fourth_BNN = fourth_BNN @ fourth_BNN
    # A fixed start, whatever the batch: a result must not depend on what else is in it.
    generator = torch.Generator().manual_seed(0)
    start_NR = torch.randn(gram_BNN.shape[1], width, generator=generator, dtype=torch.float64).to(gram_BNN.device)
    block_BNR = torch.linalg.qr(gram_BNN @ start_NR).Q
    for round_ in range(_ROUNDS):
        block_BNR = torch.linalg.qr(fourth_BNN @ block_BNR).Q
        if round_ % 4 == 3:
            image_BNR = scaled_BNN @ block_BNR
            values_BR, turn_BRR = torch.linalg.eigh(block_BNR.mT @ image_BNR)
            values_BR, turn_BRR = values_BR.flip(1), turn_BRR.flip(2)
            block_BNR = block_BNR @ turn_BRR
            miss_BNR = (image_BNR @ turn_BRR - block_BNR * values_BR[:, None])[:, :, :rank]
            if bool((torch.linalg.vector_norm(miss_BNR, dim=1) <= 0.1 * _RESIDUAL * values_BR[:, :1]).all()):
                break
    return values_BR * _trace(gram_BNN)[:, None], block_BNR


def _grams(matrices_ND: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of Gram matrices of the smaller side, in float64, with the indices that they belong to.

    Each matrix is scaled by its largest entry, so that squares neither overflow nor vanish. Zero matrices are left out.
    Matrices of one side and one size make a batch.
    """
    sizes: dict[tuple[int, str], list[int]] = {}
    for index, matrix_ND in enumerate(matrices_ND):
        if matrix_ND.numel():
            sizes.setdefault((min(matrix_ND.shape), str(matrix_ND.device)), []).append(index)
    for (size, _), members in sizes.items():
        # On a CPU a batch gains nothing, and one by one a result is the same to the bit whatever else is in the batch.
        alone = matrices_ND[members[0]].device.type == "cpu"
        step = 1 if alone else max(1, _BATCH_ENTRIES // size**2)
        for start in range(0, len(members), step):
            indices, grams = [], []
            for index in members[start : start + step]:
                matrix_ND = matrices_ND[index].detach().double()
                largest = matrix_ND.abs().max()
                if not bool(torch.isfinite(largest)):
                    raise ValueError("jac_SD holds a NaN or an infinity; expected a finite Jacobian")
                if bool(largest > 0):
                    matrix_ND = matrix_ND / largest
                    indices.append(index)
                    grams.append(matrix_ND @ matrix_ND.T if _is_wide(matrix_ND) else matrix_ND.T @ matrix_ND)
            if indices:
                yield indices, torch.stack(grams)


def _is_wide(matrix_ND: Tensor) -> bool:
    return matrix_ND.shape[0] <= matrix_ND.shape[1]


def _trace(gram_BNN: Tensor) -> Tensor:
    return gram_BNN.diagonal(dim1=1, dim2=2).sum(1)
