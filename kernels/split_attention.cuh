// Split-KV decoding: one block reads one piece of the keys of one sequence and key/value head, for up to 16 ROW_FRAGMENTS of the (query
// token, head of the group) pairs that share them. Every warp streams keys of its own through its own shared memory, so that no barrier
// of the block interrupts the reading.
//
// Defines beside those of split_pieces.cuh: ELEMENT (half_t or bf16_t), NARROW (the cache is e4m3, else ELEMENT), HEAD_DIM, HEAD_DIM_V
// (multiples of 16; NARROW of 32), PAGE_SIZE, BLOCK_N (keys of a warp's tile), WARPS, STAGES, ROW_FRAGMENTS, MIN_BLOCKS (that an SM is to
// hold, which bounds the registers), CAPPED and SINKS (0 or 1).
#pragma once

#include "attention.cuh"
#include "fp8_cache.cuh"
#include "split_pieces.cuh"

using namespace klab;

#if NARROW
using cache_t = uint8_t;
using math_t = half_t;
#else
using cache_t = ELEMENT;
using math_t = ELEMENT;
#endif

constexpr int THREADS = 32 * WARPS;
constexpr int FRAGMENTS = ROW_FRAGMENTS;
constexpr int ROWS = 16 * FRAGMENTS;                  // (query token, head of the group) pairs of a block
constexpr int SIZE = sizeof(cache_t);
constexpr int Q_ROW = round_up(2 * HEAD_DIM, 128);    // bytes of a row in shared memory, for the swizzle
constexpr int K_ROW = round_up(SIZE * HEAD_DIM, 128);
constexpr int V_ROW = round_up(SIZE * HEAD_DIM_V, 128);
constexpr int Q_BYTES = ROWS * Q_ROW;
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
KLAB_DEVICE void copy_rows(unsigned char* tile, const cache_t* cache, int page_stride, int token_stride, const uint32_t (&pages)[LOOK_UPS],
                           int key, int end) {
    constexpr int CHUNKS = DIM * SIZE / 16;
    uint32_t lane = opaque(thread_idx()) % 32;
    KLAB_UNROLL
    for (int i = 0; i < BLOCK_N * CHUNKS / 32; ++i) {
        // The same numbers either way; written apart so that the compiler sees a constant step from row to row.
        uint32_t row = 32 % CHUNKS == 0 ? lane / CHUNKS + 32 / CHUNKS * i : (lane + 32 * i) / CHUNKS;
        uint32_t chunk = 32 % CHUNKS == 0 ? lane % CHUNKS : (lane + 32 * i) % CHUNKS;
        // 32 CHUNKS copies, which are CHUNKS steps of the warp, cover 32 rows: within a step all rows have the same page register.
        int64_t page = static_cast<int>(shfl(pages[i / CHUNKS], row % 32));
        int in_page = (key + row) % PAGE_SIZE;
        cp_async_16(tile + swizzle<ROW_BYTES>(row, chunk), cache + page * page_stride + in_page * token_stride + chunk * (16 / SIZE),
                    static_cast<int>(row) < end - key);
    }
}

