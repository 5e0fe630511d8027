"""FlashAttention in CUDA C++: mma.sync tensor cores, cp.async pipelines, online softmax in registers.

The algorithm is that of FlashAttention-2 (Dao, arXiv 2307.08691): a block owns `block_m` queries of one head, walks over the keys that
any of them can see in tiles of `block_n`, and never writes scores to memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import cupy  # noqa: F401  absent CuPy makes this file "unavailable" when it is found, not when it is launched

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.mma_attention import MAX_GRID_YZ, over_budget, refusal, row_bytes, row_strides
from klab.kernels.prefill_attention.problem import PrefillAttention

SOURCE = r"""
#include "attention.cuh"
using namespace klab;

constexpr int THREADS = 32 * WARPS;
constexpr int WARP_ROWS = BLOCK_M / WARPS;
constexpr int FRAGMENTS = WARP_ROWS / 16;        // 16-row tensor-core tiles that a warp stacks
constexpr int K_STEPS = ceil_div(HEAD_DIM, 16);     // of 16 columns; the last one may end in 8 zeros
constexpr int V_COLUMNS = 2 * ceil_div(HEAD_DIM_V, 16);
constexpr int K_ROW = round_up(2 * HEAD_DIM, 128);    // bytes of a row in shared memory, for the swizzle
constexpr int V_ROW = round_up(2 * HEAD_DIM_V, 128);
constexpr int Q_BYTES = BLOCK_M * K_ROW;
constexpr int K_BYTES = BLOCK_N * K_ROW;
constexpr int V_BYTES = BLOCK_N * V_ROW;

struct QueryTile {
    int sequence, first_row;
};

// Tiles are numbered through all sequences; 32 sequences are searched at a time, one per lane. Within a causal sequence the last
// tile, which sees most keys, comes first, so that short work fills the tail.
KLAB_DEVICE QueryTile find_query_tile(const int* q_offsets, int batch, int tile) {
    int lane = thread_idx() % 32;
    for (int base = 0; base < batch; base += 32) {
        int i = base + lane;
        int tiles = i < batch ? ceil_div(q_offsets[i + 1] - q_offsets[i], BLOCK_M) : 0;
        int up_to = tiles;
        KLAB_UNROLL
        for (int distance = 1; distance < 32; distance *= 2) {
            int other = static_cast<int>(shfl(static_cast<uint32_t>(up_to), (lane - distance) & 31));
            if (lane >= distance) up_to += other;
        }
        // Exactly one lane's interval [up_to - tiles, up_to) may hold the tile: it sends 1 + its lane, the others 0.
        uint32_t found = up_to - tiles <= tile && tile < up_to ? lane + 1 : 0;
        KLAB_UNROLL
        for (int mask = 16; mask > 0; mask /= 2) found |= shfl_xor(found, mask);
        if (found) {
            int inside = CAUSAL ? up_to - 1 - tile : tile - (up_to - tiles);
            int owner = static_cast<int>(found) - 1;
            return QueryTile{base + owner, static_cast<int>(shfl(static_cast<uint32_t>(inside), owner)) * BLOCK_M};
        }
        tile -= static_cast<int>(shfl(static_cast<uint32_t>(up_to), 31));
    }
    return QueryTile{0, 0};
}

// The first key, moved down to a tile's border, that the queries at positions first.. see; and how many they see from there on.
KLAB_BOTH constexpr int first_key(int first, int window) { return WINDOWED ? max_of(0, first - window + 1) / BLOCK_N * BLOCK_N : 0; }
KLAB_BOTH constexpr int key_count(int begin, int last, int kv_len) { return (CAUSAL ? last + 1 : kv_len) - begin; }

// Keys and positions below count from first_key; `first` is the position of a warp's first query, negative if the warp has none.
// Whether the warp's queries see any key of the tile at `key`, and whether all of them see all of it.
KLAB_BOTH constexpr bool sees_some(int first, int key, int window) {
    return first >= 0 && (!CAUSAL || key < first + WARP_ROWS) && (!WINDOWED || key + BLOCK_N - 1 > first - window);
}
KLAB_BOTH constexpr bool sees_all(int first, int key, int count, int window) {
    return key + BLOCK_N <= (CAUSAL ? first + 1 : count) && (!WINDOWED || key > first + WARP_ROWS - 1 - window);
}
KLAB_BOTH constexpr bool is_hidden(int key, int position, int count, int window) {
    return (CAUSAL ? key > position : key >= count) || (WINDOWED && key <= position - window);
}

