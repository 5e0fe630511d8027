// Sampling without a sort: statistics of chunks of the vocabulary, candidates of chunks, the choice among a row's candidates.
//
// The scheme is that of FlashInfer's kernels as far as thresholds are found by bisection and not by sorting; here on the order of the float
// bit patterns, and only among candidates that a cheap bound leaves: the k-th largest of the maxima of groups of logits is no larger than
// the k-th largest logit.
//
// Defines: ELEMENT, THREADS and VECTORS (a chunk is THREADS * VECTORS pieces of 16 bytes), CHOOSE_THREADS, CANDIDATES (of a row, held in
// registers: a multiple of CHOOSE_THREADS), BOUND_STEPS.
#pragma once
#include "rows.cuh"

namespace klab {

constexpr int PIECE = chunk_of<ELEMENT>(), CHUNK = THREADS * VECTORS * PIECE, WARPS = THREADS / 32;
constexpr int GROUP_LANES = 8, GROUPS = THREADS / GROUP_LANES;  // of a chunk; a group is what 8 neighbouring threads read
constexpr float NO_TOKEN = 1e9f;                                // token numbers are exact in a float up to 2^24

struct Least {
    KLAB_DEVICE float operator()(float a, float b) const { return min_of(a, b); }
};
// 2^((x - highest) per_unit): the probability up to a factor. -inf gives 0.
KLAB_DEVICE float weight_of(float x, float highest, float per_unit) { return exp2f_fast((x - highest) * per_unit); }
// Keys in the order of the values; both zeros are one.
KLAB_DEVICE int order_of(float x) {
    const int bits = static_cast<int>(float_bits(x == 0.0f ? 0.0f : x));
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
// Sum of the lanes up to this one.
KLAB_DEVICE float running_sum(float value) {
    const int lane = thread_idx() % 32;
    KLAB_UNROLL
    for (int step = 1; step < 32; step *= 2) {
        const float before = shfl(value, lane >= step ? lane - step : lane);
        if (lane >= step) value += before;
    }
    return value;
}

// This thread's logits of a chunk; -inf where the vocabulary has ended.
KLAB_DEVICE void load_logits(float (&x)[VECTORS][PIECE], const ELEMENT* row, int chunk, int vocab, bool aligned) {
    Vec16 raw[VECTORS];
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int at = chunk * CHUNK + (v * THREADS + thread_idx()) * PIECE;
        raw[v] = load_chunk(row + at, vocab - at, aligned && vocab - at >= PIECE);
    }
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int at = chunk * CHUNK + (v * THREADS + thread_idx()) * PIECE;
        to_floats<ELEMENT>(x[v], raw[v]);
        KLAB_UNROLL
        for (int j = 0; j < PIECE; ++j)
            if (at + j >= vocab) x[v][j] = -infinity();
    }
}

// Of every chunk the largest logit, and where it stands (greedy) or the sum of weights; and the maxima of its groups (filtered).
KLAB_KERNEL(chunk_stats, THREADS)(const ELEMENT* logits, float* chunk_max, float* chunk_sum, void* group_max, int vocab, int chunks,
                                  int greedy, int filtered, int aligned, int64_t stride, float per_unit) {
    const int chunk = block_idx_x(), row = block_idx_y();
    float* scratch = shared_memory<float>();  // [2][WARPS]
    float x[VECTORS][PIECE];
    load_logits(x, logits + row * stride, chunk, vocab, aligned);
    float largest = -infinity();
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v)
        KLAB_UNROLL
        for (int j = 0; j < PIECE; ++j) largest = max_of(largest, x[v][j]);
    if (filtered) {
        const float of_group = warp_max<GROUP_LANES>(largest);
        if (thread_idx() % GROUP_LANES == 0)
            static_cast<float*>(group_max)[(static_cast<int64_t>(row) * chunks + chunk) * GROUPS + thread_idx() / GROUP_LANES] = of_group;
    }
    const float highest = over_row(largest, THREADS, scratch, Largest()), base = highest == -infinity() ? 0.0f : highest;
    float second = greedy ? NO_TOKEN : 0.0f;
    KLAB_UNROLL
    for (int v = VECTORS - 1; v >= 0; --v)
        KLAB_UNROLL
        for (int j = PIECE - 1; j >= 0; --j) {
            const int at = chunk * CHUNK + (v * THREADS + thread_idx()) * PIECE + j;
            if (!greedy) second += weight_of(x[v][j], base, per_unit);
            else if (x[v][j] == highest && at < vocab) second = static_cast<float>(at);
        }
    second = greedy ? over_row(second, THREADS, scratch + WARPS, Least()) : over_row(second, THREADS, scratch + WARPS, Add());
    if (thread_idx() == 0) {
        chunk_max[row * chunks + chunk] = highest;
        chunk_sum[row * chunks + chunk] = second;
    }
}

