"""CUDA C++ matmul for up to 16 rows: the weights are streamed once, so memory bandwidth is the bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel
import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.matmul.problem import Matmul

SOURCE = r"""
#include "device.cuh"
using namespace klab;

constexpr int THREADS = WARPS * 32;
constexpr bool HALVES = sizeof(ELEMENT) == 2;  // tensor cores multiply them; float stays on the ordinary units
constexpr int CHUNK = 16 / sizeof(ELEMENT);    // elements of a 16-byte copy
constexpr int X_TILES = M > 8 ? 2 : 1;         // eight rows of x are one operand of an mma

// A warp walks along k in steps; per step each lane copies W_LOADS + X_LOADS times 16 bytes, with lane = 4 group + pair:
//   "nt"         W[8 i + group][k + CHUNK pair ...], x[8 i + group][k + CHUNK pair ...]
//   "nn", 16 bit W[k + 8 pair + i % 8][64 (i / 8) + 8 group ...], x as above
//   "nn", float  W[k + i % 4][128 (i / 4) + 4 lane ...], x[lane][k ...]
constexpr int STEP = TRANSPOSED ? 4 * CHUNK : HALVES ? 32 : 4;
constexpr int TILE_N = ROW_TILES * (TRANSPOSED ? 16 : HALVES ? 64 : 128);
constexpr int W_LOADS = ROW_TILES * (TRANSPOSED ? 2 : HALVES ? 8 : 4), X_LOADS = TRANSPOSED || HALVES ? X_TILES : 1;
constexpr int STEP_BYTES = (W_LOADS + X_LOADS) * 512, STAGE_BYTES = UNROLL * STEP_BYTES;
constexpr int STRIDE_K = UNROLL * STEP;  // of k per stage

// Columns left of n, and k of this block; `ring` is this warp's shared memory. Copies need no registers, so that the bytes under way are
// what the ring says and not what the compiler's scheduler leaves (of 12 loads to registers it let 4 be under way).
template <class T>
struct Part {
    const T* x;
    const T* w;
    int n_left, k_end;
    int64_t x_stride, w_stride;
    char* ring;
};

// Copy 16 bytes of which the first `left` elements exist; zeros for the rest.
template <class T>
KLAB_DEVICE void bring(char* to, const T* from, int left) {
    if (ALIGNED) {
        cp_async_16(to, from, left > 0);
    } else {
        Vec16 v{};
        KLAB_UNROLL
        for (int j = 0; j < CHUNK; ++j)
            if (j < left) {
                if constexpr (sizeof(T) == 2)
                    v.word[j / 2] |= static_cast<uint32_t>(from[j].bits) << (16 * (j % 2));
                else
                    v.word[j] = float_bits(from[j]);
            }
        store_16(to, v);
    }
}

template <class T>
KLAB_DEVICE void bring_stage(const Part<T>& p, char* stage, int k0) {
    const int lane = thread_idx() % 32, group = lane / 4, pair = lane % 4;
    KLAB_UNROLL
    for (int u = 0; u < UNROLL; ++u) {
        char* to = stage + u * STEP_BYTES + lane * 16;
        const int k = k0 + u * STEP + (TRANSPOSED ? CHUNK * pair : HALVES ? 8 * pair : 0);
        KLAB_UNROLL
        for (int i = 0; i < W_LOADS; ++i) {
            if (TRANSPOSED) {
                const int row = 8 * i + group;
                bring(to + i * 512, p.w + row * p.w_stride + k, row < p.n_left ? p.k_end - k : 0);
            } else {
                const int row = k + i % (HALVES ? 8 : 4), column = HALVES ? i / 8 * 64 + group * 8 : i / 4 * 128 + lane * 4;
                bring(to + i * 512, p.w + row * p.w_stride + column, row < p.k_end ? p.n_left - column : 0);
            }
        }
        KLAB_UNROLL
        for (int i = 0; i < X_LOADS; ++i) {
            const int row = TRANSPOSED || HALVES ? 8 * i + group : lane;
            bring(to + (W_LOADS + i) * 512, p.x + row * p.x_stride + k, row < M ? p.k_end - k : 0);
        }
    }
}

// The same half of two words, side by side: elements of rows k and k + 1.
KLAB_DEVICE uint32_t side_by_side(uint32_t first, uint32_t second, bool upper) {
    return upper ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
}

// Where this thread leaves its sums for the block: a float per row of x and column of the tile, of its warp.
KLAB_DEVICE void keep(int row, int column, float value) {
    if (row < M) shared_memory<float>()[(thread_idx() / 32 * M + row) * TILE_N + column] = value;
}

