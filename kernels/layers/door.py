"""The memory-bound parts of a transformer layer: RMS norm, gated activation, rotary positions.

Each reads what the forward pass saved once for all C cotangents. Weights are frozen: Triton gives them no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cepo.kernels.cotangents import fold_cotangents, run_vjp
from cepo.kernels.launch import Implementation, unit_last, use_triton

MAX_NORM_SIZE = 8192


def rms_norm(
    hidden_ND: Tensor,
    weight_D: Tensor,
    *,
    epsilon: float,
    offset: float = 0.0,
    implementation: Implementation = "auto",
) -> Tensor:
    """Return h / rms(h) * (offset + w) over the last axis, rms(h) = sqrt(mean h^2 + epsilon).

    Everything is formed in float32 (float64 for float64 rows) and rounded once. A per-head norm of queries or keys is
    the same with rows of the head's size.

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
    if use_triton(implementation, hidden_ND, weight_D):
        _check_norm(hidden_ND, weight_D)
        return _RmsNorm.apply(hidden_ND, None, weight_D.detach(), epsilon, offset)[0]
    wide_ND = hidden_ND.to(torch.promote_types(hidden_ND.dtype, torch.float32))
    normed_ND = wide_ND * torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + epsilon)
    return (normed_ND * (offset + weight_D.to(wide_ND.dtype))).to(hidden_ND.dtype)


