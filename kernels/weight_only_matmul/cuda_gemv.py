"""CUDA C++ for up to 8 rows: packed weights are streamed once by warps that wait for nobody, so memory bandwidth is the bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel
import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import CudaKernel, Int64
from klab.kernels.weight_only_matmul._cuda_fragments import COMBINE, FRAGMENTS
from klab.kernels.weight_only_matmul._cuda_launch import STEP_K, common_defines, in_chunks, unfit
from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul

SOURCE = (
    '#include "device.cuh"'
    + FRAGMENTS
    + r"""
using namespace klab;

constexpr int THREADS = WARPS * 32, TILE_N = ROW_TILES * 16;
constexpr int W_BYTES = TILE_N * STEP_BYTES, STEP_TOTAL = W_BYTES + M * X_ROW_BYTES, STAGE_BYTES = UNROLL * STEP_TOTAL;
constexpr int STRIDE_K = UNROLL * STEP_K;  // of k per stage of a warp
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;

struct Part {
    const ELEMENT* x;
    const uint8_t* w;
    int n_left, k_end;
    int x_stride, w_stride;  // within a block offsets fit 32 bits, which saves registers
};

// One stage of this warp: for each step its rows of weights, then its columns of x.
KLAB_DEVICE void bring_stage(const Part& p, char* stage, int k0) {
    const int lane = thread_idx() % 32;
    KLAB_UNROLL
    for (int u = 0; u < UNROLL; ++u) {
        char* to = stage + u * STEP_TOTAL;
        const int k = k0 + u * STEP_K;
        KLAB_UNROLL
        for (int i = 0; i < TILE_N / 8; ++i) {
            const int row = i * 8 + lane / 4, column = k + lane % 4 * LANE_K;
            bring(to + row * STEP_BYTES + lane % 4 * 16, p.w + row * p.w_stride + (column >> HALVED),
                  row < p.n_left ? (p.k_end - column) >> HALVED : 0);
        }
        KLAB_UNROLL
        for (int i = 0; i < ceil_div(M * STEP_K / 8, 32); ++i) {
            const int at = i * 32 + lane, row = at / (STEP_K / 8), chunk = at % (STEP_K / 8), column = k + chunk * 8;
            if (row < M) bring(to + W_BYTES + x_offset(row, chunk), p.x + row * p.x_stride + column, p.k_end - column);
        }
    }
}

