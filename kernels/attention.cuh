// What the attention kernels share: one warp's work on a tile of keys and values in swizzled shared memory.
//
// A warp holds FRAGMENTS x 16 query rows. Scores and output sums are accumulators of m16n8k16: of the 16 x 8 tile number n, a lane has
// rows quad and quad + 8 (halves 0 and 1; quad = lane / 4), columns 8 n + 2 (lane % 4) + {0, 1}: elements 2 half and 2 half + 1.
// Tiles are given by byte offsets from the base of shared memory, of the lane's own row and chunk as `left_operand_at` and
// `keys_at` say; tiles start at multiples of 128 bytes and their rows are ROW_BYTES (a multiple of 128) apart.
#pragma once

#include "device.cuh"

namespace klab {

// 1 / x to about 1 ulp; of infinity it is 0.
KLAB_DEVICE float reciprocal_fast(float x) {
#if defined(KLAB_ON_DEVICE)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

// The same number, but one that the compiler cannot follow: what is computed from it in a loop stays there and holds no registers.
KLAB_DEVICE uint32_t opaque(uint32_t value) {
#if defined(KLAB_ON_DEVICE)
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// Where a lane's rows lie: ldmatrix takes the addresses of matrix m from lanes 8 m .. 8 m + 7. Queries (left operand) and values
// (transposed right operand) share one order, keys have another; each puts the registers of a fragment side by side.
template <int ROW_BYTES>
KLAB_BOTH constexpr int left_operand_at(int lane) {
    return swizzle<ROW_BYTES>(lane % 16, lane / 16);
}
template <int ROW_BYTES>
KLAB_BOTH constexpr int keys_at(int lane) {
    return swizzle<ROW_BYTES>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}
// From the offset of chunk 0 or 1 of a row to that of the chunk 16 `step` columns further. It equals swizzle(row, chunk + 2 step), but
// costs one XOR and no register per step.
KLAB_BOTH constexpr int columns_further(int at, int step) { return (at ^ (32 * step % 128)) + 32 * step / 128 * 128; }

template <int ROW_BYTES, int FRAGMENTS>
KLAB_DEVICE void load_queries(uint32_t (&queries)[FRAGMENTS][4], const unsigned char* smem, int at, int step) {
    KLAB_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) ldmatrix_x4(queries[f], smem + columns_further(at, step) + f * 16 * ROW_BYTES);
}

// scores += queries * keys^T over the 16 columns number `step` of the head dimension.
template <class T, int ROW_BYTES, int FRAGMENTS, int N>
KLAB_DEVICE void add_scores(float (&scores)[FRAGMENTS][N][4], const uint32_t (&queries)[FRAGMENTS][4], const unsigned char* smem, int at,
                            int step) {
    KLAB_UNROLL
    for (int n = 0; n < N; n += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, smem + columns_further(at, step) + n * 8 * ROW_BYTES);
        uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        KLAB_UNROLL
        for (int f = 0; f < FRAGMENTS; ++f) {
            mma_m16n8k16<T>(scores[f][n], queries[f], low);
            mma_m16n8k16<T>(scores[f][n + 1], queries[f], high);
        }
    }
}

constexpr float LOG2_E = 1.44269504f;

// scores become log2(e) softcap tanh(x / softcap) with x = score * scale_log2 / log2(e): logits in units of log2, to be scaled no further.
// tanh y = 1 - 2 / (e^2y + 1); the instruction tanh.approx is 5e-4 off, which is 2% of a weight at a cap of 50.
template <int FRAGMENTS, int N>
KLAB_DEVICE void cap_scores(float (&scores)[FRAGMENTS][N][4], float scale_log2, float softcap) {
    float inward = 2.0f * scale_log2 / softcap, outward = softcap * LOG2_E;
    KLAB_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) {
        KLAB_UNROLL
        for (int n = 0; n < N; ++n) {
            KLAB_UNROLL
            for (int j = 0; j < 4; ++j)
                scores[f][n][j] = fused_multiply_add(-2.0f * outward, reciprocal_fast(exp2f_fast(scores[f][n][j] * inward) + 1.0f), outward);
        }
    }
}

