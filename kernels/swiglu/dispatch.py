"""The gated activation of an MLP."""

from __future__ import annotations

from torch import Tensor

from cepo.kernels.cotangents import differentiable
from cepo.kernels.launch import Implementation, use_triton
from cepo.kernels.swiglu.definition import plain_swiglu


def swiglu(gate_ND: Tensor, up_ND: Tensor, *, implementation: Implementation = "auto") -> Tensor:
    """Return silu(gate) * up, computed in float32 (float64 for float64 inputs) and rounded once.

    Args:
        gate_ND: any shape; may be one half of a wider tensor.
        up_ND: tensor of the same shape and dtype.
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.

    Returns:
        Tensor of the same shape and dtype.

    Raises:
        ValueError: if shapes or dtypes differ, or Triton is asked for and can't serve them.
        RuntimeError: if Triton is needed and is missing, or the device is too old.
    """
    on_triton = use_triton(implementation, gate_ND, up_ND)
    if gate_ND.shape != up_ND.shape or gate_ND.dtype != up_ND.dtype:
        seen = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in (gate_ND, up_ND)]
        raise ValueError(f"expected gate and up of one shape and dtype, got {seen}")
    if not on_triton:
        return plain_swiglu(gate_ND, up_ND)
    from cepo.kernels.swiglu.triton import swiglu_forward, swiglu_vjp

    return differentiable(swiglu_forward, swiglu_vjp, gate_ND, up_ND)
