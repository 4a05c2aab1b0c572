"""Project a subspace out of Jacobians, and measure the share of their energy in the top singular direction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class SpectralShare:
    """phi = sigma_1^2 / ||J||_F^2, within [lower, upper]; all zero for a zero matrix."""

    value: float
    lower: float
    upper: float
    squarings: int


def project_out(jac_SD: Tensor, basis_RD: Tensor) -> Tensor:
    """Return J - (J V) V^T: the rows of J with their component in the span of the basis removed.

    It is applied twice, since the second pass removes the first one's rounding error.

    Args:
        jac_SD: (S, D), float32 or float64.
        basis_RD: (R, D) with orthonormal rows, R >= 0.

    Returns:
        Tensor (S, D) of J's dtype.
    """
    basis_RD = basis_RD.to(jac_SD.dtype)
    once_SD = torch.addmm(jac_SD, jac_SD @ basis_RD.T, basis_RD, alpha=-1)
    return torch.addmm(once_SD, once_SD @ basis_RD.T, basis_RD, alpha=-1)


def frobenius_energy(jac_SD: Tensor) -> float:
    """Return ||J||_F^2, summed in float64 (in float32, a sum of a million squares is wrong in the fourth digit)."""
    return float(jac_SD.double().square().sum())


def spectral_shares(
    jacs_SD: Sequence[Tensor], *, tolerance: float = 1e-9, max_squarings: int = 64
) -> list[SpectralShare]:
    """Return phi(J) = sigma_1^2 / ||J||_F^2 of each matrix by repeated squaring of its Gram matrix, in batches.

    Let M = J J^T / tr(J J^T) (or J^T J, the smaller one) with eigenvalues l_i, which sum to 1, and p = 2^k. Then
    (||M^p||_F^2 / tr M^p)^(1/p) <= l_1 <= ||M^p||_F^(1/p): the lower bound is the power 1/p of a weighted mean of the
    l_i^p, the upper bound the 2p-norm of the l_i. Neither needs a gap between l_1 and l_2. M is squared, and rescaled
    to trace 1 with the scale kept as a logarithm, until the interval is narrower than `tolerance` relative to phi; phi
    is its geometric mean. Each matrix stops by its own interval, so the others in its batch affect it by rounding only.

    Args:
        jacs_SD: matrices (S, D), finite, any float dtype, S may differ; computed in float64.
        tolerance: relative width at which to stop, > 0.
        max_squarings: most squarings; the interval reached by then is returned and holds up to rounding.

    Returns:
        One SpectralShare per matrix, with value in (0, 1], or all zeros for a zero or empty matrix.

    Raises:
        ValueError: if a matrix holds a NaN or an infinity.
    """
    found = [SpectralShare(0.0, 0.0, 0.0, 0)] * len(jacs_SD)
    for indices, jac_BSD in _batches(jacs_SD):
        gram_BNN = jac_BSD @ jac_BSD.mT if jac_BSD.shape[1] <= jac_BSD.shape[2] else jac_BSD.mT @ jac_BSD
        power_BNN = gram_BNN / _trace(gram_BNN)[:, None, None]
        log_scale_B = power_BNN.new_zeros(len(indices))  # M^p = exp(log_scale) * power, with tr power = 1
        waiting = indices
        for squarings in range(max_squarings + 1):
            p = 2.0**squarings
            log_norm_B = torch.linalg.matrix_norm(power_BNN).log()
            upper_B = ((log_scale_B + log_norm_B) / p).exp().clamp_max(1.0)
            lower_B = torch.minimum(upper_B, ((log_scale_B + 2.0 * log_norm_B) / p).exp())
            is_done = [
                each or squarings == max_squarings for each in (upper_B - lower_B <= tolerance * upper_B).tolist()
            ]
            for index, done, lower, upper in zip(waiting, is_done, lower_B.tolist(), upper_B.tolist(), strict=True):
                if done:
                    found[index] = SpectralShare(math.sqrt(lower * upper), lower, upper, squarings)
            if all(is_done):
                break
            if any(is_done):
                keep = [place for place, done in enumerate(is_done) if not done]
                waiting = [waiting[place] for place in keep]
                power_BNN, log_scale_B = power_BNN[keep], log_scale_B[keep]
            power_BNN = power_BNN @ power_BNN
            trace_B = _trace(power_BNN)
            power_BNN = power_BNN.div_(trace_B[:, None, None])
            log_scale_B = 2.0 * log_scale_B + trace_B.log()
    return found


def top_right_vectors(stacks_ND: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Return the top right singular vectors of each matrix; matrices of similar size are computed as one batch.

    Let A be the matrix, or its transpose if that is wider. Subspace iteration on A A^T with a Chebyshev filter and
    Rayleigh-Ritz runs in float32 to choose a start, then in float64, with a few more vectors than asked for. A matrix
    has converged, whatever else is in its batch, when ||A A^T u - s^2 u|| <= 1e-10 s_1 s for each vector u asked for
    and its singular value s; for a matrix in float32 or less, which is not known more accurately, the bound is
    1e-6 s_1 s. The last image A A^T u is returned, which is still closer. A small matrix, or one that has not converged
    after the last cycle (a flat spectrum, or one that falls by orders of magnitude), gets a full eigendecomposition.
    Directions below the rounding error are never returned, so there can be fewer than asked for.

    Args:
        stacks_ND: matrices (N, D), finite, any float dtype, N may differ.
        rank: r >= 0.

    Returns:
        One tensor (R, D) per matrix, with orthonormal rows, float64, R <= rank. The rest of its batch affects it by
        rounding only.

    Raises:
        ValueError: if a matrix holds a NaN or an infinity.

    Source:
        Zhou, Saad, Tiago and Chelikowsky, Self-consistent-field calculations using Chebyshev-filtered subspace
        iteration (2006), section 3, for the filter.
    """
    found = [stack_ND.new_zeros(0, stack_ND.shape[1], dtype=torch.float64) for stack_ND in stacks_ND]
    for indices, stack_BND in _batches(stacks_ND) if rank else ():
        is_wide = stack_BND.shape[1] <= stack_BND.shape[2]
        wide_BNM = stack_BND if is_wide else stack_BND.mT
        size = wide_BNM.shape[1]
        vectors_BRN = stack_BND.new_zeros(len(indices), min(rank, size), size)
        counts, left = [rank] * len(indices), list(range(len(indices)))
        if size > 4 * (rank + _OVERSAMPLED):
            # The start does not depend on the batch and its padding, so that results do not either.
            start_RD = torch.randn(rank + _OVERSAMPLED, stack_BND.shape[2], generator=torch.Generator().manual_seed(0))
            start_RD = start_RD.to(stack_BND)
            start_BRN = start_RD @ stack_BND.mT if is_wide else start_RD.expand(len(indices), -1, -1)
            known = 1e-10 if stacks_ND[indices[0]].dtype == torch.float64 else 1e-6
            left = _iterate(wide_BNM, start_BRN, known, vectors_BRN)
        if left:
            vectors_BRN[left], kept = _by_eigenvectors(wide_BNM[left], rank)
            for place, count in zip(left, kept, strict=True):
                counts[place] = count
        bases_BRD = _orthonormal(vectors_BRN @ stack_BND if is_wide else vectors_BRN)
        for index, basis_RD, count in zip(indices, bases_BRD, counts, strict=True):
            found[index] = basis_RD[:count]
    return found


