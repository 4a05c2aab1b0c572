"""The product of two tiles, as every Triton kernel here forms it."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(left_MK, right_KN, INTERPRETED: tl.constexpr):
    """Multiply two tiles into float32. The interpreter multiplies the raw bits of bfloat16: widen there."""
    if INTERPRETED:
        left_MK = left_MK.to(tl.float32)
        right_KN = right_KN.to(tl.float32)
    return tl.dot(left_MK, right_KN, input_precision="ieee")
