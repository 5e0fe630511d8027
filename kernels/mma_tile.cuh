// A block's tile of a matrix product on mma.sync: out[BLOCK_M, BLOCK_N] = X[BLOCK_M, k] W[BLOCK_N, k]^T, fed by a ring of cp.async stages.
//
// Where X and W come from is the kernel's business: it passes a source for each, an object with
//     bool inside(int row, int column) const;           // of the tile; what is not inside is zero
//     const ELEMENT* at(int row, int column) const;     // where it is, if inside
// ALIGNED promises that eight elements from a column that is a multiple of 8 on are inside or outside together and lie in 16 aligned bytes;
// ALIGNED_OUT that the same holds for the output.
//
// Defines: ELEMENT (half_t or bf16_t), BLOCK_M, BLOCK_N, BLOCK_K, STAGES, WARPS_M, WARPS_N, ALIGNED, ALIGNED_OUT. Shared memory: the larger
// of STAGES * STAGE_BYTES and BLOCK_M * BLOCK_N * 2.
#pragma once
#include "device.cuh"

namespace klab {
namespace tile {
constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;  // what one warp computes
constexpr int TILES_M = WARP_M / 16, TILES_N = WARP_N / 8;             // in mma tiles
constexpr int THREADS = WARPS_M * WARPS_N * 32;
constexpr int X_BYTES = BLOCK_M * BLOCK_K * 2, STAGE_BYTES = X_BYTES + BLOCK_N * BLOCK_K * 2;

// ROWS rows of BLOCK_K columns to shared memory.
template <int ROWS, class Source>
KLAB_DEVICE void bring(char* to, const Source& source, int k0) {
    constexpr int CHUNKS = BLOCK_K / 8, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0, "a thread keeps to one column of chunks");
    const int first = thread_idx() / CHUNKS, chunk = thread_idx() % CHUNKS, column = k0 + chunk * 8;
    KLAB_UNROLL
    for (int i = 0; i < ceil_div(ROWS, STEP); ++i) {
        const int row = first + i * STEP;
        if (ROWS % STEP != 0 && row >= ROWS) continue;
        char* at = to + swizzle<BLOCK_K * 2>(row, chunk);
        if (ALIGNED) {
            cp_async_16(at, source.at(row, column), source.inside(row, column));
        } else {
            Vec16 v{};
            KLAB_UNROLL
            for (int j = 0; j < 8; ++j) {
                if (source.inside(row, column + j))
                    v.word[j / 2] |= static_cast<uint32_t>(source.at(row, column + j)->bits) << (16 * (j % 2));
            }
            store_16(at, v);
        }
    }
}

struct Fragments {
    uint32_t x[TILES_M][4];
    uint32_t w[TILES_N][2];
};

// The fragments of 16 columns of a stage, number `step`.
KLAB_DEVICE void read_fragments(Fragments& f, const char* stage, int warp_m, int warp_n, int step) {
    const int lane = thread_idx() % 32;
    KLAB_UNROLL
    for (int i = 0; i < TILES_M; ++i)
        ldmatrix_x4(f.x[i], stage + swizzle<BLOCK_K * 2>(warp_m * WARP_M + i * 16 + lane % 16, step * 2 + lane / 16));
    KLAB_UNROLL
    for (int j = 0; j < TILES_N; j += 2) {
        if (j + 1 < TILES_N) {
            uint32_t r[4];  // columns 0..7 and 8..15 of k for eight rows of W, then for the next eight
            const int row = warp_n * WARP_N + j * 8 + lane % 8 + lane / 16 * 8;
            ldmatrix_x4(r, stage + X_BYTES + swizzle<BLOCK_K * 2>(row, step * 2 + lane / 8 % 2));
            f.w[j][0] = r[0];
            f.w[j][1] = r[1];
            f.w[j + 1][0] = r[2];
            f.w[j + 1][1] = r[3];
        } else {
            ldmatrix_x2(f.w[j], stage + X_BYTES + swizzle<BLOCK_K * 2>(warp_n * WARP_N + j * 8 + lane % 8, step * 2 + lane / 8 % 2));
        }
    }
}

// sum += the products over all k.
template <class X, class W>
KLAB_DEVICE void multiply(float (&sum)[TILES_M][TILES_N][4], const X& x, const W& w, int k) {
    char* shared = shared_memory<char>();
    const int warp_m = thread_idx() / 32 / WARPS_N, warp_n = thread_idx() / 32 % WARPS_N, steps = ceil_div(k, BLOCK_K);
    auto bring_stage = [&](int step) {
        char* stage = shared + static_cast<uint32_t>(step) % STAGES * STAGE_BYTES;
        bring<BLOCK_M>(stage, x, step * BLOCK_K);
        bring<BLOCK_N>(stage + X_BYTES, w, step * BLOCK_K);
    };
    KLAB_UNROLL
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) bring_stage(step);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<STAGES - 2>();
        sync_threads();  // this stage has arrived for everybody, and nobody reads the one before any more
        if (step + STAGES - 1 < steps) bring_stage(step + STAGES - 1);
        cp_async_commit();
        const char* stage = shared + static_cast<uint32_t>(step) % STAGES * STAGE_BYTES;
        Fragments f[2];
        read_fragments(f[0], stage, warp_m, warp_n, 0);
        KLAB_UNROLL
        for (int i = 0; i < BLOCK_K / 16; ++i) {
            if (i + 1 < BLOCK_K / 16) read_fragments(f[(i + 1) % 2], stage, warp_m, warp_n, i + 1);
            KLAB_UNROLL
            for (int a = 0; a < TILES_M; ++a)
                KLAB_UNROLL
                for (int b = 0; b < TILES_N; ++b) mma_m16n8k16<ELEMENT>(sum[a][b], f[i % 2].x[a], f[i % 2].w[b]);
        }
    }
    cp_async_wait<0>();
    sync_threads();
}

