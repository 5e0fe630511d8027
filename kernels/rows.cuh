// Rows of activations, 16 bytes a thread at a time: loads, reductions over the threads of a row, stores with or without fp8.
//
// Whether rows are aligned is known at launch and is the same for all threads: a branch on it costs nothing beside the memory.
#pragma once
#include "fp8.cuh"

namespace klab {

constexpr float FP8_MAX = 448.0f, LEAST_AMAX = 1e-12f, LOG2_E = 1.4426950408889634f;

// Elements of 16 bytes.
template <class T>
KLAB_BOTH constexpr int chunk_of() {
    return 16 / static_cast<int>(sizeof(T));
}
struct alignas(8) Two {
    uint32_t low, high;
};

KLAB_DEVICE uint32_t bits_of(float x) { return float_bits(x); }
KLAB_DEVICE uint32_t bits_of(half_t x) { return x.bits; }
KLAB_DEVICE uint32_t bits_of(bf16_t x) { return x.bits; }

// 16 bytes of which the first `left` elements exist; the others are zero. Aligned rows are whole chunks.
template <class T>
KLAB_DEVICE Vec16 load_chunk(const T* from, int left, bool aligned) {
    Vec16 v{};
    if (aligned) {
        if (left > 0) v = load_16_once(from);
    } else {
        constexpr int PER_WORD = 4 / static_cast<int>(sizeof(T));
        KLAB_UNROLL
        for (int j = 0; j < chunk_of<T>(); ++j)
            if (j < left) v.word[j / PER_WORD] |= bits_of(from[j]) << (j % PER_WORD * 16);
    }
    return v;
}
// The same for what many blocks read: weights stay in the caches.
template <class T>
KLAB_DEVICE Vec16 load_chunk_cached(const T* from, int left, bool aligned) {
    if (aligned) return left > 0 ? load_16(from) : Vec16{};
    return load_chunk(from, left, false);
}

template <class T>
KLAB_DEVICE void to_floats(float (&to)[chunk_of<T>()], const Vec16& v) {
    KLAB_UNROLL
    for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4) {
            to[w] = bits_float(v.word[w]);
        } else {
            const Pair pair = unpack2<T>(v.word[w]);
            to[2 * w] = pair.x;
            to[2 * w + 1] = pair.y;
        }
    }
}
template <class T>
KLAB_DEVICE Vec16 from_floats(const float (&from)[chunk_of<T>()]) {
    Vec16 v;
    KLAB_UNROLL
    for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4)
            v.word[w] = float_bits(from[w]);
        else
            v.word[w] = pack2<T>(from[2 * w], from[2 * w + 1]);
    }
    return v;
}
template <class T>
KLAB_DEVICE void store_chunk(T* to, const Vec16& v, int left, bool aligned) {
    if (aligned) {
        if (left > 0) store_16(to, v);
    } else {
        constexpr int PER_WORD = 4 / static_cast<int>(sizeof(T));
        KLAB_UNROLL
        for (int j = 0; j < chunk_of<T>(); ++j) {
            if (j < left) {
                if constexpr (sizeof(T) == 4)
                    to[j] = bits_float(v.word[j]);
                else
                    to[j].bits = static_cast<uint16_t>(v.word[j / PER_WORD] >> (j % PER_WORD * 16));
            }
        }
    }
}
// `count` (4 or 8) floats times `factor` as fp8.
template <int count>
KLAB_DEVICE void store_fp8(uint8_t* to, const float (&from)[count], float factor, int left, bool aligned) {
    uint32_t word[count / 4];
    KLAB_UNROLL
    for (int w = 0; w < count / 4; ++w)
        word[w] = floats_to_fp8x2(from[4 * w] * factor, from[4 * w + 1] * factor) |
                  static_cast<uint32_t>(floats_to_fp8x2(from[4 * w + 2] * factor, from[4 * w + 3] * factor)) << 16;
    if (aligned) {
        if (left > 0) {
            if constexpr (count == 8)
                *reinterpret_cast<Two*>(to) = Two{word[0], word[1]};
            else
                *reinterpret_cast<uint32_t*>(to) = word[0];
        }
    } else {
        KLAB_UNROLL
        for (int j = 0; j < count; ++j)
            if (j < left) to[j] = static_cast<uint8_t>(word[j / 4] >> (j % 4 * 8));
    }
}

// Over the `lanes` threads of a row (a power of two; of one warp, or whole warps of the block): every thread gets the result. `scratch` are
// as many floats as the block has warps, another place for each reduction of a launch; all threads of the block take part.
struct Add {
    KLAB_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Largest {
    KLAB_DEVICE float operator()(float a, float b) const { return max_of(a, b); }
};
template <class Merge>
KLAB_DEVICE float over_row(float value, int lanes, float* scratch, Merge merge) {
    for (int mask = min_of(lanes, 32) / 2; mask > 0; mask /= 2) value = merge(value, shfl_xor(value, mask));
    if (lanes <= 32) return value;
    const int warp = thread_idx() / 32, warps = lanes / 32;
    if (thread_idx() % 32 == 0) scratch[warp] = value;
    sync_threads();
    // A warp reads its row's values together and merges them as before: `warps` is a power of two of at most 32.
    value = scratch[warp / warps * warps + thread_idx() % 32 % warps];
    for (int mask = warps / 2; mask > 0; mask /= 2) value = merge(value, shfl_xor(value, mask));
    return value;
}

KLAB_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp2f_fast(-LOG2_E * x)); }
#if defined(KLAB_ON_DEVICE)
KLAB_DEVICE float gauss_error(float x) { return erff(x); }
KLAB_DEVICE float inverse_root(float x) { return rsqrtf(x); }
#else
inline float gauss_error(float x) { return std::erf(x); }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
#endif

}  // namespace klab
