"""CUDA C++ for 1 to 64 rows and more: a block shares x and its weights in a ring of cp.async stages and unpacks them in registers."""

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

constexpr int THREADS = WARPS_N * WARPS_K * 32, WARP_N = ROW_TILES * 16, TILE_N = WARPS_N * WARP_N, EIGHTS = BLOCK_M / 8;
constexpr int STEPS = WARPS_K * UNROLL;  // of a stage; each warp of a column of warps multiplies UNROLL of them
constexpr int W_BYTES = TILE_N * STEP_BYTES, STEP_TOTAL = W_BYTES + BLOCK_M * X_ROW_BYTES, STAGE_BYTES = STEPS * STEP_TOTAL;
constexpr int STAGE_K = STEPS * STEP_K;
constexpr int KEPT_ROW = TILE_N + 4;  // floats: the four lanes of a group write to different banks
constexpr int RING_BYTES = max_of(STAGES * STAGE_BYTES, WARPS_K * BLOCK_M * KEPT_ROW * 4);

// Copy ROWS rows of a stage, CHUNKS times 16 bytes each, consecutive threads along a row; `put(row, chunk)` copies one.
template <int ROWS, int CHUNKS, class Put>
KLAB_DEVICE void spread(const Put& put) {
    KLAB_UNROLL
    for (int i = 0; i < ceil_div(ROWS * CHUNKS, THREADS); ++i) {
        // Unsigned: a division by a power of two is then one shift.
        const uint32_t at = i * THREADS + static_cast<uint32_t>(thread_idx());
        if (ROWS * CHUNKS % THREADS == 0 || at < ROWS * CHUNKS) put(static_cast<int>(at / CHUNKS), at % CHUNKS);
    }
}

