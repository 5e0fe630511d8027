"""Activations in CUDA C++: 16 bytes of either half a load, everything else in registers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.activation.problem import KINDS, SWIGLU_LIMIT, SWIGLU_SLOPE, Activation
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.row_quantize import GROUP
from klab.kernels.row_tiles import is_power_of_2
from klab.kernels.triton_support import cdiv, next_power_of_2

SOURCE = r"""
#include "rows.cuh"
using namespace klab;

constexpr int CHUNK = chunk_of<ELEMENT>(), GROUP_LANES = 128 / CHUNK;
enum { GATED = 1, FP8_ROW = 2, FP8_GROUP = 4, ALIGNED = 8, ALIGNED_OUT = 16 };
enum { SILU, GELU, GELU_TANH, RELU2, SWIGLU_CLAMPED, SIGMOID };

KLAB_DEVICE void activate(float (&x)[CHUNK], const float (&up)[CHUNK], int kind, bool gated, float slope, float limit) {
    KLAB_UNROLL
    for (int j = 0; j < CHUNK; ++j) {
        const float v = x[j];
        float y;
        if (kind == SILU) y = v * sigmoid(v);
        else if (kind == GELU) y = 0.5f * v * (1.0f + gauss_error(v * 0.70710678f));
        // v (1 + tanh u) / 2 is v sigmoid(2 u), which keeps its relative precision where tanh is near -1.
        else if (kind == GELU_TANH) y = v * sigmoid(1.5957691f * (v + 0.044715f * v * v * v));
        else if (kind == RELU2) y = max_of(v, 0.0f) * max_of(v, 0.0f);
        else if (kind == SIGMOID) y = sigmoid(v);
        else y = min_of(v, limit) * sigmoid(slope * min_of(v, limit)) * (max_of(min_of(up[j], limit), -limit) + 1.0f);
        x[j] = gated && kind != SWIGLU_CLAMPED ? y * up[j] : y;
    }
}

