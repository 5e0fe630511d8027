"""CUDA C++ on mma.sync: int8 natively, fp8 as halves, block scales promoted in float32, split-K for few rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.scaled_matmul import _tiles
from klab.kernels.scaled_matmul._cuda_launch import split_launch
from klab.kernels.scaled_matmul.problem import BLOCK, ScaledMatmul
from klab.kernels.triton_support import cdiv

SOURCE = r"""
#include "fp8.cuh"
using namespace klab;

constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;  // what one warp computes
constexpr int TILES_M = WARP_M / 16, TILES_N = WARP_N / 8;             // in mma tiles
constexpr int THREADS = WARPS_M * WARPS_N * 32;
constexpr int X_BYTES = BLOCK_M * BLOCK_K, STAGE_BYTES = X_BYTES + BLOCK_N * BLOCK_K;

#if INTEGERS
using Sum = int32_t;
#else
using Sum = float;
#endif

// This warp's columns of w for 32 of k, and their products with 16 rows of x.
template <class T>
struct Weights;
template <>
struct Weights<int32_t> {
    uint32_t of[TILES_N][2];

    KLAB_DEVICE void set(int j, const uint32_t (&b)[2]) {
        of[j][0] = b[0];
        of[j][1] = b[1];
    }
    KLAB_DEVICE void multiply(int32_t (&sum)[TILES_N][4], const uint32_t (&x)[4]) const {
        KLAB_UNROLL
        for (int j = 0; j < TILES_N; ++j) mma_m16n8k32_s8(sum[j], x, of[j]);
    }
};
template <>
struct Weights<float> {
    uint32_t of[2][TILES_N][2];  // as halves

    KLAB_DEVICE void set(int j, const uint32_t (&b)[2]) { fp8_fragment_to_halves(b, of[0][j], of[1][j]); }
    KLAB_DEVICE void multiply(float (&sum)[TILES_N][4], const uint32_t (&x)[4]) const {
        uint32_t halves[2][4];
        fp8_fragment_to_halves(x, halves[0], halves[1]);
        KLAB_UNROLL
        for (int h = 0; h < 2; ++h)
            KLAB_UNROLL
            for (int j = 0; j < TILES_N; ++j) mma_m16n8k16<half_t>(sum[j], halves[h], of[h][j]);
    }
};

// Bring rows of BLOCK_K bytes to shared memory; what lies beyond the matrix becomes zero.
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