// Block (i, s): TILE_N columns of the output from the s-th part of k; `to` is the output, or with SPLIT > 1 float [SPLIT, M, n].
// With a least number of blocks ptxas takes the registers it needs; without, it spills a few for a block more than shared memory allows.
KLAB_KERNEL_MIN_BLOCKS(weight_only_gemv, THREADS, 1)
(const ELEMENT* __restrict__ x, const uint8_t* __restrict__ w, const SCALE* __restrict__ scale, void* __restrict__ to, int n, int k,
 int part, int x_stride, int w_stride, int64_t scale_stride, int64_t to_stride) {
    const int warp = thread_idx() / 32, lane = thread_idx() % 32, n0 = block_idx_x() * TILE_N, k_begin = block_idx_y() * part;
    char* ring = shared_memory<char>() + warp * STAGES * STAGE_BYTES;
    float* scales = reinterpret_cast<float*>(shared_memory<char>() + RING_BYTES);
    const Part p{x, w + static_cast<int64_t>(n0) * w_stride, n - n0, min_of(k, k_begin + part), x_stride, w_stride};

    const int first = k_begin + warp * STRIDE_K, steps = p.k_end > first ? ceil_div(p.k_end - first, WARPS * STRIDE_K) : 0;
    KLAB_UNROLL
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < steps) bring_stage(p, ring + i * STAGE_BYTES, first + i * WARPS * STRIDE_K);
        cp_async_commit();
    }
    // While the first stages are under way: the scales of this block, [TILE_N][groups].
    constexpr uint32_t group_k = max_of(GROUP, 1);
    const int first_group = GROUP ? static_cast<uint32_t>(k_begin) / group_k : 0;
    const int groups = GROUP ? static_cast<uint32_t>(p.k_end - 1) / group_k + 1 - first_group : 1;
    for (int i = thread_idx(); i < TILE_N * groups; i += THREADS) {
        const int row = i / groups, group = first_group + i % groups;
        scales[i] = row < p.n_left ? to_float(scale[(n0 + row) * scale_stride + group]) : 0.0f;
    }
    sync_threads();

    float sum[ROW_TILES][1][4] = {};
    for (int i = 0; i < steps; ++i) {
        cp_async_wait<STAGES - 2>();
        sync_warp();  // what the other lanes have copied is there, and they have read the stage that is filled next
        const int next = i + STAGES - 1;
        if (next < steps) bring_stage(p, ring + static_cast<uint32_t>(next) % STAGES * STAGE_BYTES, first + next * WARPS * STRIDE_K);
        cp_async_commit();
        KLAB_UNROLL
        for (int u = 0; u < UNROLL; ++u) {
            const char* at = ring + static_cast<uint32_t>(i) % STAGES * STAGE_BYTES + u * STEP_TOTAL;
            // Steps behind the end of k have no weights, but may have no group either.
            const int group = static_cast<uint32_t>(first + i * WARPS * STRIDE_K + u * STEP_K) / group_k;
            if (GROUP)
                scaled_step(sum, at, at + W_BYTES, M, scales + min_of(group - first_group, groups - 1), groups);
            else
                multiply_step(sum, at, at + W_BYTES, M);
        }
    }

    cp_async_wait<0>();
    sync_threads();
    float* kept = shared_memory<float>();  // [WARPS][M][TILE_N], below the scales
    KLAB_UNROLL
    for (int t = 0; t < ROW_TILES; ++t)
        KLAB_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int row = lane % 4 * 2 + i % 2, column = t * 16 + i / 2 * 8 + lane / 4;
            if (row < M) kept[(warp * M + row) * TILE_N + column] = sum[t][0][i];
        }
    sync_threads();
    for (int i = thread_idx(); i < M * TILE_N; i += THREADS) {
        const int row = i / TILE_N, column = i % TILE_N;
        if (column >= p.n_left) continue;
        float total = 0.0f;
        KLAB_UNROLL
        for (int j = 0; j < WARPS; ++j) total += kept[j * M * TILE_N + i];
        if (!GROUP) total *= scales[column];
        if (SPLIT > 1)
            static_cast<float*>(to)[(block_idx_y() * M + row) * to_stride + n0 + column] = total;
        else
            static_cast<ELEMENT*>(to)[row * to_stride + n0 + column] = from_float<ELEMENT>(total);
    }
}
"""
)


@dataclass(frozen=True)
class GemvConfig(Config):
    """A block has `row_tiles` times 16 rows of weights, whose k its `warps` share, and one of `split` parts of k.

    Each warp has a ring of `stages` of `unroll` steps, each 64 bytes of every row.
    """

    warps: int = 8
    row_tiles: int = 2
    unroll: int = 1
    stages: int = 4
    split: int = 1


def _part(problem: WeightOnlyMatmul, config: GemvConfig) -> int:
    """Columns of k that one block of a split walks: whole steps, so that every part starts at a whole chunk."""
    step = STEP_K[problem.format]
    return -(-problem.k // (config.split * step)) * step


def _smem_bytes(problem: WeightOnlyMatmul, config: GemvConfig) -> int:
    """The rings, or the warps' sums that replace them; and the scales behind."""
    rows = config.row_tiles * 16
    step_bytes = rows * 64 + problem.m * STEP_K[problem.format] * 2
    rings = config.warps * config.stages * config.unroll * step_bytes
    groups = _part(problem, config) // problem.group + 2 if problem.groups > 1 else 1
    return rings + rows * groups * 4


def _steps_k(problem: WeightOnlyMatmul, config: GemvConfig) -> int:
    """Columns of k that all warps of all parts take at once: with less in the problem some have nothing to do."""
    return config.split * config.warps * config.unroll * STEP_K[problem.format]


