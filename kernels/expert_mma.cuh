// A tile of a product whose rows come from anywhere: out[i][j] = x_row(i) . w[j], by mma.sync from a ring of cp.async stages. What the experts
// of a mixture multiply by: rows of tokens gathered by a list, rows of one expert's weights; or, paired, of its gate and up weights, so that
// both come to the same thread.
#pragma once
#include "device.cuh"

namespace klab {

// T: half_t or bf16_t. `aligned`: every row starts at a multiple of 16 bytes and k is a multiple of 8. `paired`: the first half of the tile's
// columns are gates, the second half the ups that belong to them.
template <class T, int block_m, int block_n, int block_k, int stages, int warps_m, int warps_n, bool paired, bool aligned>
struct ExpertTile {
    static constexpr int threads = warps_m * warps_n * 32;
    static constexpr int warp_m = block_m / warps_m, warp_n = block_n / warps_n;  // what one warp computes
    static constexpr int tiles_m = warp_m / 16, tiles_n = warp_n / 8;             // in mma tiles
    static constexpr int x_bytes = block_m * block_k * 2, stage_bytes = x_bytes + block_n * block_k * 2;
    static constexpr int chunks = block_k / 8, step = threads / chunks;           // a thread keeps to one 16-byte column
    static constexpr int x_loads = ceil_div(block_m, step), w_loads = ceil_div(block_n, step);
    static_assert(threads % chunks == 0 && tiles_n % 2 == 0, "threads are a multiple of a row's chunks, warps 16 columns wide");

    static constexpr int columns = paired ? block_n / 2 : block_n;                 // of the weights, each with its pair

    // Rows of this thread's loads; nullptr is a row of zeros.
    const T* x_from[x_loads];
    const T* w_from;  // the weights of the tile's first column
    int64_t w_stride, w_jump;
    int w_left;
    float sum[tiles_m][tiles_n][4];

    // x_row(i) is row i of the tile or nullptr; w_columns of the weights are left, those of up lie `jump` elements behind those of gate.
    template <class XRow>
    KLAB_DEVICE void start(XRow x_row, const T* weights, int64_t stride, int w_columns, int64_t jump) {
        const int first = thread_idx() / chunks;
        KLAB_UNROLL
        for (int i = 0; i < x_loads; ++i) x_from[i] = first + i * step < block_m ? x_row(first + i * step) : nullptr;
        w_from = weights;
        w_stride = stride;
        w_jump = jump;
        w_left = w_columns;
        KLAB_UNROLL
        for (int a = 0; a < tiles_m; ++a)
            KLAB_UNROLL
            for (int b = 0; b < tiles_n; ++b)
                KLAB_UNROLL
                for (int i = 0; i < 4; ++i) sum[a][b][i] = 0.0f;
    }

    // One row's 8 elements from k0 on to shared memory; `any` is some address that may be named, never read.
    KLAB_DEVICE static void load_chunk(char* to, const T* row, int column, int k, const T* any) {
        if (aligned) {
            const bool inside = row != nullptr && column < k;
            cp_async_16(to, inside ? row + column : any, inside);
        } else {
            uint32_t word[4];
            KLAB_UNROLL
            for (int j = 0; j < 4; ++j) {
                uint32_t pair[2];
                KLAB_UNROLL
                for (int h = 0; h < 2; ++h) pair[h] = row != nullptr && column + 2 * j + h < k ? row[column + 2 * j + h].bits : 0;
                word[j] = pair[0] | pair[1] << 16;
            }
            store_16(to, Vec16{{word[0], word[1], word[2], word[3]}});
        }
    }

    KLAB_DEVICE void load_stage(char* stage, int k0, int k, const T* any) const {
        const int first = thread_idx() / chunks, chunk = thread_idx() % chunks;
        KLAB_UNROLL
        for (int i = 0; i < x_loads; ++i)
            if (block_m % step == 0 || first + i * step < block_m)
                load_chunk(stage + swizzle<block_k * 2>(first + i * step, chunk), x_from[i], k0 + chunk * 8, k, any);
        KLAB_UNROLL
        for (int i = 0; i < w_loads; ++i) {
            const int row = first + i * step, second = paired && row >= columns, column = row - second * columns;
            if (block_n % step == 0 || row < block_n) {
                const T* from = column < w_left ? w_from + column * w_stride + second * w_jump : nullptr;
                load_chunk(stage + x_bytes + swizzle<block_k * 2>(row, chunk), from, k0 + chunk * 8, k, any);
            }
        }
    }

