// Attention over an fp8 (e4m3) cache on fp16 tensor cores: tiles stay bytes in shared memory and become fp16 in the registers of a product.
//
// ldmatrix moves two fp8 elements where it would move one of 16 bits, so lanes get other columns than mma's fragments name. Both products
// are free to call their columns as they like: the queries are stored in the order in which the keys arrive, and the output's columns are
// taken in the order in which the values did (`column_of`).
//
// e4m3 is exact in fp16 and costs one conversion for two elements (in bf16 two more), which is why a bf16 query becomes fp16 here, with its
// row's power of two taken out: `store_query`.
#pragma once

#include "attention.cuh"
#include "fp8.cuh"

namespace klab {

// Bytes 0, 2, 1, 3.
KLAB_DEVICE uint32_t sort_bytes(uint32_t word) {
#if defined(KLAB_ON_DEVICE)
    return __byte_perm(word, 0, 0x3120);
#else
    return (word & 0xff0000ffu) | (word >> 8 & 0xff00u) | (word << 8 & 0xff0000u);
#endif
}

// Where column `dim` of a query is stored: a lane's four neighbouring bytes of a key meet columns 2 pair, 2 pair + 1, 2 pair + 8 and
// 2 pair + 9 of a fragment of 16.
KLAB_BOTH constexpr int query_column(int dim) { return dim / 16 * 16 + dim % 4 / 2 * 8 + dim % 16 / 4 * 2 + dim % 2; }
// The column of the output that element j (0 or 1) of accumulator tile n holds: tiles take turns between even and odd columns of 16.
KLAB_BOTH constexpr int column_of(int n, int pair, int j) { return n / 2 * 16 + 4 * pair + 2 * j + n % 2; }

// One warp: a query of DIM columns (or, if !valid, zeros) to row `row` of a swizzled tile in fp16, divided by a power of two, which is
// returned, so that all its elements are below 2.
template <class T, int DIM, int ROW_BYTES>
KLAB_DEVICE float store_query(unsigned char* tile, int row, const T* query, bool valid) {
    static_assert(DIM % 32 == 0, "a lane takes every 32nd column");
    int lane = thread_idx() % 32;
    float mine[DIM / 32], largest = 0.0f;
    KLAB_UNROLL
    for (int i = 0; i < DIM / 32; ++i) {
        mine[i] = valid ? to_float(query[lane + 32 * i]) : 0.0f;
        largest = max_of(largest, max_of(mine[i], -mine[i]));
    }
    float size = bits_float(float_bits(warp_max<32>(largest)) & 0x7f800000u);
    if (size == 0.0f) size = 1.0f;
    KLAB_UNROLL
    for (int i = 0; i < DIM / 32; ++i) {
        int column = query_column(lane + 32 * i);
        *reinterpret_cast<half_t*>(tile + swizzle<ROW_BYTES>(row, column / 8) + column % 8 * 2) = from_float<half_t>(mine[i] / size);
    }
    return size;
}

// scores += queries * keys^T over the 32 columns number `step` of the head dimension; `queries` are two fragments of 16 columns each.
template <int ROW_BYTES, int FRAGMENTS, int N>
KLAB_DEVICE void add_narrow_scores(float (&scores)[FRAGMENTS][N][4], const uint32_t (&queries)[2][FRAGMENTS][4], const unsigned char* smem,
                                   int at, int step) {
    KLAB_UNROLL
    for (int n = 0; n < N; n += 2) {
        uint32_t bytes[4];  // keys n .. n + 8: columns 0 .. 15, 16 .. 31; the next eight keys: the same
        ldmatrix_x4(bytes, smem + columns_further(at, step) + n * 8 * ROW_BYTES);
        KLAB_UNROLL
        for (int part = 0; part < 4; ++part) {
            uint32_t b[2];
            fp8x4_to_halves(bytes[part], b[0], b[1]);
            KLAB_UNROLL
            for (int f = 0; f < FRAGMENTS; ++f) mma_m16n8k16<half_t>(scores[f][n + part / 2], queries[part % 2][f], b);
        }
    }
}

// sums += weights * values over the tile's 16 KEY_STEPS keys; see `column_of`.
template <int ROW_BYTES, int FRAGMENTS, int KEY_STEPS, int COLUMNS>
KLAB_DEVICE void add_narrow_values(float (&sums)[FRAGMENTS][COLUMNS][4], const uint32_t (&weights)[FRAGMENTS][KEY_STEPS][4],
                                   const unsigned char* smem, int at) {
    KLAB_UNROLL
    for (int k = 0; k < KEY_STEPS; ++k) {
        KLAB_UNROLL
        for (int column = 0; column < COLUMNS; column += 4) {
            uint32_t bytes[4];  // columns 0 .. 15 of keys 0 .. 7 and 8 .. 15, columns 16 .. 31 of the same
            ldmatrix_x4_trans(bytes, smem + columns_further(at, column / 4) + k * 16 * ROW_BYTES);
            KLAB_UNROLL
            for (int part = 0; part < 4; part += 2) {
                uint32_t even[2], odd[2];
                fp8x4_to_halves(sort_bytes(bytes[part]), even[0], odd[0]);
                fp8x4_to_halves(sort_bytes(bytes[part + 1]), even[1], odd[1]);
                KLAB_UNROLL
                for (int f = 0; f < FRAGMENTS; ++f) {
                    mma_m16n8k16<half_t>(sums[f][column + part], weights[f][k], even);
                    mma_m16n8k16<half_t>(sums[f][column + part + 1], weights[f][k], odd);
                }
            }
        }
    }
}

}  // namespace klab
