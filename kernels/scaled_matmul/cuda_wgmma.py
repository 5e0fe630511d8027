"""CUDA C++ on Hopper's warpgroup products (wgmma): fp8 and int8, block scales promoted while the next product runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.scaled_matmul import _tiles
from klab.kernels.scaled_matmul._cuda_launch import split_launch
from klab.kernels.scaled_matmul._wgmma8 import wgmma8_function
from klab.kernels.scaled_matmul.problem import BLOCK, ScaledMatmul
from klab.kernels.triton_support import cdiv

INCLUDES = """
#include "fp8.cuh"
#include "hopper.cuh"
"""

SOURCE = r"""
using namespace klab;
constexpr int THREADS = GROUPS * 128, BLOCK_M = GROUPS * 64, BLOCK_K = 128;
constexpr int TILES_N = BLOCK_N / 8;
constexpr int X_BYTES = BLOCK_M * BLOCK_K, STAGE_BYTES = X_BYTES + BLOCK_N * BLOCK_K;
// Steps whose copies are under way beside the two whose products are.
constexpr int AHEAD = STAGES - 2;

#if INTEGERS
using Sum = int32_t;
#else
using Sum = float;
#endif

// Bring rows of 128 bytes to shared memory; what lies beyond the matrix becomes zero.
template <int ROWS>
KLAB_DEVICE void load_tile(char* tile, const char* from, int64_t stride, int rows_left, int columns_left) {
    constexpr int CHUNKS = BLOCK_K / 16, STEP = THREADS / CHUNKS;
    const int first = thread_idx() / CHUNKS, chunk = thread_idx() % CHUNKS;
    const char* source = from + first * stride + chunk * 16;
    KLAB_UNROLL
    for (int i = 0; i < ceil_div(ROWS, STEP); ++i) {
        const int row = first + i * STEP;
        if (ROWS % STEP == 0 || row < ROWS)
            cp_async_16(tile + swizzle<BLOCK_K>(row, chunk), source, row < rows_left && chunk * 16 < columns_left);
        source += STEP * stride;
    }
}

KLAB_DEVICE float scale_of(const float* scales, int64_t index, bool exists) { return exists ? scales[index] : 0.0f; }

