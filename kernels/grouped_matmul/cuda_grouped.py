"""A grouped matmul in CUDA C++: each block finds its expert from the offsets, then multiplies by mma.sync from a cp.async ring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.expert_routing import experts_hit, most_blocks
from klab.kernels.expert_tiles import TileConfig, tile_default, tile_fits, tile_space
from klab.kernels.grouped_matmul.problem import GroupedMatmul

if TYPE_CHECKING:
    import torch

SOURCE = r"""
#include "expert_mma.cuh"
using namespace klab;

using Tile = ExpertTile<ELEMENT, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, WARPS_M, WARPS_N, false, ALIGNED>;
constexpr int PER_LANE = ceil_div(EXPERTS, 32);

KLAB_KERNEL(grouped_mma, Tile::threads)(const ELEMENT* __restrict__ x, const ELEMENT* __restrict__ w, const int* __restrict__ offsets,
                                        ELEMENT* __restrict__ out, int n, int k, int64_t x_stride, int64_t expert_stride,
                                        int64_t w_stride, int64_t out_stride) {
    char* shared = shared_memory<char>();
    const int lane = thread_idx() % 32;

    // Every warp for itself: lane l has experts l PER_LANE ... and counts their blocks of rows.
    int bounds[PER_LANE + 1];
    KLAB_UNROLL
    for (int i = 0; i <= PER_LANE; ++i) bounds[i] = offsets[min_of(lane * PER_LANE + i, EXPERTS)];
    int mine = 0;
    KLAB_UNROLL
    for (int i = 0; i < PER_LANE; ++i) mine += ceil_div(bounds[i + 1] - bounds[i], BLOCK_M);
    const int before = sum_before(mine, lane);
    const int tiles_m = static_cast<int>(shfl(static_cast<uint32_t>(before + mine), 31)), tiles_n = ceil_div(n, BLOCK_N);
    if (block_idx_x() >= tiles_m * tiles_n) return;  // the whole block
    const int first_m = block_idx_x() / (GROUP_M * tiles_n) * GROUP_M, in_group = block_idx_x() % (GROUP_M * tiles_n);
    const int group_rows = min_of(tiles_m - first_m, GROUP_M);
    const int tile_m = first_m + in_group % group_rows, n0 = in_group / group_rows * BLOCK_N;

    int expert = 0, m0 = 0, end = 0, left = tile_m - before;
    const bool found = left >= 0 && left < mine;
    KLAB_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int blocks = ceil_div(bounds[i + 1] - bounds[i], BLOCK_M);
        if (left >= 0 && left < blocks) {
            expert = lane * PER_LANE + i;
            m0 = bounds[i] + left * BLOCK_M;
            end = bounds[i + 1];
        }
        left -= blocks;
    }
    const int owner = static_cast<int>(warp_max<32>(found ? static_cast<float>(lane) : -1.0f));
    expert = static_cast<int>(shfl(static_cast<uint32_t>(expert), owner));
    m0 = static_cast<int>(shfl(static_cast<uint32_t>(m0), owner));
    end = static_cast<int>(shfl(static_cast<uint32_t>(end), owner));

    Tile tile;
    const ELEMENT* weights = w + expert * expert_stride + n0 * w_stride;
    tile.start([&](int row) { return m0 + row < end ? x + (m0 + row) * x_stride : nullptr; }, weights, w_stride, n - n0, 0);
    tile.multiply(shared, k, x);
    tile.stage_out(shared, [](int row, float sum, float) { return sum; });
    sync_threads();
    store_tile<ELEMENT, BLOCK_M, BLOCK_N, Tile::threads, ALIGNED_OUT>(
        shared, [&](int row) { return m0 + row < end ? out + (m0 + row) * out_stride + n0 : nullptr; }, n - n0);
}
"""


def rows_per_expert(problem: GroupedMatmul) -> float:
    """Expected rows of a visited expert."""
    return problem.rows / experts_hit(problem.tokens, problem.experts, problem.top_k, problem.skew)


def fits(problem: GroupedMatmul, config: TileConfig, chip: Chip) -> str | None:
    """16-bit operands; see expert_tiles."""
    if problem.format:
        return "is for 16-bit operands; fp8 blocks are multiplied by triton_grouped"
    if problem.experts > 1024:
        return "a lane keeps the offsets of at most 32 experts"
    return tile_fits(config, problem.dtype, chip)


def default(problem: GroupedMatmul, chip: Chip) -> TileConfig:
    """By the rows of a visited expert."""
    return tile_default(rows_per_expert(problem), chip)


def space(problem: GroupedMatmul, chip: Chip) -> Iterator[TileConfig]:
    """See expert_tiles."""
    yield from tile_space(rows_per_expert(problem), problem.n, problem.k)


def _in_chunks(tensor: torch.Tensor) -> bool:
    """Whether each row is whole 16-byte chunks at multiples of 16 bytes, so that no chunk runs over the row's end."""
    return tensor.shape[-1] % 8 == 0 and tensor.stride(-2) % 8 == 0 and tensor.data_ptr() % 16 == 0


@kernel(GroupedMatmul, backend="cuda", config=TileConfig, fits=fits, default=default, space=space)
def cuda_grouped(problem: GroupedMatmul, config: TileConfig, chip: Chip) -> Launch:
    """CUDA C++, 16 bits (fp8 blocks: Triton), one launch: mma.sync with a cp.async ring; the experts' tiles found by a scan per warp."""
    p, c = problem, config
    defines: dict[str, str | int] = {
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "STAGES": c.stages, "WARPS_M": c.warps_m, "WARPS_N": c.warps_n,
        "GROUP_M": c.group_m, "EXPERTS": p.experts, "ELEMENT": ELEMENT[p.dtype],
    }  # fmt: skip
    variants = {
        (a, b): CudaKernel(SOURCE, "grouped_mma", chip, {**defines, "ALIGNED": int(a), "ALIGNED_OUT": int(b)}, c.smem_bytes)
        for a in (False, True)
        for b in (False, True)
    }
    grid = (most_blocks(p.rows, p.experts, c.block_m) * -(-p.n // c.block_n), 1, 1)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        aligned = _in_chunks(x) and _in_chunks(w) and w.stride(0) % 8 == 0
        strides = [Int64(x.stride(0)), Int64(w.stride(0)), Int64(w.stride(1)), Int64(out.stride(0))]
        variants[aligned, _in_chunks(out)].launch(grid, c.threads, [x, w, inputs["offsets"], out, p.n, p.k, *strides])

    return launch
