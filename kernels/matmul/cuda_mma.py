"""CUDA C++ matmul for many rows: tensor cores by mma.sync, fed from shared memory by a ring of cp.async stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.matmul.problem import Matmul

if TYPE_CHECKING:
    import torch

SOURCE = r"""
#include "device.cuh"
using namespace klab;

constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;  // what one warp computes
constexpr int TILES_M = WARP_M / 16, TILES_N = WARP_N / 8;             // in mma tiles
constexpr int THREADS = WARPS_M * WARPS_N * 32;
// Shared memory of W: as it lies in global memory, rows of n ("nt") or rows of k ("nn").
constexpr int W_ROWS = TRANSPOSED ? BLOCK_N : BLOCK_K, W_COLUMNS = TRANSPOSED ? BLOCK_K : BLOCK_N;
constexpr int X_BYTES = BLOCK_M * BLOCK_K * 2, STAGE_BYTES = X_BYTES + BLOCK_N * BLOCK_K * 2;

// Bring a ROWS x COLUMNS tile to shared memory; what lies beyond the matrix becomes zero.
template <int ROWS, int COLUMNS>
KLAB_DEVICE void load_tile(char* tile, const ELEMENT* from, int64_t stride, int rows_left, int columns_left) {
    constexpr int CHUNKS = COLUMNS / 8, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0, "a thread keeps to one column of chunks");
    const int first = thread_idx() / CHUNKS, chunk = thread_idx() % CHUNKS;
    const ELEMENT* source = from + first * stride + chunk * 8;
    KLAB_UNROLL
    for (int i = 0; i < ceil_div(ROWS, STEP); ++i) {
        const int row = first + i * STEP;
        if (ROWS % STEP == 0 || row < ROWS) {
            char* to = tile + swizzle<COLUMNS * 2>(row, chunk);
            if (ALIGNED) {
                cp_async_16(to, source, row < rows_left && chunk * 8 < columns_left);
            } else {
                uint32_t word[4];
                KLAB_UNROLL
                for (int j = 0; j < 4; ++j) {
                    uint32_t pair[2];
                    KLAB_UNROLL
                    for (int h = 0; h < 2; ++h)
                        pair[h] = row < rows_left && chunk * 8 + 2 * j + h < columns_left ? source[2 * j + h].bits : 0;
                    word[j] = pair[0] | pair[1] << 16;
                }
                store_16(to, Vec16{{word[0], word[1], word[2], word[3]}});
            }
        }
        source += STEP * stride;
    }
}

struct Fragments {
    uint32_t x[TILES_M][4];
    uint32_t w[TILES_N][2];
};