// Online softmax of one row half: scores become exp2(score * scale_log2 - maximum). Returned is by how much what was summed under an older
// maximum shrinks. `row_max` is in units of log2; `row_sum` is this lane's share (warp_sum<4> adds it up).
template <int N>
KLAB_DEVICE float soften_scores(float (&scores)[N][4], int half, float scale_log2, float& row_max, float& row_sum) {
    float highest = -infinity();
    KLAB_UNROLL
    for (int n = 0; n < N; ++n) highest = max_of(highest, max_of(scores[n][2 * half], scores[n][2 * half + 1]));
    highest = max_of(row_max, warp_max<4>(highest) * scale_log2);
    // A row that has seen no key yet keeps -inf, which must not meet another -inf in a difference.
    float base = highest == -infinity() ? 0.0f : highest;
    float shrink = exp2f_fast(row_max - base), sum = 0.0f;
    KLAB_UNROLL
    for (int n = 0; n < N; ++n) {
        KLAB_UNROLL
        for (int j = 2 * half; j < 2 * half + 2; ++j) {
            scores[n][j] = exp2f_fast(fused_multiply_add(scores[n][j], scale_log2, -base));
            sum += scores[n][j];
        }
    }
    row_max = highest;
    row_sum = row_sum * shrink + sum;
    return shrink;
}

template <int COLUMNS>
KLAB_DEVICE void shrink_sums(float (&sums)[COLUMNS][4], int half, float shrink) {
    KLAB_UNROLL
    for (int n = 0; n < COLUMNS; ++n) {
        sums[n][2 * half] *= shrink;
        sums[n][2 * half + 1] *= shrink;
    }
}

template <int N, int COLUMNS>
KLAB_DEVICE void soften(float (&scores)[N][4], int half, float scale_log2, float& row_max, float& row_sum, float (&sums)[COLUMNS][4]) {
    shrink_sums(sums, half, soften_scores(scores, half, scale_log2, row_max, row_sum));
}

// Two neighbouring accumulator tiles hold exactly the elements of one left operand, in the same lanes.
template <class T, int N>
KLAB_DEVICE void pack_weights(uint32_t (&weights)[N / 2][4], const float (&scores)[N][4]) {
    KLAB_UNROLL
    for (int n = 0; n < N / 2; ++n) {
        weights[n][0] = pack2<T>(scores[2 * n][0], scores[2 * n][1]);
        weights[n][1] = pack2<T>(scores[2 * n][2], scores[2 * n][3]);
        weights[n][2] = pack2<T>(scores[2 * n + 1][0], scores[2 * n + 1][1]);
        weights[n][3] = pack2<T>(scores[2 * n + 1][2], scores[2 * n + 1][3]);
    }
}

// sums += weights * values over the tile's 16 KEY_STEPS keys.
template <class T, int ROW_BYTES, int FRAGMENTS, int KEY_STEPS, int COLUMNS>
KLAB_DEVICE void add_values(float (&sums)[FRAGMENTS][COLUMNS][4], const uint32_t (&weights)[FRAGMENTS][KEY_STEPS][4],
                            const unsigned char* smem, int at) {
    KLAB_UNROLL
    for (int k = 0; k < KEY_STEPS; ++k) {
        KLAB_UNROLL
        for (int column = 0; column < COLUMNS; column += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, smem + columns_further(at, column / 2) + k * 16 * ROW_BYTES);
            uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
            KLAB_UNROLL
            for (int f = 0; f < FRAGMENTS; ++f) {
                mma_m16n8k16<T>(sums[f][column], weights[f][k], low);
                mma_m16n8k16<T>(sums[f][column + 1], weights[f][k], high);
            }
        }
    }
}

}  // namespace klab
