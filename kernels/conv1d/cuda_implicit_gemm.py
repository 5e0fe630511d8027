"""CUDA C++ convolution as a matrix product whose left side is never made: a row's columns are found in x where they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Launch, Tensors, kernel
from klab.kernels.conv1d.problem import Conv1d
from klab.kernels.cuda_module import CudaKernel, Int64
from klab.kernels.mma_tile import MmaTileConfig, default_tile, tiles, unfit

if TYPE_CHECKING:
    import torch

SOURCE = r"""
#include "mma_tile.cuh"
using namespace klab;

// Row r of the product is output frame first + r; column c is channel c % CHANNELS of its tap c / CHANNELS.
struct Frames {
    const ELEMENT* base;
    int stride, first, rows, frames;
    KLAB_DEVICE static int tap(int column) { return static_cast<uint32_t>(column) / CHANNELS; }
    KLAB_DEVICE static int channel(int column) { return static_cast<uint32_t>(column) % CHANNELS; }
    KLAB_DEVICE int frame(int row, int column) const { return (first + row) * STRIDE + tap(column) - PADDING; }
    KLAB_DEVICE bool inside(int row, int column) const {
        // Unsigned: a frame before the first is a large number.
        return row < rows && tap(column) < WIDTH && static_cast<uint32_t>(frame(row, column)) < static_cast<uint32_t>(frames);
    }
    KLAB_DEVICE const ELEMENT* at(int row, int column) const { return base + (frame(row, column) * stride + channel(column)); }
};

// Row r is output channel r of this tile.
struct Taps {
    const ELEMENT* base;
    int stride, tap_stride, rows;
    KLAB_DEVICE bool inside(int row, int column) const { return row < rows && column < WIDTH * CHANNELS; }
    KLAB_DEVICE const ELEMENT* at(int row, int column) const {
        return base + (row * stride + Frames::tap(column) * tap_stride + Frames::channel(column));
    }
};

// Block (i, b): tile i of sequence b, channels first, so that blocks that run together share the frames in L2.
KLAB_KERNEL_MIN_BLOCKS(conv1d_mma, tile::THREADS, 1)
(const ELEMENT* __restrict__ x, const ELEMENT* __restrict__ w, ELEMENT* __restrict__ out, int frames, int frames_out, int channels_out,
 int x_stride, int w_stride, int w_tap, int64_t x_batch, int64_t out_batch, int64_t out_stride) {
    const int tiles_n = ceil_div(channels_out, BLOCK_N), sequence = block_idx_y();
    const int m0 = block_idx_x() / tiles_n * BLOCK_M, n0 = block_idx_x() % tiles_n * BLOCK_N;
    const Frames x_rows{x + sequence * x_batch, x_stride, m0, frames_out - m0, frames};
    const Taps w_rows{w + static_cast<int64_t>(n0) * w_stride, w_stride, w_tap, channels_out - n0};
    float sum[tile::TILES_M][tile::TILES_N][4] = {};
    tile::multiply(sum, x_rows, w_rows, WIDTH * CHANNELS);
    tile::store(sum, out + sequence * out_batch + m0 * out_stride + n0, out_stride, frames_out - m0, channels_out - n0);
}
"""


def fits(problem: Conv1d, config: MmaTileConfig, chip: Chip) -> str | None:
    """Why this config cannot run, or None. Channels that are no multiple of 8 run too, by a slower load."""
    if problem.batch > 65535:
        return f"a grid has no {problem.batch} sequences"
    if max(problem.frames + 2 * problem.padding, problem.width * config.block_n) * problem.channels_in >= 2**30:
        return "a sequence is too long for 32-bit offsets"
    return unfit(problem.dtype, config, chip)


def default(problem: Conv1d, chip: Chip) -> MmaTileConfig:
    """As for a matmul of frames_out by channels_out over all taps."""
    return default_tile(problem.frames_out, problem.channels_out, problem.taps, chip)


def space(problem: Conv1d, chip: Chip) -> Iterator[MmaTileConfig]:
    """All tiles not much larger than the problem."""
    yield from tiles(problem.frames_out, problem.channels_out, problem.taps)


def _in_chunks(tensor: torch.Tensor) -> bool:
    """Whether the channels are whole 16-byte chunks at multiples of 16 bytes, so that no chunk has two taps."""
    return all(value % 8 == 0 for value in (tensor.shape[2], tensor.stride(0), tensor.stride(1))) and tensor.data_ptr() % 16 == 0


@kernel(Conv1d, backend="cuda", config=MmaTileConfig, fits=fits, default=default, space=space)
def cuda_implicit_gemm(problem: Conv1d, config: MmaTileConfig, chip: Chip) -> Launch:
    """mma.sync m16n8k16 on frames that cp.async gathers tap by tap; padding is zero-filled copies, nothing is laid out before."""
    p, c = problem, config
    defines = c.defines(p.dtype) | {"CHANNELS": p.channels_in, "WIDTH": p.width, "STRIDE": p.stride, "PADDING": p.padding}
    variants = {
        (a, b): CudaKernel(SOURCE, "conv1d_mma", chip, {**defines, "ALIGNED": int(a), "ALIGNED_OUT": int(b)}, c.smem_bytes)
        for a in (False, True)
        for b in (False, True)
    }
    grid = (-(-p.frames_out // c.block_m) * -(-p.channels_out // c.block_n), p.batch, 1)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        strides = [x.stride(1), w.stride(0), w.stride(1), *(Int64(s) for s in (x.stride(0), out.stride(0), out.stride(1)))]
        aligned = _in_chunks(x) and _in_chunks(w), _in_chunks(out)
        variants[aligned].launch(grid, c.threads, [x, w, out, p.frames, p.frames_out, p.channels_out, *strides])

    return launch
