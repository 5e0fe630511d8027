"""Rotation and cache write in CUDA C++: a thread turns the same columns of several heads, 16 bytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel
import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.rope_cache.problem import RopeCache
from klab.kernels.row_tiles import is_power_of_2
from klab.kernels.triton_support import cdiv

SOURCE = r"""
#include "rows.cuh"
using namespace klab;

constexpr int CHUNK = chunk_of<ELEMENT>();
enum { INTERLEAVED = 1, ROTARY = 2, FP8 = 4, ALIGNED = 8, CACHE = 16 };

// Rows of one token: `heads` of them, `from_head` apart where they are read, `to_head` apart where they go.
struct Rows {
    const ELEMENT* from;
    void* to;             // ELEMENT, or fp8 with `scale` [heads or 1]
    const float* scale;   // null: not narrowed
    int heads, from_head, to_head;
};

KLAB_DEVICE void put(const Rows& rows, int head, int column, const float (&value)[CHUNK]) {
    const int64_t at = static_cast<int64_t>(head) * rows.to_head + column;
    if (rows.scale)
        store_fp8<CHUNK>(static_cast<uint8_t*>(rows.to) + at, value, 1.0f / rows.scale[head], CHUNK, true);
    else
        store_16(static_cast<ELEMENT*>(rows.to) + at, from_floats<ELEMENT>(value));
}
KLAB_DEVICE void put(const Rows& rows, int head, int column, float value) {
    const int64_t at = static_cast<int64_t>(head) * rows.to_head + column;
    if (rows.scale)
        static_cast<uint8_t*>(rows.to)[at] = from_float<fp8_t>(value / rows.scale[head]).bits;
    else
        static_cast<ELEMENT*>(rows.to)[at] = from_float<ELEMENT>(value);
}

// One 16-byte column of HEADS rows from `head` on, copied.
KLAB_DEVICE void copy_columns(const Rows& rows, int head, int column) {
    Vec16 raw[HEADS];
    KLAB_UNROLL
    for (int i = 0; i < HEADS; ++i)
        raw[i] = load_chunk(rows.from + static_cast<int64_t>(head + i) * rows.from_head + column, head + i < rows.heads ? CHUNK : 0, true);
    KLAB_UNROLL
    for (int i = 0; i < HEADS; ++i) {
        if (head + i >= rows.heads) break;
        float value[CHUNK];
        to_floats<ELEMENT>(value, raw[i]);
        put(rows, head + i, column, value);
    }
}

// Columns column.. and column + half.. of HEADS rows, turned against each other.
KLAB_DEVICE void turn_halves(const Rows& rows, int head, int column, int half, const float* cos, const float* sin) {
    Vec16 raw[HEADS][2];
    KLAB_UNROLL
    for (int i = 0; i < HEADS; ++i)
        KLAB_UNROLL
        for (int h = 0; h < 2; ++h)
            raw[i][h] = load_chunk(rows.from + static_cast<int64_t>(head + i) * rows.from_head + column + h * half,
                                   head + i < rows.heads ? CHUNK : 0, true);
    float c[CHUNK], s[CHUNK];
    KLAB_UNROLL
    for (int j = 0; j < CHUNK; j += 4) {
        const Vec16 four_cos = load_16(cos + column + j), four_sin = load_16(sin + column + j);
        KLAB_UNROLL
        for (int w = 0; w < 4; ++w) c[j + w] = bits_float(four_cos.word[w]), s[j + w] = bits_float(four_sin.word[w]);
    }
    KLAB_UNROLL
    for (int i = 0; i < HEADS; ++i) {
        if (head + i >= rows.heads) break;
        float a[CHUNK], b[CHUNK], first[CHUNK], second[CHUNK];
        to_floats<ELEMENT>(a, raw[i][0]);
        to_floats<ELEMENT>(b, raw[i][1]);
        KLAB_UNROLL
        for (int j = 0; j < CHUNK; ++j) first[j] = a[j] * c[j] - b[j] * s[j], second[j] = b[j] * c[j] + a[j] * s[j];
        put(rows, head + i, column, first);
        put(rows, head + i, column + half, second);
    }
}

// One 16-byte column of HEADS rows, which holds whole pairs.
KLAB_DEVICE void turn_pairs(const Rows& rows, int head, int column, const float* cos, const float* sin) {
    Vec16 raw[HEADS];
    KLAB_UNROLL
    for (int i = 0; i < HEADS; ++i)
        raw[i] = load_chunk(rows.from + static_cast<int64_t>(head + i) * rows.from_head + column, head + i < rows.heads ? CHUNK : 0, true);
    float c[CHUNK / 2], s[CHUNK / 2];
    KLAB_UNROLL
    for (int j = 0; j < CHUNK / 2; ++j) c[j] = cos[column / 2 + j], s[j] = sin[column / 2 + j];
    KLAB_UNROLL
    for (int i = 0; i < HEADS; ++i) {
        if (head + i >= rows.heads) break;
        float x[CHUNK], y[CHUNK];
        to_floats<ELEMENT>(x, raw[i]);
        KLAB_UNROLL
        for (int j = 0; j < CHUNK / 2; ++j) {
            y[2 * j] = x[2 * j] * c[j] - x[2 * j + 1] * s[j];
            y[2 * j + 1] = x[2 * j + 1] * c[j] + x[2 * j] * s[j];
        }
        put(rows, head + i, column, y);
    }
}

