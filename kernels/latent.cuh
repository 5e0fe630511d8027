// Attention over latent rows (MLA), for latent_attention and sparse_latent_attention: all heads read the same cached rows, so a tile of
// rows in shared memory is the right operand of both products, as keys (DIM columns) and as values (the first RANK).
//
// Defines: ELEMENT (half_t or bf16_t), RANK, ROPE, PAGE_SIZE, LISTED (0: page table and length; otherwise slots in a token's list),
// ROW_FRAGMENTS (16 query rows each), BLOCK_N (keys of a tile), WARPS, STAGES.
//
// The output sums of 16 rows are RANK / 2 registers of a warp, so the warps share them by columns: RANK / WARPS each, of all rows. The
// scores they share by keys (KEY_WARPS) and rows (ROW_WARPS); maxima and weights go through shared memory.
#pragma once

#include "attention.cuh"

namespace klab {

constexpr int THREADS = 32 * WARPS;
constexpr int DIM = RANK + ROPE;
constexpr int ROWS = 16 * ROW_FRAGMENTS;
constexpr int ROW_BYTES = round_up(2 * DIM, 128);         // of a query or a cached row in shared memory
constexpr int WEIGHT_BYTES = round_up(2 * BLOCK_N, 128);  // of a row of weights
constexpr int KEY_WARPS = min_of(WARPS, BLOCK_N / 16);
constexpr int ROW_WARPS = WARPS / KEY_WARPS;
constexpr int FRAGMENTS = ROW_FRAGMENTS / ROW_WARPS;      // of one warp's scores
constexpr int KEYS = BLOCK_N / KEY_WARPS;
constexpr int COLUMNS = RANK / WARPS;                     // of one warp's output
constexpr int CHUNKS = DIM / 8;
constexpr int TILE_BYTES = BLOCK_N * ROW_BYTES;
constexpr int RING = STAGES + 1;                          // tiles whose slots are known
static_assert(KEY_WARPS * ROW_WARPS == WARPS && FRAGMENTS * ROW_WARPS == ROW_FRAGMENTS, "warps share rows and keys evenly");
static_assert(COLUMNS % 16 == 0 && DIM % 64 == 0 && BLOCK_N <= THREADS, "16 columns per product, one thread per slot");

constexpr int TILES_AT = ROWS * ROW_BYTES;
constexpr int WEIGHTS_AT = TILES_AT + STAGES * TILE_BYTES;
constexpr int PLACES_AT = WEIGHTS_AT + ROWS * WEIGHT_BYTES;   // int64_t[RING][BLOCK_N]: where a row begins, -1 for none
constexpr int MAXIMA_AT = PLACES_AT + RING * BLOCK_N * 8;     // float[KEY_WARPS][ROWS]
constexpr int SHRINK_AT = MAXIMA_AT + KEY_WARPS * ROWS * 4;   // float[ROWS]

KLAB_BOTH constexpr int pieces_of(int length, int tiles_per_piece) { return max_of(1, ceil_div(ceil_div(length, BLOCK_N), tiles_per_piece)); }

// The block copies chunks FIRST .. FIRST + COUNT of a tile's rows; rows without a place become zero.
template <int FIRST, int COUNT>
KLAB_DEVICE void copy_columns(unsigned char* tile, const ELEMENT* cache, const int64_t* places) {
    uint32_t thread = opaque(thread_idx());
    KLAB_UNROLL
    for (int i = 0; i < ceil_div(BLOCK_N * COUNT, THREADS); ++i) {
        uint32_t index = thread + i * THREADS, row = index / COUNT, chunk = FIRST + index % COUNT;
        if (BLOCK_N * COUNT % THREADS == 0 || index < BLOCK_N * COUNT) {
            int64_t place = places[row];
            cp_async_16(tile + swizzle<ROW_BYTES>(row, chunk), cache + (place < 0 ? 0 : place) + chunk * 8, place >= 0);
        }
    }
}

KLAB_KERNEL(read_latents, THREADS)(
    const ELEMENT* q, const ELEMENT* cache, const int* slots, const int* lens, ELEMENT* out, float* partial_sums, float* partial_stats,
    int heads, int q_len, int row_tiles, int q_batch, int q_token, int q_head, int64_t cache_page, int cache_row, int slots_row,
    int tiles_per_piece, int max_pieces, float scale_log2) {
    int warp = thread_idx() / 32, lane = thread_idx() % 32, quad = lane / 4, pair = lane % 4;
    int key_warp = warp % KEY_WARPS, row_warp = warp / KEY_WARPS;
    int sequence = block_idx_x() / row_tiles, first_row = block_idx_x() % row_tiles * ROWS, piece = block_idx_y();
    int length = LISTED ? LISTED : lens[sequence];
    int pieces = pieces_of(length, tiles_per_piece), rows = min_of(ROWS, heads * q_len - first_row);
    if (piece >= pieces) return;
    int begin = piece * tiles_per_piece * BLOCK_N;
    int steps = min_of(tiles_per_piece, ceil_div(length - begin, BLOCK_N));

    q += static_cast<int64_t>(sequence) * q_batch;
    const int* own = slots + static_cast<int64_t>(sequence) * slots_row;
    unsigned char* smem = shared_memory<unsigned char>();
    int64_t* places = reinterpret_cast<int64_t*>(smem + PLACES_AT);
    float* maxima = reinterpret_cast<float*>(smem + MAXIMA_AT);
    float* shrinks = reinterpret_cast<float*>(smem + SHRINK_AT);

    // Where this thread's key of tile i begins. The first BLOCK_N threads look one tile's rows up.
    auto look_up = [&](int i) -> int64_t {
        int key = begin + i * BLOCK_N + thread_idx();
        if (thread_idx() >= BLOCK_N || i >= steps || key >= length) return -1;
        int slot = LISTED ? own[key] : own[static_cast<uint32_t>(key) / PAGE_SIZE];
        if (LISTED && slot < 0) return -1;
        uint32_t page = LISTED ? static_cast<uint32_t>(slot) / PAGE_SIZE : slot;
        uint32_t row = static_cast<uint32_t>(LISTED ? slot : key) % PAGE_SIZE;
        return page * cache_page + static_cast<int64_t>(row) * cache_row;
    };
    auto keep = [&](int i, int64_t place) {
        if (thread_idx() < BLOCK_N) places[i % RING * BLOCK_N + thread_idx()] = place;
    };
    auto copy_tile = [&](int i) {
        if (i < steps) {
            unsigned char* tile = smem + TILES_AT + i % STAGES * TILE_BYTES;
            copy_columns<0, RANK / 8>(tile, cache, places + i % RING * BLOCK_N);
            copy_columns<RANK / 8, ROPE / 8>(tile, cache, places + i % RING * BLOCK_N);
        }
        cp_async_commit();
    };

    for (int index = thread_idx(); index < ROWS * CHUNKS; index += THREADS) {
        int row = index / CHUNKS, chunk = index % CHUNKS, token = (first_row + row) / heads, head = (first_row + row) % heads;
        bool valid = row < rows;
        cp_async_16(smem + swizzle<ROW_BYTES>(row, chunk), q + (valid ? token * q_token + head * q_head : 0) + chunk * 8, valid);
    }
    KLAB_UNROLL
    for (int i = 0; i < STAGES; ++i) keep(i, look_up(i));
    sync_threads();
    KLAB_UNROLL
    for (int i = 0; i < STAGES - 1; ++i) copy_tile(i);  // the queries belong to the first group
    if (STAGES == 1) cp_async_commit();

    float sums[ROW_FRAGMENTS][COLUMNS / 8][4] = {};
    float row_max[FRAGMENTS][2], row_sum[FRAGMENTS][2];  // the maximum in units of log2; this lane's share of the sum
    KLAB_UNROLL
    for (int i = 0; i < 2 * FRAGMENTS; ++i) row_max[i / 2][i % 2] = -infinity(), row_sum[i / 2][i % 2] = 0.0f;
    int score_row = row_warp * FRAGMENTS * 16;  // this warp's first row of scores
    int q_at = left_operand_at<ROW_BYTES>(lane) + score_row * ROW_BYTES;
    int k_at = TILES_AT + keys_at<ROW_BYTES>(lane) + key_warp * KEYS * ROW_BYTES;
    // The columns of this warp begin at a multiple of 16: columns_further's step, from the chunk of column 0 or 8.
    int v_at = TILES_AT + left_operand_at<ROW_BYTES>(lane), first_step = warp * COLUMNS / 16;
    int w_at = WEIGHTS_AT + left_operand_at<WEIGHT_BYTES>(lane);

    KLAB_NO_UNROLL
    for (int i = 0; i < steps; ++i) {
        if (STAGES == 1) {
            sync_threads();
            copy_tile(i);
            cp_async_wait<0>();
        } else {
            cp_async_wait<max_of(STAGES - 2, 0)>();
        }
        sync_threads();  // the tile is here, and all have done with the one before
        int64_t next = look_up(i + STAGES);
        if (STAGES > 1) copy_tile(i + STAGES - 1);

        float scores[FRAGMENTS][KEYS / 8][4] = {};
        int q_tile_at = opaque(q_at), k_tile_at = opaque(k_at + i % STAGES * TILE_BYTES), v_tile_at = opaque(v_at + i % STAGES * TILE_BYTES);
        // 64 columns at a time: unrolled wholly, operands are loaded so early that registers spill.
        KLAB_NO_UNROLL
        for (int column = 0; column < DIM / 64; ++column, q_tile_at += 128, k_tile_at += 128) {
            KLAB_UNROLL
            for (int step = 0; step < 4; ++step) {
                uint32_t queries[FRAGMENTS][4];
                load_queries<ROW_BYTES>(queries, smem, q_tile_at, step);
                add_scores<ELEMENT, ROW_BYTES>(scores, queries, smem, k_tile_at, step);
            }
        }
        int key = begin + i * BLOCK_N + key_warp * KEYS + 2 * pair;
        bool all_visible = !LISTED && begin + (i + 1) * BLOCK_N <= length - q_len + 1;
        KLAB_UNROLL
        for (int f = 0; f < FRAGMENTS; ++f) {
            KLAB_UNROLL
            for (int half = 0; half < 2; ++half) {
                int row = score_row + f * 16 + half * 8 + quad;
                if (!all_visible) {
                    int last = length - q_len + static_cast<uint32_t>(first_row + row) / static_cast<uint32_t>(heads);
                    KLAB_UNROLL
                    for (int n = 0; n < KEYS / 8; ++n) {
                        KLAB_UNROLL
                        for (int j = 0; j < 2; ++j) {
                            int at = key_warp * KEYS + n * 8 + 2 * pair + j;
                            bool hidden = LISTED ? places[i % RING * BLOCK_N + at] < 0 : key + n * 8 + j > last;
                            if (hidden) scores[f][n][2 * half + j] = -infinity();
                        }
                    }
                }
                float highest = -infinity();
                KLAB_UNROLL
                for (int n = 0; n < KEYS / 8; ++n) highest = max_of(highest, max_of(scores[f][n][2 * half], scores[f][n][2 * half + 1]));
                highest = warp_max<4>(highest) * scale_log2;
                if (pair == 0) maxima[key_warp * ROWS + row] = highest;
            }
        }
        sync_threads();
        KLAB_UNROLL
        for (int f = 0; f < FRAGMENTS; ++f) {
            KLAB_UNROLL
            for (int half = 0; half < 2; ++half) {
                int row = score_row + f * 16 + half * 8 + quad;
                float highest = row_max[f][half], sum = 0.0f;
                KLAB_UNROLL
                for (int w = 0; w < KEY_WARPS; ++w) highest = max_of(highest, maxima[w * ROWS + row]);
                // A row that has seen no key yet keeps -inf, which must not meet another -inf in a difference.
                float base = highest == -infinity() ? 0.0f : highest, shrink = exp2f_fast(row_max[f][half] - base);
                KLAB_UNROLL
                for (int n = 0; n < KEYS / 8; ++n) {
                    float first = exp2f_fast(fused_multiply_add(scores[f][n][2 * half], scale_log2, -base));
                    float second = exp2f_fast(fused_multiply_add(scores[f][n][2 * half + 1], scale_log2, -base));
                    sum += first + second;
                    int at = swizzle<WEIGHT_BYTES>(row, key_warp * KEYS / 8 + n) + 4 * pair;
                    *reinterpret_cast<uint32_t*>(smem + WEIGHTS_AT + at) = pack2<ELEMENT>(first, second);
                }
                row_max[f][half] = highest;
                row_sum[f][half] = row_sum[f][half] * shrink + sum;
                if (key_warp == 0 && pair == 0) shrinks[row] = shrink;
            }
        }
        sync_threads();
        KLAB_UNROLL
        for (int f = 0; f < ROW_FRAGMENTS; ++f) {
            float upper = shrinks[f * 16 + quad], lower = shrinks[f * 16 + 8 + quad];
            KLAB_UNROLL
            for (int n = 0; n < COLUMNS / 8; ++n) {
                sums[f][n][0] *= upper, sums[f][n][1] *= upper;
                sums[f][n][2] *= lower, sums[f][n][3] *= lower;
            }
        }
        KLAB_NO_UNROLL
        for (int k = 0; k < BLOCK_N / 16; ++k) {
            uint32_t weights[ROW_FRAGMENTS][4];
            KLAB_UNROLL
            for (int f = 0; f < ROW_FRAGMENTS; ++f) ldmatrix_x4(weights[f], smem + columns_further(w_at, k) + f * 16 * WEIGHT_BYTES);
            KLAB_UNROLL
            for (int column = 0; column < COLUMNS / 8; column += 2) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, smem + columns_further(v_tile_at, first_step + column / 2) + k * 16 * ROW_BYTES);
                uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                KLAB_UNROLL
                for (int f = 0; f < ROW_FRAGMENTS; ++f) {
                    mma_m16n8k16<ELEMENT>(sums[f][column], weights[f], low);
                    mma_m16n8k16<ELEMENT>(sums[f][column + 1], weights[f], high);
                }
            }
        }
        keep(i + STAGES, next);
    }

    cp_async_wait<0>();
    sync_threads();
    KLAB_UNROLL
    for (int i = 0; i < 2 * FRAGMENTS; ++i) {
        int row = score_row + i * 8 + quad;
        float sum = warp_sum<4>(row_sum[i / 2][i % 2]);
        if (pair == 0) maxima[key_warp * ROWS + row] = sum;
        if (key_warp == 0 && pair == 0) shrinks[row] = row_max[i / 2][i % 2];
    }
    sync_threads();
    KLAB_UNROLL
    for (int i = 0; i < 2 * ROW_FRAGMENTS; ++i) {
        int row = i * 8 + quad, f = i / 2, half = i % 2;
        float total = 0.0f;
        for (int w = 0; w < KEY_WARPS; ++w) total += maxima[w * ROWS + row];
        int64_t at = static_cast<int64_t>(sequence) * heads * q_len + first_row + row;
        if (row >= rows) continue;
        if (pieces == 1) {
            float factor = total > 0.0f ? 1.0f / total : 0.0f;
            uint32_t* to = reinterpret_cast<uint32_t*>(out + at * RANK + warp * COLUMNS + 2 * pair);
            KLAB_UNROLL
            for (int n = 0; n < COLUMNS / 8; ++n) to[4 * n] = pack2<ELEMENT>(sums[f][n][2 * half] * factor, sums[f][n][2 * half + 1] * factor);
        } else {
            at = at * max_pieces + piece;
            float* to = partial_sums + at * RANK + warp * COLUMNS + 2 * pair;
            KLAB_UNROLL
            for (int n = 0; n < COLUMNS / 8; ++n) to[8 * n] = sums[f][n][2 * half], to[8 * n + 1] = sums[f][n][2 * half + 1];
            if (warp == 0 && pair == 0) partial_stats[at * 2] = shrinks[row], partial_stats[at * 2 + 1] = total;
        }
    }
}

