"""RMS norm over the last axis, of hidden states or of heads. The weight is frozen: Triton gives it no gradient."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from cepo.kernels.cotangents import differentiable
from cepo.kernels.launch import Implementation, use_triton
from cepo.kernels.norm.definition import plain_rms_norm

MAX_NORM_SIZE = 8192


def rms_norm(
    hidden_ND: Tensor, weight_D: Tensor, *, epsilon: float, offset: float = 0.0, implementation: Implementation = "auto"
) -> Tensor:
    """Return h / rms(h) * (offset + w) over the last axis, rms(h) = sqrt(mean h^2 + epsilon).

    Computed in float32 (float64 for float64 rows) and rounded once. For a per-head norm of queries or keys, D is the
    head size.

    Args:
        hidden_ND: rows, any number of leading axes.
        weight_D: the norm's weight, of any float dtype.
        epsilon: added to the mean square.
        offset: added to the weight: 0, or 1 for Gemma's norms.
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.

    Returns:
        Tensor of the rows' shape and dtype.

    Raises:
        ValueError: if shapes don't fit together, or Triton is asked for and can't serve them (D up to 8,192).
        RuntimeError: if Triton is needed and is missing, or the device is too old.
    """
    if not use_triton(implementation, hidden_ND, weight_D):
        return plain_rms_norm(hidden_ND, weight_D, epsilon, offset)
    size = hidden_ND.shape[-1]
    if weight_D.shape != (size,) or not 1 <= size <= MAX_NORM_SIZE:
        seen = (tuple(hidden_ND.shape), tuple(weight_D.shape))
        raise ValueError(f"expected rows (..., D), D up to {MAX_NORM_SIZE}, and a weight (D,), got {seen}")
    from cepo.kernels.norm.triton import norm_forward, norm_vjp

    forward, vjp = partial(norm_forward, epsilon=epsilon, offset=offset), partial(norm_vjp, offset=offset)
    return differentiable(forward, vjp, hidden_ND, weight_D.detach())
