"""The product of two tiles, for all Triton kernels here."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(left_MK, right_KN, INTERPRETED: tl.constexpr):
    """Multiply two tiles into float32. Triton's interpreter multiplies bfloat16 by its raw bits, so it is widened."""
    if INTERPRETED:
        left_MK = left_MK.to(tl.float32)
        right_KN = right_KN.to(tl.float32)
    return tl.dot(left_MK, right_KN, input_precision="ieee")
