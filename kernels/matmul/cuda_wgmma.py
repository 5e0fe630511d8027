"""CUDA C++ matmul on Hopper's own units: the copy engine fills a ring, warpgroups multiply from it, and nobody else does anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64, TensorMap
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul
from klab.kernels.wgmma import wgmma_functions

if TYPE_CHECKING:
    import torch

# 64 columns of 16 bits are the 128 bytes over which the copy engine and the products swizzle.
BLOCK_K = 64
ROW_BYTES = 128
# Registers of a thread of the copying warpgroup and of the others: 40 + 2 x 232 = 504 of the 512 that three groups have. With one consumer
# every thread can have 255, and nothing is given away.
REGISTERS = {1: (255, 255), 2: (40, 232), 3: (32, 160)}

SOURCE = r"""
#include "tma.cuh"
using namespace klab;

constexpr int BLOCK_K = 64, ROWS = 64 * TILES_PER_GROUP;  // rows of one consumer warpgroup
constexpr int BLOCK_M = ROWS * CONSUMERS, THREADS = 128 * (1 + CONSUMERS);
constexpr int X_BYTES = BLOCK_M * 128, W_BYTES = BLOCK_N * 128, STAGE_BYTES = X_BYTES + W_BYTES;

struct Tile {
    int m0, n0;
};
// Tiles that run together share rows and columns through L2: GROUP_M tile rows at a time, column by column.
KLAB_DEVICE Tile tile_at(int tile, int tiles_m, int tiles_n) {
    const int first_m = tile / (GROUP_M * tiles_n) * GROUP_M, in_group = tile % (GROUP_M * tiles_n);
    const int rows = min_of(tiles_m - first_m, GROUP_M);
    return {(first_m + in_group % rows) * BLOCK_M, in_group / rows * BLOCK_N};
}

// The sums of 64 rows, 16 bytes of a row at a time: four lanes that hold two columns each of four groups of eight exchange them, so that
// each has one group whole.
KLAB_DEVICE void store_rows(float (&sum)[BLOCK_N / 8][4], ELEMENT* out, int64_t stride, int m, int n, int m0, int n0) {
    const int lane = thread_idx() % 32, pair = lane % 4, row = m0 + thread_idx() % 128 / 32 * 16 + lane / 4;
    KLAB_UNROLL
    for (int h = 0; h < 2; ++h) {
        KLAB_UNROLL
        for (int j = 0; j < BLOCK_N / 8; j += 4) {
            uint32_t word[4];
            KLAB_UNROLL
            for (int i = 0; i < 4; ++i) word[i] = pack2<ELEMENT>(sum[j + i][2 * h], sum[j + i][2 * h + 1]);
            // A 4 x 4 transposition in two steps: first between lanes that differ in bit 0, then in bit 1.
            KLAB_UNROLL
            for (int bit = 1; bit <= 2; bit *= 2) {
                const bool upper = (pair & bit) != 0;
                KLAB_UNROLL
                for (int i = 0; i < 4; ++i) {
                    if (i & bit) continue;
                    const uint32_t given = upper ? word[i] : word[i | bit];
                    const uint32_t taken = shfl_xor(given, bit);
                    if (upper) word[i] = taken;
                    else word[i | bit] = taken;
                }
            }
            const int column = n0 + 8 * (j + pair), at = row + 8 * h;
            if (at < m && column < n) store_16(out + at * stride + column, Vec16{{word[0], word[1], word[2], word[3]}});
        }
    }
}

