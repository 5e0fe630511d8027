"""CUDA C++ matmul per head: a block computes a tile of one head on mma.sync, on tensors where the heads of a token lie together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.batched_matmul.problem import BatchedMatmul
from klab.kernels.contract import Chip, Launch, Tensors, kernel
from klab.kernels.cuda_module import CudaKernel, Int64
from klab.kernels.mma_tile import MmaTileConfig, default_tile, tiles, unfit

if TYPE_CHECKING:
    import torch

SOURCE = r"""
#include "mma_tile.cuh"
using namespace klab;

// Rows of a matrix that lie `stride` elements apart; within a tile offsets fit 32 bits.
struct Rows {
    const ELEMENT* base;
    int stride, rows, columns;
    KLAB_DEVICE bool inside(int row, int column) const { return row < rows && column < columns; }
    KLAB_DEVICE const ELEMENT* at(int row, int column) const { return base + (row * stride + column); }
};

// Block (i, head): tile i of one head, rows first, so that blocks that run together share the tile of weights in L2.
KLAB_KERNEL_MIN_BLOCKS(batched_mma, tile::THREADS, 1)
(const ELEMENT* __restrict__ x, const ELEMENT* __restrict__ w, ELEMENT* __restrict__ out, int m, int n, int k, int x_stride, int w_stride,
 int64_t x_head, int64_t w_head, int64_t out_stride, int64_t out_head) {
    const int tiles_m = ceil_div(m, BLOCK_M), head = block_idx_y();
    const int m0 = block_idx_x() % tiles_m * BLOCK_M, n0 = block_idx_x() / tiles_m * BLOCK_N;
    const Rows x_rows{x + head * x_head + static_cast<int64_t>(m0) * x_stride, x_stride, m - m0, k};
    const Rows w_rows{w + head * w_head + static_cast<int64_t>(n0) * w_stride, w_stride, n - n0, k};
    float sum[tile::TILES_M][tile::TILES_N][4] = {};
    tile::multiply(sum, x_rows, w_rows, k);
    tile::store(sum, out + head * out_head + m0 * out_stride + n0, out_stride, m - m0, n - n0);
}
"""


def fits(problem: BatchedMatmul, config: MmaTileConfig, chip: Chip) -> str | None:
    """Why this config cannot run, or None. Odd sizes and strides run too, by a slower load."""
    if problem.batch > 65535:
        return f"a grid has no {problem.batch} heads"
    if max(problem.batch * problem.k * config.block_m, problem.k * config.block_n) >= 2**30:
        return "rows are too long for 32-bit offsets within a tile"
    return unfit(problem.dtype, config, chip)


def default(problem: BatchedMatmul, chip: Chip) -> MmaTileConfig:
    """As for one matmul: k is short, so a ring holds most of it."""
    return default_tile(problem.m, problem.n, problem.k, chip)


def space(problem: BatchedMatmul, chip: Chip) -> Iterator[MmaTileConfig]:
    """All tiles not much larger than the problem."""
    yield from tiles(problem.m, problem.n, problem.k)


def _in_chunks(tensor: torch.Tensor) -> bool:
    """Whether each row is whole 16-byte chunks at multiples of 16 bytes, so that no chunk runs over the row's end."""
    return all(value % 8 == 0 for value in (tensor.shape[2], tensor.stride(0), tensor.stride(1))) and tensor.data_ptr() % 16 == 0


@kernel(BatchedMatmul, backend="cuda", config=MmaTileConfig, fits=fits, default=default, space=space)
def cuda_mma(problem: BatchedMatmul, config: MmaTileConfig, chip: Chip) -> Launch:
    """mma.sync m16n8k16 with a cp.async ring, one head per row of the grid; no copies around it."""
    p, c = problem, config
    variants = {
        (a, b): CudaKernel(SOURCE, "batched_mma", chip, {**c.defines(p.dtype), "ALIGNED": int(a), "ALIGNED_OUT": int(b)}, c.smem_bytes)
        for a in (False, True)
        for b in (False, True)
    }
    grid = (-(-p.m // c.block_m) * -(-p.n // c.block_n), p.batch, 1)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        strides = [x.stride(0), w.stride(1), *(Int64(s) for s in (x.stride(1), w.stride(0), out.stride(0), out.stride(1)))]
        variants[_in_chunks(x) and _in_chunks(w), _in_chunks(out)].launch(grid, c.threads, [x, w, out, p.m, p.n, p.k, *strides])

    return launch