// One element of HEADS rows, for sizes that 16 bytes do not divide.
KLAB_DEVICE void turn_element(const Rows& rows, int head, int column, int half, bool interleaved, const float* cos, const float* sin) {
    for (int i = head; i < min_of(head + HEADS, rows.heads); ++i) {
        const ELEMENT* x = rows.from + static_cast<int64_t>(i) * rows.from_head;
        float y = to_float(x[column]);
        if (column < 2 * half) {
            const bool second = interleaved ? column % 2 : column >= half;
            const int pair = interleaved ? column / 2 : column % half, step = interleaved ? 1 : half;
            const float other = to_float(x[second ? column - step : column + step]);
            y = second ? y * cos[pair] + other * sin[pair] : y * cos[pair] - other * sin[pair];
        }
        put(rows, i, column, y);
    }
}

// One block at least: left to itself ptxas spills a register so that 1024 threads fit on an SM.
KLAB_KERNEL_MIN_BLOCKS(rope_and_cache, THREADS, 1)(
    const ELEMENT* __restrict__ q, const ELEMENT* __restrict__ k, const ELEMENT* __restrict__ v, ELEMENT* __restrict__ q_out, void* k_cache,
    void* v_cache, const void* k_scale, const void* v_scale, const void* positions, const void* cos_table, const void* sin_table,
    const void* slots, int tokens, int heads, int kv_heads, int dim, int dim_v, int half, int k_at, int k_row, int v_row,
    int options, int q_head, int k_head, int v_head, int table_stride, int64_t q_token, int64_t k_token, int64_t v_token) {
    const bool aligned = options & ALIGNED, interleaved = options & INTERLEAVED;
    const int step = aligned ? CHUNK : 1;
    // What one thread does of a row: a pair of 16-byte columns where halves are turned, else one column.
    const int pairs = aligned && !interleaved ? half / CHUNK : 0, per_row = dim / step - pairs, per_value = dim_v / step;
    const int kv_blocks = ceil_div(kv_heads, HEADS);
    const int q_items = options & ROTARY ? ceil_div(heads, HEADS) * per_row : 0, k_items = kv_blocks * per_row;
    const int items = q_items + k_items + kv_blocks * per_value;
    const int64_t index = static_cast<int64_t>(block_idx_x()) * THREADS + thread_idx();
    if (index >= static_cast<int64_t>(tokens) * items) return;
    const int token = static_cast<int>(index) / items;
    int item = static_cast<int>(index) % items;

    const bool queries = item < q_items;
    if (!queries) item -= q_items;
    const bool keys = !queries && item < k_items;
    if (!queries && !keys) item -= k_items;
    const int per = queries || keys ? per_row : per_value, head = item / per * HEADS, at = item % per;
    // Without a cache the keys of a token go to the row of that token, and there are no values.
    const int64_t slot = queries || !(options & CACHE) ? token : static_cast<const int*>(slots)[token];
    // In bytes: an element of the cache is fp8 or ELEMENT.
    const int size = options & FP8 ? 1 : static_cast<int>(sizeof(ELEMENT));
    Rows rows;
    if (queries)
        rows = Rows{q + token * q_token, q_out + static_cast<int64_t>(token) * heads * dim, nullptr, heads, q_head, dim};
    else if (keys)
        rows = Rows{k + token * k_token, static_cast<char*>(k_cache) + (slot * kv_heads * k_row + k_at) * size,
                    options & FP8 ? static_cast<const float*>(k_scale) : nullptr, kv_heads, k_head, k_row};
    else
        rows = Rows{v + token * v_token, static_cast<char*>(v_cache) + slot * kv_heads * v_row * size,
                    options & FP8 ? static_cast<const float*>(v_scale) : nullptr, kv_heads, v_head, v_row};

    const float *cos = nullptr, *sin = nullptr;
    if (options & ROTARY && (queries || keys)) {
        const int64_t position = static_cast<const int*>(positions)[token];
        cos = static_cast<const float*>(cos_table) + position * table_stride;
        sin = static_cast<const float*>(sin_table) + position * table_stride;
    } else {
        half = 0;
    }
    if (!aligned) turn_element(rows, head, at, half, interleaved, cos, sin);
    else if (at < pairs && half) turn_halves(rows, head, at * CHUNK, half, cos, sin);
    else if (interleaved && at * CHUNK < 2 * half) turn_pairs(rows, head, at * CHUNK, cos, sin);
    else copy_columns(rows, head, (half && !interleaved ? at + pairs : at) * CHUNK);
}
"""


@dataclass(frozen=True)
class HeadsConfig(Config):
    """Heads of a thread, whose loads are under way together, and threads of a block."""

    heads: int = 2
    threads: int = 128


def fits(problem: RopeCache, config: HeadsConfig, chip: Chip) -> str | None:
    """The heads of a thread are held in registers."""
    c = config
    if not is_power_of_2(c.heads, c.threads) or c.heads > 8 or not 32 <= c.threads <= 1024:
        return "heads are 1, 2, 4 or 8, threads a power of two of 32 to 1024"
    if c.heads > 1 and c.heads >= 2 * problem.heads:
        return "more heads than there are"
    if c.threads * (32 + 12 * c.heads) > 65536:
        return "the heads would spill registers"
    if (
        problem.tokens * (problem.heads + (1 + problem.cache) * problem.kv_heads) * max(problem.head_dim, problem.latent, problem.dim_v)
        >= 2**31
    ):
        return "more elements than 32 bits count"
    return None


def default(problem: RopeCache, chip: Chip) -> HeadsConfig:
    """Two heads a thread where that leaves enough threads to fill the chip."""
    pieces = problem.tokens * problem.heads * problem.head_dim * SIZE_BYTES[problem.dtype] // 32
    return HeadsConfig(2 if problem.heads > 1 and pieces >= 4096 * chip.sm_count else 1, 128)


def space(problem: RopeCache, chip: Chip) -> Iterator[HeadsConfig]:
    """Heads of a thread and threads of a block."""
    for heads, threads in product((1, 2, 4, 8), (32, 64, 128, 256, 512)):
        yield HeadsConfig(heads, threads)


@kernel(RopeCache, backend="cuda", config=HeadsConfig, fits=fits, default=default, space=space)
def cuda_rope(problem: RopeCache, config: HeadsConfig, chip: Chip) -> Launch:
    """CUDA C++, one launch: queries, keys and values turned, narrowed and written, 16 bytes at a time."""
    p, c = problem, config
    function = CudaKernel(SOURCE, "rope_and_cache", chip, {"ELEMENT": ELEMENT[p.dtype], "HEADS": c.heads, "THREADS": c.threads})
    chunk = 16 // SIZE_BYTES[p.dtype]
    kv_heads, values = (1, p.latent) if p.latent else (p.kv_heads, p.dim_v * p.cache)
    half = p.turned // 2 if p.rotary else 0
    k_row = p.latent + p.head_dim
    options = p.interleaved + 2 * p.rotary + 4 * bool(p.kv_dtype) + 16 * p.cache
    whole = all(size % chunk == 0 for size in (p.head_dim, values, 2 * half if p.interleaved else half, 2 * half))

    def items(step: int) -> int:
        """Of a token, as the kernel counts them."""
        per_row = p.head_dim // step - (half // step if step > 1 and not p.interleaved else 0)
        blocks = cdiv(kv_heads, c.heads)
        return cdiv(p.heads, c.heads) * per_row * p.rotary + blocks * (per_row + values // step)

    def aligned(tensor: torch.Tensor) -> bool:
        size = 16 // tensor.element_size()
        return tensor.data_ptr() % 16 == 0 and all(stride % size == 0 for stride in tensor.stride()[:-1])

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        if p.latent:
            k, v, caches = inputs["k_rope"][:, None], inputs["latent"][:, None], [outputs["cache"]] * 2
            scales = [inputs.get("kv_scale", k)] * 2
        elif not p.cache:
            k = v = inputs["k"]
            caches, scales = [outputs["k"]] * 2, [k] * 2
        else:
            k, v, caches = inputs["k"], inputs["v"], [outputs["k_cache"], outputs["v_cache"]]
            scales = [inputs.get("k_scale", k), inputs.get("v_scale", k)]
        q, q_out = (side.get("q_rope" if p.latent else "q", k) for side in (inputs, outputs))
        tables = [inputs.get("cos", k), inputs.get("sin", k)]
        fast = whole and all(aligned(tensor) for tensor in (q, k, v, *tables)) and all(t.data_ptr() % 16 == 0 for t in (q_out, *caches))
        function.launch(
            (cdiv(p.tokens * items(chunk if fast else 1), c.threads), 1, 1),
            c.threads,
            [
                q, k, v, q_out, *caches, *scales, inputs.get("positions", k), *tables, inputs.get("slot_mapping", k), p.tokens, p.heads,
                kv_heads, p.head_dim, values, half, p.latent, k_row, k_row if p.latent else p.dim_v, options + 8 * fast, q.stride(1),
                k.stride(1), v.stride(1), tables[0].stride(0), Int64(q.stride(0)), Int64(k.stride(0)), Int64(v.stride(0)),
            ],
        )  # fmt: skip

    return launch
