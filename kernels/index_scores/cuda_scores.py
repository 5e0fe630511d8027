"""Indexer scores in CUDA C++: a warp keeps its keys in registers, as left operands of mma.sync, and meets one token after another.

The scores of single heads live in accumulators for 16 heads at a time, and what their weighted sum adds up stays in four lanes. fp8 is
converted to halves (exactly) on its way into shared memory: neither sm_90 nor sm_100 multiplies it by mma.sync.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  absent CuPy makes this file "unavailable" when it is found, not when it is launched
import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.errors import UsageError
from klab.kernels.index_scores.problem import IndexScores
from klab.kernels.mma_attention import over_budget
from klab.kernels.triton_support import cdiv

SOURCE = r"""
#include "attention.cuh"
#include "fp8.cuh"
using namespace klab;

constexpr int THREADS = 32 * WARPS;
constexpr int KEYS = WARPS * 16 * ROW_FRAGMENTS;            // of a block
constexpr int ROW_BYTES = round_up(2 * HEAD_DIM, 128);  // of 16-bit elements in shared memory
constexpr int PADDED = round_up(HEADS, 16);
constexpr int QUERY_BYTES = PADDED * ROW_BYTES;
constexpr int PER_LOAD = NARROW ? 16 : 8;               // elements in 16 bytes
constexpr int CHUNKS = HEAD_DIM / PER_LOAD;
constexpr int LOADS = ceil_div(PADDED * CHUNKS, THREADS);
constexpr int WEIGHTS_AT = max_of(KEYS * ROW_BYTES, 2 * QUERY_BYTES);
using Multiplied = MULTIPLIED;                          // half_t for fp8, else the element itself

// 16 bytes of elements to their place in a tile of 16-bit elements.
KLAB_DEVICE void put(unsigned char* tile, int row, int chunk, const Vec16& loaded) {
    if (!NARROW) {
        store_16(tile + swizzle<ROW_BYTES>(row, chunk), loaded);
        return;
    }
    Vec16 low, high;
    KLAB_UNROLL
    for (int i = 0; i < 2; ++i) {
        fp8x4_to_halves(loaded.word[i], low.word[2 * i], low.word[2 * i + 1]);
        fp8x4_to_halves(loaded.word[2 + i], high.word[2 * i], high.word[2 * i + 1]);
    }
    store_16(tile + swizzle<ROW_BYTES>(row, 2 * chunk), low);
    store_16(tile + swizzle<ROW_BYTES>(row, 2 * chunk + 1), high);
}

