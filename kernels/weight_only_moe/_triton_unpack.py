"""Packed nibbles as numbers, in Triton."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def numbers(nibbles, MX: tl.constexpr):
    """int32 values 0..15 as float32: e2m1 where MX, else two's complement."""
    if MX:
        # Sign, exponent and mantissa where float32 has its own, whose exponents are biased by 127 instead of 1: denormals come out right,
        # because the factor makes them normal.
        return (((nibbles & 8) << 28) | ((nibbles & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
    return ((nibbles << 28) >> 28).to(tl.float32)


@triton.jit
def factors(scales, MX: tl.constexpr):
    """Scales as float32: biased exponents where MX (those of 0 are 0, no denormal)."""
    if MX:
        return (scales.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return scales.to(tl.float32)
