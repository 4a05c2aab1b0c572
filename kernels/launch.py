"""What every kernel launch needs to know: which implementation was asked for, which GPU, which tile sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Implementation = Literal["auto", "torch", "triton"]
SERVED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Kernel arguments that Triton must not specialise on: else it recompiles whenever one is 1 or a multiple of 16. Strides
# and row sizes are not among them, since they decide how wide loads are, and in models they are multiples of 16.
COUNTS = ("tokens", "padded_length", "count", "rows", "vocabulary", "blocks_each")


@dataclass(frozen=True)
class Tile:
    """Sizes of one launch: rows and columns of a program's tile, warps of a program, stages of its load pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Warps and stages, as keyword arguments of a launch or a compilation."""
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Variant:
    """One kernel with the tensors' dtype, the compile-time constants and the tile of a launch."""

    kernel: Any
    dtype: torch.dtype
    constants: Mapping[str, Any]
    tile: Tile


def use_triton(implementation: Implementation, *tensors: Tensor) -> bool:
    """Decide whether these tensors go to the Triton kernels; an explicit choice is never replaced by the other.

    Args:
        implementation: "auto" takes Triton exactly when the tensors are on CUDA.
        tensors: the operation's tensors.

    Returns:
        True for Triton, False for plain PyTorch.

    Raises:
        ValueError: if the tensors lie on different devices, or if Triton is asked for with a dtype other than float32,
            float16 or bfloat16, or with tensors that are not on CUDA (the interpreter, TRITON_INTERPRET=1, takes
            tensors on the CPU).
        RuntimeError: if Triton is asked for, or meant by "auto", and is not installed.
    """
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(f"implementation is {implementation!r}; expected 'auto', 'torch' or 'triton'")
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"tensors lie on {sorted(map(str, devices))}; expected one device")
    on_cuda = tensors[0].is_cuda
    if implementation == "torch" or (implementation == "auto" and not on_cuda):
        return False
    if not _interprets() and not on_cuda:
        raise ValueError(f"implementation='triton' needs tensors on CUDA, got {tensors[0].device}")
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in SERVED_DTYPES:
            raise ValueError(f"Triton kernels take float32, float16 or bfloat16, got {tensor.dtype}; use 'torch'")
    return True


def takes_over(implementation: Implementation, tensor: Tensor) -> bool:
    """Tell whether the Triton kernels serve a model whose weights have this tensor's device and dtype.

    Like `use_triton`, except that "auto" means plain PyTorch for other dtypes, on older GPUs, and without Triton.

    Raises:
        ValueError, RuntimeError: as `use_triton`, but never for "auto".
    """
    installed = importlib.util.find_spec("triton") is not None
    if implementation == "auto" and not (
        installed and tensor.dtype in SERVED_DTYPES and not _is_too_old(tensor.device)
    ):
        return False
    return use_triton(implementation, tensor)


def architecture(device: torch.device) -> int:
    """Return the key of the tile tables for a device: 80 (compute capability 8.x, such as A100) or 90 (H100 and later).

    Raises:
        RuntimeError: on a device older than compute capability 8.0, for which there is no table.
    """
    if device.type != "cuda":
        return 80  # the interpreter: any table will do
    if _is_too_old(device):
        raise RuntimeError(f"the Triton kernels need compute capability 8.0 or later, {device} has an older one")
    return 80 if torch.cuda.get_device_capability(device)[0] == 8 else 90


def interpreted(tensor: Tensor) -> bool:
    """Tell whether a launch on this tensor is interpreted on the CPU (where a bfloat16 `tl.dot` must be widened)."""
    return not tensor.is_cuda


def unit_last(tensor: Tensor) -> Tensor:
    """Return the tensor with stride 1 along its last axis, copied only if it has another."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _is_too_old(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8


def _interprets() -> bool:
    try:
        from triton import knobs
    except ImportError as error:
        raise RuntimeError("the Triton kernels were asked for, but triton is not installed") from error
    return bool(knobs.runtime.interpret)
