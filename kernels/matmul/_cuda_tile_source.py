# No `from __future__ import annotations`: cuTile reads the annotations as values.
"""The kernel of cuda_tile_tiled, in cuTile Python; imported only where cuda.tile is."""

import cuda.tile as ct

# Blocks of this many rows of tiles run side by side, so that they share columns of w in the second-level cache.
GROUP = 8


@ct.kernel  # type: ignore[untyped-decorator,unused-ignore]
def tiled(x, w, out, nt: ct.Constant[bool], block_m: ct.Constant[int], block_n: ct.Constant[int], block_k: ct.Constant[int]):  # type: ignore[no-untyped-def]
    """out[m, n] = x[m, k] @ w, of which one block computes a tile; w is [n, k] where `nt`, else [k, n]."""
    tiles_m = ct.cdiv(out.shape[0], block_m)
    tiles_n = ct.cdiv(out.shape[1], block_n)
    number = ct.bid(0)
    first = number // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    row = first + number % (GROUP * tiles_n) % height
    column = number % (GROUP * tiles_n) // height
    sums = ct.full((block_m, block_n), 0, dtype=ct.float32)
    for step in range(ct.cdiv(x.shape[1], block_k)):
        x_tile = ct.load(x, index=(row, step), shape=(block_m, block_k), padding_mode=ct.PaddingMode.ZERO)
        if nt:
            w_tile = ct.load(w, index=(step, column), shape=(block_k, block_n), order=(1, 0), padding_mode=ct.PaddingMode.ZERO)
        else:
            w_tile = ct.load(w, index=(step, column), shape=(block_k, block_n), padding_mode=ct.PaddingMode.ZERO)
        sums = ct.mma(x_tile, w_tile, sums)
    ct.store(out, index=(row, column), tile=ct.astype(sums, out.dtype))