// Weights are the first operand of the mma, 16 of n by 16 of k; x is the second. Which k goes to which slot of the mma does not matter as
// long as both operands agree: word i of a lane's 16 bytes is k = 8 pair + {2 i, 2 i + 1} in both, so nothing is shuffled ("nt").
template <class T>
struct Sums {
    static constexpr int COUNT = TRANSPOSED ? ROW_TILES : 4 * ROW_TILES;
    float sum[COUNT][X_TILES][4] = {};

    KLAB_DEVICE void add(const char* step) {
        const int lane = thread_idx() % 32;
        Vec16 w[W_LOADS], x[X_TILES];
        KLAB_UNROLL
        for (int i = 0; i < W_LOADS; ++i) w[i] = load_16(step + i * 512 + lane * 16);
        KLAB_UNROLL
        for (int t = 0; t < X_TILES; ++t) x[t] = load_16(step + (W_LOADS + t) * 512 + lane * 16);
        KLAB_UNROLL
        for (int h = 0; h < 2; ++h)
            KLAB_UNROLL
            for (int s = 0; s < COUNT; ++s) {
                uint32_t a[4];
                KLAB_UNROLL
                for (int j = 0; j < 4; ++j) {  // j % 2: upper eight of n; j / 2: upper eight slots of k
                    if (TRANSPOSED) {
                        a[j] = w[2 * s + j % 2].word[2 * h + j / 2];
                    } else {
                        const int column = s % 4 + j % 2 * 4, row = s / 4 * 8 + 4 * h + j / 2 * 2;
                        a[j] = side_by_side(w[row].word[column / 2], w[row + 1].word[column / 2], column % 2);
                    }
                }
                KLAB_UNROLL
                for (int t = 0; t < X_TILES; ++t) {
                    const uint32_t b[2] = {x[t].word[2 * h], x[t].word[2 * h + 1]};
                    mma_m16n8k16<T>(sum[s][t], a, b);
                }
            }
    }

    KLAB_DEVICE void leave() {
        const int lane = thread_idx() % 32, group = lane / 4, pair = lane % 4;
        KLAB_UNROLL
        for (int s = 0; s < COUNT; ++s)
            KLAB_UNROLL
            for (int t = 0; t < X_TILES; ++t)
                KLAB_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int column = TRANSPOSED ? s * 16 + group + i / 2 * 8 : s / 4 * 64 + group * 8 + s % 4 + i / 2 * 4;
                    keep(t * 8 + 2 * pair + i % 2, column, sum[s][t][i]);
                }
    }
};

template <>
struct Sums<float> {
    static constexpr int COUNT = W_LOADS;  // nt: a row of W each, in four lanes; nn: a column each
    float sum[COUNT][M] = {};

    KLAB_DEVICE void add(const char* step) {
        const int lane = thread_idx() % 32, pair = lane % 4;
        Vec16 w[W_LOADS];
        KLAB_UNROLL
        for (int i = 0; i < W_LOADS; ++i) w[i] = load_16(step + i * 512 + lane * 16);
        KLAB_UNROLL
        for (int row = 0; row < M; ++row) {
            // What another lane has copied: four k of a row of x.
            const Vec16 x = load_16(step + W_LOADS * 512 + (TRANSPOSED ? row * 64 + pair * 16 : row * 16));
            KLAB_UNROLL
            for (int i = 0; i < W_LOADS; ++i)
                KLAB_UNROLL
                for (int j = 0; j < 4; ++j) {
                    float& s = sum[TRANSPOSED ? i : i / 4 * 4 + j][row];
                    s = fused_multiply_add(bits_float(w[i].word[j]), bits_float(x.word[TRANSPOSED ? j : i % 4]), s);
                }
        }
    }

    KLAB_DEVICE void leave() {
        const int lane = thread_idx() % 32;
        KLAB_UNROLL
        for (int i = 0; i < COUNT; ++i)
            KLAB_UNROLL
            for (int row = 0; row < M; ++row) {
                if (TRANSPOSED) {
                    const float total = warp_sum<4>(sum[i][row]);
                    if (lane % 4 == 0) keep(row, 8 * i + lane / 4, total);
                } else {
                    keep(row, i / 4 * 128 + lane * 4 + i % 4, sum[i][row]);
                }
            }
    }
};