def add_rms_norm(
    hidden_ND: Tensor,
    residual_ND: Tensor,
    weight_D: Tensor,
    *,
    epsilon: float,
    offset: float = 0.0,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the norm of hidden + residual, and that sum, in one pass.

    Args:
        hidden_ND: what a block put out; the rest as in `rms_norm`.
        residual_ND: the residual stream, of the same shape and dtype.
        weight_D: as there.
        epsilon: as there.
        offset: as there.
        implementation: as there.

    Returns:
        The normed sum and the sum, rounded to the rows' dtype before it is normed, both of the rows' shape and dtype.

    Raises:
        ValueError: as there.
        RuntimeError: as there.
    """
    if use_triton(implementation, hidden_ND, residual_ND, weight_D):
        _check_norm(hidden_ND, weight_D)
        if residual_ND.shape != hidden_ND.shape or residual_ND.dtype != hidden_ND.dtype:
            seen = (tuple(residual_ND.shape), residual_ND.dtype)
            raise ValueError(f"expected a residual of {tuple(hidden_ND.shape)}, {hidden_ND.dtype}, got {seen}")
        return _RmsNorm.apply(hidden_ND, residual_ND, weight_D.detach(), epsilon, offset)
    sum_ND = hidden_ND + residual_ND
    return rms_norm(sum_ND, weight_D, epsilon=epsilon, offset=offset, implementation="torch"), sum_ND


def swiglu(gate_ND: Tensor, up_ND: Tensor, *, implementation: Implementation = "auto") -> Tensor:
    """Return silu(gate) * up, formed in float32 (float64 for float64 inputs) and rounded once.

    Args:
        gate_ND: any shape; may be one half of a wider tensor.
        up_ND: of the same shape and dtype.
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.

    Returns:
        Tensor of that shape and dtype.

    Raises:
        ValueError: if shapes or dtypes differ, or Triton is asked for and can't serve them.
        RuntimeError: if Triton is needed and is missing, or the device is too old.
    """
    on_triton = use_triton(implementation, gate_ND, up_ND)
    if gate_ND.shape != up_ND.shape or gate_ND.dtype != up_ND.dtype:
        seen = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in (gate_ND, up_ND)]
        raise ValueError(f"expected gate and up of one shape and dtype, got {seen}")
    if on_triton:
        return _SwiGlu.apply(gate_ND, up_ND)
    wide = torch.promote_types(gate_ND.dtype, torch.float32)
    return (torch.nn.functional.silu(gate_ND.to(wide)) * up_ND.to(wide)).to(gate_ND.dtype)


def rotate(heads_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor, *, implementation: Implementation = "auto") -> Tensor:
    """Return x cos + (-x_2, x_1) sin, x_1 and x_2 the halves of a head (the layout of Llama and Qwen).

    Its VJP is the transposed map, for equal halves of cos and sin the rotation by the negative angle.

    Args:
        heads_BHTE: queries or keys, E even, any strides.
        cos_BTE: cosines, (B, T, E), (1, T, E) or (T, E), any float dtype. They get no gradient from Triton.
        sin_BTE: sines, of the same shape.
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.

    Returns:
        Tensor (B, H, T, E) of the heads' dtype, formed in float32 or wider and rounded once.

    Raises:
        ValueError: if shapes don't fit together, or Triton is asked for and can't serve them.
        RuntimeError: if Triton is needed and is missing, or the device is too old.
    """
    on_triton = use_triton(implementation, heads_BHTE, cos_BTE, sin_BTE)
    if heads_BHTE.ndim != 4 or heads_BHTE.shape[-1] % 2:
        raise ValueError(f"expected heads (B, H, T, E) with E even, got {tuple(heads_BHTE.shape)}")
    rollouts, _, tokens, size = heads_BHTE.shape
    shapes = [(tokens, size), (1, tokens, size), (rollouts, tokens, size)]
    if cos_BTE.shape != sin_BTE.shape or tuple(cos_BTE.shape) not in shapes:
        seen = [tuple(tensor.shape) for tensor in (cos_BTE, sin_BTE)]
        raise ValueError(f"expected cosines and sines of one of the shapes {shapes}, got {seen}")
    cos_BTE, sin_BTE = (tensor.expand(rollouts, tokens, size) for tensor in (cos_BTE, sin_BTE))
    if on_triton:
        return _Rotate.apply(heads_BHTE, unit_last(cos_BTE).detach(), unit_last(sin_BTE).detach())
    wide = torch.promote_types(heads_BHTE.dtype, torch.float32)
    first, second = heads_BHTE.to(wide).chunk(2, dim=-1)
    turned_BHTE = torch.cat([-second, first], dim=-1)
    rotated_BHTE = heads_BHTE.to(wide) * cos_BTE[:, None].to(wide) + turned_BHTE * sin_BTE[:, None].to(wide)
    return rotated_BHTE.to(heads_BHTE.dtype)


def _check_norm(hidden_ND: Tensor, weight_D: Tensor) -> None:
    size = hidden_ND.shape[-1]
    if weight_D.shape != (size,) or not 1 <= size <= MAX_NORM_SIZE:
        seen = (tuple(hidden_ND.shape), tuple(weight_D.shape))
        raise ValueError(f"expected rows (..., D), D up to {MAX_NORM_SIZE}, and a weight (D,), got {seen}")


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, residual_ND: Tensor | None, weight_D: Tensor, epsilon: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        from cepo.kernels.layers.triton import norm_forward

        with torch.cuda.device_of(hidden_ND):
            normed_ND, sum_ND, scale_N = norm_forward(hidden_ND, residual_ND, weight_D, epsilon, offset)
        ctx.save_for_backward(sum_ND, scale_N, weight_D)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        if residual_ND is None:
            sum_ND = sum_ND.new_zeros(0)  # an input is no output; nobody sees this one
            ctx.mark_non_differentiable(sum_ND)
        return normed_ND, sum_ND

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = None
        if any(cotangent is not None for cotangent in cotangents):
            (gradient,) = run_vjp(_RmsNormVjp.apply, cotangents, *ctx.saved_tensors, ctx.offset)
        return gradient, gradient if ctx.needs_input_grad[1] else None, None, None, None


class _RmsNormVjp(torch.autograd.Function):
    @staticmethod
    def forward(normed_CND: Tensor | None, sum_CND: Tensor | None, *saved: Any) -> tuple[Tensor, ...]:
        from cepo.kernels.layers.triton import norm_vjp

        with torch.cuda.device_of(saved[0]):
            return (norm_vjp(normed_CND, sum_CND, *saved),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing: there is no second derivative."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return fold_cotangents(_RmsNormVjp.apply, 2, info.batch_size, in_dims, arguments)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_ND: Tensor, up_ND: Tensor) -> Tensor:
        from cepo.kernels.layers.triton import swiglu_forward

        ctx.save_for_backward(gate_ND, up_ND)
        with torch.cuda.device_of(gate_ND):
            return swiglu_forward(gate_ND, up_ND)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return run_vjp(_SwiGluVjp.apply, cotangents, *ctx.saved_tensors)


class _SwiGluVjp(torch.autograd.Function):
    @staticmethod
    def forward(cotangent_CND: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        from cepo.kernels.layers.triton import swiglu_vjp

        with torch.cuda.device_of(cotangent_CND):
            return swiglu_vjp(cotangent_CND, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing: there is no second derivative."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return fold_cotangents(_SwiGluVjp.apply, 1, info.batch_size, in_dims, arguments)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
        from cepo.kernels.layers.triton import rotate_heads

        ctx.save_for_backward(cos_BTE, sin_BTE)
        with torch.cuda.device_of(heads_BHTE):
            return rotate_heads(heads_BHTE[None], cos_BTE, sin_BTE, transposed=False)[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return *run_vjp(_RotateVjp.apply, cotangents, *ctx.saved_tensors), None, None


class _RotateVjp(torch.autograd.Function):
    @staticmethod
    def forward(cotangent_CBHTE: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        from cepo.kernels.layers.triton import rotate_heads

        with torch.cuda.device_of(cotangent_CBHTE):
            return (rotate_heads(cotangent_CBHTE, *saved, transposed=True),)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing: there is no second derivative."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return fold_cotangents(_RotateVjp.apply, 1, info.batch_size, in_dims, arguments)
