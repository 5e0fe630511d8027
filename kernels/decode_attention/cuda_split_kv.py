"""Flash-decoding in CUDA C++: split keys, paged cache, the query heads of a group packed as rows of tensor-core tiles.

Splitting the keys over blocks and merging by their maxima and sums is the scheme of Flash-Decoding (Dao and others, 2023). Every warp
streams keys of its own through its own shared memory, so that no barrier of the block interrupts the reading.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import cupy  # noqa: F401  absent CuPy makes this file "unavailable" when it is found, not when it is launched
import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.mma_attention import MAX_GRID_YZ, REGISTERS_PER_SM, REGISTERS_PER_THREAD, over_budget, refusal, row_bytes, row_strides
from klab.kernels.split_rule import COMBINE_TILES, MERGE_TILES, OVERHEAD_TILES, choose_splits, tiles_per_split

COMBINE_THREADS = 128

COMBINE_SOURCE = '#include "split_pieces.cuh"\nusing namespace klab;'
SOURCE = r"""
#include "attention.cuh"
#include "split_pieces.cuh"
using namespace klab;

constexpr int THREADS = 32 * WARPS;
constexpr int FRAGMENTS = ROW_FRAGMENTS;
constexpr int ROWS = 16 * FRAGMENTS;                  // (query token, head of the group) pairs of a block
constexpr int K_ROW = round_up(2 * HEAD_DIM, 128);    // bytes of a row in shared memory, for the swizzle
constexpr int V_ROW = round_up(2 * HEAD_DIM_V, 128);
constexpr int Q_BYTES = ROWS * K_ROW;
constexpr int K_BYTES = BLOCK_N * K_ROW;
constexpr int V_BYTES = BLOCK_N * V_ROW;
constexpr int WARP_BYTES = STAGES * (K_BYTES + V_BYTES);
constexpr int LOOK_UPS = ceil_div(BLOCK_N, 32);       // pages that a lane looks up for a tile of its warp
constexpr int SUM_ROW = HEAD_DIM_V + 8;               // floats; the 8 shift neighbouring rows to other banks

// Keys and positions may count from anywhere.
KLAB_BOTH constexpr bool is_hidden(int key, int position, int window) { return key > position || (WINDOWED && key <= position - window); }

// Row of the output [sequence][token][head] of a block's query row: (token, head of the group) pairs of one key/value head.
KLAB_BOTH constexpr int64_t output_row(int sequence, int row, int q_len, int kv_head, int kv_heads, int group) {
    return ((static_cast<int64_t>(sequence) * q_len + row / group) * kv_heads + kv_head) * group + row % group;
}

// Lane l learns the pages of keys key + l, key + 32 + l ..; keys from `end` on have none and are never read.
KLAB_DEVICE void look_up(uint32_t (&pages)[LOOK_UPS], const int* table, int key, int end) {
    KLAB_UNROLL
    for (int i = 0; i < LOOK_UPS; ++i) {
        int mine = key + 32 * i + thread_idx() % 32;
        pages[i] = mine < end ? table[static_cast<uint32_t>(mine) / PAGE_SIZE] : 0;
    }
}

// One warp: BLOCK_N rows of a paged cache, from key `key` on, to a swizzled tile; rows from `end` on become zero.
template <int DIM, int ROW_BYTES>
KLAB_DEVICE void copy_rows(unsigned char* tile, const ELEMENT* cache, int page_stride, int token_stride, const uint32_t (&pages)[LOOK_UPS],
                           int key, int end) {
    constexpr int CHUNKS = DIM / 8;
    uint32_t lane = opaque(thread_idx()) % 32;
    KLAB_UNROLL
    for (int i = 0; i < BLOCK_N * CHUNKS / 32; ++i) {
        // The same numbers either way; written apart so that the compiler sees a constant step from row to row.
        uint32_t row = 32 % CHUNKS == 0 ? lane / CHUNKS + 32 / CHUNKS * i : (lane + 32 * i) / CHUNKS;
        uint32_t chunk = 32 % CHUNKS == 0 ? lane % CHUNKS : (lane + 32 * i) % CHUNKS;
        // 32 CHUNKS copies, which are CHUNKS steps of the warp, cover 32 rows: within a step all rows have the same page register.
        int64_t page = static_cast<int>(shfl(pages[i / CHUNKS], row % 32));
        int in_page = (key + row) % PAGE_SIZE;
        cp_async_16(tile + swizzle<ROW_BYTES>(row, chunk), cache + page * page_stride + in_page * token_stride + chunk * 8,
                    static_cast<int>(row) < end - key);
    }
}

