"""CUDA C++ that the weight-only kernels share: copying packed weights and activations, and multiplying them.

A source puts `FRAGMENTS` behind its includes. Its defines: ELEMENT, SCALE (the C++ types of activations and scales), INT4 (1; 0 is fp8),
GROUP (columns of k per scale, 0: one scale per row), ALIGNED (rows of x and w are whole 16-byte chunks at multiples of 16 bytes).

A warp multiplies in steps: 16 rows of weights per tile and 64 bytes of each row, which is STEP_K columns. Lane (group, pair) = (lane / 4,
lane % 4) reads 16 of these bytes of rows `group` and `group + 8`, and the same columns of row `group` of x. Which k goes to which slot of
an mma does not matter as long as both operands agree, so a lane's weights are unpacked in the order that costs least and its activations
are put into that order, with one instruction per two of them that serves all tiles.
"""

from __future__ import annotations

FRAGMENTS = r"""
namespace klab {
constexpr int STEP_BYTES = 64, STEP_K = INT4 ? 128 : 64;   // of one row of weights
constexpr int LANE_K = STEP_K / 4, X_CHUNKS = LANE_K / 8;  // columns of a lane, and their 16-byte chunks in x
constexpr int HALVED = INT4 ? 1 : 0;                       // columns >> HALVED are bytes of w; / 2 takes three instructions
constexpr int X_ROW_BYTES = STEP_K * 2;                    // of one row of x per step

// a * b + c on two numbers each.
template <class T>
KLAB_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c);
#if defined(KLAB_ON_DEVICE)
template <>
KLAB_DEVICE uint32_t fma_pair<bf16_t>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
template <>
KLAB_DEVICE uint32_t fma_pair<half_t>(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// (a & mask) ^ magic in one instruction: left alone, the compiler takes two, since only one of the constants may be an immediate.
KLAB_DEVICE uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t magic) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(mask), "r"(magic));
    return d;
}
#else
inline uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t magic) { return (a & mask) ^ magic; }
template <class T>
uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
    const Pair x = unpack2<T>(a), y = unpack2<T>(b), z = unpack2<T>(c);
    return pack2<T>(fused_multiply_add(x.x, y.x, z.x), fused_multiply_add(x.y, y.y, z.y));
}
#endif

template <class T>
struct Magic;
template <>
struct Magic<bf16_t> {
    // 128 in every half with the nibble's sign bit turned, 1, -136; e4m3's shift to bf16's places, these places, 2^120.
    static constexpr uint32_t base = 0x43084308u, one = 0x3f803f80u, offset = 0xc308c308u;
    static constexpr uint32_t shift = 4, places = 0x07f007f0u, factor = 0x7b807b80u;
};
template <>
struct Magic<half_t> {
    // 1024, 1, -1032; 2^8.
    static constexpr uint32_t base = 0x64086408u, one = 0x3c003c00u, offset = 0xe408e408u;
    static constexpr uint32_t shift = 1, places = 0x3f803f80u, factor = 0x5c005c00u;
};

// Eight weights of a lane, number `chunk` of its 16 bytes, as pairs: int4 {0, 4}, {1, 5}, {2, 6}, {3, 7}; fp8 {0, 2}, {1, 3}, {4, 6},
// {5, 7}. All values are exact.
KLAB_DEVICE void unpack(uint32_t (&pair)[4], const Vec16& packed, int chunk) {
    using Bits = Magic<ELEMENT>;
    KLAB_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (INT4) {
            pair[i] = fma_pair<ELEMENT>(and_xor(packed.word[chunk] >> (4 * i), 0x000f000fu, Bits::base), Bits::one, Bits::offset);
        } else {
            const uint32_t word = packed.word[2 * chunk + i / 2];
            const uint32_t upper = i % 2 == 0 ? word << 8 : word;  // the byte with its sign where a 16-bit float has it
            pair[i] = fma_pair<ELEMENT>((upper & 0x80008000u) | ((upper >> Bits::shift) & Bits::places), Bits::factor, 0x80008000u);
        }
    }
}

// The same half of two words, side by side.
KLAB_DEVICE uint32_t side_by_side(uint32_t first, uint32_t second, bool upper) {
    return upper ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
}

// Eight activations in the order of `unpack`.
KLAB_DEVICE void arrange(uint32_t (&pair)[4], const Vec16& chunk) {
    KLAB_UNROLL
    for (int i = 0; i < 4; ++i)
        pair[i] = INT4 ? side_by_side(chunk.word[i / 2], chunk.word[i / 2 + 2], i % 2)
                       : side_by_side(chunk.word[i / 2 * 2], chunk.word[i / 2 * 2 + 1], i % 2);
}

KLAB_DEVICE uint32_t bits_of(uint8_t x) { return x; }
template <class T>
KLAB_DEVICE uint32_t bits_of(T x) {
    return x.bits;
}

// Copy 16 bytes of which the first `left` elements exist; zeros for the rest.
template <class T>
KLAB_DEVICE void bring(char* to, const T* from, int left) {
    if (ALIGNED) {
        cp_async_16(to, from, left > 0);
    } else {
        constexpr int PER = 4 / sizeof(T);
        Vec16 v{};
        KLAB_UNROLL
        for (int j = 0; j < 4 * PER; ++j)
            if (j < left) v.word[j / PER] |= bits_of(from[j]) << (8 * sizeof(T) * (j % PER));
        store_16(to, v);
    }
}

// Where chunk `chunk` of row `row` of a step of x lies: the four lanes of two rows that read at once meet no bank twice.
KLAB_DEVICE uint32_t x_offset(uint32_t row, uint32_t chunk) {
    return row * X_ROW_BYTES + ((chunk % X_CHUNKS * 4 + chunk / X_CHUNKS) ^ (row % 2 * 4)) * 16;
}

// sum[tile][eight][0..3] += 16 TILES rows of weights at `w` times EIGHTS eights of rows of x, of which `rows` exist.
template <int TILES, int EIGHTS>
KLAB_DEVICE void multiply_step(float (&sum)[TILES][EIGHTS][4], const char* w, const char* x, int rows) {
    const uint32_t lane = thread_idx() % 32, group = lane / 4, pair = lane % 4;
    const char* x_lane = x + group * X_ROW_BYTES + pair * 16;
    Vec16 packed[TILES][2];
    KLAB_UNROLL
    for (int t = 0; t < TILES; ++t)
        KLAB_UNROLL
        for (int h = 0; h < 2; ++h) packed[t][h] = load_16(w + (t * 16 + h * 8 + group) * STEP_BYTES + pair * 16);
    KLAB_UNROLL
    for (int c = 0; c < X_CHUNKS; ++c) {
        uint32_t a[TILES][2][4];
        KLAB_UNROLL
        for (int t = 0; t < TILES; ++t)
            KLAB_UNROLL
            for (int h = 0; h < 2; ++h) unpack(a[t][h], packed[t][h], c);
        const char* x_chunk = x_lane + ((c * 4) ^ (group % 2 * 4)) * 16;  // x_offset(8 s + group, pair * X_CHUNKS + c)
        KLAB_UNROLL
        for (int s = 0; s < EIGHTS; ++s) {
            uint32_t b[4];
            arrange(b, s * 8 + static_cast<int>(group) < rows ? load_16(x_chunk + s * 8 * X_ROW_BYTES) : Vec16{});
            KLAB_UNROLL
            for (int i = 0; i < 4; i += 2)
                KLAB_UNROLL
                for (int t = 0; t < TILES; ++t) {
                    const uint32_t weights[4] = {a[t][0][i], a[t][1][i], a[t][0][i + 1], a[t][1][i + 1]}, activations[2] = {b[i], b[i + 1]};
                    mma_m16n8k16<ELEMENT>(sum[t][s], weights, activations);
                }
        }
    }
}

// The same into `total`, where the step has scales of its own: `scale` has those of the warp's rows, `stride` floats apart.
template <int TILES, int EIGHTS>
KLAB_DEVICE void scaled_step(float (&total)[TILES][EIGHTS][4], const char* w, const char* x, int rows, const float* scale, int stride) {
    float sum[TILES][EIGHTS][4] = {};
    multiply_step(sum, w, x, rows);
    const int group = thread_idx() % 32 / 4;
    KLAB_UNROLL
    for (int t = 0; t < TILES; ++t)
        KLAB_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float factor = scale[(t * 16 + i / 2 * 8 + group) * stride];
            KLAB_UNROLL
            for (int s = 0; s < EIGHTS; ++s) total[t][s][i] = fused_multiply_add(sum[t][s][i], factor, total[t][s][i]);
        }
}
}  // namespace klab
"""

# Adds the parts of k in their order: the same bits every time.
COMBINE = r"""
#include "device.cuh"
using namespace klab;
KLAB_KERNEL(weight_only_combine, 128)(const float* __restrict__ partial, ELEMENT* __restrict__ out, int m, int n, int64_t out_stride) {
    const int column = block_idx_x() * 128 + thread_idx(), row = block_idx_y();
    if (column >= n) return;
    float sum = 0.0f;
    KLAB_UNROLL
    for (int s = 0; s < SPLIT; ++s) sum += partial[(s * static_cast<int64_t>(m) + row) * n + column];
    out[row * out_stride + column] = from_float<ELEMENT>(sum);
}
"""