// sum += the products of 32 of k at `step` (in 32s) of a stage.
KLAB_DEVICE void multiply(Sum (&sum)[TILES_M][TILES_N][4], const char* stage, int warp_m, int warp_n, int step) {
    const int lane = thread_idx() % 32;
    const char* w_stage = stage + X_BYTES;
    Weights<Sum> w;
    KLAB_UNROLL
    for (int j = 0; j < TILES_N; j += 2) {
        uint32_t r[4];  // chunks 2 step and 2 step + 1 of columns n..n+7, then of n+8..n+15
        const int n = warp_n * WARP_N + j * 8;
        ldmatrix_x4(r, w_stage + swizzle<BLOCK_K>(n + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
        w.set(j, {r[0], r[1]});
        w.set(j + 1, {r[2], r[3]});
    }
    KLAB_UNROLL
    for (int i = 0; i < TILES_M; ++i) {
        uint32_t x[4];
        ldmatrix_x4(x, stage + swizzle<BLOCK_K>(warp_m * WARP_M + i * 16 + lane % 16, step * 2 + lane / 16));
        w.multiply(sum[i], x);
    }
}

KLAB_DEVICE float scale_of(const float* scales, int64_t index, bool exists) { return exists ? scales[index] : 0.0f; }

// Block (t, s): tile t of the output from the s-th `part` of k; with SPLIT, `to` is float [splits, m, n], else the output.
KLAB_KERNEL(scaled_mma, THREADS)(const void* __restrict__ x, const void* __restrict__ w, const float* __restrict__ x_scale,
                                 const float* __restrict__ w_scale, OUT* __restrict__ to, int m, int n, int k, int part, int aligned,
                                 int64_t x_stride, int64_t w_stride, int64_t to_stride, int64_t x_scale_stride, int64_t w_scale_stride) {
    char* shared = shared_memory<char>();
    const int warp = thread_idx() / 32, lane = thread_idx() % 32;
    const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;

    // Blocks that run together share rows and columns through L2: GROUP_M tile rows at a time, column by column.
    const int tiles_m = ceil_div(m, BLOCK_M), tiles_n = ceil_div(n, BLOCK_N);
    const int first_m = block_idx_x() / (GROUP_M * tiles_n) * GROUP_M, in_group = block_idx_x() % (GROUP_M * tiles_n);
    const int group_rows = min_of(tiles_m - first_m, GROUP_M);
    const int m0 = (first_m + in_group % group_rows) * BLOCK_M, n0 = in_group / group_rows * BLOCK_N;
    const int k_begin = block_idx_y() * part, k_end = min_of(k, k_begin + part);
    const int steps = max_of(0, ceil_div(k_end - k_begin, BLOCK_K));

    const char* x_tile = static_cast<const char*>(x) + m0 * x_stride + k_begin;
    const char* w_tile = static_cast<const char*>(w) + n0 * w_stride + k_begin;
    auto load_stage = [&](int step) {
        char* stage = shared + step % STAGES * STAGE_BYTES;
        const int k0 = step * BLOCK_K;
        load_tile<BLOCK_M>(stage, x_tile + k0, x_stride, m - m0, k_end - k_begin - k0);
        load_tile<BLOCK_N>(stage + X_BYTES, w_tile + k0, w_stride, n - n0, k_end - k_begin - k0);
    };
    KLAB_UNROLL
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) load_stage(step);
        cp_async_commit();
    }

    // This thread's rows are 8 apart, from here.
    const int row0 = m0 + warp_m * WARP_M + lane / 4;
    float total[TILES_M][TILES_N][4] = {}, scale[2 * TILES_M];
    auto load_scales = [&](int step) {
        const int block = (k_begin + step * BLOCK_K) / SCALE_BLOCK;
        const float of_w = scale_of(w_scale, n0 / SCALE_BLOCK * w_scale_stride + block, step < steps);
        KLAB_UNROLL
        for (int i = 0; i < 2 * TILES_M; ++i) {
            const int row = row0 + 8 * i;
            scale[i] = of_w * scale_of(x_scale, row * x_scale_stride + block, row < m && step < steps);
        }
    };
    if (BLOCK_SCALES) load_scales(0);
    Sum sum[TILES_M][TILES_N][4] = {};
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<STAGES - 2>();
        sync_threads();  // this stage has arrived for everybody, and nobody reads the one before any more
        if (step + STAGES - 1 < steps) load_stage(step + STAGES - 1);
        cp_async_commit();
        const char* stage = shared + step % STAGES * STAGE_BYTES;
        KLAB_UNROLL
        for (int i = 0; i < BLOCK_K / 32; ++i) multiply(sum, stage, warp_m, warp_n, i);
        if (BLOCK_SCALES) {
            KLAB_UNROLL
            for (int a = 0; a < TILES_M; ++a)
                KLAB_UNROLL
                for (int b = 0; b < TILES_N; ++b)
                    KLAB_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        total[a][b][i] = fused_multiply_add(sum[a][b][i], scale[2 * a + i / 2], total[a][b][i]);
                        sum[a][b][i] = 0;
                    }
            load_scales(step + 1);
        }
    }
    if (!BLOCK_SCALES)
        KLAB_UNROLL
        for (int b = 0; b < TILES_N; ++b)
            KLAB_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int column = n0 + warp_n * WARP_N + b * 8 + lane % 4 * 2 + i % 2;
                const float of_w = scale_of(w_scale, column * w_scale_stride, column < n);
                KLAB_UNROLL
                for (int a = 0; a < TILES_M; ++a) {
                    const int row = row0 + 16 * a + i / 2 * 8;
                    total[a][b][i] = static_cast<float>(sum[a][b][i]) * scale_of(x_scale, row * x_scale_stride, row < m) * of_w;
                }
            }

    // Through shared memory, so that 16 bytes of a row leave at once.
    constexpr int ROW_BYTES = BLOCK_N * sizeof(OUT), PER_CHUNK = 16 / sizeof(OUT);
    cp_async_wait<0>();
    sync_threads();
    KLAB_UNROLL
    for (int a = 0; a < TILES_M; ++a)
        KLAB_UNROLL
        for (int b = 0; b < TILES_N; ++b)
            KLAB_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int row = warp_m * WARP_M + a * 16 + i / 2 * 8 + lane / 4, column = warp_n * WARP_N + b * 8 + lane % 4 * 2 + i % 2;
                char* chunk = shared + swizzle<ROW_BYTES>(row, column / PER_CHUNK);
                reinterpret_cast<OUT*>(chunk)[column % PER_CHUNK] = from_float<OUT>(total[a][b][i]);
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
class MmaConfig(Config):
    """Tile of a block (elements), parts of k, stages of the ring, the warps that share a tile, tile rows walked together (for L2)."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 128
    split_k: int = 1
    stages: int = 3
    warps_m: int = 2
    warps_n: int = 4
    group_m: int = 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps_m * self.warps_n * 32

    def smem_bytes(self, dtype: str) -> int:
        """The ring, or the tile of the output (float32 partial sums with splits) that passes through the same memory."""
        out_bytes = 4 if self.split_k > 1 else SIZE_BYTES[dtype]
        return max(self.stages * (self.block_m + self.block_n) * self.block_k, self.block_m * self.block_n * out_bytes)

    def registers(self, problem: ScaledMatmul) -> int:
        """Per thread, estimated: sums (twice with block scales), the fragments of w and of one tile of x, 50 for addresses."""
        warp_m, warp_n = self.block_m // self.warps_m, self.block_n // self.warps_n
        sums = warp_m * warp_n // 32
        if problem.format == "int8_row":
            return sums + warp_n // 4 + 4 + 50
        scaled = problem.format == "fp8_block"
        return (2 if scaled else 1) * sums + (warp_m // 8 if scaled else 0) + warp_n // 2 + 16 + 50


def fits(problem: ScaledMatmul, config: MmaConfig, chip: Chip) -> str | None:
    """Why this config cannot run, or None."""
    c = config
    why = _tiles.refused_format(problem)
    if why is not None:
        return why
    if chip.target < (80 if problem.format == "int8_row" else 89):
        return "needs compute capability 8.0, and 8.9 for fp8"
    if problem.k % 16:
        return "copies 16 bytes at a time: k must be a multiple of 16"
    if c.block_m % (16 * c.warps_m) or c.block_n % (16 * c.warps_n) or c.warps_m < 1 or c.warps_n < 1:
        return "a warp's tile is not a multiple of 16x16"
    if c.block_k not in (64, 128) or c.block_n not in (32, 64, 128, 256) or c.threads % (c.block_k // 16) or c.threads > 1024:
        return "block_k is 64 or 128, block_n 32 to 256, and the threads a multiple of the 16-byte chunks of a row"
    if problem.format == "fp8_block" and c.block_n > BLOCK:
        return "the columns of a tile must share one block of scales"
    if c.stages < 2 or c.split_k < 1 or c.group_m < 1:
        return "needs two stages, one split and one row of tiles"
    if c.split_k > 1 and c.split_k * c.block_k > problem.k:
        return "more splits than steps along k"
    if c.split_k > 1 and c.split_k * problem.m * problem.n * 4 > chip.memory_bytes // 16:
        return "the partial sums need too much memory"
    if c.smem_bytes(problem.dtype) > chip.smem_per_block_bytes:
        return f"{c.smem_bytes(problem.dtype)} B of shared memory, {chip.smem_per_block_bytes} allowed"
    registers = c.registers(problem)
    if registers > min(255, 65536 // c.threads):
        return f"about {registers} registers, {min(255, 65536 // c.threads)} allowed"
    return None


def default(problem: ScaledMatmul, chip: Chip) -> MmaConfig:
    """128x128 tiles by eight warps, half of that with block scales; flat ones, a deep ring and splits that fill the chip for few rows."""
    p = problem
    if p.m > 64:
        # With block scales 64 sums a thread are two sets: 64x128 by four warps takes 238 registers, and two blocks share an SM.
        config = MmaConfig(block_m=64, stages=4, warps_n=2) if p.format == "fp8_block" else MmaConfig()
        while config.stages > 2 and config.smem_bytes(p.dtype) > chip.smem_per_block_bytes:
            config = replace(config, stages=config.stages - 1)
        return config
    # 32 rows for each of four warps keep to 96 registers with block scales, and spill; 16 for each of two by two take 84.
    block_m, warps_m = (16, 1) if p.m <= 16 else (32, 2 if p.format == "fp8_block" else 1) if p.m <= 32 else (64, 2)
    tiles, steps, splits = cdiv(p.m, block_m) * cdiv(p.n, 64), cdiv(p.k, 128), 1
    # Two blocks an SM; fewer than 4 steps per split would not pay for the second pass.
    while tiles * splits < 2 * chip.sm_count and 8 * splits <= steps and splits < 16:
        splits *= 2
    stages = 6 if block_m <= 32 else 4
    while stages > 2 and stages * (block_m + 64) * 128 > chip.smem_per_block_bytes:
        stages -= 1
    return MmaConfig(block_m, 64, 128, splits, stages, warps_m, 4 // warps_m, 1)


def space(problem: ScaledMatmul, chip: Chip) -> Iterator[MmaConfig]:
    """Tiles not much larger than the problem, every ring that fits, and warps of 16x16 to 64x64."""
    for block_m, block_n, block_k, split_k in product((16, 32, 64, 128, 256), (32, 64, 128, 256), (64, 128), (1, 2, 4, 8, 16)):
        if block_m >= 2 * max(problem.m, 16) or block_n >= 2 * max(problem.n, 32):
            continue
        steps, tiles = cdiv(problem.k, block_k), _tiles.tiles(problem, block_m, block_n)
        if split_k > 1 and (tiles * split_k > 8 * chip.sm_count or steps < 2 * split_k):
            continue  # the chip is full without it, or a split is too short to pipeline
        warps = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (2, 4), (4, 2), (4, 4))
        for stages, (warps_m, warps_n) in product((2, 3, 4, 6, 8), warps):
            if stages > max(2, cdiv(steps, split_k)):
                continue
            # All groups of at least the tile rows walk alike: only the smallest of them.
            tile_rows = cdiv(problem.m, block_m)
            for group_m in (1, 8, 16)[: 1 + (tile_rows > 1) + (tile_rows > 8)]:
                yield MmaConfig(block_m, block_n, block_k, split_k, stages, warps_m, warps_n, group_m)


@kernel(ScaledMatmul, backend="cuda", config=MmaConfig, fits=fits, default=default, space=space)
def cuda_mma(problem: ScaledMatmul, config: MmaConfig, chip: Chip) -> Launch:
    """mma.sync with a cp.async ring: int8 natively, fp8 converted to half in registers (no fp8 tensor cores), sums in float32."""
    p, c = problem, config
    defines: dict[str, str | int] = {
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "STAGES": c.stages, "WARPS_M": c.warps_m, "WARPS_N": c.warps_n,
        "GROUP_M": c.group_m, "SPLIT": int(c.split_k > 1), "INTEGERS": int(p.format == "int8_row"),
        "BLOCK_SCALES": int(p.format == "fp8_block"), "SCALE_BLOCK": BLOCK, "OUT": "float" if c.split_k > 1 else ELEMENT[p.dtype],
    }  # fmt: skip
    multiply = CudaKernel(SOURCE, "scaled_mma", chip, defines, c.smem_bytes(p.dtype))
    grid = (_tiles.tiles(p, c.block_m, c.block_n), c.split_k, 1)
    return split_launch(p, multiply, grid, c.threads, cdiv(cdiv(p.k, c.block_k), c.split_k) * c.block_k, chip)