// Block (i, s, j): BLOCK_M rows by TILE_N columns of the output from the s-th part of k; `to` is the output, or with SPLIT > 1 float
// [SPLIT, m, n]. With a least number of blocks ptxas takes the registers it needs; without, it spills a few for a block more than shared
// memory allows.
KLAB_KERNEL_MIN_BLOCKS(weight_only_mma, THREADS, 1)
(const ELEMENT* __restrict__ x, const uint8_t* __restrict__ w, const SCALE* __restrict__ scale, void* __restrict__ to, int m, int n, int k,
 int part, int x_stride, int w_stride, int64_t scale_stride, int64_t to_stride) {
    const int warp = thread_idx() / 32, lane = thread_idx() % 32, warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
    const int n0 = block_idx_x() * TILE_N, m0 = block_idx_z() * BLOCK_M, n_left = n - n0, m_left = m - m0;
    const int k_begin = block_idx_y() * part, k_end = min_of(k, k_begin + part);
    char* ring = shared_memory<char>();
    float* scales = reinterpret_cast<float*>(ring + RING_BYTES);
    const uint8_t* w_block = w + static_cast<int64_t>(n0) * w_stride;
    const ELEMENT* x_block = x + static_cast<int64_t>(m0) * x_stride;

    auto load_stage = [&](int i) {
        char* stage = ring + static_cast<uint32_t>(i) % STAGES * STAGE_BYTES;
        const int k0 = k_begin + i * STAGE_K;
        spread<TILE_N, STEPS * 4>([&](int row, uint32_t chunk) {
            const int column = k0 + static_cast<int>(chunk) * LANE_K;
            bring(stage + chunk / 4 * STEP_TOTAL + row * STEP_BYTES + chunk % 4 * 16, w_block + row * w_stride + (column >> HALVED),
                  row < n_left ? (k_end - column) >> HALVED : 0);
        });
        spread<BLOCK_M, STAGE_K / 8>([&](int row, uint32_t chunk) {
            constexpr int PER_STEP = STEP_K / 8;
            const int column = k0 + static_cast<int>(chunk) * 8;
            bring(stage + chunk / PER_STEP * STEP_TOTAL + W_BYTES + x_offset(row, chunk % PER_STEP), x_block + row * x_stride + column,
                  row < m_left ? k_end - column : 0);
        });
    };
    const int stages = ceil_div(k_end - k_begin, STAGE_K);
    KLAB_UNROLL
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < stages) load_stage(i);
        cp_async_commit();
    }
    // While the first stages are under way: the scales of this block, [TILE_N][groups].
    constexpr uint32_t group_k = max_of(GROUP, 1);
    const int first_group = GROUP ? static_cast<uint32_t>(k_begin) / group_k : 0;
    const int groups = GROUP ? static_cast<uint32_t>(k_end - 1) / group_k + 1 - first_group : 1;
    for (int i = thread_idx(); i < TILE_N * groups; i += THREADS) {
        const int row = i / groups, group = first_group + i % groups;
        scales[i] = row < n_left ? to_float(scale[(n0 + row) * scale_stride + group]) : 0.0f;
    }

    float sum[ROW_TILES][EIGHTS][4] = {};
    for (int i = 0; i < stages; ++i) {
        cp_async_wait<STAGES - 2>();
        sync_threads();  // this stage has arrived for everybody, and nobody reads the one before any more
        if (i + STAGES - 1 < stages) load_stage(i + STAGES - 1);
        cp_async_commit();
        KLAB_UNROLL
        for (int u = 0; u < UNROLL; ++u) {
            const int step = warp_k * UNROLL + u;
            const char* at = ring + static_cast<uint32_t>(i) % STAGES * STAGE_BYTES + step * STEP_TOTAL;
            const char* rows = at + warp_n * WARP_N * STEP_BYTES;
            // Steps behind the end of k have no weights, but may have no group either.
            const int group = static_cast<uint32_t>(k_begin + i * STAGE_K + step * STEP_K) / group_k - first_group;
            const float* factors = scales + warp_n * WARP_N * groups + min_of(group, groups - 1);
            if (GROUP)
                scaled_step(sum, rows, at + W_BYTES, BLOCK_M, factors, groups);
            else
                multiply_step(sum, rows, at + W_BYTES, BLOCK_M);
        }
    }

    cp_async_wait<0>();
    sync_threads();
    float* kept = shared_memory<float>();  // [WARPS_K][BLOCK_M][KEPT_ROW], below the scales
    KLAB_UNROLL
    for (int t = 0; t < ROW_TILES; ++t)
        KLAB_UNROLL
        for (int s = 0; s < EIGHTS; ++s)
            KLAB_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int row = s * 8 + lane % 4 * 2 + i % 2, column = warp_n * WARP_N + t * 16 + i / 2 * 8 + lane / 4;
                kept[(warp_k * BLOCK_M + row) * KEPT_ROW + column] = sum[t][s][i];
            }
    sync_threads();
    for (int i = thread_idx(); i < BLOCK_M * TILE_N; i += THREADS) {
        const int row = i / TILE_N, column = i % TILE_N;
        if (row >= m_left || column >= n_left) continue;
        float total = 0.0f;
        KLAB_UNROLL
        for (int j = 0; j < WARPS_K; ++j) total += kept[(j * BLOCK_M + row) * KEPT_ROW + column];
        if (!GROUP) total *= scales[column];
        if (SPLIT > 1)
            static_cast<float*>(to)[(block_idx_y() * static_cast<int64_t>(m) + m0 + row) * to_stride + n0 + column] = total;
        else
            static_cast<ELEMENT*>(to)[(m0 + row) * to_stride + n0 + column] = from_float<ELEMENT>(total);
    }
}
"""
)


@dataclass(frozen=True)
class MmaConfig(Config):
    """A block has `block_m` rows of x and warps_n times row_tiles times 16 rows of weights; `warps_k` warps share each stage's k.

    A stage holds `unroll` steps (64 bytes of every row of weights) for each of them; `split` blocks share k.
    """

    block_m: int = 16
    warps_n: int = 4
    warps_k: int = 2
    row_tiles: int = 2
    unroll: int = 1
    stages: int = 4
    split: int = 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps_n * self.warps_k * 32

    @property
    def tile_n(self) -> int:
        """Rows of weights of a block."""
        return self.warps_n * self.row_tiles * 16


def _part(problem: WeightOnlyMatmul, config: MmaConfig) -> int:
    """Columns of k that one block of a split walks: whole steps, so that every part starts at a whole chunk."""
    step = STEP_K[problem.format]
    return -(-problem.k // (config.split * step)) * step


def _stage_k(problem: WeightOnlyMatmul, config: MmaConfig) -> int:
    """Columns of k in a stage."""
    return config.warps_k * config.unroll * STEP_K[problem.format]


def _smem_bytes(problem: WeightOnlyMatmul, config: MmaConfig) -> int:
    """The ring, or the sums that replace it; and the scales behind."""
    c = config
    stage_bytes = c.warps_k * c.unroll * (c.tile_n * 64 + c.block_m * STEP_K[problem.format] * 2)
    groups = _part(problem, c) // problem.group + 2 if problem.groups > 1 else 1
    return max(c.stages * stage_bytes, c.warps_k * c.block_m * (c.tile_n + 4) * 4) + c.tile_n * groups * 4


def _registers(problem: WeightOnlyMatmul, config: MmaConfig) -> int:
    """Per thread, estimated: the sums, those of a group, packed and unpacked weights, x as it lies and as it is arranged, 48 others."""
    eights, tiles = config.block_m // 8, config.row_tiles
    return 4 * tiles * eights * (2 if problem.groups > 1 else 1) + 8 * tiles + 6 * eights + 48


def fits(problem: WeightOnlyMatmul, config: MmaConfig, chip: Chip) -> str | None:
    """Why this config cannot run, or None. Odd sizes and strides run too, by a slower load."""
    c = config
    reason = unfit(problem, chip)
    if reason:
        return reason
    if c.block_m not in (8, 16, 32, 64):
        return "block_m is 8, 16, 32 or 64"
    if c.stages < 2 or min(c.warps_n, c.warps_k, c.row_tiles, c.unroll, c.split) < 1 or c.threads > 512:
        return "needs two stages, at least one of everything else, and at most 16 warps"
    smem = _smem_bytes(problem, c)
    if smem > chip.smem_per_block_bytes:
        return f"{smem} B of shared memory, {chip.smem_per_block_bytes} allowed"
    registers, allowed = _registers(problem, c), min(255, 65536 // c.threads)
    if registers > allowed:
        return f"about {registers} registers, {allowed} allowed"
    if c.split > 1 and (c.split - 1) * _part(problem, c) >= problem.k:
        return f"k={problem.k} has no {c.split} parts"
    return None


def default(problem: WeightOnlyMatmul, chip: Chip) -> MmaConfig:
    """128 rows of weights by all rows of x up to 64; fewer where the output or k is small; k split until every SM has a block."""
    block_m = 8
    while block_m < min(64, problem.m):
        block_m *= 2
    config = MmaConfig(block_m=block_m, stages=3 if block_m == 64 else 4)
    while config.warps_n > 1 and (config.tile_n >= 2 * problem.n or -(-problem.n // config.tile_n) < chip.sm_count // 8):
        config = replace(config, warps_n=config.warps_n // 2)
    while config.warps_k > 1 and _stage_k(problem, config) >= 2 * problem.k:
        config = replace(config, warps_k=config.warps_k // 2)
    blocks = -(-problem.n // config.tile_n) * -(-problem.m // block_m)
    while 4 * blocks * config.split < 3 * chip.sm_count and config.split < 16 and 8 * config.split * _stage_k(problem, config) <= problem.k:
        config = replace(config, split=2 * config.split)
    while config.stages > 2 and fits(problem, config, chip):
        config = replace(config, stages=config.stages - 1)
    while config.warps_n > 1 and fits(problem, config, chip):
        config = replace(config, warps_n=config.warps_n // 2)
    return config


def space(problem: WeightOnlyMatmul, chip: Chip) -> Iterator[MmaConfig]:
    """Tiles not much larger than the problem, every ring that fits, and splits that the chip has SMs for."""
    for block_m, warps_n, warps_k, row_tiles in product((8, 16, 32, 64), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4)):
        config = MmaConfig(block_m, warps_n, warps_k, row_tiles)
        if block_m >= 2 * max(problem.m, 8) or problem.m > 4 * block_m or config.tile_n >= 2 * max(problem.n, 16):
            continue
        if warps_n * warps_k < 4 and config.tile_n < problem.n:
            continue
        for unroll, stages, split in product((1, 2), (2, 3, 4, 5, 6), (1, 2, 4, 8, 16)):
            config = replace(config, unroll=unroll, stages=stages, split=split)
            steps = -(-_part(problem, config) // _stage_k(problem, config))
            blocks = -(-problem.n // config.tile_n) * -(-problem.m // block_m)
            if stages > max(2, steps) or (split > 1 and (steps < 2 or blocks * split > 8 * chip.sm_count)):
                continue
            yield config


@kernel(WeightOnlyMatmul, backend="cuda", config=MmaConfig, fits=fits, default=default, space=space)
def cuda_mma(problem: WeightOnlyMatmul, config: MmaConfig, chip: Chip) -> Launch:
    """mma.sync with the weights as first operand, unpacked in registers by bit tricks; cp.async ring, deterministic split-K."""
    p, c = problem, config
    defines = common_defines(p) | {
        "BLOCK_M": c.block_m, "WARPS_N": c.warps_n, "WARPS_K": c.warps_k, "ROW_TILES": c.row_tiles, "UNROLL": c.unroll,
        "STAGES": c.stages, "SPLIT": c.split,
    }  # fmt: skip
    smem = _smem_bytes(p, c)
    variants = {a: CudaKernel(SOURCE, "weight_only_mma", chip, {**defines, "ALIGNED": int(a)}, smem) for a in (False, True)}
    combine = CudaKernel(COMBINE, "weight_only_combine", chip, {"ELEMENT": defines["ELEMENT"], "SPLIT": c.split})
    partials: dict[torch.device, torch.Tensor] = {}
    grid = (-(-p.n // c.tile_n), c.split, -(-p.m // c.block_m))

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, scale, out = inputs["x"], inputs["w"], inputs["scale"], outputs["out"]
        to = out
        if c.split > 1:
            if out.device not in partials:
                partials[out.device] = torch.empty((c.split, p.m, p.n), dtype=torch.float32, device=out.device)
            to = partials[out.device]
        strides = [x.stride(0), w.stride(0), Int64(scale.stride(0)), Int64(to.stride(-2))]
        aligned = in_chunks(x) and in_chunks(w)
        variants[aligned].launch(grid, c.threads, [x, w.view(torch.uint8), scale, to, p.m, p.n, p.k, _part(p, c), *strides])
        if c.split > 1:
            combine.launch((-(-p.n // 128), p.m, 1), 128, [to, out, p.m, p.n, Int64(out.stride(0))])

    return launch
