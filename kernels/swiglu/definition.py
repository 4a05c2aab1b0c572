"""The definition of the gated activation, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_swiglu(gate_ND: Tensor, up_ND: Tensor) -> Tensor:
    """Return silu(gate) * up, rounded once; see `swiglu`."""
    wide = torch.promote_types(gate_ND.dtype, torch.float32)
    return (torch.nn.functional.silu(gate_ND.to(wide)) * up_ND.to(wide)).to(gate_ND.dtype)