# Additional vectors: the speed of convergence depends on the first eigenvalue that is left out.
_OVERSAMPLED = 6
# Degree of the filter in each cycle. High degrees separate close eigenvalues, low ones those that differ by magnitudes.
_DEGREES_FLOAT32 = (4, 5)
_DEGREES_FLOAT64 = (3, 3, 6, 8, 8, 8)
# Most by which a filter may amplify one direction over another: above 1 / epsilon the other would be lost to rounding.
_GAIN = 1e11
# Most entries of a batch of matrices: on a CPU what fits in the cache, elsewhere 256 MiB in float64.
_BATCH_ENTRIES_CPU = 2**18
_BATCH_ENTRIES = 2**25


def _iterate(wide_BNM: Tensor, block_BRN: Tensor, tolerance: float, vectors_BRN: Tensor) -> list[int]:
    """Write the top left singular vectors of the matrices that converge, descending; return the others' indices."""
    rank = vectors_BRN.shape[1]
    places = list(range(len(wide_BNM)))
    # Products with the matrix and its transpose cost less than with the Gram matrix, unless one side is much smaller.
    exact: tuple[Tensor, ...]
    if 2 * wide_BNM.shape[1] <= wide_BNM.shape[2]:
        exact = (wide_BNM @ wide_BNM.mT,)
        rough = (exact[0].float(),)
    else:
        exact = (wide_BNM, wide_BNM.mT)
        single_BNM = wide_BNM.float()
        rough = (single_BNM @ single_BNM.mT,)
    block_BRN = _orthonormal(block_BRN.float() @ rough[0])
    for degree in _DEGREES_FLOAT32:
        block_BRN = _filter(rough, *_rayleigh_ritz(rough, block_BRN), degree)
    block_BRN = _orthonormal(block_BRN.double())
    for degree in _DEGREES_FLOAT64:
        values_BR, block_BRN, image_BRN = _rayleigh_ritz(exact, block_BRN)
        miss_BR = torch.linalg.vector_norm(image_BRN - values_BR[:, :, None] * block_BRN, dim=2)
        near_BR = miss_BR <= tolerance * (values_BR[:, -1:] * values_BR).clamp_min(0.0).sqrt()
        near_BR &= _above_rounding(values_BR, block_BRN.shape[2])
        is_done = near_BR[:, -rank:].all(1).tolist()
        done, keep = ([at for at, each in enumerate(is_done) if each is wanted] for wanted in (True, False))
        if done:
            vectors_BRN[[places[at] for at in done]] = image_BRN[done, -rank:].flip(1)
            places = [places[at] for at in keep]
            exact = tuple(factor[keep] for factor in exact)
            values_BR, block_BRN, image_BRN = values_BR[keep], block_BRN[keep], image_BRN[keep]
        if not keep:
            break
        block_BRN = _filter(exact, values_BR, block_BRN, image_BRN, degree)
    return places


