// Split-KV decoding: which keys form a piece, and the kernel that merges the pieces' results.
//
// Defines: TILE (keys of one step of a block) and WINDOWED (0 or 1). The merging kernel is there where COMBINE_THREADS is defined; it
// also needs HEAD_DIM_V (a multiple of 4, at most 4 COMBINE_THREADS), ELEMENT (of the output) and SINKS (0 or 1).
#pragma once

#include "device.cuh"

namespace klab {

// The first key that any of the q_len last tokens of a sequence sees, and the pieces into which its keys are cut.
KLAB_BOTH constexpr int first_key(int kv_len, int q_len, int window) { return WINDOWED ? max_of(0, kv_len - q_len + 1 - window) : 0; }
KLAB_BOTH constexpr int tile_count(int kv_len, int q_len, int window) { return ceil_div(kv_len - first_key(kv_len, q_len, window), TILE); }
// Even an empty sequence has a piece: it writes the zeros.
KLAB_BOTH constexpr int piece_count(int tiles, int tiles_per_piece) { return max_of(1, ceil_div(tiles, tiles_per_piece)); }

#if defined(COMBINE_THREADS)
// One block per query row (sequence, token, head): a column of threads takes every COLUMNth piece, 4 values per thread.
KLAB_KERNEL(combine_pieces, COMBINE_THREADS)(
    const float* partial_sums, const float* partial_stats, const float* sinks, const int* kv_lens, ELEMENT* out, int rows_per_sequence,
    int q_len, int window, int tiles_per_piece, int max_pieces) {
    constexpr int WIDTH = HEAD_DIM_V / 4;
    constexpr int COLUMNS = COMBINE_THREADS / WIDTH;
    int kv_len = kv_lens[block_idx_x() / rows_per_sequence];
    int pieces = piece_count(tile_count(kv_len, q_len, window), tiles_per_piece);
    if (pieces == 1) return;  // already written
    int64_t row = block_idx_x();
    int column = thread_idx() / WIDTH, at = thread_idx() % WIDTH * 4;
    const float* stats = partial_stats + row * max_pieces * 2;
    const float* sums = partial_sums + row * max_pieces * HEAD_DIM_V + at;

    float highest = -infinity(), total = 0.0f, values[4] = {};
    if (SINKS && column == 0) {
        // A further piece, of one key whose value is zero.
        highest = sinks[block_idx_x() % (rows_per_sequence / q_len)] * 1.44269504f;
        total = 1.0f;
    }
    if (column < COLUMNS) {
        for (int piece = column; piece < pieces; piece += COLUMNS) {
            float piece_max = stats[2 * piece], piece_sum = stats[2 * piece + 1];
            Vec16 four = load_16(sums + static_cast<int64_t>(piece) * HEAD_DIM_V);
            float next = max_of(highest, piece_max), base = next == -infinity() ? 0.0f : next;
            float shrink = exp2f_fast(highest - base), factor = exp2f_fast(piece_max - base);
            highest = next;
            total = total * shrink + piece_sum * factor;
            KLAB_UNROLL
            for (int j = 0; j < 4; ++j) values[j] = values[j] * shrink + bits_float(four.word[j]) * factor;
        }
    }
    float* merged = shared_memory<float>();  // [COLUMNS][HEAD_DIM_V + 2]
    if (column < COLUMNS) {
        float* mine = merged + column * (HEAD_DIM_V + 2);
        KLAB_UNROLL
        for (int j = 0; j < 4; ++j) mine[at + j] = values[j];
        if (at == 0) {
            mine[HEAD_DIM_V] = highest;
            mine[HEAD_DIM_V + 1] = total;
        }
    }
    sync_threads();
    for (int c = thread_idx(); c < HEAD_DIM_V / 2; c += COMBINE_THREADS) {
        float top = -infinity(), sum = 0.0f, first = 0.0f, second = 0.0f;
        for (int g = 0; g < COLUMNS; ++g) top = max_of(top, merged[g * (HEAD_DIM_V + 2) + HEAD_DIM_V]);
        for (int g = 0; g < COLUMNS; ++g) {
            const float* theirs = merged + g * (HEAD_DIM_V + 2);
            float factor = exp2f_fast(theirs[HEAD_DIM_V] - top);  // top is finite: every query sees its own key
            sum += theirs[HEAD_DIM_V + 1] * factor;
            first += theirs[2 * c] * factor;
            second += theirs[2 * c + 1] * factor;
        }
        *reinterpret_cast<uint32_t*>(out + row * HEAD_DIM_V + 2 * c) = pack2<ELEMENT>(first / sum, second / sum);
    }
}
#endif

}  // namespace klab