// All threads: `source` rows 0..ROWS-1 to a swizzled tile; rows from `valid_rows` on become zero, as columns behind the last one do.
template <int ROWS, int DIM, int ROW_BYTES>
KLAB_DEVICE void copy_rows(unsigned char* tile, const ELEMENT* source, int stride, int valid_rows) {
    constexpr int CHUNKS = 2 * ceil_div(DIM, 16);
    uint32_t thread = opaque(thread_idx());
    if constexpr (DIM % 16 == 0 && THREADS % CHUNKS == 0 && ROWS * CHUNKS % THREADS == 0) {
        // Every thread keeps its column. One stepping pointer, and comparing constants with one register, keep a register per row free.
        constexpr int STEP = THREADS / CHUNKS;
        int row = thread / CHUNKS, chunk = thread % CHUNKS, left = valid_rows - row;
        source += row * stride + chunk * 8;
        KLAB_UNROLL
        for (int i = 0; i < ROWS / STEP; ++i) {
            int at = STEP % 8 == 0 ? swizzle<ROW_BYTES>(row, chunk) + i * STEP * ROW_BYTES : swizzle<ROW_BYTES>(row + i * STEP, chunk);
            cp_async_16(tile + at, source, i * STEP < left);
            source += STEP * stride;
        }
    } else {
        for (uint32_t index = thread; index < ROWS * CHUNKS; index += THREADS) {
            int row = index / CHUNKS, chunk = index % CHUNKS;
            cp_async_16(tile + swizzle<ROW_BYTES>(row, chunk), source + row * stride + chunk * 8, row < valid_rows && chunk < DIM / 8);
        }
    }
}

// The same for the keys first_key.. of a sequence whose pages are listed in `pages`; `cache` points to the head's column.
template <int DIM, int ROW_BYTES>
KLAB_DEVICE void copy_from_pages(unsigned char* tile, const ELEMENT* cache, const int* pages, int64_t page_stride, int stride,
                                 int first_key, int valid_rows) {
    constexpr int CHUNKS = 2 * ceil_div(DIM, 16);
    for (uint32_t index = opaque(thread_idx()); index < BLOCK_N * CHUNKS; index += THREADS) {
        int row = index / CHUNKS, chunk = index % CHUNKS, key = first_key + row;
        bool valid = row < valid_rows;
        int64_t page = valid ? pages[key / PAGE_SIZE] : 0;
        cp_async_16(tile + swizzle<ROW_BYTES>(row, chunk), cache + page * page_stride + key % PAGE_SIZE * stride + chunk * 8,
                    valid && chunk < DIM / 8);
    }
}