// The maximum over a row's chunks, by one warp or by every warp of a block.
KLAB_DEVICE float row_max(const float* chunk_max, int chunks) {
    float highest = -infinity();
    for (int c = thread_idx() % 32; c < chunks; c += 32) highest = max_of(highest, chunk_max[c]);
    return warp_max<32>(highest);
}
KLAB_DEVICE float row_total(const float* chunk_max, const float* chunk_sum, int chunks, float highest, float per_unit) {
    float total = 0.0f;
    for (int c = thread_idx() % 32; c < chunks; c += 32) total += chunk_sum[c] * weight_of(chunk_max[c], highest, per_unit);
    return warp_sum<32>(total);
}

// One warp per row: the first of the largest logits.
KLAB_KERNEL(merge_greedy, 32)(const float* chunk_max, const float* chunk_at, int* token, int chunks) {
    chunk_max += block_idx_x() * chunks, chunk_at += block_idx_x() * chunks;
    const float highest = row_max(chunk_max, chunks);
    float at = NO_TOKEN;
    for (int c = thread_idx(); c < chunks; c += 32)
        if (chunk_max[c] == highest) at = min_of(at, chunk_at[c]);
    at = -warp_max<32>(-at);
    if (thread_idx() == 0) token[block_idx_x()] = static_cast<int>(at);
}

// The first of `count` weights at which the sum from `sum` on exceeds `target`, by one warp; if rounding leaves none, the last that
// is not 0. weight(i) is asked by lane i % 32, all lanes together. `sum` becomes the sum before the answer's 32.
template <class Weight>
KLAB_DEVICE int where_exceeded(int count, float& sum, float target, Weight weight) {
    int last = 0;
    float before_last = sum;
    for (int first = 0; first < count; first += 32) {
        const int i = first + thread_idx() % 32;
        const float mine = i < count ? weight(i) : 0.0f, running = running_sum(mine);
        const float found = -warp_max<32>(sum + running > target && mine > 0.0f ? -static_cast<float>(i) : -NO_TOKEN);
        const float latest = warp_max<32>(mine > 0.0f ? static_cast<float>(i) : -1.0f);
        if (latest >= 0.0f) last = static_cast<int>(latest), before_last = sum;
        if (found < NO_TOKEN) return static_cast<int>(found);
        sum += shfl(running, 31);
    }
    sum = before_last;
    return last;
}

// Without filters, one block per row: the chunk in which the draw falls, then the token in it.
KLAB_KERNEL(pick_from_chunk, THREADS)(const ELEMENT* logits, const float* chunk_max, const float* chunk_sum, const float* draw, int* token,
                                      int vocab, int chunks, int aligned, int64_t stride, float per_unit) {
    const int row = block_idx_x(), warp = thread_idx() / 32;
    chunk_max += static_cast<int64_t>(row) * chunks, chunk_sum += static_cast<int64_t>(row) * chunks;
    float* sums = shared_memory<float>();  // [THREADS]: of 32 threads' pieces in the order of tokens: [VECTORS][WARPS] are used
    const float highest = row_max(chunk_max, chunks);
    const float target = draw[row] * row_total(chunk_max, chunk_sum, chunks, highest, per_unit);
    float before = 0.0f;
    auto weight_of_chunk = [&](int c) { return chunk_sum[c] * weight_of(chunk_max[c], highest, per_unit); };
    const int chunk = where_exceeded(chunks, before, target, weight_of_chunk);
    // `before` counts whole steps of 32 chunks: the rest up to the chunk.
    const int step = chunk / 32 * 32, mine = step + thread_idx() % 32;
    before += warp_sum<32>(mine < chunk ? weight_of_chunk(mine) : 0.0f);

    float x[VECTORS][PIECE];
    load_logits(x, logits + row * stride, chunk, vocab, aligned);
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        float sum = 0.0f;
        KLAB_UNROLL
        for (int j = 0; j < PIECE; ++j) sum += weight_of(x[v][j], highest, per_unit);
        sum = warp_sum<32>(sum);
        if (thread_idx() % 32 == 0) sums[v * WARPS + warp] = sum;
    }
    sync_threads();
    if (warp > 0) return;
    const int stretch = where_exceeded(VECTORS * WARPS, before, target, [&](int i) { return sums[i]; });
    for (int i = stretch / 32 * 32; i < stretch; ++i) before += sums[i];
    const int first = chunk * CHUNK + stretch * 32 * PIECE, count = min_of(32 * PIECE, vocab - first);
    const ELEMENT* from = logits + row * stride + first;
    const int at = where_exceeded(count, before, target, [&](int i) { return weight_of(to_float(from[i]), highest, per_unit); });
    if (thread_idx() == 0) token[row] = first + at;
}

