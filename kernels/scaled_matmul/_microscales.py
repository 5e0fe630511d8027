"""Triton device functions for blocks of 16 or 32 with a scale each: expanding elements exactly, and packing scales for Blackwell."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_values(scale):
    """float32 of uint8 biased exponents (2^(e - 127)), or of e4m3 scales."""
    if scale.dtype == tl.uint8:
        # A float32's own exponent field; 2^-127 is a denormal.
        values = tl.maximum(scale.to(tl.uint32) << 23, 0x00400000).to(tl.float32, bitcast=True)
    else:
        values = scale.to(tl.float32)
    return values


@triton.jit
def fp4_magnitudes(nibbles):
    """float32 of e2m1 codes 0..15 in uint32.

    Their exponent and mantissa bits, at the place of a float32's, make a number that is 2^126 times too small (denormals included).
    """
    bits = ((nibbles & 7) << 22) | ((nibbles & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def expand(elements, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """float32 [ROWS, COLUMNS]: e4m3 elements, or uint8 ones of two e2m1 each [ROWS, COLUMNS / 2], times scale [ROWS, COLUMNS / VECTOR]."""
    if elements.dtype == tl.uint8:
        words = elements.to(tl.uint32)
        values = tl.join(fp4_magnitudes(words & 15), fp4_magnitudes(words >> 4)).reshape(ROWS, COLUMNS)
    else:
        values = elements.to(tl.float32)
    scaled = values.reshape(ROWS, COLUMNS // VECTOR, VECTOR) * scale_values(scale)[:, :, None]
    return scaled.reshape(ROWS, COLUMNS)


@triton.jit
def unpack_scales(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of packed tiles (see _packed_scales) [1, ROWS / 128, COLUMNS / 4, 2, 256], which tcgen05 copies as they are."""
    return tile.reshape(ROWS // 128, COLUMNS // 4, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(ROWS, COLUMNS)


@triton.jit
def pack_scales(
    x_scale,
    w_scale,
    x_packed,
    w_packed,
    m,
    n,
    columns,
    stride_xs,
    stride_ws,
    x_tiles,
    tiles_k,
    TILES: tl.constexpr,
):
    """Program (t, c): 128 rows of x (t < x_tiles) or w, and TILES tiles of 4 scales along k; zeros beyond the edges."""
    rows_tile = tl.program_id(0)
    if rows_tile < x_tiles:
        scale, packed, rows, stride = x_scale, x_packed, m, stride_xs
    else:
        scale, packed, rows, stride = w_scale, w_packed, n, stride_ws
        rows_tile -= x_tiles
    row = tl.arange(0, 128)[:, None]
    column = tl.arange(0, 4 * TILES)[None, :]
    first = tl.program_id(1) * TILES
    inside = (rows_tile * 128 + row < rows) & (first * 4 + column < columns)
    values = tl.load(scale + (rows_tile * 128 + row).to(tl.int64) * stride + first * 4 + column, mask=inside, other=0)
    tile = rows_tile.to(tl.int64) * tiles_k + first + column // 4
    to = packed + tile * 512 + row % 32 * 16 + row // 32 * 4 + column % 4
    tl.store(to, values, mask=first + column // 4 < tiles_k)