KLAB_KERNEL(activate_rows, THREADS)(const ELEMENT* __restrict__ x, void* __restrict__ out, void* __restrict__ scales, int rows, int width,
                                    int lanes, int kind, int options, int64_t x_stride, float slope, float limit) {
    const bool aligned = options & ALIGNED, aligned_out = options & ALIGNED_OUT, gated = options & GATED;
    const int lane = thread_idx() % lanes;
    const int64_t row = static_cast<int64_t>(block_idx_x()) * (THREADS / lanes) + thread_idx() / lanes;
    const int end = row < rows ? width : 0, first = block_idx_y() * VECTORS * lanes + lane;
    float* scale = static_cast<float*>(scales);
    float* scratch = shared_memory<float>();

    Vec16 gate_raw[VECTORS], up_raw[VECTORS];
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int column = (first + v * lanes) * CHUNK;
        const ELEMENT* from = x + row * x_stride + column;
        gate_raw[v] = load_chunk(from, end - column, aligned);
        if (gated) up_raw[v] = load_chunk(from + width, end - column, aligned);
    }
    float y[VECTORS][CHUNK], largest[VECTORS];
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int column = (first + v * lanes) * CHUNK;
        float up[CHUNK] = {};
        to_floats<ELEMENT>(y[v], gate_raw[v]);
        if (gated) to_floats<ELEMENT>(up, up_raw[v]);
        activate(y[v], up, kind, gated, slope, limit);
        if (!(options & (FP8_ROW | FP8_GROUP))) {
            store_chunk(static_cast<ELEMENT*>(out) + row * width + column, from_floats<ELEMENT>(y[v]), end - column, aligned_out);
        } else {
            largest[v] = LEAST_AMAX;
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j)
                if (column + j < end) largest[v] = max_of(largest[v], y[v][j] < 0.0f ? -y[v][j] : y[v][j]);
        }
    }
    if (!(options & (FP8_ROW | FP8_GROUP))) return;

    if (options & FP8_ROW) {
        KLAB_UNROLL
        for (int v = 1; v < VECTORS; ++v) largest[0] = max_of(largest[0], largest[v]);
        largest[0] = over_row(largest[0], lanes, scratch, Largest());
        if (lane == 0 && end > 0) scale[row] = largest[0] * (1.0f / FP8_MAX);
    }
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int column = (first + v * lanes) * CHUNK;
        if (options & FP8_GROUP) {
            largest[v] = warp_max<GROUP_LANES>(largest[v]);
            if (lane % GROUP_LANES == 0 && column < end) scale[row * ceil_div(width, 128) + column / 128] = largest[v] * (1.0f / FP8_MAX);
        }
        store_fp8<CHUNK>(static_cast<uint8_t*>(out) + row * width + column, y[v], FP8_MAX / (options & FP8_ROW ? largest[0] : largest[v]),
                         end - column, aligned_out);
    }
}
"""
MAX_VECTORS = 8
MAX_THREADS = 1024
MAX_GRID_Y = 65535


@dataclass(frozen=True)
class LanesConfig(Config):
    """`lanes` threads do a stretch of a row, `vectors` times 16 bytes of either half each; a block does threads / lanes rows."""

    lanes: int = 256
    vectors: int = 1
    threads: int = 256


def _chunks(problem: Activation) -> int:
    """16-byte pieces of a row of the output, before it is narrowed."""
    return cdiv(problem.width * SIZE_BYTES[problem.dtype], 16)


def _group_lanes(problem: Activation) -> int:
    """Threads that must hold neighbouring pieces."""
    return GROUP * SIZE_BYTES[problem.dtype] // 16 if problem.quantize == "fp8_group" else 1


def fits(problem: Activation, config: LanesConfig, chip: Chip) -> str | None:
    """The stretches of a row; with fp8_row one stretch holds the row."""
    c, chunks = config, _chunks(problem)
    if not is_power_of_2(c.lanes, c.vectors, c.threads) or c.vectors > MAX_VECTORS:
        return f"lanes, vectors and threads must be powers of two, vectors at most {MAX_VECTORS}"
    if not c.lanes <= c.threads <= MAX_THREADS or c.threads < 32:
        return f"a block has 32 to {MAX_THREADS} threads, and whole stretches"
    if problem.quantize == "fp8_row" and c.lanes * c.vectors < chunks:
        return f"a row has {chunks} pieces of 16 bytes, and {c.lanes} x {c.vectors} hold fewer"
    if c.lanes < _group_lanes(problem):
        return f"a group of {GROUP} columns needs {_group_lanes(problem)} lanes"
    if c.lanes * c.vectors >= 2 * chunks and c.lanes > _group_lanes(problem):
        return "half of the threads would have nothing to do"
    # Values, what they are read from, and 20 for the rest. Rows of over 2048 pieces have no other way for fp8_row: 48 B a thread spill.
    registers = 16 // SIZE_BYTES[problem.dtype] * c.vectors + 4 * c.vectors + 20
    if registers > 65536 // c.threads and (problem.quantize != "fp8_row" or c.lanes < MAX_THREADS):
        return "the values would spill registers"
    if cdiv(chunks, c.lanes * c.vectors) > MAX_GRID_Y or cdiv(problem.rows, c.threads // c.lanes) >= 2**31:
        return "too many blocks"
    return None


def default(problem: Activation, chip: Chip) -> LanesConfig:
    """One piece of either half a thread (2048 threads of an SM have 64 KB under way); for fp8_row as many as a row needs."""
    pieces, least = next_power_of_2(_chunks(problem)), _group_lanes(problem)
    lanes, vectors = max(least, min(pieces, 256)), 1
    if problem.quantize == "fp8_row":
        vectors = 2 if pieces >= 64 else 1
        vectors = min(MAX_VECTORS, max(vectors, pieces // MAX_THREADS))
        lanes = min(MAX_THREADS, max(1, pieces // vectors))
    return LanesConfig(lanes, vectors, max(lanes, 256))


def space(problem: Activation, chip: Chip) -> Iterator[LanesConfig]:
    """Stretches, pieces of a thread, and rows of a block."""
    for vectors, lanes, threads in product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), (64, 128, 256, 512, 1024)):
        if lanes * vectors * 8 >= min(_chunks(problem), 64):  # shorter stretches leave the loads of a warp scattered
            yield LanesConfig(lanes, vectors, threads)


@kernel(Activation, backend="cuda", config=LanesConfig, fits=fits, default=default, space=space)
def cuda_activation(problem: Activation, config: LanesConfig, chip: Chip) -> Launch:
    """CUDA C++, one pass: activation, product and fp8 in registers."""
    p, c = problem, config
    defines: dict[str, str | int] = {"ELEMENT": ELEMENT[p.dtype], "VECTORS": c.vectors, "THREADS": c.threads}
    function = CudaKernel(SOURCE, "activate_rows", chip, defines, 4 * cdiv(c.threads, 32))
    options = p.gated + 2 * (p.quantize == "fp8_row") + 4 * (p.quantize == "fp8_group")
    grid = (cdiv(p.rows, c.threads // c.lanes), cdiv(_chunks(p), c.lanes * c.vectors), 1)
    chunk = 16 // SIZE_BYTES[p.dtype]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = inputs["x"], outputs["out"]
        whole = p.width % chunk == 0
        flags = options + 8 * (whole and x.data_ptr() % 16 == 0 and x.stride(0) % chunk == 0) + 16 * (whole and out.data_ptr() % 16 == 0)
        function.launch(
            grid,
            c.threads,
            [
                x, out, outputs.get("scale", out), p.rows, p.width, c.lanes, KINDS.index(p.kind), flags, Int64(x.stride(0)), SWIGLU_SLOPE,
                SWIGLU_LIMIT,
            ],
        )  # fmt: skip

    return launch