def _by_eigenvectors(wide_BNM: Tensor, rank: int) -> tuple[Tensor, list[int]]:
    """Return the top left singular vectors, descending, and how many of each matrix's are above the rounding error."""
    values_BN, vectors_BNN = torch.linalg.eigh(wide_BNM @ wide_BNM.mT)
    counts = _above_rounding(values_BN, wide_BNM.shape[1])[:, -rank:].sum(1).tolist()
    return vectors_BNN.mT.flip(1)[:, :rank], counts


def _above_rounding(values_BR: Tensor, size: int) -> Tensor:
    return values_BR > 10 * size * torch.finfo(torch.float64).eps * values_BR[:, -1:]


def _rayleigh_ritz(factors: tuple[Tensor, ...], block_BRN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Ritz values in the span of the block, ascending, the Ritz vectors, and the vectors' images."""
    image_BRN = reduce(torch.matmul, factors, block_BRN)
    values_BR, turn_BRR = torch.linalg.eigh(block_BRN @ image_BRN.mT)
    return values_BR, turn_BRR.mT @ block_BRN, turn_BRR.mT @ image_BRN


def _filter(
    factors: tuple[Tensor, ...], values_BR: Tensor, block_BRN: Tensor, image_BRN: Tensor, degree: int
) -> Tensor:
    """Return an orthonormal basis of T(1 - G / h) times the block, which amplifies eigenvalues above 2 h only.

    Args:
        factors: G, as the factors of a product.
        values_BR: Ritz values, ascending. The smallest is 2 h, unless amplification would then exceed `_GAIN`.
        block_BRN: Ritz vectors.
        image_BRN: their images under G.
        degree: degree of the Chebyshev polynomial T.
    """
    least = 4.0 * (2.0 * _GAIN) ** (-1.0 / degree)
    half_B11 = torch.maximum(values_BR[:, 0], least * values_BR[:, -1])[:, None, None] / 2.0
    before_BRN, now_BRN = block_BRN, block_BRN - image_BRN / half_B11
    for _ in range(degree - 1):
        image_BRN = reduce(torch.matmul, factors, now_BRN)
        before_BRN, now_BRN = now_BRN, torch.addcmul(2.0 * now_BRN - before_BRN, image_BRN, -2.0 / half_B11)
    return _orthonormal(now_BRN)


def _orthonormal(block_BRD: Tensor) -> Tensor:
    return torch.linalg.qr(block_BRD.mT).Q.mT


def _batches(matrices_ND: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of matrices in float64, with their indices.

    Matrices of similar size share a batch, padded with rows of zeros, which change neither singular values nor right
    vectors. Each is divided by its largest entry, so that squares neither overflow nor underflow. Zero matrices are
    skipped.
    """
    kinds: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for index, matrix_ND in enumerate(matrices_ND):
        if matrix_ND.numel():
            kinds.setdefault((matrix_ND.shape[1], matrix_ND.dtype, matrix_ND.device), []).append(index)
    rows = [matrix_ND.shape[0] for matrix_ND in matrices_ND]
    for (columns, _, device), members in kinds.items():
        entries = _BATCH_ENTRIES_CPU if device.type == "cpu" else _BATCH_ENTRIES
        members.sort(key=lambda index: -rows[index])
        while members:
            longest = rows[members[0]]
            most = max(1, entries // (longest * columns))
            indices = [index for index in members[:most] if 4 * rows[index] >= 3 * longest]
            members = members[len(indices) :]
            padded_BND = pad_sequence([matrices_ND[index].detach() for index in indices], batch_first=True)
            largest_B = padded_BND.abs().amax((1, 2)).double()
            if not bool(torch.isfinite(largest_B).all()):
                raise ValueError("jac_SD holds a NaN or an infinity; expected a finite Jacobian")
            kept = [place for place, largest in enumerate(largest_B.tolist()) if largest > 0.0]
            if len(kept) < len(indices):
                padded_BND, largest_B = padded_BND[kept], largest_B[kept]
            if kept:
                yield [indices[place] for place in kept], padded_BND.double().div_(largest_B[:, None, None])


def _trace(gram_BNN: Tensor) -> Tensor:
    return gram_BNN.diagonal(dim1=1, dim2=2).sum(1)