KLAB_KERNEL(matmul_wgmma, THREADS)(KLAB_TENSOR_MAP(x), KLAB_TENSOR_MAP(w), ELEMENT* __restrict__ out, int m, int n, int k,
                                   int64_t out_stride) {
    char* base = shared_memory<char>();
    base += (1024 - shared_address(base) % 1024) % 1024;
    uint64_t* full = reinterpret_cast<uint64_t*>(base + STAGES * STAGE_BYTES);
    uint64_t* empty = full + STAGES;
    const int group = thread_idx() / 128;
    if (thread_idx() == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full + i, 1);
            barrier_init(empty + i, 4 * CONSUMERS);  // one lane of each warp
        }
        barrier_init_fence();
    }
    sync_threads();

    const int tiles_m = ceil_div(m, BLOCK_M), tiles_n = ceil_div(n, BLOCK_N), steps = ceil_div(k, BLOCK_K);
    if (group == 0) {
        if (CONSUMERS > 1) release_registers<PRODUCER_REGISTERS>();
        if (thread_idx() == 0) {
            tma_prefetch(x);
            tma_prefetch(w);
            int stage = 0, round = 0;
            for (int t = block_idx_x(); t < tiles_m * tiles_n; t += grid_dim_x()) {
                const Tile tile = tile_at(t, tiles_m, tiles_n);
                KLAB_NO_UNROLL
                for (int step = 0; step < steps; ++step) {
                    // The first round finds every stage empty: the phase before the first counts as ended.
                    barrier_wait(empty + stage, (round & 1) ^ 1);
                    char* to = base + stage * STAGE_BYTES;
                    barrier_arrive_expect(full + stage, STAGE_BYTES);
                    tma_load(to, x, full + stage, step * BLOCK_K, tile.m0);
                    tma_load(to + X_BYTES, w, full + stage, step * BLOCK_K, tile.n0);
                    if (++stage == STAGES) stage = 0, ++round;
                }
            }
        }
    } else {
        if (CONSUMERS > 1) claim_registers<CONSUMER_REGISTERS>();
        const int first_row = (group - 1) * ROWS;
        int stage = 0, round = 0;
        for (int t = block_idx_x(); t < tiles_m * tiles_n; t += grid_dim_x()) {
            const Tile tile = tile_at(t, tiles_m, tiles_n);
            float sum[TILES_PER_GROUP][BLOCK_N / 8][4];
            int before = 0;
            for (int step = 0; step < steps; ++step) {
                barrier_wait(full + stage, round & 1);
                const uint32_t x_at = shared_address(base + stage * STAGE_BYTES) + first_row * 128;
                const uint32_t w_at = shared_address(base + stage * STAGE_BYTES + X_BYTES);
                wgmma_fence();
                KLAB_UNROLL
                for (int i = 0; i < BLOCK_K / 16; ++i)
                    KLAB_UNROLL
                    for (int a = 0; a < TILES_PER_GROUP; ++a)
                        multiply(sum[a], panel_rows(x_at + a * 64 * 128 + 32 * i), panel_rows(w_at + 32 * i), step > 0 || i > 0);
                wgmma_commit();
                // The products of the step before have ended when only this step's are under way: its stage is free.
                wgmma_wait<1>();
                if (step > 0 && thread_idx() % 32 == 0) barrier_arrive(empty + before);
                before = stage;
                if (++stage == STAGES) stage = 0, ++round;
            }
            wgmma_wait<0>();
            if (thread_idx() % 32 == 0) barrier_arrive(empty + before);
            KLAB_UNROLL
            for (int a = 0; a < TILES_PER_GROUP; ++a)
                store_rows(sum[a], out, out_stride, m, n, tile.m0 + first_row + a * 64, tile.n0);
        }
    }
}
"""


@dataclass(frozen=True)
class WgmmaConfig(Config):
    """`consumers` warpgroups multiply `rows` rows each (64 or 128) by block_n columns; one more fills the ring of `stages`.

    `group_m` tile rows are walked together for the L2's sake.
    """

    consumers: int = 2
    rows: int = 64
    block_n: int = 256
    stages: int = 4
    group_m: int = 8

    @property
    def block_m(self) -> int:
        """Rows of a tile."""
        return self.consumers * self.rows

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * (1 + self.consumers)

    @property
    def smem_bytes(self) -> int:
        """The ring on a multiple of 1024 bytes, and two barriers per stage."""
        return 1024 + self.stages * ((self.block_m + self.block_n) * ROW_BYTES + 16)

    @property
    def sums(self) -> int:
        """Sums that one thread holds."""
        return self.rows * self.block_n // 128


def fits(problem: Matmul, config: WgmmaConfig, chip: Chip) -> str | None:
    """Why this config cannot run, or None."""
    c = config
    if chip.target // 10 != 9:
        return "wgmma is Hopper's alone"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"{problem.dtype} has no tensor-core product of full precision"
    if problem.layout != "nt":
        return "both operands lie along k (layout nt)"
    if problem.k % 8 or problem.n % 8:
        return "the copy engine and the stores take rows of whole 16 bytes: k and n are multiples of 8"
    if c.consumers not in REGISTERS or c.rows not in (64, 128) or c.block_n not in (32, 64, 128, 256):
        return "1 to 3 consumers, 64 or 128 rows each, 32 to 256 columns"
    if c.block_m > 256:
        return "a box of the copy engine has at most 256 rows"
    if c.stages < 2 or c.group_m < 1:
        return "needs two stages and a group of one row"
    if c.smem_bytes > chip.smem_per_block_bytes:
        return f"{c.smem_bytes} B of shared memory, {chip.smem_per_block_bytes} allowed"
    # Beside its sums a thread has about 30 registers of addresses, counters and barriers.
    if c.sums + 30 > REGISTERS[c.consumers][1]:
        return f"{c.sums} sums per thread of {REGISTERS[c.consumers][1]} registers"
    # ptxas 13.0 (C7602) wants one product's sums and 26 more of what every thread has before the warpgroups share anew.
    if c.block_n // 2 + 26 > 65536 // c.threads:
        return f"a product of {c.block_n // 2} sums per thread, which starts with {65536 // c.threads} registers"
    return None


def default(problem: Matmul, chip: Chip) -> WgmmaConfig:
    """128x256 tiles where they fill the chip, else smaller ones; one consumer for few rows, whose time is the weights'."""
    if problem.m <= 64:
        return WgmmaConfig(consumers=1, block_n=64 if problem.n >= 64 * chip.sm_count else 32, stages=8, group_m=1)
    tiles_m = -(-problem.m // 128)
    block_n = next((n for n in (256, 128) if tiles_m * -(-problem.n // n) >= chip.sm_count), 64)
    return WgmmaConfig(block_n=block_n, stages=4 if block_n == 256 else 6, group_m=min(8, tiles_m))


def space(problem: Matmul, chip: Chip) -> Iterator[WgmmaConfig]:
    """Every tile that fits registers and is not mostly beyond the edge, every ring that fits shared memory."""
    for consumers, rows, block_n in product((1, 2, 3), (64, 128), (32, 64, 128, 256)):
        block_m = consumers * rows
        if block_m >= 2 * max(problem.m, 64) or block_n >= 2 * max(problem.n, 32):
            continue
        tiles_m = -(-problem.m // block_m)
        for stages, group_m in product((2, 3, 4, 5, 6, 8, 10), (1, 4, 8, 16)):
            if stages > max(2, -(-problem.k // BLOCK_K)) or (group_m > 1 and group_m > tiles_m):
                continue  # idle stages, or the same order as fewer rows
            yield WgmmaConfig(consumers, rows, block_n, stages, group_m)


@kernel(Matmul, backend="cuda", config=WgmmaConfig, fits=fits, default=default, space=space)
def cuda_wgmma(problem: Matmul, config: WgmmaConfig, chip: Chip) -> Launch:
    """Hopper's wgmma fed by TMA: one warpgroup copies, the others multiply; persistent blocks, a ring of barriers."""
    p, c = problem, config
    producer, consumer = REGISTERS[c.consumers]
    defines: dict[str, str | int] = {
        "TILES_PER_GROUP": c.rows // 64, "CONSUMERS": c.consumers, "BLOCK_N": c.block_n, "STAGES": c.stages, "GROUP_M": c.group_m,
        "ELEMENT": ELEMENT[p.dtype], "PRODUCER_REGISTERS": producer, "CONSUMER_REGISTERS": consumer,
    }  # fmt: skip
    multiply = wgmma_functions("multiply", c.block_n, p.dtype, left_in_registers=False, transposed=False)
    source = SOURCE.replace("using namespace klab;\n", "using namespace klab;\n" + multiply, 1)
    function = CudaKernel(source, "matmul_wgmma", chip, defines, c.smem_bytes)
    tiles = -(-p.m // c.block_m) * -(-p.n // c.block_n)
    grid = (min(tiles, chip.sm_count), 1, 1)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        _require_rows_of_16_bytes({"x": x, "w": w, "out": out})
        maps = [TensorMap(x, c.block_m, BLOCK_K), TensorMap(w, c.block_n, BLOCK_K)]
        function.launch(grid, c.threads, [*maps, out, p.m, p.n, p.k, Int64(out.stride(0))])

    return launch


def _require_rows_of_16_bytes(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.stride(1) != 1 or tensor.stride(0) % 8 or tensor.data_ptr() % 16:
            raise UsageError(f"cuda_wgmma needs {name} with dense rows that start at multiples of 16 bytes")