// One block per query row merges the row's pieces: 4 columns per thread.
KLAB_KERNEL(merge_latents, RANK / 4)(const float* partial_sums, const float* partial_stats, const int* lens, ELEMENT* out,
                                     int rows_per_sequence, int tiles_per_piece, int max_pieces) {
    int64_t row = block_idx_x();
    int pieces = pieces_of(LISTED ? LISTED : lens[block_idx_x() / rows_per_sequence], tiles_per_piece), at = 4 * thread_idx();
    if (pieces == 1) return;  // already written
    const float* stats = partial_stats + row * max_pieces * 2;
    const float* sums = partial_sums + row * max_pieces * RANK + at;
    float highest = -infinity(), total = 0.0f, values[4] = {};
    for (int piece = 0; piece < pieces; ++piece) highest = max_of(highest, stats[2 * piece]);
    float base = highest == -infinity() ? 0.0f : highest;
#if defined(KLAB_ON_DEVICE)
#pragma unroll 4
#endif
    for (int piece = 0; piece < pieces; ++piece) {
        float factor = exp2f_fast(stats[2 * piece] - base);
        Vec16 four = load_16(sums + static_cast<int64_t>(piece) * RANK);
        total += stats[2 * piece + 1] * factor;
        KLAB_UNROLL
        for (int j = 0; j < 4; ++j) values[j] += bits_float(four.word[j]) * factor;
    }
    float factor = total > 0.0f ? 1.0f / total : 0.0f;
    uint32_t* to = reinterpret_cast<uint32_t*>(out + row * RANK + at);
    to[0] = pack2<ELEMENT>(values[0] * factor, values[1] * factor);
    to[1] = pack2<ELEMENT>(values[2] * factor, values[3] * factor);
}

}  // namespace klab
