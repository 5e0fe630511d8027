"""Rounding to fp8 in Triton kernels, also in an interpreter that truncates."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from klab.kernels.triton_support import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
FP8_MAX = tl.constexpr(448.0)


@triton.jit
def to_fp8(x):
    """float32 to e4m3fn: the nearest, ties to even, magnitudes above 448 become 448.

    Triton 3.7's interpreter truncates, so there the value is rounded to what fp8 can hold first: three bits behind the leading one, or a
    multiple of 2^-9 below 2^-6.
    """
    x = tl.minimum(tl.maximum(x, -FP8_MAX), FP8_MAX)
    if _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (x + 24576.0) - 24576.0  # 1.5 * 2^14: the last bit of the sum is 2^-9
        x = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)
