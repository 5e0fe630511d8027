"""Norms in CUDA C++: a row lies in the registers of 4 to 1024 threads, 16 bytes a load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel
import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.norm.problem import Norm
from klab.kernels.row_quantize import GROUP
from klab.kernels.row_tiles import is_power_of_2
from klab.kernels.triton_support import cdiv, next_power_of_2

SOURCE = r"""
#include "rows.cuh"
using namespace klab;

constexpr int CHUNK = chunk_of<ELEMENT>(), WARPS = ceil_div(THREADS, 32);
constexpr int GROUP_LANES = 128 / CHUNK;  // threads that hold a group of 128 columns
enum { LAYER = 1, RESIDUAL = 2, GATED = 4, FP8_ROW = 8, FP8_GROUP = 16, ALIGNED = 32 };

KLAB_KERNEL(norm_rows, THREADS)(const ELEMENT* __restrict__ x, const ELEMENT* __restrict__ residual, const ELEMENT* __restrict__ gate,
                                const ELEMENT* __restrict__ weight, const ELEMENT* __restrict__ bias, void* __restrict__ out,
                                void* __restrict__ scales, ELEMENT* __restrict__ sum, int rows, int width, int lanes, int options,
                                int64_t x_stride, int64_t residual_stride, int64_t gate_stride, float eps) {
    const bool aligned = options & ALIGNED;
    float* scale = static_cast<float*>(scales);  // [rows, 1 or groups], or nothing
    const int lane = thread_idx() % lanes, in_block = thread_idx() / lanes;
    const int64_t row = static_cast<int64_t>(block_idx_x()) * (THREADS / lanes) + in_block;
    const int end = row < rows ? width : 0;  // threads behind the last row read and write nothing
    float* scratch = shared_memory<float>();

    // All loads are under way before the first value is needed.
    Vec16 raw[VECTORS], other[VECTORS], weights[VECTORS];
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int column = (v * lanes + lane) * CHUNK;
        raw[v] = load_chunk(x + row * x_stride + column, end - column, aligned);
    }
    if (options & RESIDUAL) {
        KLAB_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            const int column = (v * lanes + lane) * CHUNK;
            other[v] = load_chunk(residual + row * residual_stride + column, end - column, aligned);
        }
    }
    // More than two would cost registers that other blocks need: those are read when they are used.
    constexpr bool EARLY = VECTORS <= 2;
    if (EARLY) {
        KLAB_UNROLL
        for (int v = 0; v < VECTORS; ++v) {
            const int column = (v * lanes + lane) * CHUNK;
            weights[v] = load_chunk_cached(weight + column, width - column, aligned);
        }
    }
    float h[VECTORS][CHUNK];
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        to_floats<ELEMENT>(h[v], raw[v]);
        if (options & RESIDUAL) {
            const int column = (v * lanes + lane) * CHUNK;
            float added[CHUNK];
            to_floats<ELEMENT>(added, other[v]);
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j) h[v][j] += added[j];
            const Vec16 rounded = from_floats<ELEMENT>(h[v]);
            store_chunk(sum + row * width + column, rounded, end - column, aligned);
            to_floats<ELEMENT>(h[v], rounded);
        }
    }

    if (options & LAYER) {
        float total = 0.0f;
        KLAB_UNROLL
        for (int v = 0; v < VECTORS; ++v)
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j) total += h[v][j];
        const float mean = over_row(total, lanes, scratch + WARPS, Add()) / static_cast<float>(width);
        KLAB_UNROLL
        for (int v = 0; v < VECTORS; ++v)
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j) h[v][j] = (v * lanes + lane) * CHUNK + j < end ? h[v][j] - mean : 0.0f;
    }
    float squares = 0.0f;
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v)
        KLAB_UNROLL
        for (int j = 0; j < CHUNK; ++j) squares = fused_multiply_add(h[v][j], h[v][j], squares);
    const float root = inverse_root(over_row(squares, lanes, scratch, Add()) / static_cast<float>(width) + eps);

    float largest[VECTORS];
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int column = (v * lanes + lane) * CHUNK;
        float factor[CHUNK];
        to_floats<ELEMENT>(factor, EARLY ? weights[v] : load_chunk_cached(weight + column, width - column, aligned));
        KLAB_UNROLL
        for (int j = 0; j < CHUNK; ++j) h[v][j] *= root * factor[j];
        if (options & LAYER) {
            to_floats<ELEMENT>(factor, load_chunk_cached(bias + column, width - column, aligned));
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j) h[v][j] += factor[j];
        }
        if (options & GATED) {
            to_floats<ELEMENT>(factor, load_chunk(gate + row * gate_stride + column, end - column, aligned));
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j) h[v][j] *= factor[j] * sigmoid(factor[j]);
        }
        if (options & (FP8_ROW | FP8_GROUP)) {
            largest[v] = LEAST_AMAX;
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j)
                if (column + j < end) largest[v] = max_of(largest[v], h[v][j] < 0.0f ? -h[v][j] : h[v][j]);
        } else {
            store_chunk(static_cast<ELEMENT*>(out) + row * width + column, from_floats<ELEMENT>(h[v]), end - column, aligned);
        }
    }
    if (!(options & (FP8_ROW | FP8_GROUP))) return;

    uint8_t* narrow = static_cast<uint8_t*>(out) + row * width;
    if (options & FP8_ROW) {
        KLAB_UNROLL
        for (int v = 1; v < VECTORS; ++v) largest[0] = max_of(largest[0], largest[v]);
        largest[0] = over_row(largest[0], lanes, scratch + 2 * WARPS, Largest());
        if (lane == 0 && end > 0) scale[row] = largest[0] * (1.0f / FP8_MAX);
    }
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int column = (v * lanes + lane) * CHUNK;
        if (options & FP8_GROUP) {
            largest[v] = warp_max<GROUP_LANES>(largest[v]);
            if (lane % GROUP_LANES == 0 && column < end) scale[row * ceil_div(width, 128) + column / 128] = largest[v] * (1.0f / FP8_MAX);
        }
        store_fp8<CHUNK>(narrow + column, h[v], FP8_MAX / (options & FP8_ROW ? largest[0] : largest[v]), end - column, aligned);
    }
}
"""
OPTIONS = {"layer": 1, "residual": 2, "gated": 4, "fp8_row": 8, "fp8_group": 16, "aligned": 32}
MAX_VECTORS = 8
MAX_THREADS = 1024


@dataclass(frozen=True)
class LanesConfig(Config):
    """`lanes` threads hold a row, `vectors` times 16 bytes each; a block of `threads` has threads / lanes rows."""

    lanes: int = 256
    vectors: int = 2
    threads: int = 256


def _chunks(problem: Norm) -> int:
    """16-byte pieces of a row."""
    return cdiv(problem.width * SIZE_BYTES[problem.dtype], 16)


def fits(problem: Norm, config: LanesConfig, chip: Chip) -> str | None:
    """The threads hold a row, and no more of them than it has pieces."""
    c, chunks = config, _chunks(problem)
    if not is_power_of_2(c.lanes, c.vectors, c.threads) or c.vectors > MAX_VECTORS:
        return f"lanes, vectors and threads must be powers of two, vectors at most {MAX_VECTORS}"
    if not c.lanes <= c.threads <= MAX_THREADS or c.threads < 32:
        return f"a block has 32 to {MAX_THREADS} threads, and whole rows"
    if c.lanes * c.vectors < chunks:
        return f"a row has {chunks} pieces of 16 bytes, and {c.lanes} x {c.vectors} hold fewer"
    group_lanes = GROUP * SIZE_BYTES[problem.dtype] // 16
    if problem.quantize == "fp8_group" and c.lanes < group_lanes:
        return f"a group of {GROUP} columns needs {group_lanes} lanes"
    if c.lanes * c.vectors >= 2 * chunks and c.lanes > max(1, group_lanes if problem.quantize == "fp8_group" else 1):
        return "half of the threads would have nothing to do"
    # Values, what they are read from, and 40 for the rest.
    registers = 16 // SIZE_BYTES[problem.dtype] * c.vectors + 4 * c.vectors + 40
    if registers > 65536 // c.threads:
        return "the row would spill registers"
    if cdiv(problem.rows, c.threads // c.lanes) >= 2**31:
        return "too many rows"
    return None


def default(problem: Norm, chip: Chip) -> LanesConfig:
    """Two pieces a thread, so that two loads of each tensor are under way; blocks of 256 threads, more only where a row needs them."""
    pieces = next_power_of_2(_chunks(problem))
    least = GROUP * SIZE_BYTES[problem.dtype] // 16 if problem.quantize == "fp8_group" else 1
    vectors = 2 if pieces > least else 1
    if pieces // vectors > MAX_THREADS:
        vectors = min(MAX_VECTORS, pieces // MAX_THREADS)
    lanes = max(least, pieces // vectors)
    return LanesConfig(lanes, vectors, min(MAX_THREADS, max(lanes, 256 if problem.rows * lanes >= 256 * chip.sm_count else 64)))


def space(problem: Norm, chip: Chip) -> Iterator[LanesConfig]:
    """How a row is shared, and rows of a block."""
    for vectors, lanes, threads in product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), (64, 128, 256, 512, 1024)):
        yield LanesConfig(lanes, vectors, threads)


@kernel(Norm, backend="cuda", config=LanesConfig, fits=fits, default=default, space=space)
def cuda_norm(problem: Norm, config: LanesConfig, chip: Chip) -> Launch:
    """CUDA C++, one pass with the rows in registers; sum, gate and fp8 fused."""
    p, c = problem, config
    defines: dict[str, str | int] = {"ELEMENT": ELEMENT[p.dtype], "VECTORS": c.vectors, "THREADS": c.threads}
    function = CudaKernel(SOURCE, "norm_rows", chip, defines, 3 * 4 * cdiv(c.threads, 32))
    chosen = {"layer": p.kind == "layer", "residual": p.residual, "gated": p.gated, p.quantize: bool(p.quantize)}
    options = sum(OPTIONS[name] for name, on in chosen.items() if on)
    grid = (cdiv(p.rows, c.threads // c.lanes), 1, 1)
    chunk = 16 // SIZE_BYTES[p.dtype]

    def aligned(tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() % 16 == 0 and tensor.stride(0) % chunk == 0

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = inputs["x"], outputs["out"]
        residual, gate = inputs.get("residual", x), inputs.get("gate", x)
        whole = p.width % chunk == 0 and all(aligned(tensor) for tensor in (x, residual, gate))
        vectors = [inputs["weight"], inputs.get("bias", inputs["weight"])]
        whole = whole and all(tensor.data_ptr() % 16 == 0 for tensor in (*vectors, out, outputs.get("residual", out)))
        function.launch(
            grid,
            c.threads,
            [
                x, residual, gate, *vectors, out, outputs.get("scale", out),
                outputs.get("residual", x), p.rows, p.width, c.lanes, options + OPTIONS["aligned"] * whole,
                Int64(x.stride(0)), Int64(residual.stride(0)), Int64(gate.stride(0)), p.eps,
            ],
        )  # fmt: skip

    return launch