KLAB_KERNEL(split_attention, THREADS)(
    const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, const int* block_table, const int* kv_lens, ELEMENT* out, float* partial_sums,
    float* partial_stats, int q_len, int kv_heads, int group, int table_width, int q_batch, int q_token, int q_head, int k_page,
    int k_token, int k_head, int v_page, int v_token, int v_head, int window, int tiles_per_piece, int max_pieces, float scale_log2) {
    int warp = thread_idx() / 32, lane = thread_idx() % 32, quad = lane / 4, pair = lane % 4;
    int kv_head = block_idx_x() % kv_heads, first_row = block_idx_x() / kv_heads * ROWS, piece = block_idx_y(), sequence = block_idx_z();
    int kv_len = kv_lens[sequence], begin = first_key(kv_len, q_len, window), tiles = tile_count(kv_len, q_len, window);
    int pieces = piece_count(tiles, tiles_per_piece), rows = min_of(ROWS, q_len * group - first_row);
    if (piece >= pieces) return;
    begin += piece * tiles_per_piece * TILE + warp * BLOCK_N;  // this warp's first key
    int steps = min_of(min_of(tiles_per_piece, tiles - piece * tiles_per_piece), ceil_div(kv_len - begin, TILE));

    q += static_cast<int64_t>(sequence) * q_batch + kv_head * group * q_head;
    k += kv_head * k_head, v += kv_head * v_head;
    const int* table = block_table + static_cast<int64_t>(sequence) * table_width;
    unsigned char* smem = shared_memory<unsigned char>();
    int warp_at = Q_BYTES + warp * WARP_BYTES;

    // Row r of the block's queries is token (first_row + r) / group, head (first_row + r) % group of this key/value head.
    constexpr int Q_CHUNKS = HEAD_DIM / 8;
    for (int index = thread_idx(); index < ROWS * Q_CHUNKS; index += THREADS) {
        int row = index / Q_CHUNKS, chunk = index % Q_CHUNKS, token = (first_row + row) / group, head = (first_row + row) % group;
        bool valid = row < rows;
        cp_async_16(smem + swizzle<K_ROW>(row, chunk), q + (valid ? token * q_token + head * q_head : 0) + chunk * 8, valid);
    }
    cp_async_commit();

    // One commit group per tile of keys or values, in the order K0 V0 K1 V1 ..: with K(S) and V(S-1) as the newest, K(i) and V(i)
    // have always arrived when 2 (STAGES - 1) younger groups may still be on their way. Pages are looked up a step ahead.
    auto copy_keys = [&](int i, const uint32_t(&pages)[LOOK_UPS]) {
        if (i < steps)
            copy_rows<HEAD_DIM, K_ROW>(smem + warp_at + i % STAGES * K_BYTES, k, k_page, k_token, pages, begin + i * TILE, kv_len);
        cp_async_commit();
    };
    auto copy_values = [&](int i, const uint32_t(&pages)[LOOK_UPS]) {
        if (i < steps)
            copy_rows<HEAD_DIM_V, V_ROW>(smem + warp_at + STAGES * K_BYTES + i % STAGES * V_BYTES, v, v_page, v_token, pages,
                                         begin + i * TILE, kv_len);
        cp_async_commit();
    };
    uint32_t early[STAGES + 1][LOOK_UPS], newest[LOOK_UPS], next[LOOK_UPS];
    KLAB_UNROLL
    for (int i = 0; i <= STAGES; ++i) look_up(early[i], table, begin + i * TILE, kv_len);
    KLAB_UNROLL
    for (int i = 0; i < STAGES; ++i) {
        copy_keys(i, early[i]);
        if (i < STAGES - 1) copy_values(i, early[i]);
    }
    KLAB_UNROLL
    for (int i = 0; i < LOOK_UPS; ++i) newest[i] = early[STAGES - 1][i], next[i] = early[STAGES][i];

    int q_at = left_operand_at<K_ROW>(lane), k_at = warp_at + keys_at<K_ROW>(lane);
    int v_at = warp_at + STAGES * K_BYTES + left_operand_at<V_ROW>(lane);
    cp_async_wait<2 * STAGES - 1>();
    sync_threads();

    float sums[FRAGMENTS][HEAD_DIM_V / 8][4] = {};
    float row_max[FRAGMENTS][2], row_sum[FRAGMENTS][2];  // the maximum in units of log2; rows `quad` and `quad + 8`
    int position[FRAGMENTS][2];
    KLAB_UNROLL
    for (int i = 0; i < 2 * FRAGMENTS; ++i) {
        row_max[i / 2][i % 2] = -infinity();
        row_sum[i / 2][i % 2] = 0.0f;
        position[i / 2][i % 2] = kv_len - q_len + (first_row + i * 8 + quad) / group;
    }

    KLAB_NO_UNROLL
    for (int i = 0; i < steps; ++i) {
        int key = begin + i * TILE, q_tile_at = opaque(q_at);
        int k_tile_at = k_at + i % STAGES * K_BYTES, v_tile_at = v_at + i % STAGES * V_BYTES;
        cp_async_wait<2 * (STAGES - 1)>();
        sync_warp();
        copy_values(i + STAGES - 1, newest);
        float scores[FRAGMENTS][BLOCK_N / 8][4] = {};
        KLAB_UNROLL
        for (int step = 0; step < HEAD_DIM / 16; ++step) {
            uint32_t queries[FRAGMENTS][4];
            load_queries<K_ROW>(queries, smem, q_tile_at, step);
            add_scores<ELEMENT, K_ROW>(scores, queries, smem, k_tile_at, step);
        }
        uint32_t weights[FRAGMENTS][BLOCK_N / 16][4];
        bool all_visible = key + BLOCK_N <= kv_len - q_len + 1 && (!WINDOWED || key > kv_len - 1 - window);
        KLAB_UNROLL
        for (int f = 0; f < FRAGMENTS; ++f) {
            KLAB_UNROLL
            for (int half = 0; half < 2; ++half) {
                if (!all_visible) {
                    // Counted from this lane's first key, so that every comparison is of one register with a constant.
                    int seen_from = position[f][half] - (key + 2 * pair);
                    KLAB_UNROLL
                    for (int n = 0; n < BLOCK_N / 8; ++n) {
                        if (is_hidden(n * 8, seen_from, window)) scores[f][n][2 * half] = -infinity();
                        if (is_hidden(n * 8 + 1, seen_from, window)) scores[f][n][2 * half + 1] = -infinity();
                    }
                }
                soften(scores[f], half, scale_log2, row_max[f][half], row_sum[f][half], sums[f]);
            }
            pack_weights<ELEMENT>(weights[f], scores[f]);
        }
        cp_async_wait<2 * (STAGES - 1)>();
        sync_warp();
        KLAB_UNROLL
        for (int j = 0; j < LOOK_UPS; ++j) newest[j] = next[j];
        copy_keys(i + STAGES, newest);
        look_up(next, table, key + (STAGES + 1) * TILE, kv_len);
        add_values<ELEMENT, V_ROW>(sums, weights, smem, v_tile_at);
    }

    // Merge the warps: each brings its sums to the block's maximum, then every thread adds up some columns. The tiles' memory is free.
    float* stats = shared_memory<float>();             // [WARPS][ROWS][2]: maximum, sum
    float* merged = stats + WARPS * ROWS * 2;          // [WARPS][ROWS][SUM_ROW]
    cp_async_wait<0>();
    sync_threads();
    KLAB_UNROLL
    for (int i = 0; i < 2 * FRAGMENTS; ++i) {
        float* mine = stats + (warp * ROWS + i * 8 + quad) * 2;
        float sum = warp_sum<4>(row_sum[i / 2][i % 2]);
        if (pair == 0) mine[0] = row_max[i / 2][i % 2], mine[1] = sum;
    }
    sync_threads();
    KLAB_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) {
        KLAB_UNROLL
        for (int half = 0; half < 2; ++half) {
            int row = f * 16 + half * 8 + quad;
            float highest = -infinity(), total = 0.0f;
            for (int w = 0; w < WARPS; ++w) highest = max_of(highest, stats[(w * ROWS + row) * 2]);
            float base = highest == -infinity() ? 0.0f : highest;
            for (int w = 0; w < WARPS; ++w) total += stats[(w * ROWS + row) * 2 + 1] * exp2f_fast(stats[(w * ROWS + row) * 2] - base);
            float factor = exp2f_fast(row_max[f][half] - base);
            if (pieces == 1) factor *= total > 0.0f ? 1.0f / total : 0.0f;
            KLAB_UNROLL
            for (int n = 0; n < HEAD_DIM_V / 8; ++n) {
                float* at = merged + (warp * ROWS + row) * SUM_ROW + n * 8 + 2 * pair;
                at[0] = sums[f][n][2 * half] * factor;
                at[1] = sums[f][n][2 * half + 1] * factor;
            }
            if (pieces > 1 && warp == 0 && pair == 0 && row < rows) {
                int64_t at = output_row(sequence, first_row + row, q_len, kv_head, kv_heads, group) * max_pieces + piece;
                partial_stats[at * 2] = highest;
                partial_stats[at * 2 + 1] = total;
            }
        }
    }
    sync_threads();
    constexpr int CHUNKS = HEAD_DIM_V / 8;
    for (int index = thread_idx(); index < rows * CHUNKS; index += THREADS) {
        int row = index / CHUNKS, chunk = index % CHUNKS;
        float total[8] = {};
        for (int w = 0; w < WARPS; ++w) {
            KLAB_UNROLL
            for (int j = 0; j < 8; ++j) total[j] += merged[(w * ROWS + row) * SUM_ROW + chunk * 8 + j];
        }
        int64_t at = output_row(sequence, first_row + row, q_len, kv_head, kv_heads, group);
        Vec16 packed;
        if (pieces == 1) {
            KLAB_UNROLL
            for (int j = 0; j < 4; ++j) packed.word[j] = pack2<ELEMENT>(total[2 * j], total[2 * j + 1]);
            store_16(out + at * HEAD_DIM_V + chunk * 8, packed);
        } else {
            float* to = partial_sums + (at * max_pieces + piece) * HEAD_DIM_V + chunk * 8;
            KLAB_UNROLL
            for (int j = 0; j < 8; ++j) {
                packed.word[j % 4] = float_bits(total[j]);
                if (j % 4 == 3) store_16(to + j - 3, packed);
            }
        }
    }
}
"""


@dataclass(frozen=True)
class SplitConfig(Config):
    """Each of `warps` warps streams tiles of `block_n` keys through `stages` buffers of its own.

    A block takes 16 * `row_fragments` (query token, head) pairs of one key/value head; where there are more, further blocks read the
    same keys again. `num_splits` pieces for the longest sequence: 0 lets `choose_splits` decide for the chip.
    """

    block_n: int = 16
    warps: int = 4
    stages: int = 3
    row_fragments: int = 1
    num_splits: int = 0


def smem_bytes(problem: DecodeAttention, config: SplitConfig) -> int:
    """Shared memory of a block: queries and every warp's tiles, rows padded to 128 bytes; at the end it holds the warps' float sums."""
    k_row, v_row = row_bytes(problem.head_dim), row_bytes(problem.dim_v)
    rows = 16 * config.row_fragments
    tiles = rows * k_row + config.warps * config.stages * config.block_n * (k_row + v_row)
    return max(tiles, config.warps * rows * 4 * (2 + problem.dim_v + 8))


def registers(problem: DecodeAttention, config: SplitConfig) -> int:
    """Estimated 32-bit registers of a thread: output sums, scores, one fragment of queries, and 60 for addresses, pages and operands.

    A 16 x n tile of float sums spreads over 32 lanes as n / 2 registers. The packed weights reuse the scores' registers.
    """
    return config.row_fragments * (problem.dim_v // 2 + config.block_n // 2 + 8) + 60


def blocks_per_sm(problem: DecodeAttention, config: SplitConfig, chip: Chip) -> int:
    """Blocks of an SM that bring more bandwidth: as many as fit, by shared memory (1 KiB of each is the system's) and registers.

    But not more than keep 128 KiB on their way, of which 36 KiB (4.8 TB/s over 132 SMs for 1 us) are needed.
    """
    by_smem = chip.smem_per_sm_bytes // (smem_bytes(problem, config) + 1024)
    by_registers = REGISTERS_PER_SM // (32 * config.warps * min(registers(problem, config), REGISTERS_PER_THREAD))
    waiting = config.warps * max(1, config.stages - 1) * config.block_n * 2 * (problem.head_dim + problem.dim_v)
    return max(1, min(by_smem, by_registers, -(-(128 << 10) // waiting)))


def row_tiles(problem: DecodeAttention, config: SplitConfig) -> int:
    """Blocks that share one key/value head of one sequence because its queries do not fit one block."""
    return -(-problem.q_len * (problem.heads // problem.kv_heads) // (16 * config.row_fragments))


@lru_cache(maxsize=4096)
def pieces(problem: DecodeAttention, config: SplitConfig, chip: Chip) -> tuple[int, int]:
    """(tiles of a piece, pieces of the longest sequence); a tile is `warps * block_n` keys that some query sees."""
    tile = config.warps * config.block_n
    visible = [min(n, problem.window + problem.q_len - 1) if problem.window else n for n in problem.kv_lens]
    tiles = [-(-n // tile) for n in visible]
    splits = config.num_splits
    if not splits:
        programs = problem.batch * problem.kv_heads * row_tiles(problem, config)
        unit = 32768 / (tile * 2 * (problem.head_dim + problem.dim_v))  # the rule's constants are for tiles of 32 KiB
        splits = choose_splits(
            tiles,
            programs,
            chip.sm_count * blocks_per_sm(problem, config, chip),
            overhead_tiles=OVERHEAD_TILES * unit,
            merge_tiles=MERGE_TILES * unit,
            combine_tiles=COMBINE_TILES * unit,
        )
    piece = tiles_per_split(max(tiles), splits)
    return piece, -(-max(tiles) // piece)


def fits(problem: DecodeAttention, config: SplitConfig, chip: Chip) -> str | None:
    """None when it can run; otherwise the reason in a few words."""
    if problem.sinks or problem.softcap or problem.kv_dtype:
        return "sinks, a soft-cap and fp8 caches are not supported"
    refused = refusal(problem, chip)
    if refused:
        return refused
    if config.block_n not in (16, 32, 64) or not 1 <= config.warps <= 16 or not 1 <= config.stages <= 8 or config.num_splits < 0:
        return "block_n is 16, 32 or 64, warps 1 to 16, stages 1 to 8, num_splits 0 or more"
    if not 1 <= config.row_fragments <= max(1, -(-problem.q_len * (problem.heads // problem.kv_heads) // 16)):
        return f"row_fragments={config.row_fragments} is more than the queries of a key/value head fill"
    if problem.batch > MAX_GRID_YZ or config.num_splits > MAX_GRID_YZ:
        return f"a grid has at most {MAX_GRID_YZ} sequences and splits"
    if config.num_splits and pieces(problem, config, chip)[1] != config.num_splits:
        return f"the longest sequence cannot be cut into {config.num_splits} even pieces of {config.warps * config.block_n} keys and more"
    return over_budget(smem_bytes(problem, config), registers(problem, config), config.warps, chip)


def space(problem: DecodeAttention, chip: Chip) -> Iterator[SplitConfig]:
    """Every combination that may be worth a measurement; invalid ones are dropped by `fits`."""
    splits = (0, 1, 2, 4, 8, 16, 32, 64, 128)
    for num_splits, fragments, warps, block_n, stages in itertools.product(splits, (1, 2), (4, 2, 8, 1), (16, 32, 64), (3, 2, 4, 1)):
        config = SplitConfig(block_n, warps, stages, fragments, num_splits)
        if not num_splits or pieces(problem, replace(config, num_splits=0), chip)[1] != num_splits:  # else it is the rule's choice
            yield config


def default(problem: DecodeAttention, chip: Chip) -> SplitConfig:
    """16 keys of 128 columns, or as many bytes, per warp and stage: 4 warps x 3 stages x 2 blocks keep 128 KiB per SM in flight.

    4.8 TB/s over 132 SMs for about a microsecond of latency need 36 KiB. Two fragments where a group has more than 16 rows.
    """
    fragments = 2 if problem.q_len * (problem.heads // problem.kv_heads) > 16 and problem.dim_v <= 128 else 1
    both = problem.head_dim + problem.dim_v
    return SplitConfig(block_n=32 if both <= 128 else 16, stages=3 if both <= 256 else 2, row_fragments=fragments)


@kernel(DecodeAttention, backend="cuda", config=SplitConfig, space=space, default=default, fits=fits)
def cuda_split_kv(problem: DecodeAttention, config: SplitConfig, chip: Chip) -> Launch:
    """Flash-decoding in CUDA C++ (mma.sync, cp.async): split keys over a paged cache, GQA packed into tensor-core rows."""
    shared: dict[str, str | int] = {
        "ELEMENT": ELEMENT[problem.dtype],
        "HEAD_DIM_V": problem.dim_v,
        "TILE": config.warps * config.block_n,
        "WINDOWED": int(problem.window > 0),
    }
    defines: dict[str, str | int] = shared | {
        "HEAD_DIM": problem.head_dim,
        "PAGE_SIZE": problem.page_size,
        "BLOCK_N": config.block_n,
        "WARPS": config.warps,
        "STAGES": config.stages,
        "ROW_FRAGMENTS": config.row_fragments,
    }
    split = CudaKernel(SOURCE, "split_attention", chip, defines, smem_bytes(problem, config))
    columns_bytes = COMBINE_THREADS // (problem.dim_v // 4) * (problem.dim_v + 2) * 4
    combine = CudaKernel(COMBINE_SOURCE, "combine_pieces", chip, shared | {"COMBINE_THREADS": COMBINE_THREADS}, columns_bytes)
    tiles_per_piece, max_pieces = pieces(problem, config, chip)
    group, rows = problem.heads // problem.kv_heads, problem.batch * problem.q_len * problem.heads
    scale_log2 = problem.scale * math.log2(math.e)
    workspaces: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in workspaces:
            entries = rows * max_pieces if max_pieces > 1 else 1  # one piece goes straight to the output
            sums, stats = (torch.empty((entries, width), dtype=torch.float32, device=device) for width in (problem.dim_v, 2))
            workspaces[device] = sums, stats
        return workspaces[device]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k, v, table, kv_lens, out = *(inputs[n] for n in ("q", "k_cache", "v_cache", "block_table", "kv_lens")), outputs["out"]
        sums, stats = workspace(q.device)
        strides = [s for name, tensor in zip("qkv", (q, k, v), strict=True) for s in row_strides("cuda_split_kv", name, tensor)]
        shape = [problem.q_len, problem.kv_heads, group, table.stride(0), *strides, problem.window, tiles_per_piece, max_pieces, scale_log2]
        grid = (problem.kv_heads * row_tiles(problem, config), max_pieces, problem.batch)
        split.launch(grid, 32 * config.warps, [q, k, v, table, kv_lens, out, sums, stats, *shape])
        if max_pieces > 1:
            shape = [problem.q_len * problem.heads, problem.q_len, problem.window, tiles_per_piece, max_pieces]
            combine.launch((rows, 1, 1), COMBINE_THREADS, [sums, stats, kv_lens, out, *shape])

    return launch