// Block (i, s): TILE_N columns of the output from the s-th part of k; `to` is the output, or with SPLIT > 1 float [SPLIT, M, n].
KLAB_KERNEL(gemv, THREADS)(const ELEMENT* __restrict__ x, const ELEMENT* __restrict__ w, void* __restrict__ to, int n, int k, int part,
                           int64_t x_stride, int64_t w_stride, int64_t to_stride) {
    const int warp = thread_idx() / 32, n0 = block_idx_x() * TILE_N, k_begin = block_idx_y() * part;
    char* ring = shared_memory<char>() + warp * STAGES * STAGE_BYTES;
    const Part<ELEMENT> p{x, TRANSPOSED ? w + n0 * w_stride : w + n0, n - n0, min_of(k, k_begin + part), x_stride, w_stride, ring};

    const int first = k_begin + warp * STRIDE_K, steps = p.k_end > first ? ceil_div(p.k_end - first, WARPS * STRIDE_K) : 0;
    KLAB_UNROLL
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < steps) bring_stage(p, ring + i * STAGE_BYTES, first + i * WARPS * STRIDE_K);
        cp_async_commit();
    }
    Sums<ELEMENT> sums;
    for (int i = 0; i < steps; ++i) {
        cp_async_wait<STAGES - 2>();
        if (!HALVES) sync_warp();  // the lanes of a warp share x; of 16-bit elements each lane reads only what it has copied itself
        const int next = i + STAGES - 1;
        if (next < steps) bring_stage(p, ring + next % STAGES * STAGE_BYTES, first + next * WARPS * STRIDE_K);
        cp_async_commit();
        KLAB_UNROLL
        for (int u = 0; u < UNROLL; ++u) sums.add(ring + i % STAGES * STAGE_BYTES + u * STEP_BYTES);
    }

    cp_async_wait<0>();
    sync_threads();
    sums.leave();
    sync_threads();
    for (int i = thread_idx(); i < M * TILE_N; i += THREADS) {
        const int row = i / TILE_N, column = n0 + i % TILE_N;
        if (column >= n) continue;
        float sum = 0.0f;
        KLAB_UNROLL
        for (int j = 0; j < WARPS; ++j) sum += shared_memory<float>()[j * M * TILE_N + i];
        if (SPLIT > 1)
            static_cast<float*>(to)[(block_idx_y() * M + row) * to_stride + column] = sum;
        else
            static_cast<ELEMENT*>(to)[row * to_stride + column] = from_float<ELEMENT>(sum);
    }
}
"""

# Adds the parts of k in their order: the same bits every time.
COMBINE = r"""
#include "device.cuh"
using namespace klab;
KLAB_KERNEL(gemv_combine, 128)(const float* __restrict__ partial, ELEMENT* __restrict__ out, int n, int64_t out_stride) {
    const int column = block_idx_x() * 128 + thread_idx(), row = block_idx_y();
    if (column >= n) return;
    float sum = 0.0f;
    KLAB_UNROLL
    for (int s = 0; s < SPLIT; ++s) sum += partial[(s * M + row) * static_cast<int64_t>(n) + column];
    out[row * out_stride + column] = from_float<ELEMENT>(sum);
}
"""


@dataclass(frozen=True)
class GemvConfig(Config):
    """How a block works: `warps` share its columns and its part of k; it has `row_tiles` times 16 columns (nt), 64 (nn) or 128 (nn, fp32).

    Each warp has a ring of `stages` of `unroll` steps of k (_Shape.step elements each); `split` blocks share k.
    """

    warps: int = 8
    row_tiles: int = 1
    unroll: int = 2
    stages: int = 3
    split: int = 1


@dataclass(frozen=True)
class _Shape:
    """What the source makes of a problem and a config: elements of k per step, columns of a block, registers, shared memory."""

    step: int
    tile_n: int
    registers: int
    smem_bytes: int

    @classmethod
    def of(cls, problem: Matmul, config: GemvConfig) -> _Shape:
        tiles, x_tiles, nt, single = config.row_tiles, -(-problem.m // 8), problem.layout == "nt", problem.dtype == "float32"
        step = (16 if nt else 4) if single else 32
        tile_n = tiles * (16 if nt else 128 if single else 64)
        w_loads = tiles * (2 if nt else 4 if single else 8)
        x_loads = 1 if single and not nt else x_tiles
        sums = w_loads * problem.m if single else tile_n // 64 * 16 * x_tiles if not nt else 4 * tiles * x_tiles
        ring_bytes = config.warps * config.stages * config.unroll * (w_loads + x_loads) * 512
        # A step's 16-byte words, the sums, and 44 for addresses: what it needs; NVRTC 13.0 takes more where there is room.
        return cls(step, tile_n, 4 * (w_loads + x_loads) + sums + 44, max(ring_bytes, 4 * config.warps * problem.m * tile_n))

    def steps_k(self, config: GemvConfig) -> int:
        """Elements of k that all warps of all parts take at once: with less in the problem some have nothing to do."""
        return config.split * config.warps * config.unroll * self.step


def _part(problem: Matmul, config: GemvConfig) -> int:
    """Elements of k that one block of a split walks: a multiple of 32, so that every part starts at a whole chunk."""
    return -(-problem.k // (config.split * 32)) * 32


def fits(problem: Matmul, config: GemvConfig, chip: Chip) -> str | None:
    """Why this config cannot run, or None. Odd sizes and strides run too, by a slower load."""
    if problem.m > 16:
        return f"is for up to 16 rows, not {problem.m}"
    if chip.target < 80:
        return "needs compute capability 8.0"
    if config.stages < 2:
        return "needs two stages"
    shape = _Shape.of(problem, config)
    if shape.smem_bytes > chip.smem_per_block_bytes:
        return f"{shape.smem_bytes} B of shared memory, {chip.smem_per_block_bytes} allowed"
    allowed = min(255, 65536 // (32 * config.warps))
    if shape.registers > allowed:
        return f"about {shape.registers} registers, {allowed} allowed"
    if config.split > 1 and (config.split - 1) * _part(problem, config) >= problem.k:
        return f"k={problem.k} has no {config.split} parts"
    return None


def default(problem: Matmul, chip: Chip) -> GemvConfig:
    """About 32 KB under way per block; fewer warps where k has no step for each; k split while a quarter of the SMs would be idle.

    A split costs a second launch, 2 to 3 us: 256 blocks on 132 SMs are better left alone.
    """
    config = GemvConfig() if problem.layout == "nt" else GemvConfig(warps=4, unroll=1)
    shape = _Shape.of(problem, config)
    while config.warps > 1 and shape.steps_k(config) > problem.k:
        config = replace(config, warps=config.warps // 2)
    blocks = -(-problem.n // shape.tile_n)
    while 4 * blocks * config.split < 3 * chip.sm_count and config.split < 16 and 2 * shape.steps_k(config) <= problem.k:
        config = replace(config, split=2 * config.split)
    return config


def space(problem: Matmul, chip: Chip) -> Iterator[GemvConfig]:
    """Whatever gives each warp at least one step of k, and tiles not larger than the output."""
    for warps, row_tiles, unroll, stages, split in product((2, 4, 8, 16), (1, 2, 4), (1, 2, 4), (2, 3, 4, 6), (1, 2, 4, 8, 16)):
        config = GemvConfig(warps, row_tiles, unroll, stages, split)
        shape = _Shape.of(problem, config)
        if shape.steps_k(config) <= problem.k and (row_tiles == 1 or shape.tile_n < 2 * problem.n):
            yield config


def _in_chunks(matrix: torch.Tensor) -> bool:
    """Whether each row is whole 16-byte chunks at multiples of 16 bytes, so that no chunk runs over the row's end."""
    chunk = 16 // matrix.element_size()
    return matrix.shape[1] % chunk == 0 and matrix.stride(0) % chunk == 0 and matrix.data_ptr() % 16 == 0