KLAB_KERNEL_MIN_BLOCKS(split_attention, THREADS, MIN_BLOCKS)(
    const ELEMENT* q, const cache_t* k, const cache_t* v, const float* k_scale, const float* v_scale, const float* sinks,
    const int* block_table, const int* kv_lens, ELEMENT* out, float* partial_sums, float* partial_stats, int q_len, int kv_heads, int group, int table_width, int q_batch, int q_token, int q_head, int k_page,
    int k_token, int k_head, int v_page, int v_token, int v_head, int window, int tiles_per_piece, int max_pieces, float scale_log2, float softcap) {
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
    float* query_sizes = reinterpret_cast<float*>(smem + Q_BYTES + WARPS * WARP_BYTES);  // [ROWS], NARROW only
#if !NARROW
    constexpr int Q_CHUNKS = HEAD_DIM / 8;
    for (int index = thread_idx(); index < ROWS * Q_CHUNKS; index += THREADS) {
        int row = index / Q_CHUNKS, chunk = index % Q_CHUNKS, token = (first_row + row) / group, head = (first_row + row) % group;
        bool valid = row < rows;
        cp_async_16(smem + swizzle<Q_ROW>(row, chunk), q + (valid ? token * q_token + head * q_head : 0) + chunk * 8, valid);
    }
#endif
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

#if NARROW
    // Not copied but converted, while the first tiles are on their way.
    for (int row = warp; row < ROWS; row += WARPS) {
        int token = (first_row + row) / group, head = (first_row + row) % group;
        const ELEMENT* query = row < rows ? q + token * q_token + head * q_head : q;
        float size = store_query<ELEMENT, HEAD_DIM, Q_ROW>(smem, row, query, row < rows);
        if (lane == 0) query_sizes[row] = size;
    }
#endif
    int q_at = left_operand_at<Q_ROW>(lane), k_at = warp_at + keys_at<K_ROW>(lane);
    int v_at = warp_at + STAGES * K_BYTES + left_operand_at<V_ROW>(lane);
    cp_async_wait<2 * STAGES - 1>();
    sync_threads();

    float sums[FRAGMENTS][HEAD_DIM_V / 8][4] = {};
    float row_max[FRAGMENTS][2], row_sum[FRAGMENTS][2];  // the maximum in units of log2; rows `quad` and `quad + 8`
    int position[FRAGMENTS][2];
    float scale[FRAGMENTS][2];
    KLAB_UNROLL
    for (int i = 0; i < 2 * FRAGMENTS; ++i) {
        int row = first_row + i * 8 + quad;
        // With one piece the sink is a key of the first warp whose value is zero; otherwise the merging kernel adds it.
        bool takes_sink = SINKS && pieces == 1 && warp == 0;
        row_max[i / 2][i % 2] = takes_sink ? sinks[kv_head * group + row % group] * LOG2_E : -infinity();
        row_sum[i / 2][i % 2] = takes_sink && pair == 0 ? 1.0f : 0.0f;
        position[i / 2][i % 2] = kv_len - q_len + row / group;
        scale[i / 2][i % 2] = NARROW ? scale_log2 * k_scale[kv_head] * query_sizes[i * 8 + quad] : scale_log2;
    }

    KLAB_NO_UNROLL
    for (int i = 0; i < steps; ++i) {
        int key = begin + i * TILE, q_tile_at = opaque(q_at);
        int k_tile_at = k_at + i % STAGES * K_BYTES, v_tile_at = v_at + i % STAGES * V_BYTES;
        cp_async_wait<2 * (STAGES - 1)>();
        sync_warp();
        copy_values(i + STAGES - 1, newest);
        float scores[FRAGMENTS][BLOCK_N / 8][4] = {};
#if NARROW
        KLAB_UNROLL
        for (int step = 0; step < HEAD_DIM / 32; ++step) {
            uint32_t queries[2][FRAGMENTS][4];
            load_queries<Q_ROW>(queries[0], smem, q_tile_at, 2 * step);
            load_queries<Q_ROW>(queries[1], smem, q_tile_at, 2 * step + 1);
            add_narrow_scores<K_ROW>(scores, queries, smem, k_tile_at, step);
        }
#else
        KLAB_UNROLL
        for (int step = 0; step < HEAD_DIM / 16; ++step) {
            uint32_t queries[FRAGMENTS][4];
            load_queries<Q_ROW>(queries, smem, q_tile_at, step);
            add_scores<ELEMENT, K_ROW>(scores, queries, smem, k_tile_at, step);
        }
#endif
#if CAPPED
        KLAB_UNROLL
        for (int n = 0; n < FRAGMENTS * BLOCK_N / 2; ++n) {
            int f = n / (BLOCK_N / 2), j = n % (BLOCK_N / 2);
            scores[f][j / 4][j % 4] *= scale[f][j % 4 / 2];
        }
        cap_scores(scores, 1.0f, softcap);
#endif
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
                soften(scores[f], half, CAPPED ? 1.0f : scale[f][half], row_max[f][half], row_sum[f][half], sums[f]);
            }
            pack_weights<math_t>(weights[f], scores[f]);
        }
        cp_async_wait<2 * (STAGES - 1)>();
        sync_warp();
        KLAB_UNROLL
        for (int j = 0; j < LOOK_UPS; ++j) newest[j] = next[j];
        copy_keys(i + STAGES, newest);
        look_up(next, table, key + (STAGES + 1) * TILE, kv_len);
#if NARROW
        add_narrow_values<V_ROW>(sums, weights, smem, v_tile_at);
#else
        add_values<ELEMENT, V_ROW>(sums, weights, smem, v_tile_at);
#endif
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
            if (NARROW) factor *= v_scale[kv_head];
            KLAB_UNROLL
            for (int n = 0; n < HEAD_DIM_V / 8; ++n) {
                float* at = merged + (warp * ROWS + row) * SUM_ROW;
                KLAB_UNROLL
                for (int j = 0; j < 2; ++j) at[NARROW ? column_of(n, pair, j) : n * 8 + 2 * pair + j] = sums[f][n][2 * half + j] * factor;
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
