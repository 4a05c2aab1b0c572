"""The definition of RMS norm, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_rms_norm(hidden_ND: Tensor, weight_D: Tensor, epsilon: float, offset: float) -> Tensor:
    """Return h / rms(h) * (offset + w), rounded once; see `rms_norm`."""
    wide_ND = hidden_ND.to(torch.promote_types(hidden_ND.dtype, torch.float32))
    normed_ND = wide_ND * torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + epsilon)
    return (normed_ND * (offset + weight_D.to(wide_ND.dtype))).to(hidden_ND.dtype)