// Fragments of the 16 columns of k at `step` (in 16s) of a stage.
KLAB_DEVICE void load_fragments(Fragments& f, const char* stage, int warp_m, int warp_n, int step) {
    const int lane = thread_idx() % 32;
    KLAB_UNROLL
    for (int i = 0; i < TILES_M; ++i)
        ldmatrix_x4(f.x[i], stage + swizzle<BLOCK_K * 2>(warp_m * WARP_M + i * 16 + lane % 16, step * 2 + lane / 16));
    const char* w = stage + X_BYTES;
    KLAB_UNROLL
    for (int j = 0; j < TILES_N; j += 2) {
        const int n = warp_n * WARP_N + j * 8;
        uint32_t r[4];  // k 0..7 and 8..15 of columns n..n+7, then of n+8..n+15
        if (TRANSPOSED)
            ldmatrix_x4(r, w + swizzle<W_COLUMNS * 2>(n + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
        else
            ldmatrix_x4_trans(r, w + swizzle<W_COLUMNS * 2>(step * 16 + lane % 16, n / 8 + lane / 16));
        f.w[j][0] = r[0];
        f.w[j][1] = r[1];
        f.w[j + 1][0] = r[2];
        f.w[j + 1][1] = r[3];
    }
}

KLAB_KERNEL(matmul_mma, THREADS)(const ELEMENT* __restrict__ x, const ELEMENT* __restrict__ w, ELEMENT* __restrict__ out, int m, int n,
                                 int k, int64_t x_stride, int64_t w_stride, int64_t out_stride) {
    char* shared = shared_memory<char>();
    const int warp = thread_idx() / 32, lane = thread_idx() % 32;
    const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;

    // Blocks that run together share rows and columns through L2: GROUP_M tile rows at a time, column by column.
    const int tiles_m = ceil_div(m, BLOCK_M), tiles_n = ceil_div(n, BLOCK_N);
    const int first_m = block_idx_x() / (GROUP_M * tiles_n) * GROUP_M, in_group = block_idx_x() % (GROUP_M * tiles_n);
    const int group_rows = min_of(tiles_m - first_m, GROUP_M);
    const int m0 = (first_m + in_group % group_rows) * BLOCK_M, n0 = in_group / group_rows * BLOCK_N;

    const ELEMENT* x_tile = x + m0 * x_stride;
    const ELEMENT* w_tile = TRANSPOSED ? w + n0 * w_stride : w + n0;
    const int steps = ceil_div(k, BLOCK_K);
    auto load_stage = [&](int step) {
        char* stage = shared + step % STAGES * STAGE_BYTES;
        const int k0 = step * BLOCK_K;
        load_tile<BLOCK_M, BLOCK_K>(stage, x_tile + k0, x_stride, m - m0, k - k0);
        if (TRANSPOSED)
            load_tile<W_ROWS, W_COLUMNS>(stage + X_BYTES, w_tile + k0, w_stride, n - n0, k - k0);
        else
            load_tile<W_ROWS, W_COLUMNS>(stage + X_BYTES, w_tile + k0 * w_stride, w_stride, k - k0, n - n0);
    };
    KLAB_UNROLL
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) load_stage(step);
        cp_async_commit();
    }

    float sum[TILES_M][TILES_N][4] = {};
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<STAGES - 2>();
        sync_threads();  // this stage has arrived for everybody, and nobody reads the one before any more
        if (step + STAGES - 1 < steps) load_stage(step + STAGES - 1);
        cp_async_commit();
        const char* stage = shared + step % STAGES * STAGE_BYTES;
        Fragments f[2];
        load_fragments(f[0], stage, warp_m, warp_n, 0);
        KLAB_UNROLL
        for (int i = 0; i < BLOCK_K / 16; ++i) {
            if (i + 1 < BLOCK_K / 16) load_fragments(f[(i + 1) % 2], stage, warp_m, warp_n, i + 1);
            KLAB_UNROLL
            for (int a = 0; a < TILES_M; ++a)
                KLAB_UNROLL
                for (int b = 0; b < TILES_N; ++b) mma_m16n8k16<ELEMENT>(sum[a][b], f[i % 2].x[a], f[i % 2].w[b]);
        }
    }

    // Through shared memory, so that 16 bytes of a row leave at once.
    cp_async_wait<0>();
    sync_threads();
    KLAB_UNROLL
    for (int a = 0; a < TILES_M; ++a)
        KLAB_UNROLL
        for (int b = 0; b < TILES_N; ++b)
            KLAB_UNROLL
            for (int h = 0; h < 2; ++h) {
                const int row = warp_m * WARP_M + a * 16 + h * 8 + lane / 4, chunk = warp_n * WARP_N / 8 + b;
                char* to = shared + swizzle<BLOCK_N * 2>(row, chunk) + lane % 4 * 4;
                *reinterpret_cast<uint32_t*>(to) = pack2<ELEMENT>(sum[a][b][2 * h], sum[a][b][2 * h + 1]);
            }
    sync_threads();
    for (int i = thread_idx(); i < BLOCK_M * BLOCK_N / 8; i += THREADS) {
        const int row = i / (BLOCK_N / 8), chunk = i % (BLOCK_N / 8), column = n0 + chunk * 8;
        if (m0 + row < m && column < n) {
            const Vec16 v = load_16(shared + swizzle<BLOCK_N * 2>(row, chunk));
            ELEMENT* to = out + (m0 + row) * out_stride + column;
            if (ALIGNED_OUT)
                store_16(to, v);
            else
                KLAB_UNROLL
                for (int j = 0; j < 8; ++j)
                    if (column + j < n) to[j].bits = static_cast<uint16_t>(v.word[j / 2] >> (16 * (j % 2)));
        }
    }
}
"""


@dataclass(frozen=True)
class MmaConfig(Config):
    """Tile of a block (elements), stages of the ring, the warps that share a tile, and tile rows walked together for the L2's sake."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    stages: int = 3
    warps_m: int = 2
    warps_n: int = 2
    group_m: int = 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps_m * self.warps_n * 32

    @property
    def smem_bytes(self) -> int:
        """The ring, or the tile of the output that passes through the same memory."""
        return 2 * max(self.stages * (self.block_m + self.block_n) * self.block_k, self.block_m * self.block_n)

    @property
    def registers(self) -> int:
        """Per thread, estimated: the sums, two sets of fragments, 45 for addresses. NVRTC 13.0 allots up to 50 more or fewer, unspilled."""
        warp_m, warp_n = self.block_m // self.warps_m, self.block_n // self.warps_n
        return warp_m * warp_n // 32 + 2 * (warp_m // 4 + warp_n // 4) + 45