KLAB_KERNEL(index_scores, THREADS)(
    const ELEMENT* q, const ELEMENT* k, const float* k_scale, const float* weights, const int* table, float* out, int q_len, int kv_len,
    int key_tiles, int token_tiles, int64_t q_batch, int q_token, int q_head, int64_t k_batch, int64_t k_page, int k_row,
    int64_t scale_batch, int64_t scale_page, int w_batch, int w_token, int table_row, int64_t out_batch, int64_t out_token) {
    int warp = thread_idx() / 32, lane = thread_idx() % 32, quad = lane / 4, pair = lane % 4;
    int first_key = block_idx_x() % key_tiles * KEYS, sequence = block_idx_x() / key_tiles / token_tiles;
    int begin = block_idx_x() / key_tiles % token_tiles * TOKENS, end = min_of(begin + TOKENS, q_len), before = kv_len - q_len;
    q += sequence * q_batch, k += sequence * k_batch, weights += static_cast<int64_t>(sequence) * w_batch, out += sequence * out_batch;
    const int* own = table + static_cast<int64_t>(sequence) * table_row;

    // Tokens that see none of these keys come first: they get -inf, and nothing is multiplied.
    int seeing = min_of(max_of(first_key - before, begin), end);
    for (int index = thread_idx(); index < (seeing - begin) * KEYS; index += THREADS) {
        int key = first_key + index % KEYS;
        if (key < kv_len) out[(begin + index / KEYS) * out_token + key] = -infinity();
    }
    if (seeing == end) return;

    auto place = [&](int key, int64_t page_stride, int row_stride) -> int64_t {
        if (PAGE_SIZE == 0) return static_cast<int64_t>(key) * row_stride;
        constexpr uint32_t page_size = PAGE_SIZE > 0 ? PAGE_SIZE : 1;
        uint32_t at = key;
        return own[at / page_size] * page_stride + static_cast<int64_t>(at % page_size) * row_stride;
    };
    unsigned char* smem = shared_memory<unsigned char>();
    float* shared_weights = reinterpret_cast<float*>(smem + WEIGHTS_AT);  // [2][PADDED]
    const Vec16 zeros = {};
    KLAB_UNROLL
    for (int i = 0; i < ceil_div(KEYS * CHUNKS, THREADS); ++i) {
        int index = thread_idx() + i * THREADS, row = index / CHUNKS, chunk = index % CHUNKS, key = first_key + row;
        if (KEYS * CHUNKS % THREADS != 0 && index >= KEYS * CHUNKS) break;
        put(smem, row, chunk, key < kv_len ? load_16_once(k + place(key, k_page, k_row) + chunk * PER_LOAD) : zeros);
    }
    sync_threads();
    uint32_t keys[HEAD_DIM / 16][ROW_FRAGMENTS][4];
    int keys_at_row = left_operand_at<ROW_BYTES>(lane) + warp * ROW_FRAGMENTS * 16 * ROW_BYTES;
    KLAB_UNROLL
    for (int step = 0; step < HEAD_DIM / 16; ++step) load_queries<ROW_BYTES>(keys[step], smem, keys_at_row, step);
    float scale[ROW_FRAGMENTS][2];
    KLAB_UNROLL
    for (int i = 0; i < 2 * ROW_FRAGMENTS; ++i) {
        int key = first_key + (warp * ROW_FRAGMENTS * 2 + i) * 8 + quad;
        int64_t at = key >= kv_len ? 0 : PAGE_SIZE ? place(key, scale_page, 1) : sequence * scale_batch + key;
        scale[i / 2][i % 2] = NARROW ? k_scale[at] : 1.0f;
    }
    sync_threads();  // the keys' memory becomes the queries'

    // The queries of the next token are under way, in registers, while those of this one are multiplied.
    Vec16 next[LOADS];
    float next_weight = 0.0f;
    auto load = [&](int token) {
        const ELEMENT* from = q + static_cast<int64_t>(token) * q_token;
        KLAB_UNROLL
        for (int i = 0; i < LOADS; ++i) {
            int index = thread_idx() + i * THREADS, head = index / CHUNKS;
            next[i] = head < HEADS ? load_16(from + static_cast<int64_t>(head) * q_head + index % CHUNKS * PER_LOAD) : zeros;
        }
        next_weight = thread_idx() < HEADS ? weights[static_cast<int64_t>(token) * w_token + thread_idx()] : 0.0f;
    };
    auto keep = [&](int buffer) {
        KLAB_UNROLL
        for (int i = 0; i < LOADS; ++i) {
            int index = thread_idx() + i * THREADS;
            if (PADDED * CHUNKS % THREADS != 0 && index >= PADDED * CHUNKS) break;
            put(smem + buffer * QUERY_BYTES, index / CHUNKS, index % CHUNKS, next[i]);
        }
        if (thread_idx() < PADDED) shared_weights[buffer * PADDED + thread_idx()] = next_weight;
    };
    load(seeing);
    keep(0);
    sync_threads();
    KLAB_NO_UNROLL
    for (int token = seeing; token < end; ++token) {
        int buffer = (token - seeing) % 2;
        if (token + 1 < end) load(token + 1);
        float totals[ROW_FRAGMENTS][2] = {};
        KLAB_NO_UNROLL
        for (int head = 0; head < PADDED; head += 16) {
            float each[ROW_FRAGMENTS][2][4] = {};
            int at = keys_at<ROW_BYTES>(lane) + buffer * QUERY_BYTES + head * ROW_BYTES;
            KLAB_UNROLL
            for (int step = 0; step < HEAD_DIM / 16; ++step) add_scores<Multiplied, ROW_BYTES>(each, keys[step], smem, at, step);
            KLAB_UNROLL
            for (int n = 0; n < 2; ++n) {
                const float* w = shared_weights + buffer * PADDED + head + n * 8 + 2 * pair;
                float first = w[0], second = w[1];
                KLAB_UNROLL
                for (int i = 0; i < 2 * ROW_FRAGMENTS; ++i) {
                    float& total = totals[i / 2][i % 2];
                    total = fused_multiply_add(max_of(each[i / 2][n][2 * (i % 2)], 0.0f), first, total);
                    total = fused_multiply_add(max_of(each[i / 2][n][2 * (i % 2) + 1], 0.0f), second, total);
                }
            }
        }
        KLAB_UNROLL
        for (int i = 0; i < 2 * ROW_FRAGMENTS; ++i) {
            int key = first_key + (warp * ROW_FRAGMENTS * 2 + i) * 8 + quad;
            float score = warp_sum<4>(totals[i / 2][i % 2]) * scale[i / 2][i % 2];
            if (pair == 0 && key < kv_len) out[token * out_token + key] = key <= before + token ? score : -infinity();
        }
        if (token + 1 < end) keep(1 - buffer);
        sync_threads();
    }
}
"""


@dataclass(frozen=True)
class CudaScoresConfig(Config):
    """A block of `warps` warps keeps 16 * `fragments` keys each in registers and streams `tokens` tokens past them."""

    fragments: int = 2
    warps: int = 4
    tokens: int = 32


def smem_bytes(problem: IndexScores, config: CudaScoresConfig) -> int:
    """Shared memory of a block: the keys once, then two tokens' queries in the same place, and their weights."""
    row, padded = cdiv(2 * problem.head_dim, 128) * 128, cdiv(problem.heads, 16) * 16
    return max(config.warps * 16 * config.fragments, 2 * padded) * row + 2 * padded * 4