@kernel(Matmul, backend="cuda", config=GemvConfig, fits=fits, default=default, space=space)
def cuda_gemv(problem: Matmul, config: GemvConfig, chip: Chip) -> Launch:
    """Streams the weights once, by cp.async, into mma operands; warps and blocks share k and are added up in a fixed order."""
    p, c = problem, config
    shape = _Shape.of(p, c)
    defines: dict[str, str | int] = {
        "M": p.m, "WARPS": c.warps, "ROW_TILES": c.row_tiles, "UNROLL": c.unroll, "STAGES": c.stages, "SPLIT": c.split,
        "TRANSPOSED": int(p.layout == "nt"), "ELEMENT": ELEMENT[p.dtype],
    }  # fmt: skip
    variants = [CudaKernel(SOURCE, "gemv", chip, {**defines, "ALIGNED": aligned}, shape.smem_bytes) for aligned in (0, 1)]
    combine = CudaKernel(COMBINE, "gemv_combine", chip, {name: defines[name] for name in ("M", "SPLIT", "ELEMENT")})
    grid = (-(-p.n // shape.tile_n), c.split, 1)
    partials: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        to = out
        if c.split > 1:
            if out.device not in partials:
                partials[out.device] = torch.empty((c.split, p.m, p.n), dtype=torch.float32, device=out.device)
            to = partials[out.device]
        strides = Int64(x.stride(0)), Int64(w.stride(0)), Int64(p.n if c.split > 1 else out.stride(0))
        variants[_in_chunks(x) and _in_chunks(w)].launch(grid, 32 * c.warps, [x, w, to, p.n, p.k, _part(p, c), *strides])
        if c.split > 1:
            combine.launch((-(-p.n // 128), p.m, 1), 128, [to, out, p.n, Int64(out.stride(0))])

    return launch
