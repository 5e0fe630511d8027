"""Norms of long rows in CUDA C++: a block has one row, which waits in shared memory between the passes."""

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
from klab.kernels.row_tiles import is_power_of_2
from klab.kernels.triton_support import cdiv, next_power_of_2

SOURCE = r"""
#include "rows.cuh"
using namespace klab;

constexpr int CHUNK = chunk_of<ELEMENT>(), WARPS = THREADS / 32, STEP = THREADS * AT_ONCE;
constexpr int GROUP_LANES = 128 / CHUNK;  // threads that hold a group of 128 columns

// A thread has the same chunks in every pass: what it keeps in shared memory, it alone reads again.
KLAB_KERNEL(norm_long_row, THREADS)(const ELEMENT* __restrict__ x, const ELEMENT* __restrict__ residual, const ELEMENT* __restrict__ gate,
                                    const ELEMENT* __restrict__ weight, const ELEMENT* __restrict__ bias, void* __restrict__ out,
                                    void* __restrict__ scales, ELEMENT* __restrict__ sum, int width, int aligned, int64_t x_stride,
                                    int64_t residual_stride, int64_t gate_stride, float eps) {
    const int64_t row = block_idx_x();
    const int chunks = ceil_div(width, CHUNK), lane = thread_idx();
    Vec16* kept = shared_memory<Vec16>();                          // [chunks]
    float* scratch = reinterpret_cast<float*>(kept + chunks);      // [3][WARPS]

    float total = 0.0f, squares = 0.0f;
    for (int first = lane; first < chunks; first += STEP) {
        // All loads of a step are under way before the first value is needed.
        Vec16 raw[AT_ONCE], other[AT_ONCE];
        KLAB_UNROLL
        for (int i = 0; i < AT_ONCE; ++i) {
            const int column = (first + i * THREADS) * CHUNK;
            raw[i] = load_chunk(x + row * x_stride + column, width - column, aligned);
            if (RESIDUAL) other[i] = load_chunk(residual + row * residual_stride + column, width - column, aligned);
        }
        KLAB_UNROLL
        for (int i = 0; i < AT_ONCE; ++i) {
            const int chunk = first + i * THREADS, column = chunk * CHUNK;
            if (chunk >= chunks) break;
            float h[CHUNK];
            to_floats<ELEMENT>(h, raw[i]);
            if (RESIDUAL) {
                float added[CHUNK];
                to_floats<ELEMENT>(added, other[i]);
                KLAB_UNROLL
                for (int j = 0; j < CHUNK; ++j) h[j] += added[j];
                raw[i] = from_floats<ELEMENT>(h);
                store_chunk(sum + row * width + column, raw[i], width - column, aligned);
                to_floats<ELEMENT>(h, raw[i]);
            }
            kept[chunk] = raw[i];
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j) total += h[j], squares = fused_multiply_add(h[j], h[j], squares);
        }
    }
    float mean = 0.0f;
    if (LAYER) {
        // The squares of what is left when the mean is off: their sum less the mean's would cancel.
        mean = over_row(total, THREADS, scratch, Add()) / static_cast<float>(width);
        squares = 0.0f;
        for (int chunk = lane; chunk < chunks; chunk += THREADS) {
            float h[CHUNK];
            to_floats<ELEMENT>(h, kept[chunk]);
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j)
                if (chunk * CHUNK + j < width) squares = fused_multiply_add(h[j] - mean, h[j] - mean, squares);
        }
    }
    const float root = inverse_root(over_row(squares, THREADS, scratch + WARPS, Add()) / static_cast<float>(width) + eps);

    auto normed = [&](float (&h)[CHUNK], int chunk) {
        const int column = chunk * CHUNK;
        to_floats<ELEMENT>(h, kept[chunk]);
        float factor[CHUNK];
        to_floats<ELEMENT>(factor, load_chunk_cached(weight + column, width - column, aligned));
        KLAB_UNROLL
        for (int j = 0; j < CHUNK; ++j) h[j] = (h[j] - mean) * root * factor[j];
        if (LAYER) {
            to_floats<ELEMENT>(factor, load_chunk_cached(bias + column, width - column, aligned));
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j) h[j] += factor[j];
        }
        if (GATED) {
            to_floats<ELEMENT>(factor, load_chunk_cached(gate + row * gate_stride + column, width - column, aligned));
            KLAB_UNROLL
            for (int j = 0; j < CHUNK; ++j) h[j] *= factor[j] * sigmoid(factor[j]);
        }
    };
    auto largest_of = [&](const float (&h)[CHUNK], int chunk, float largest) {
        KLAB_UNROLL
        for (int j = 0; j < CHUNK; ++j)
            if (chunk * CHUNK + j < width) largest = max_of(largest, h[j] < 0.0f ? -h[j] : h[j]);
        return largest;
    };
    float* scale = static_cast<float*>(scales);  // [rows, 1 or groups], or nothing
    uint8_t* narrow = static_cast<uint8_t*>(out) + row * width;
    float largest = LEAST_AMAX;
    if (QUANTIZE == 1) {
        for (int chunk = lane; chunk < chunks; chunk += THREADS) {
            float h[CHUNK];
            normed(h, chunk);
            largest = largest_of(h, chunk, largest);
        }
        largest = over_row(largest, THREADS, scratch + 2 * WARPS, Largest());
        if (lane == 0) scale[row] = largest * (1.0f / FP8_MAX);
    }
    // Whole warps walk on together, because the threads of a group of columns share its largest magnitude.
    for (int first = 0; first < chunks; first += THREADS) {
        const int chunk = first + lane, column = chunk * CHUNK;
        float h[CHUNK] = {};
        if (chunk < chunks) normed(h, chunk);
        if (QUANTIZE == 2) {
            largest = warp_max<GROUP_LANES>(largest_of(h, chunk, LEAST_AMAX));
            if (lane % GROUP_LANES == 0 && column < width) scale[row * ceil_div(width, 128) + column / 128] = largest * (1.0f / FP8_MAX);
        }
        if (QUANTIZE)
            store_fp8<CHUNK>(narrow + column, h, FP8_MAX / largest, width - column, aligned);
        else
            store_chunk(static_cast<ELEMENT*>(out) + row * width + column, from_floats<ELEMENT>(h), width - column, aligned);
    }
}
"""
# Shorter rows lie in registers (cuda_norm); this many 16-byte pieces are 4096 columns of bf16.
LEAST_CHUNKS = 512