// Write the tile, of which `rows` by `columns` exist, through shared memory, so that 16 bytes of a row leave at once.
KLAB_DEVICE void store(const float (&sum)[TILES_M][TILES_N][4], ELEMENT* out, int64_t stride, int rows, int columns) {
    char* shared = shared_memory<char>();
    const int lane = thread_idx() % 32, warp_m = thread_idx() / 32 / WARPS_N, warp_n = thread_idx() / 32 % WARPS_N;
    KLAB_UNROLL
    for (int a = 0; a < TILES_M; ++a)
        KLAB_UNROLL
        for (int b = 0; b < TILES_N; ++b)
            KLAB_UNROLL
            for (int h = 0; h < 2; ++h) {
                const int row = warp_m * WARP_M + a * 16 + h * 8 + lane / 4, chunk = warp_n * WARP_N / 8 + b;
                char* to = shared + swizzle<BLOCK_N * 2>(row, chunk) + lane % 4 * 4;
                *reinterpret_cast<uint32_t*>(to) = pack2<ELEMENT>(sum[a][b][2 * h], sum[a][b][2 * h + 1]);
            }
    sync_threads();
    for (int i = thread_idx(); i < BLOCK_M * BLOCK_N / 8; i += THREADS) {
        const int row = i / (BLOCK_N / 8), chunk = i % (BLOCK_N / 8), column = chunk * 8;
        if (row >= rows || column >= columns) continue;
        const Vec16 v = load_16(shared + swizzle<BLOCK_N * 2>(row, chunk));
        ELEMENT* to = out + row * stride + column;
        if (ALIGNED_OUT)
            store_16(to, v);
        else
            KLAB_UNROLL
            for (int j = 0; j < 8; ++j)
                if (column + j < columns) to[j].bits = static_cast<uint16_t>(v.word[j / 2] >> (16 * (j % 2)));
    }
}
}  // namespace tile
}  // namespace klab