KLAB_KERNEL(flash_forward, THREADS)(
    const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, const int* q_offsets, const int* kv_offsets, const int* block_table,
    const void* sinks, ELEMENT* out, int batch, int group, int q_token, int q_head, int64_t k_page, int k_token, int k_head,
    int64_t v_page, int v_token, int v_head, int out_token, int out_head, int table_width, int window, float scale_log2, float softcap) {
    int warp = thread_idx() / 32, lane = thread_idx() % 32;
    int head = HEADS_INNER ? block_idx_x() : block_idx_y();
    QueryTile at = find_query_tile(q_offsets, batch, HEADS_INNER ? block_idx_y() : block_idx_x());
    int q_start = q_offsets[at.sequence] + at.first_row, kv_start = kv_offsets[at.sequence];
    int q_len = q_offsets[at.sequence + 1] - q_offsets[at.sequence], kv_len = kv_offsets[at.sequence + 1] - kv_start;
    int rows = min_of(BLOCK_M, q_len - at.first_row);
    int position = (CAUSAL ? kv_len - q_len : 0) + at.first_row;  // of the block's first query among the keys
    int begin = first_key(position, window), count = key_count(begin, position + rows - 1, kv_len);
    int warp_row = warp * WARP_ROWS, first = warp_row < rows ? position + warp_row - begin : -1;

    q += static_cast<int64_t>(q_start) * q_token + head * q_head;
    k += head / group * k_head;
    v += head / group * v_head;
    const int* pages = block_table;
    if (PAGE_SIZE) {
        pages += static_cast<int64_t>(at.sequence) * table_width;
    } else {
        k += static_cast<int64_t>(kv_start + begin) * k_token;
        v += static_cast<int64_t>(kv_start + begin) * v_token;
    }

    unsigned char* smem = shared_memory<unsigned char>();
    // Needed again only at the end: the loop uses every register.
    int* kept = reinterpret_cast<int*>(smem + Q_BYTES + STAGES * (K_BYTES + V_BYTES));
    if (thread_idx() == 0) kept[0] = q_start, kept[1] = rows;
    auto copy_keys = [&](int i) {
        int key = i * BLOCK_N;
        unsigned char* tile = smem + Q_BYTES + i % STAGES * K_BYTES;
        if constexpr (PAGE_SIZE > 0) {
            if (key < count) copy_from_pages<HEAD_DIM, K_ROW>(tile, k, pages, k_page, k_token, begin + key, count - key);
        } else if (key < count) {
            copy_rows<BLOCK_N, HEAD_DIM, K_ROW>(tile, k + static_cast<int64_t>(key) * k_token, k_token, count - key);
        }
        cp_async_commit();
    };
    auto copy_values = [&](int i) {
        int key = i * BLOCK_N;
        unsigned char* tile = smem + Q_BYTES + STAGES * K_BYTES + i % STAGES * V_BYTES;
        if constexpr (PAGE_SIZE > 0) {
            if (key < count) copy_from_pages<HEAD_DIM_V, V_ROW>(tile, v, pages, v_page, v_token, begin + key, count - key);
        } else if (key < count) {
            copy_rows<BLOCK_N, HEAD_DIM_V, V_ROW>(tile, v + static_cast<int64_t>(key) * v_token, v_token, count - key);
        }
        cp_async_commit();
    };

    // One commit group per tile of keys or values, in the order K0 V0 K1 V1 ..: with K(S) and V(S-1) as the newest, K(i) and V(i)
    // have always arrived when 2 (STAGES - 1) younger groups may still be on their way. The queries travel with K0.
    copy_rows<BLOCK_M, HEAD_DIM, K_ROW>(smem, q, q_token, rows);
    KLAB_UNROLL
    for (int i = 0; i < STAGES; ++i) {
        copy_keys(i);
        if (i < STAGES - 1) copy_values(i);
    }

    int q_at = warp_row * K_ROW + left_operand_at<K_ROW>(lane);
    int k_at = Q_BYTES + keys_at<K_ROW>(lane);
    int v_at = Q_BYTES + STAGES * K_BYTES + left_operand_at<V_ROW>(lane);
    uint32_t queries[Q_IN_REGISTERS ? K_STEPS : 1][FRAGMENTS][4];
    if (Q_IN_REGISTERS) {
        cp_async_wait<2 * (STAGES - 1)>();
        sync_threads();
        KLAB_UNROLL
        for (int step = 0; step < (Q_IN_REGISTERS ? K_STEPS : 1); ++step) load_queries<K_ROW>(queries[step], smem, q_at, step);
    }

    float sums[FRAGMENTS][V_COLUMNS][4] = {};
    float row_max[FRAGMENTS][2], row_sum[FRAGMENTS][2];  // the maximum in units of log2; rows `quad` and `quad + 8`
    KLAB_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) {
        // A sink is a key before all others, without a value. Its weight counts once: in the share of the first of four lanes.
        row_max[f][0] = row_max[f][1] = SINKS ? static_cast<const float*>(sinks)[head] * LOG2_E : -infinity();
        row_sum[f][0] = row_sum[f][1] = SINKS && lane % 4 == 0 ? 1.0f : 0.0f;
    }

    KLAB_NO_UNROLL
    for (int i = 0; i * BLOCK_N < count; ++i) {
        int key = i * BLOCK_N;
        bool active = sees_some(first, key, window);
        uint32_t weights[FRAGMENTS][BLOCK_N / 16][4];
        cp_async_wait<2 * (STAGES - 1)>();
        sync_threads();
        copy_values(i + STAGES - 1);
        if (active) {
            int k_tile_at = k_at + i % STAGES * K_BYTES, q_tile_at = opaque(q_at);
            float scores[FRAGMENTS][BLOCK_N / 8][4] = {};
            KLAB_UNROLL
            for (int step = 0; step < K_STEPS; ++step) {
                int held = Q_IN_REGISTERS ? step : 0;
                if (!Q_IN_REGISTERS) load_queries<K_ROW>(queries[held], smem, q_tile_at, step);
                add_scores<ELEMENT, K_ROW>(scores, queries[held], smem, k_tile_at, step);
            }
            if (SOFTCAP) cap_scores(scores, scale_log2, softcap);
            if (!sees_all(first, key, count, window)) {
                // Counted from this lane's first key, so that every comparison is of one register with a constant.
                int masker = opaque(thread_idx()) % 32, origin = key + 2 * (masker % 4), seen_from = first + masker / 4 - origin;
                KLAB_UNROLL
                for (int f = 0; f < FRAGMENTS; ++f) {
                    KLAB_UNROLL
                    for (int n = 0; n < BLOCK_N / 8; ++n) {
                        KLAB_UNROLL
                        for (int j = 0; j < 4; ++j)
                            if (is_hidden(n * 8 + j % 2, seen_from + f * 16 + j / 2 * 8, count - origin, window))
                                scores[f][n][j] = -infinity();
                    }
                }
            }
            KLAB_UNROLL
            for (int f = 0; f < FRAGMENTS; ++f) {
                KLAB_UNROLL
                for (int half = 0; half < 2; ++half)
                    soften(scores[f], half, SOFTCAP ? 1.0f : scale_log2, row_max[f][half], row_sum[f][half], sums[f]);
                pack_weights<ELEMENT>(weights[f], scores[f]);
            }
        }
        cp_async_wait<2 * (STAGES - 1)>();
        sync_threads();
        copy_keys(i + STAGES);
        if (active) add_values<ELEMENT, V_ROW>(sums, weights, smem, v_at + i % STAGES * V_BYTES);
    }

    // Through shared memory, over the warp's own queries, so that whole rows are stored 16 bytes at a time.
    int writer = opaque(thread_idx()), quad = writer % 32 / 4, pair = writer % 4;
    warp_row = writer / 32 * WARP_ROWS;
    unsigned char* staged = smem + warp_row * K_ROW;
    sync_warp();
    KLAB_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) {
        KLAB_UNROLL
        for (int half = 0; half < 2; ++half) {
            float sum = warp_sum<4>(row_sum[f][half]);
            float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
            KLAB_UNROLL
            for (int n = 0; n < HEAD_DIM_V / 8; ++n)
                *reinterpret_cast<uint32_t*>(staged + swizzle<K_ROW>(f * 16 + half * 8 + quad, n) + 4 * pair) =
                    pack2<ELEMENT>(sums[f][n][2 * half] * inverse, sums[f][n][2 * half + 1] * inverse);
        }
    }
    sync_warp();
    constexpr int CHUNKS = HEAD_DIM_V / 8;
    out += static_cast<int64_t>(kept[0]) * out_token + head * out_head;
    for (int index = writer % 32; index < WARP_ROWS * CHUNKS; index += 32) {
        int row = index / CHUNKS, chunk = index % CHUNKS;
        if (warp_row + row < kept[1])
            store_16(out + static_cast<int64_t>(warp_row + row) * out_token + chunk * 8, load_16(staged + swizzle<K_ROW>(row, chunk)));
    }
}
"""


@dataclass(frozen=True)
class FlashConfig(Config):
    """A block takes `block_m` queries of one head and steps over keys in tiles of `block_n`.

    block_m / warps is 16 or 32: with 32 rows a warp reads keys and values from shared memory half as often, for twice the
    registers. `stages` tiles of keys and of values are in shared memory. `q_in_registers` keeps the queries there instead of
    reading them again for every tile. `heads_inner` numbers the blocks head by head within a tile of queries: the longest work of
    all heads starts first, but keys and values of all heads compete for the L2 cache.
    """

    block_m: int = 128
    block_n: int = 64
    warps: int = 4
    stages: int = 2
    q_in_registers: bool = False
    heads_inner: bool = True


def smem_bytes(problem: PrefillAttention, config: FlashConfig) -> int:
    """Shared memory of a block: the tile of queries, and `stages` tiles of keys and values, rows padded to 128 bytes; and one number."""
    k_row, v_row = row_bytes(problem.head_dim), row_bytes(problem.dim_v)
    return config.block_m * k_row + config.stages * config.block_n * (k_row + v_row) + 16


def registers(problem: PrefillAttention, config: FlashConfig) -> int:
    """Estimated 32-bit registers of a thread: output sums, scores, queries if kept, and 40 for addresses and operands.

    A 16 x n tile of float sums spreads over 32 lanes as n / 2 registers, a 16 x n tile of 16-bit operands as n / 4. The packed
    weights reuse the scores' registers. NVRTC 13.0 comes within 45 of it, and spills at most 176 bytes where it reaches 255.
    """
    fragments = config.block_m // config.warps // 16
    queries = problem.head_dim // 4 if config.q_in_registers else 4
    return fragments * (-(-problem.dim_v // 16) * 8 + config.block_n // 2 + queries) + 40


def query_tiles(problem: PrefillAttention, config: FlashConfig) -> int:
    """Tiles of `block_m` queries in all sequences, for one head."""
    return sum(-(-q_len // config.block_m) for q_len in problem.q_lens)


def fits(problem: PrefillAttention, config: FlashConfig, chip: Chip) -> str | None:
    """None when it can run; otherwise the reason in a few words."""
    refused = problem.unserved("sinks", "softcap", "page_size", "kv_tokens") or refusal(problem, chip, multiple=8)
    if refused:
        return refused
    if problem.dim_v > problem.head_dim:
        return f"the head dim of v ({problem.dim_v}) is larger than that of k ({problem.head_dim})"
    if config.block_m % 16 or config.block_n % 16 or config.block_n < 16 or not 1 <= config.stages <= 8 or not 1 <= config.warps <= 32:
        return "block_m and block_n are multiples of 16, stages 1 to 8, warps 1 to 32"
    if config.block_m not in (16 * config.warps, 32 * config.warps):
        return f"each warp takes 16 or 32 rows, not {config.block_m}/{config.warps}"
    if (query_tiles(problem, config) if config.heads_inner else problem.heads) > MAX_GRID_YZ:
        return f"needs more than {MAX_GRID_YZ} blocks in the grid's second dimension"
    return over_budget(smem_bytes(problem, config), registers(problem, config), config.warps, chip)


def space(problem: PrefillAttention, chip: Chip) -> Iterator[FlashConfig]:
    """Every combination that may be worth a measurement; invalid ones are dropped by `fits`."""
    for rows, block_m, block_n, stages, kept, inner in itertools.product(
        (32, 16), (128, 64), (64, 32, 128), (2, 1, 3), (False, True), (True, False)
    ):
        yield FlashConfig(block_m, block_n, block_m // rows, stages, kept, inner)


def default(problem: PrefillAttention, chip: Chip) -> FlashConfig:
    """The first that fits of: 32 rows per warp up to head dim 128 (192 spills, as 128 does with pages or a cap), 16 rows per warp, and
    ever smaller tiles.
    """
    roomy = problem.head_dim <= (96 if problem.page_size or problem.softcap else 128)
    candidates = [FlashConfig()] if roomy else []
    candidates += [FlashConfig(warps=8), FlashConfig(block_n=32, warps=8), FlashConfig(64, 32, 4), FlashConfig(64, 32, 4, 1)]
    return next((config for config in candidates if fits(problem, config, chip) is None), candidates[-1])


@kernel(PrefillAttention, backend="cuda", config=FlashConfig, space=space, default=default, fits=fits)
def cuda_flash(problem: PrefillAttention, config: FlashConfig, chip: Chip) -> Launch:
    """FlashAttention-2 forward in CUDA C++ (mma.sync, cp.async): packed sequences or pages, window, sinks, soft-cap, GQA."""
    flash = CudaKernel(
        SOURCE,
        "flash_forward",
        chip,
        {
            "ELEMENT": ELEMENT[problem.dtype],
            "HEAD_DIM": problem.head_dim,
            "HEAD_DIM_V": problem.dim_v,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "WARPS": config.warps,
            "STAGES": config.stages,
            "Q_IN_REGISTERS": int(config.q_in_registers),
            "HEADS_INNER": int(config.heads_inner),
            "CAUSAL": int(problem.causal),
            "WINDOWED": int(problem.window > 0),
            "SINKS": int(problem.sinks),
            "SOFTCAP": int(problem.softcap > 0),
            "PAGE_SIZE": problem.page_size,
        },
        smem_bytes(problem, config),
    )
    tiles = query_tiles(problem, config)
    scale_log2 = problem.scale * math.log2(math.e)

    keys, values = ("k_cache", "v_cache") if problem.page_size else ("k", "v")

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        tensors = {"q": inputs["q"], keys: inputs[keys], values: inputs[values], "out": outputs["out"]}
        strides = {name: row_strides("cuda_flash", name, tensor) for name, tensor in tensors.items()}
        pages = [strides[name].pop(0) if problem.page_size else 0 for name in (keys, values)]
        # What the code of this problem does not read is any pointer.
        table, sinks = inputs.get("block_table", inputs["q_offsets"]), inputs.get("sinks", inputs["q"])
        flash.launch(
            (problem.heads, tiles, 1) if config.heads_inner else (tiles, problem.heads, 1),
            32 * config.warps,
            [
                inputs["q"], inputs[keys], inputs[values], inputs["q_offsets"], inputs["kv_offsets"], table, sinks, outputs["out"],
                len(problem.q_lens), problem.heads // problem.kv_heads, *strides["q"], Int64(pages[0]), *strides[keys], Int64(pages[1]),
                *strides[values], *strides["out"], table.stride(0), problem.window, scale_log2, float(problem.softcap),
            ],
        )  # fmt: skip

    return launch
