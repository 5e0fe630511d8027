// The last step of sampling: one block per row chooses among the row's candidates (see sampling.cuh).
#pragma once
#include "sampling.cuh"

namespace klab {

constexpr int OWN = CANDIDATES / CHOOSE_THREADS, CHOOSE_WARPS = CHOOSE_THREADS / 32;
constexpr int LOWEST_KEY = -2139095041;  // of the lowest finite float

// The largest key at which `measure(key)`, the same for all threads and falling with the key, is still at least `goal`.
template <class Measure>
KLAB_DEVICE int largest_enough(int low, int high, float goal, Measure measure) {
    for (int step = 0; low < high; ++step) {
        const int64_t gap = static_cast<int64_t>(high) - low;
        const int middle = static_cast<int>(low + (gap + 1) / 2);
        if (measure(middle, step % 2) >= goal) low = middle;
        else high = middle - 1;
    }
    return low;
}

KLAB_KERNEL(choose, CHOOSE_THREADS)(const float* values, const int* places, const int* counts, const float* chunk_max,
                                    const float* chunk_sum, const float* draw, int* token, int chunks, int top_k,
                                    float per_unit, float top_p) {
    const int row = block_idx_x(), warp = thread_idx() / 32, lane = thread_idx() % 32;
    chunk_max += static_cast<int64_t>(row) * chunks, chunk_sum += static_cast<int64_t>(row) * chunks;
    values += static_cast<int64_t>(row) * chunks * CHUNK, places += static_cast<int64_t>(row) * chunks * CHUNK;
    counts += static_cast<int64_t>(row) * chunks;
    float* scratch = shared_memory<float>();                                 // [2][CHOOSE_WARPS]
    float* by_chunk = scratch + 2 * CHOOSE_WARPS;                            // [chunks]: candidates before a chunk, or a chunk's weight
    float* held = by_chunk + round_up(chunks, 32);                           // [CANDIDATES] values
    int* held_places = reinterpret_cast<int*>(held + CANDIDATES);            // [CANDIDATES]
    const float highest = row_max(chunk_max, chunks);
    float total = row_total(chunk_max, chunk_sum, chunks, highest, per_unit);
    const int top = order_of(highest);

    // Every warp counts for itself; the first keeps where each chunk's candidates begin.
    float all = 0.0f;
    for (int first = 0; first < chunks; first += 32) {
        const float mine = first + lane < chunks ? static_cast<float>(counts[first + lane]) : 0.0f, running = running_sum(mine);
        if (warp == 0) by_chunk[first + lane] = all + running - mine;
        all += shfl(running, 31);
    }
    const int count = static_cast<int>(all);
    sync_threads();

    if (count <= CANDIDATES) {
        for (int i = thread_idx(); i < CANDIDATES; i += CHOOSE_THREADS)
            if (i >= count) held[i] = -infinity(), held_places[i] = 0;
        for (int c = warp; c < chunks; c += CHOOSE_WARPS) {
            const int to = static_cast<int>(by_chunk[c]), here = counts[c];
            for (int i = lane; i < here; i += 32) {
                held[to + i] = values[static_cast<int64_t>(c) * CHUNK + i];
                held_places[to + i] = places[static_cast<int64_t>(c) * CHUNK + i];
            }
        }
        sync_threads();
        // A thread owns neighbours, in the order of tokens.
        int key[OWN];
        float weight[OWN];
        KLAB_UNROLL
        for (int i = 0; i < OWN; ++i) {
            const float x = held[thread_idx() * OWN + i];
            key[i] = order_of(x), weight[i] = weight_of(x, highest, per_unit);
        }
        int low = LOWEST_KEY;
        if (top_k > 0)
            low = largest_enough(low, top, static_cast<float>(top_k), [&](int least, int turn) {
                float mine = 0.0f;
                KLAB_UNROLL
                for (int i = 0; i < OWN; ++i) mine += key[i] >= least ? 1.0f : 0.0f;
                return over_row(mine, CHOOSE_THREADS, scratch + turn * CHOOSE_WARPS, Add());
            });
        sync_threads();
        auto weighed = [&](int least, int turn) {
            float mine = 0.0f;
            KLAB_UNROLL
            for (int i = 0; i < OWN; ++i) mine += key[i] >= least ? weight[i] : 0.0f;
            return over_row(mine, CHOOSE_THREADS, scratch + turn * CHOOSE_WARPS, Add());
        };
        if (top_k > 0) total = weighed(low, 0);
        sync_threads();
        if (top_p < 1.0f) low = largest_enough(low, top, top_p * total, weighed);
        sync_threads();
        const float target = draw[row] * weighed(low, 0);
        float mine = 0.0f;
        KLAB_UNROLL
        for (int i = 0; i < OWN; ++i) mine += key[i] >= low ? weight[i] : 0.0f;
        const float running = running_sum(mine);
        if (lane == 31) scratch[CHOOSE_WARPS + warp] = running;
        sync_threads();
        float sum = running - mine;
        for (int w = 0; w < warp; ++w) sum += scratch[CHOOSE_WARPS + w];
        // Each thread's first candidate beyond the target; the least of them, or the last that has any weight.
        float found = NO_TOKEN, last = 0.0f;
        KLAB_UNROLL
        for (int i = 0; i < OWN; ++i) {
            if (key[i] < low || weight[i] == 0.0f) continue;
            sum += weight[i];
            last = static_cast<float>(thread_idx() * OWN + i);
            if (sum > target) found = min_of(found, last);
        }
        sync_threads();
        found = over_row(found, CHOOSE_THREADS, scratch, Least());
        last = over_row(last, CHOOSE_THREADS, scratch + CHOOSE_WARPS, Largest());
        if (thread_idx() == 0) token[row] = held_places[static_cast<int>(min_of(found, last))];
        return;
    }

    // The same for rows so flat that registers do not hold their candidates: every step reads them again, a warp a chunk at a time.
    auto sum_of = [&](int least, int turn, bool weights) {
        float mine = 0.0f;
        for (int c = warp; c < chunks; c += CHOOSE_WARPS)
            for (int i = lane; i < counts[c]; i += 32) {
                const float x = values[static_cast<int64_t>(c) * CHUNK + i];
                if (order_of(x) >= least) mine += weights ? weight_of(x, highest, per_unit) : 1.0f;
            }
        return over_row(mine, CHOOSE_THREADS, scratch + turn * CHOOSE_WARPS, Add());
    };
    int low = LOWEST_KEY;
    if (top_k > 0)
        low = largest_enough(low, top, static_cast<float>(top_k), [&](int least, int turn) { return sum_of(least, turn, false); });
    sync_threads();
    if (top_k > 0) total = sum_of(low, 0, true);
    sync_threads();
    if (top_p < 1.0f) low = largest_enough(low, top, top_p * total, [&](int least, int turn) { return sum_of(least, turn, true); });
    sync_threads();
    for (int c = warp; c < chunks; c += CHOOSE_WARPS) {
        float mine = 0.0f;
        for (int i = lane; i < counts[c]; i += 32) {
            const float x = values[static_cast<int64_t>(c) * CHUNK + i];
            if (order_of(x) >= low) mine += weight_of(x, highest, per_unit);
        }
        mine = warp_sum<32>(mine);
        if (lane == 0) by_chunk[c] = mine;
    }
    sync_threads();
    if (warp > 0) return;
    float kept = 0.0f;
    for (int c = lane; c < chunks; c += 32) kept += by_chunk[c];
    const float target = draw[row] * warp_sum<32>(kept);
    float before = 0.0f;
    const int chunk = where_exceeded(chunks, before, target, [&](int c) { return by_chunk[c]; });
    for (int c = chunk / 32 * 32; c < chunk; ++c) before += by_chunk[c];
    const int64_t at = static_cast<int64_t>(chunk) * CHUNK;
    const int chosen = where_exceeded(counts[chunk], before, target, [&](int i) {
        return order_of(values[at + i]) >= low ? weight_of(values[at + i], highest, per_unit) : 0.0f;
    });
    if (lane == 0) token[row] = places[at + chosen];
}

}  // namespace klab