def fits(problem: Matmul, config: MmaConfig, chip: Chip) -> str | None:
    """Why this config cannot run, or None. Odd sizes and strides run too, by a slower load."""
    c = config
    if SIZE_BYTES[problem.dtype] != 2:
        return f"{problem.dtype} has no tensor-core product of full precision"
    if chip.target < 80:
        return "needs compute capability 8.0"
    if c.block_m % (16 * c.warps_m) or c.block_n % (16 * c.warps_n):
        return "a warp's tile is not a multiple of 16x16"
    if c.block_k not in (32, 64, 128) or c.block_n % 64 or c.threads % (max(c.block_n, c.block_k) // 8):
        return "block_k is 32, 64 or 128, block_n a multiple of 64, and the threads a multiple of the 16-byte chunks of a row"
    if c.stages < 2:
        return "needs two stages"
    if c.smem_bytes > chip.smem_per_block_bytes:
        return f"{c.smem_bytes} B of shared memory, {chip.smem_per_block_bytes} allowed"
    if c.registers > min(255, 65536 // c.threads):
        return f"about {c.registers} registers, {min(255, 65536 // c.threads)} allowed"
    return None


def default(problem: Matmul, chip: Chip) -> MmaConfig:
    """128x128x64 with three stages, so that two blocks share an SM of 228 KB; flatter for few rows; fewer stages on a small chip."""
    config = MmaConfig()
    if problem.m <= 64:
        config = MmaConfig(block_m=32 if problem.m <= 32 else 64, warps_m=1 if problem.m <= 32 else 2, warps_n=4 if problem.m <= 32 else 2)
    if problem.m <= 128:
        config = replace(config, group_m=1, stages=4)
    while config.stages > 2 and config.smem_bytes > chip.smem_per_block_bytes:
        config = replace(config, stages=config.stages - 1)
    return config


def space(problem: Matmul, chip: Chip) -> Iterator[MmaConfig]:
    """Tiles not much larger than the problem, every ring that fits, and warps of 16x16 to 64x64."""
    for block_m, block_n, block_k in product((32, 64, 128, 256), (64, 128, 256), (32, 64, 128)):
        if block_m >= 2 * max(problem.m, 32) or block_n >= 2 * max(problem.n, 64) or block_k >= 2 * max(problem.k, 32):
            continue
        for stages, (warps_m, warps_n) in product((2, 3, 4, 5, 6), ((1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (2, 4), (4, 2))):
            if stages > max(2, -(-problem.k // block_k)):
                continue
            # All groups of at least the tile rows walk alike: only the smallest of them.
            tile_rows = -(-problem.m // block_m)
            for group_m in (1, 8, 16)[: 1 + (tile_rows > 1) + (tile_rows > 8)]:
                yield MmaConfig(block_m, block_n, block_k, stages, warps_m, warps_n, group_m)


def _in_chunks(matrix: torch.Tensor) -> bool:
    """Whether each row is whole 16-byte chunks at multiples of 16 bytes, so that no chunk runs over the row's end."""
    return matrix.shape[1] % 8 == 0 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0


@kernel(Matmul, backend="cuda", config=MmaConfig, fits=fits, default=default, space=space)
def cuda_mma(problem: Matmul, config: MmaConfig, chip: Chip) -> Launch:
    """mma.sync m16n8k16 with a cp.async ring, ldmatrix from swizzled shared memory, and tiles grouped for L2."""
    p, c = problem, config
    defines: dict[str, str | int] = {
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "STAGES": c.stages, "WARPS_M": c.warps_m, "WARPS_N": c.warps_n,
        "GROUP_M": c.group_m, "TRANSPOSED": int(p.layout == "nt"), "ELEMENT": ELEMENT[p.dtype],
    }  # fmt: skip
    variants = {
        (a, b): CudaKernel(SOURCE, "matmul_mma", chip, {**defines, "ALIGNED": int(a), "ALIGNED_OUT": int(b)}, c.smem_bytes)
        for a in (False, True)
        for b in (False, True)
    }
    grid = (-(-p.m // c.block_m) * -(-p.n // c.block_n), 1, 1)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        strides = [Int64(matrix.stride(0)) for matrix in (x, w, out)]
        variants[_in_chunks(x) and _in_chunks(w), _in_chunks(out)].launch(grid, c.threads, [x, w, out, p.m, p.n, p.k, *strides])

    return launch