// Block (t, s): tile t of the output from the s-th `part` of k; with SPLIT, `to` is float [splits, m, n], else the output.
KLAB_KERNEL(scaled_wgmma, THREADS)(const void* __restrict__ x, const void* __restrict__ w, const float* __restrict__ x_scale,
                                   const float* __restrict__ w_scale, OUT* __restrict__ to, int m, int n, int k, int part, int aligned,
                                   int64_t x_stride, int64_t w_stride, int64_t to_stride, int64_t x_scale_stride, int64_t w_scale_stride) {
    char* shared = shared_memory<char>();
    shared += -shared_address(shared) & 1023;  // panels begin at multiples of 1024 bytes
    const int group = thread_idx() / 128, lane = thread_idx() % 32;

    // Blocks that run together share rows and columns through L2: GROUP_M tile rows at a time, column by column.
    const int tiles_m = ceil_div(m, BLOCK_M), tiles_n = ceil_div(n, BLOCK_N);
    const int first_m = block_idx_x() / (GROUP_M * tiles_n) * GROUP_M, in_group = block_idx_x() % (GROUP_M * tiles_n);
    const int group_rows = min_of(tiles_m - first_m, GROUP_M);
    const int m0 = (first_m + in_group % group_rows) * BLOCK_M, n0 = in_group / group_rows * BLOCK_N;
    const int k_begin = block_idx_y() * part, k_end = min_of(k, k_begin + part);
    // Whole unrolled rounds: beyond the end of k the copies bring zeros.
    const int steps = round_up(max_of(0, ceil_div(k_end - k_begin, BLOCK_K)), STEPS);

    const char* x_tile = static_cast<const char*>(x) + m0 * x_stride + k_begin;
    const char* w_tile = static_cast<const char*>(w) + n0 * w_stride + k_begin;
    auto load_stage = [&](int step) {
        char* stage = shared + step % STAGES * STAGE_BYTES;
        const int k0 = step * BLOCK_K;
        load_tile<BLOCK_M>(stage, x_tile + k0, x_stride, m - m0, k_end - k_begin - k0);
        load_tile<BLOCK_N>(stage + X_BYTES, w_tile + k0, w_stride, n - n0, k_end - k_begin - k0);
    };
    KLAB_UNROLL
    for (int step = 0; step < AHEAD; ++step) {
        if (step < steps) load_stage(step);
        cp_async_commit();
    }
    // Have the stage of `step` arrive for everybody, and bring another to where the products of step - 2 have been.
    auto arrive = [&](int step) {
        cp_async_wait<AHEAD - 1>();
        fence_async_proxy();
        sync_threads();
        if (step + AHEAD < steps) load_stage(step + AHEAD);
        cp_async_commit();
    };
    // Begin the products of a step, 64 rows for this warpgroup.
    auto multiply = [&](Sum (&sum)[TILES_N][4], int step, bool accumulate) {
        const uint32_t stage = shared_address(shared + step % STAGES * STAGE_BYTES);
        const uint32_t rows = stage + group * 64 * BLOCK_K, columns = stage + X_BYTES;
        wgmma_fence();
        KLAB_UNROLL
        for (int i = 0; i < BLOCK_K / 32; ++i) multiply8(sum, panel_rows(rows + 32 * i), panel_rows(columns + 32 * i), accumulate || i > 0);
        wgmma_commit();
    };

    // This thread's rows: this one and the one 8 below.
    const int row0 = m0 + thread_idx() / 32 * 16 + lane / 4;
#if BLOCK_SCALES
    float total[TILES_N][4];
    // Two sets of sums: while the tensor cores fill one, the other is scaled and added up in float.
    Sum sums[2][TILES_N][4] = {};
    float scale[2][2];
    KLAB_UNROLL
    for (int j = 0; j < TILES_N; ++j)
        KLAB_UNROLL
        for (int i = 0; i < 4; ++i) total[j][i] = 0.0f;
    auto load_scales = [&](float (&of)[2], int step) {
        // Beyond the end the products are zero, and any finite scale will do.
        const int block = k_begin / BLOCK_K + min_of(step, ceil_div(k - k_begin, BLOCK_K) - 1);
        const float of_w = w_scale[n0 / BLOCK_K * w_scale_stride + block];
        KLAB_UNROLL
        for (int h = 0; h < 2; ++h) of[h] = of_w * scale_of(x_scale, (row0 + 8 * h) * x_scale_stride + block, row0 + 8 * h < m);
    };
    auto promote = [&](Sum (&sum)[TILES_N][4], const float (&by)[2]) {
        settled(sum);
        KLAB_UNROLL
        for (int j = 0; j < TILES_N; ++j)
            KLAB_UNROLL
            for (int i = 0; i < 4; ++i) total[j][i] = fused_multiply_add(sum[j][i], by[i / 2], total[j][i]);
    };
    // STEPS at a time, between which nothing is under way: ptxas runs products one after another whose sums are read in the next iteration.
    for (int first = 0; first < steps; first += STEPS) {
        KLAB_UNROLL
        for (int u = 0; u < STEPS; ++u) {
            arrive(first + u);
            multiply(sums[u % 2], first + u, false);
            load_scales(scale[u % 2], first + u);
            if (u > 0) {
                wgmma_wait<1>();
                promote(sums[(u + 1) % 2], scale[(u + 1) % 2]);
            }
        }
        wgmma_wait<0>();
        promote(sums[(STEPS + 1) % 2], scale[(STEPS + 1) % 2]);
    }
#else
    Sum sum[TILES_N][4] = {};
    for (int step = 0; step < steps; ++step) {
        arrive(step);
        multiply(sum, step, step > 0);
        wgmma_wait<1>();  // the step before has been read
    }
    wgmma_wait<0>();
    settled(sum);
#endif

    // Through shared memory, so that 16 bytes of a row leave at once.
    constexpr int ROW_BYTES = BLOCK_N * sizeof(OUT), PER_CHUNK = 16 / sizeof(OUT);
    cp_async_wait<0>();
    sync_threads();
#if !BLOCK_SCALES
    // Behind the tile: as registers the scales of 64 columns a thread are read ahead of their use, beside 128 sums, and spill.
    float* of_columns = reinterpret_cast<float*>(shared + BLOCK_M * ROW_BYTES);
    for (int i = thread_idx(); i < BLOCK_N; i += THREADS) of_columns[i] = scale_of(w_scale, (n0 + i) * w_scale_stride, n0 + i < n);
    float of_x[2];
    KLAB_UNROLL
    for (int h = 0; h < 2; ++h) of_x[h] = scale_of(x_scale, (row0 + 8 * h) * x_scale_stride, row0 + 8 * h < m);
    sync_threads();
#endif
    KLAB_UNROLL
    for (int j = 0; j < TILES_N; ++j)
        KLAB_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int column = j * 8 + lane % 4 * 2 + i % 2;
            char* chunk = shared + swizzle<ROW_BYTES>(row0 - m0 + i / 2 * 8, column / PER_CHUNK);
#if BLOCK_SCALES
            const float value = total[j][i];
#else
            const float value = static_cast<float>(sum[j][i]) * of_x[i / 2] * of_columns[column];
#endif
            reinterpret_cast<OUT*>(chunk)[column % PER_CHUNK] = from_float<OUT>(value);
        }
    sync_threads();
    if (SPLIT) to += block_idx_y() * (m * to_stride);
    for (int i = thread_idx(); i < BLOCK_M * BLOCK_N / PER_CHUNK; i += THREADS) {
        const int row = i / (BLOCK_N / PER_CHUNK), chunk = i % (BLOCK_N / PER_CHUNK), column = n0 + chunk * PER_CHUNK;
        if (m0 + row < m && column < n) {
            const char* from = shared + swizzle<ROW_BYTES>(row, chunk);
            OUT* out = to + (m0 + row) * to_stride + column;
            if (aligned)
                store_16(out, load_16(from));
            else
                for (int j = 0; j < PER_CHUNK; ++j)
                    if (column + j < n) out[j] = reinterpret_cast<const OUT*>(from)[j];
        }
    }
}
"""


@dataclass(frozen=True)
class WgmmaConfig(Config):
    """`groups` warpgroups compute 64 x block_n outputs each, over 1/split_k of k, 128 of k a step and stage.

    With block scales, `unroll` steps are taken in one go: all but the last are scaled and added up while the next one runs.
    """

    groups: int = 2
    block_n: int = 128
    split_k: int = 1
    stages: int = 6
    unroll: int = 4
    group_m: int = 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.groups * 128

    def smem_bytes(self, dtype: str) -> int:
        """The ring, or the tile of the output and the scales of its columns in the same memory; and 1024 bytes to align it."""
        out_bytes = 4 if self.split_k > 1 else SIZE_BYTES[dtype]
        rows = self.groups * 64
        return max(self.stages * (rows + self.block_n) * 128, (rows * out_bytes + 4) * self.block_n) + 1024

    def registers(self, problem: ScaledMatmul) -> int:
        """Per thread, estimated: one set of sums, three with block scales, and 55 more (NVRTC 13.0 allots 128 to 255)."""
        return (3 if problem.format == "fp8_block" else 1) * self.block_n // 2 + 55


def fits(problem: ScaledMatmul, config: WgmmaConfig, chip: Chip) -> str | None:
    """Why this config cannot run, or None."""
    c = config
    why = _tiles.refused_format(problem)
    if why is not None:
        return why
    if chip.target != 90:
        return "wgmma is Hopper's (sm_90a)"
    if problem.k % 16:
        return "copies 16 bytes at a time: k must be a multiple of 16"
    if c.groups not in (1, 2, 3, 4) or c.block_n not in (64, 128, 256):
        return "1 to 4 warpgroups share 64, 128 or 256 columns"
    if problem.format == "fp8_block":
        if c.block_n > BLOCK:
            return "the columns of a tile must share one block of scales"
        if c.unroll not in (2, 4):
            return "block scales are taken 2 or 4 steps at a time"
    elif c.unroll != 1:
        return "only block scales need steps to be taken together: unroll is 1"
    if c.stages < 3 or c.split_k < 1 or c.group_m < 1:
        return "needs three stages, one split and one row of tiles"
    if c.split_k > 1 and c.split_k * 128 > problem.k:
        return "more splits than steps along k"
    if c.split_k > 1 and c.split_k * problem.m * problem.n * 4 > chip.memory_bytes // 16:
        return "the partial sums need too much memory"
    if c.smem_bytes(problem.dtype) > chip.smem_per_block_bytes:
        return f"{c.smem_bytes(problem.dtype)} B of shared memory, {chip.smem_per_block_bytes} allowed"
    registers = c.registers(problem)
    if registers > min(255, 65536 // c.threads):
        return f"about {registers} registers, {min(255, 65536 // c.threads)} allowed"
    return None


def default(problem: ScaledMatmul, chip: Chip) -> WgmmaConfig:
    """Two warpgroups of 64x128 with block scales, of 64x256 without where there are tiles for the chip; one, and splits, for few rows."""
    p = problem
    blocks = p.format == "fp8_block"
    unroll = 4 if blocks else 1
    if p.m > 64:
        wide = not blocks and _tiles.tiles(p, 128, 256) >= chip.sm_count
        config = WgmmaConfig(2, 256 if wide else 128, 1, 4 if wide else 6, unroll, 8 if p.m > 128 else 1)
    else:
        tiles, steps, splits = cdiv(p.n, 64), cdiv(p.k, 128), 1
        # Two blocks an SM; fewer than 4 steps per split would not pay for the second pass.
        while tiles * splits < 2 * chip.sm_count and 8 * splits <= steps and splits < 16:
            splits *= 2
        config = WgmmaConfig(1, 64, splits, 6, unroll, 1)
    return config


def space(problem: ScaledMatmul, chip: Chip) -> Iterator[WgmmaConfig]:
    """Tiles not much larger than the problem and every ring that fits."""
    unrolls = (2, 4) if problem.format == "fp8_block" else (1,)
    for groups, block_n, split_k in product((1, 2, 3, 4), (64, 128, 256), (1, 2, 4, 8, 16)):
        if groups > 1 and groups * 64 >= 2 * problem.m:
            continue
        steps, tiles = cdiv(problem.k, 128), _tiles.tiles(problem, groups * 64, block_n)
        if split_k > 1 and (tiles * split_k > 8 * chip.sm_count or steps < 2 * split_k):
            continue  # the chip is full without it, or a split is too short to pipeline
        tile_rows = cdiv(problem.m, groups * 64)
        for stages, unroll in product((3, 4, 5, 6, 8), unrolls):
            if stages > max(3, cdiv(steps, split_k)):
                continue
            # All groups of at least the tile rows walk alike: only the smallest of them.
            for group_m in (1, 8, 16)[: 1 + (tile_rows > 1) + (tile_rows > 8)]:
                yield WgmmaConfig(groups, block_n, split_k, stages, unroll, group_m)


@kernel(ScaledMatmul, backend="cuda", config=WgmmaConfig, fits=fits, default=default, space=space)
def cuda_wgmma(problem: ScaledMatmul, config: WgmmaConfig, chip: Chip) -> Launch:
    """Hopper's wgmma with a cp.async ring, fp8 and int8: block scales are promoted in float32 behind the next product."""
    p, c = problem, config
    integers = p.format == "int8_row"
    defines: dict[str, str | int] = {
        "GROUPS": c.groups, "BLOCK_N": c.block_n, "STAGES": c.stages, "STEPS": c.unroll, "GROUP_M": c.group_m, "SPLIT": int(c.split_k > 1),
        "INTEGERS": int(integers), "BLOCK_SCALES": int(p.format == "fp8_block"),
        "OUT": "float" if c.split_k > 1 else ELEMENT[p.dtype],
    }  # fmt: skip
    source = INCLUDES + wgmma8_function(c.block_n, integers=integers) + SOURCE
    multiply = CudaKernel(source, "scaled_wgmma", chip, defines, c.smem_bytes(p.dtype))
    grid = (_tiles.tiles(p, c.groups * 64, c.block_n), c.split_k, 1)
    return split_launch(p, multiply, grid, c.threads, cdiv(cdiv(p.k, 128), c.split_k) * 128, chip)