    KLAB_DEVICE void fragments(uint32_t (&x)[tiles_m][4], uint32_t (&w)[tiles_n][2], const char* stage, int k16) const {
        const int lane = thread_idx() % 32, warp = thread_idx() / 32;
        const int m0 = warp / warps_n * warp_m, n0 = warp % warps_n * (paired ? warp_n / 2 : warp_n);
        KLAB_UNROLL
        for (int i = 0; i < tiles_m; ++i) ldmatrix_x4(x[i], stage + swizzle<block_k * 2>(m0 + i * 16 + lane % 16, k16 * 2 + lane / 16));
        KLAB_UNROLL
        for (int j = 0; j < tiles_n; j += 2) {
            uint32_t r[4];  // k 0..7 and 8..15 of eight columns, then of the next eight, or of the eight that they are paired with
            const int row = n0 + (paired ? j * 4 + lane / 16 * columns : j * 8 + lane / 16 * 8) + lane % 8;
            ldmatrix_x4(r, stage + x_bytes + swizzle<block_k * 2>(row, k16 * 2 + lane / 8 % 2));
            w[j][0] = r[0];
            w[j][1] = r[1];
            w[j + 1][0] = r[2];
            w[j + 1][1] = r[3];
        }
    }

    // The whole product; afterwards nobody reads the ring any more.
    KLAB_DEVICE void multiply(char* shared, int k, const T* any) {
        const int steps = ceil_div(k, block_k);
        KLAB_UNROLL
        for (int s = 0; s < stages - 1; ++s) {
            if (s < steps) load_stage(shared + s * stage_bytes, s * block_k, k, any);
            cp_async_commit();
        }
        for (int s = 0; s < steps; ++s) {
            cp_async_wait<stages - 2>();
            sync_threads();  // this stage has arrived for everybody, and nobody reads the one before any more
            const int ahead = s + stages - 1;
            if (ahead < steps) load_stage(shared + ahead % stages * stage_bytes, ahead * block_k, k, any);
            cp_async_commit();
            const char* stage = shared + s % stages * stage_bytes;
            uint32_t x[2][tiles_m][4], w[2][tiles_n][2];
            fragments(x[0], w[0], stage, 0);
            KLAB_UNROLL
            for (int i = 0; i < block_k / 16; ++i) {
                if (i + 1 < block_k / 16) fragments(x[(i + 1) % 2], w[(i + 1) % 2], stage, i + 1);
                KLAB_UNROLL
                for (int a = 0; a < tiles_m; ++a)
                    KLAB_UNROLL
                    for (int b = 0; b < tiles_n; ++b) mma_m16n8k16<T>(sum[a][b], x[i % 2][a], w[i % 2][b]);
            }
        }
        cp_async_wait<0>();
        sync_threads();
    }

    // Write to shared memory, as a tile of block_m x columns for store_tile, what f(row, a, b) makes of two neighbours: unpaired, of the sums
    // a and b, into two elements; paired, f(gate, up) of each, row by row.
    template <class F>
    KLAB_DEVICE void stage_out(char* shared, F f) const {
        const int lane = thread_idx() % 32, warp = thread_idx() / 32;
        KLAB_UNROLL
        for (int a = 0; a < tiles_m; ++a)
            KLAB_UNROLL
            for (int b = 0; b < tiles_n; b += paired ? 2 : 1)
                KLAB_UNROLL
                for (int h = 0; h < 2; ++h) {
                    const int row = warp / warps_n * warp_m + a * 16 + h * 8 + lane / 4;
                    const int chunk = (warp % warps_n * warp_n / 8 + b) / (paired ? 2 : 1);
                    const float* first = sum[a][b] + 2 * h;
                    const float* second = paired ? sum[a][b + paired] + 2 * h : first;
                    *reinterpret_cast<uint32_t*>(shared + swizzle<columns * 2>(row, chunk) + lane % 4 * 4) =
                        pack2<T>(f(row, first[0], second[0]), f(row, first[1], second[1]));
                }
    }
};

// Write a tile of `rows` x `columns` elements, which lies swizzled in shared memory: row i to to_row(i) (nullptr: nowhere), cut after
// columns_left. Whole 16 bytes where `aligned`.
template <class T, int rows, int columns, int threads, bool aligned, class ToRow>
KLAB_DEVICE void store_tile(const char* shared, ToRow to_row, int columns_left) {
    for (int i = thread_idx(); i < rows * columns / 8; i += threads) {
        const int row = i / (columns / 8), chunk = i % (columns / 8);
        T* to = to_row(row);
        if (to == nullptr || chunk * 8 >= columns_left) continue;
        const Vec16 v = load_16(shared + swizzle<columns * 2>(row, chunk));
        if (aligned)
            store_16(to + chunk * 8, v);
        else
            KLAB_UNROLL
            for (int j = 0; j < 8; ++j)
                if (chunk * 8 + j < columns_left) to[chunk * 8 + j].bits = static_cast<uint16_t>(v.word[j / 2] >> (16 * (j % 2)));
    }
}

// Sum of `value` over the lanes before this one.
KLAB_DEVICE int sum_before(int value, int lane) {
    int sum = value;
    KLAB_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = static_cast<int>(shfl(static_cast<uint32_t>(sum), lane >= distance ? lane - distance : 0));
        if (lane >= distance) sum += other;
    }
    return sum - value;
}

}  // namespace klab