@dataclass(frozen=True)
class LongConfig(Config):
    """Threads of a block, and 16-byte loads of each tensor that a thread has under way."""

    threads: int = 512
    at_once: int = 4


def _chunks(problem: Norm) -> int:
    """16-byte pieces of a row."""
    return cdiv(problem.width * SIZE_BYTES[problem.dtype], 16)


def _smem_bytes(problem: Norm, config: LongConfig) -> int:
    return 16 * _chunks(problem) + 3 * 4 * (config.threads // 32)


def fits(problem: Norm, config: LongConfig, chip: Chip) -> str | None:
    """A row fits into shared memory."""
    c = config
    if not is_power_of_2(c.threads, c.at_once) or not 64 <= c.threads <= 1024 or c.at_once > 8:
        return "threads are a power of two of 64 to 1024, loads under way 1, 2, 4 or 8"
    if _chunks(problem) < LEAST_CHUNKS:
        return f"is for rows of at least {LEAST_CHUNKS} pieces of 16 bytes"
    if _smem_bytes(problem, c) > chip.smem_per_block_bytes:
        return "a row does not fit into shared memory"
    if c.threads * (4 * c.at_once * (1 + problem.residual) + 40) > 65536:
        return "the loads under way would spill registers"
    return None


def default(problem: Norm, chip: Chip) -> LongConfig:
    """64 bytes of each tensor a thread under way, and no more threads than that leaves busy."""
    return LongConfig(max(128, min(512, next_power_of_2(_chunks(problem)) // 4)), 4)


def space(problem: Norm, chip: Chip) -> Iterator[LongConfig]:
    """Threads and loads under way."""
    for threads, at_once in product((128, 256, 512, 1024), (1, 2, 4, 8)):
        yield LongConfig(threads, at_once)


@kernel(Norm, backend="cuda", config=LongConfig, fits=fits, default=default, space=space)
def cuda_norm_long(problem: Norm, config: LongConfig, chip: Chip) -> Launch:
    """CUDA C++ for long rows: a block per row, read once and kept in shared memory; sum, gate and fp8 fused."""
    p, c = problem, config
    defines: dict[str, str | int] = {"ELEMENT": ELEMENT[p.dtype], "THREADS": c.threads, "AT_ONCE": c.at_once}
    defines |= {"RESIDUAL": int(p.residual), "LAYER": int(p.kind == "layer"), "GATED": int(p.gated)}
    defines["QUANTIZE"] = ["", "fp8_row", "fp8_group"].index(p.quantize)
    function = CudaKernel(SOURCE, "norm_long_row", chip, defines, _smem_bytes(p, c))
    chunk = 16 // SIZE_BYTES[p.dtype]

    def aligned(tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() % 16 == 0 and tensor.stride(0) % chunk == 0

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = inputs["x"], outputs["out"]
        residual, gate = inputs.get("residual", x), inputs.get("gate", x)
        vectors = [inputs["weight"], inputs.get("bias", inputs["weight"])]
        whole = p.width % chunk == 0 and all(aligned(tensor) for tensor in (x, residual, gate))
        whole = whole and all(tensor.data_ptr() % 16 == 0 for tensor in (*vectors, out, outputs.get("residual", out)))
        function.launch(
            (p.rows, 1, 1),
            c.threads,
            [
                x, residual, gate, *vectors, out, outputs.get("scale", out), outputs.get("residual", x), p.width, int(whole),
                Int64(x.stride(0)), Int64(residual.stride(0)), Int64(gate.stride(0)), p.eps,
            ],
        )  # fmt: skip

    return launch