def fits(problem: WeightOnlyMatmul, config: GemvConfig, chip: Chip) -> str | None:
    """Why this config cannot run, or None. Odd sizes and strides run too, by a slower load."""
    if problem.m > 8:
        return f"is for up to 8 rows, not {problem.m}"
    reason = unfit(problem, chip)
    if reason:
        return reason
    if config.stages < 2 or min(config.warps, config.row_tiles, config.unroll, config.split) < 1 or config.warps > 32:
        return "needs two stages, and at least one of everything else"
    smem = _smem_bytes(problem, config)
    if smem > chip.smem_per_block_bytes:
        return f"{smem} B of shared memory, {chip.smem_per_block_bytes} allowed"
    # Two words of 16 bytes per tile, sums and those of a group, 60 for addresses and the unpacked.
    registers, allowed = 16 * config.row_tiles + 60, min(255, 65536 // (32 * config.warps))
    if registers > allowed:
        return f"about {registers} registers, {allowed} allowed"
    if config.split > 1 and (config.split - 1) * _part(problem, config) >= problem.k:
        return f"k={problem.k} has no {config.split} parts"
    return None


def default(problem: WeightOnlyMatmul, chip: Chip) -> GemvConfig:
    """Rings of 64 KB and three blocks to an SM; fewer warps where k has no step for each; k split while SMs would be idle."""
    config = GemvConfig()
    while config.warps > 1 and _steps_k(problem, config) > problem.k:
        config = replace(config, warps=config.warps // 2)
    if -(-problem.n // 32) < 2 * chip.sm_count:
        config = replace(config, row_tiles=1)
    while config.stages > 2 and fits(problem, config, chip):
        config = replace(config, stages=config.stages - 1)
    blocks = -(-problem.n // (16 * config.row_tiles))
    # A split costs a second launch, 2 to 3 us: not before a quarter of the SMs would be idle.
    while 4 * blocks * config.split < 3 * chip.sm_count and config.split < 16 and 2 * _steps_k(problem, config) <= problem.k:
        config = replace(config, split=2 * config.split)
    return config


def space(problem: WeightOnlyMatmul, chip: Chip) -> Iterator[GemvConfig]:
    """Whatever gives each warp at least one step of k, and tiles not larger than the output."""
    for warps, row_tiles, unroll, stages, split in product((2, 4, 8, 16), (1, 2, 4), (1, 2, 4), (2, 3, 4, 6, 8), (1, 2, 4, 8, 16)):
        config = GemvConfig(warps, row_tiles, unroll, stages, split)
        steps = -(-problem.k // _steps_k(problem, config))
        if (_steps_k(problem, config) > problem.k and warps * split > 2) or (stages > 2 and stages > steps + 1):
            continue
        blocks = -(-problem.n // (16 * row_tiles))
        if (row_tiles == 1 or 16 * row_tiles < 2 * problem.n) and (split == 1 or blocks * split <= 8 * chip.sm_count):
            yield config


@kernel(WeightOnlyMatmul, backend="cuda", config=GemvConfig, fits=fits, default=default, space=space)
def cuda_gemv(problem: WeightOnlyMatmul, config: GemvConfig, chip: Chip) -> Launch:
    """Up to 8 rows: every warp streams packed weights by its own cp.async ring and unpacks them into mma.sync's first operand."""
    p, c = problem, config
    defines = common_defines(p) | {
        "M": p.m, "WARPS": c.warps, "ROW_TILES": c.row_tiles, "UNROLL": c.unroll, "STAGES": c.stages, "SPLIT": c.split,
    }  # fmt: skip
    smem = _smem_bytes(p, c)
    variants = {a: CudaKernel(SOURCE, "weight_only_gemv", chip, {**defines, "ALIGNED": int(a)}, smem) for a in (False, True)}
    combine = CudaKernel(COMBINE, "weight_only_combine", chip, {"ELEMENT": defines["ELEMENT"], "SPLIT": c.split})
    partials: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, scale, out = inputs["x"], inputs["w"], inputs["scale"], outputs["out"]
        to = out
        if c.split > 1:
            if out.device not in partials:
                partials[out.device] = torch.empty((c.split, p.m, p.n), dtype=torch.float32, device=out.device)
            to = partials[out.device]
        strides = [x.stride(0), w.stride(0), Int64(scale.stride(0)), Int64(to.stride(-2))]
        aligned = in_chunks(x) and in_chunks(w)
        grid = (-(-p.n // (16 * c.row_tiles)), c.split, 1)
        variants[aligned].launch(grid, 32 * c.warps, [x, w.view(torch.uint8), scale, to, p.n, p.k, _part(p, c), *strides])
        if c.split > 1:
            combine.launch((-(-p.n // 128), p.m, 1), 128, [to, out, p.m, p.n, Int64(out.stride(0))])

    return launch