// What is no larger than the smallest logit kept (see the top). `maxima` are the row's `count` group maxima, in shared memory.
KLAB_DEVICE float bound_of(const float* maxima, int count, float highest, float total, float per_unit, int top_k, float top_p,
                           float least_share, float* scratch) {
    float lowest = highest, held = 0.0f;
    for (int i = thread_idx(); i < count; i += THREADS) {
        if (maxima[i] == -infinity()) continue;
        lowest = min_of(lowest, maxima[i]);
        held += top_k > 0 ? 1.0f : weight_of(maxima[i], highest, per_unit);
    }
    // 1e-4 for the rounding of either sum; tokens of less than (1 - top_p) / vocab each hold less than 1 - top_p together.
    const float goal = top_k > 0 ? static_cast<float>(top_k) : top_p * total * 1.0001f;
    const float bound = top_k > 0 ? -infinity() : highest + log2f_fast(least_share * total) / per_unit - 0.001f;
    float low = over_row(lowest, THREADS, scratch, Least()), high = highest;
    if (over_row(held, THREADS, scratch + WARPS, Add()) < goal) return bound;
    for (int step = 0; step < BOUND_STEPS; ++step) {
        const float middle = 0.5f * (low + high);
        held = 0.0f;
        for (int i = thread_idx(); i < count; i += THREADS)
            if (maxima[i] >= middle) held += top_k > 0 ? 1.0f : weight_of(maxima[i], highest, per_unit);
        if (over_row(held, THREADS, scratch + step % 2 * WARPS, Add()) >= goal) low = middle;
        else high = middle;
    }
    return max_of(bound, low);
}

// The logits of every chunk that may be kept, in order, with their tokens, at the front of the chunk's own stretch of `values`.
KLAB_KERNEL(chunk_candidates, THREADS)(const ELEMENT* logits, const float* chunk_max, const float* chunk_sum, const float* group_max,
                                       float* values, int* places, int* counts, int vocab, int chunks, int top_k, int aligned,
                                       int64_t stride, float per_unit, float top_p, float least_share) {
    const int chunk = block_idx_x(), row = block_idx_y(), warp = thread_idx() / 32, lane = thread_idx() % 32;
    chunk_max += static_cast<int64_t>(row) * chunks, chunk_sum += static_cast<int64_t>(row) * chunks;
    float* scratch = shared_memory<float>();      // [2][WARPS]
    float* sums = scratch + 2 * WARPS;            // [VECTORS][WARPS]
    float* maxima = sums + VECTORS * WARPS;       // [chunks][GROUPS]
    float x[VECTORS][PIECE];
    load_logits(x, logits + row * stride, chunk, vocab, aligned);
    for (int i = thread_idx(); i < chunks * GROUPS; i += THREADS) maxima[i] = group_max[static_cast<int64_t>(row) * chunks * GROUPS + i];
    const float highest = row_max(chunk_max, chunks), total = row_total(chunk_max, chunk_sum, chunks, highest, per_unit);
    sync_threads();
    const float bound = bound_of(maxima, chunks * GROUPS, highest, total, per_unit, top_k, top_p, least_share, scratch);

    float before[VECTORS];
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        float mine = 0.0f;
        KLAB_UNROLL
        for (int j = 0; j < PIECE; ++j) mine += x[v][j] >= bound && x[v][j] > -infinity() ? 1.0f : 0.0f;
        const float running = running_sum(mine);
        before[v] = running - mine;
        if (lane == 31) sums[v * WARPS + warp] = running;
    }
    sync_threads();
    const int64_t stretch = (static_cast<int64_t>(row) * chunks + chunk) * CHUNK;
    float counted = 0.0f;
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        for (int w = 0; w < WARPS; ++w) {
            if (w == warp) before[v] += counted;
            counted += sums[v * WARPS + w];
        }
        int64_t to = stretch + static_cast<int>(before[v]);
        KLAB_UNROLL
        for (int j = 0; j < PIECE; ++j) {
            if (x[v][j] >= bound && x[v][j] > -infinity()) {
                values[to] = x[v][j];
                places[to++] = chunk * CHUNK + (v * THREADS + thread_idx()) * PIECE + j;
            }
        }
    }
    if (thread_idx() == 0) counts[row * chunks + chunk] = static_cast<int>(counted);
}
}  // namespace klab