def registers(problem: IndexScores, config: CudaScoresConfig) -> int:
    """Estimated 32-bit registers of a thread: keys, products, the next queries, and 50 for addresses."""
    loads = cdiv(cdiv(problem.heads, 16) * 16 * problem.head_dim * SIZE_BYTES[problem.operand_dtype], 16 * 32 * config.warps)
    return config.fragments * (problem.head_dim // 4 + 8) + 4 * loads + 50


def fits(problem: IndexScores, config: CudaScoresConfig, chip: Chip) -> str | None:
    """None when it can run; otherwise the reason in a few words."""
    if problem.dtype not in ("float16", "bfloat16"):
        return f"tensor cores multiply fp16 and bf16 here, not {problem.dtype}"
    if chip.compute_capability < ((8, 9) if problem.format else (8, 0)):
        return f"needs bf16 tensor cores (8.0) and for fp8 its conversions (8.9), {chip.name} has {chip.compute_capability}"
    if problem.head_dim % 64 or problem.head_dim > 256 or problem.heads > 32 * config.warps:
        return "head_dim is a multiple of 64 up to 256, and there are no more heads than threads"
    if config.fragments not in (1, 2, 4) or config.warps not in (1, 2, 4, 8) or not 1 <= config.tokens <= problem.q_len:
        return "fragments is 1, 2 or 4, warps 1 to 8, tokens no more than there are"
    if 16 * config.fragments * config.warps > max(64, 2 * problem.kv_len):
        return "the keys of a block are more than there are"
    return over_budget(smem_bytes(problem, config), registers(problem, config), config.warps, chip)


def default(problem: IndexScores, chip: Chip) -> CudaScoresConfig:
    """128 keys of a block, 32 tokens; few keys take fewer fragments, many heads more warps."""
    warps = max(2, min(4, cdiv(problem.kv_len, 16)), cdiv(problem.heads, 32))
    return CudaScoresConfig(2 if problem.kv_len >= 128 and problem.head_dim <= 128 else 1, warps, min(32, problem.q_len))


def space(problem: IndexScores, chip: Chip) -> Iterator[CudaScoresConfig]:
    """1, 2 or 4 fragments, 1 to 8 warps, 1 to 128 tokens."""
    for fragments, warps, tokens in product((2, 1, 4), (4, 8, 2, 1), (32, 1, 2, 4, 8, 16, 64, 128)):
        yield CudaScoresConfig(fragments, warps, tokens)


def _row_strides(name: str, tensor: torch.Tensor) -> list[int]:
    """Elements from one index to the next, for all dimensions but the last; UsageError unless rows are dense and start at 16 bytes."""
    *outer, dim = tensor.stride()
    if dim != 1 or any(stride * tensor.element_size() % 16 for stride in outer) or tensor.data_ptr() % 16:
        raise UsageError(f"cuda_scores loads 16 bytes at a time: make rows of {name} dense and 16-byte aligned (strides {tensor.stride()})")
    return outer


@kernel(IndexScores, backend="cuda", config=CudaScoresConfig, space=space, default=default, fits=fits)
def cuda_scores(problem: IndexScores, config: CudaScoresConfig, chip: Chip) -> Launch:
    """CUDA C++ indexer (mma.sync): keys in registers, queries streamed token by token; fp8 converted to fp16 on its way (emulated)."""
    narrow, paged = bool(problem.format), bool(problem.page_size)
    defines: dict[str, str | int] = {
        "ELEMENT": "klab::uint8_t" if narrow else ELEMENT[problem.dtype],
        "MULTIPLIED": "klab::half_t" if narrow else ELEMENT[problem.dtype],
        "NARROW": int(narrow),
        "HEADS": problem.heads,
        "HEAD_DIM": problem.head_dim,
        "PAGE_SIZE": problem.page_size,
        "ROW_FRAGMENTS": config.fragments,
        "WARPS": config.warps,
        "TOKENS": config.tokens,
    }
    score = CudaKernel(SOURCE, "index_scores", chip, defines, smem_bytes(problem, config))
    key_tiles, token_tiles = cdiv(problem.kv_len, 16 * config.fragments * config.warps), cdiv(problem.q_len, config.tokens)

    tables: dict[torch.device, torch.Tensor] = {}

    def no_table(device: torch.device) -> torch.Tensor:
        if device not in tables:
            tables[device] = torch.empty((1, 1), dtype=torch.int32, device=device)
        return tables[device]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, weights, out = inputs["q"], inputs["weights"], outputs["scores"]
        k = inputs["k_cache"] if paged else inputs["k"]
        scale: torch.Tensor = inputs["k_scale"] if narrow else weights
        table = inputs["block_table"] if paged else no_table(q.device)
        q_batch, q_token, q_head = _row_strides("q", q)
        k_outer, k_row = _row_strides("k", k)
        of_scale = scale.stride(0) if narrow else 0
        strides = [Int64(q_batch), q_token, q_head, Int64(0 if paged else k_outer), Int64(k_outer if paged else 0), k_row]
        strides += [Int64(0 if paged else of_scale), Int64(of_scale if paged else 0), *weights.stride()[:2], table.stride(0)]
        strides += [Int64(out.stride(0)), Int64(out.stride(1))]
        shape = [problem.q_len, problem.kv_len, key_tiles, token_tiles]
        if narrow:
            q, k = q.view(torch.uint8), k.view(torch.uint8)
        grid = (problem.batch * token_tiles * key_tiles, 1, 1)
        score.launch(grid, 32 * config.warps, [q, k, scale, weights, table, out, *shape, *strides])

    return launch
