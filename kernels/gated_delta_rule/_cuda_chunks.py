"""The scan of the chunked gated delta rule in CUDA C++, on mma.sync, and what it shares with `_cuda_prepare.py`.

Chunks have 64 tokens. The names are those of `_triton_chunks.py`; here the workspace holds, per chunk and head,
  values   [value_dim][64]  T beta v, transposed: what a lane of the scan holds of it are two neighbouring tokens
  keys     [64][key_dim]    T beta exp(b) k
  weights  [64][64]         what a token's output takes of each correction, all factors included
  gates    [3][64] float    of each token: what a query's reading of the state is multiplied by; what its correction is multiplied by on
                            its way into the state; the decay of the whole chunk
"""

from __future__ import annotations

COMMON = r"""
#include "device.cuh"
using namespace klab;

constexpr int CHUNK = 64;
constexpr int THREADS = 32 * WARPS;
constexpr int K_ROW = 2 * KEY_DIM, V_ROW = 2 * VALUE_DIM, S_ROW = 2 * CHUNK;  // bytes of a row in shared memory
constexpr int K_BYTES = CHUNK * K_ROW, V_BYTES = CHUNK * V_ROW, S_BYTES = CHUNK * S_ROW;

// The same number, but one that the compiler cannot follow: addresses computed from it in a loop stay there and hold no registers.
KLAB_DEVICE int opaque(int value) {
#if defined(KLAB_ON_DEVICE)
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// All threads: 64 rows of DIM elements to a swizzled tile; rows from `count` on become zero. One stepping pointer and addresses that
// are computed anew each time: kept over the scan's loop they would take 50 registers.
template <int DIM>
KLAB_DEVICE void copy_rows(unsigned char* tile, const ELEMENT* source, int64_t stride, int count) {
    constexpr int CHUNKS = DIM / 8, STEP = THREADS / CHUNKS;
    static_assert(THREADS % CHUNKS == 0 && CHUNK % STEP == 0, "every thread keeps its column");
    int thread = opaque(thread_idx()), row = thread / CHUNKS, chunk = thread % CHUNKS;
    source += row * stride + chunk * 8;
    KLAB_UNROLL
    for (int i = 0; i < CHUNK / STEP; ++i) {
        cp_async_16(tile + swizzle<2 * DIM>(row + i * STEP, chunk), source, row + i * STEP < count);
        source += STEP * stride;
    }
}

// Operands of m16n8k16 from a swizzled tile whose rows are ROW bytes; `row` and `column` of the block's corner, in elements.
// Left operand, rows as they lie.
template <int ROW>
KLAB_DEVICE void load_left(uint32_t (&a)[4], const unsigned char* tile, int lane, int row, int column) {
    ldmatrix_x4(a, tile + swizzle<ROW>(row + lane % 16, column / 8 + lane / 16));
}
// Left operand from a tile that holds it transposed: block [k][m].
template <int ROW>
KLAB_DEVICE void load_left_transposed(uint32_t (&a)[4], const unsigned char* tile, int lane, int row, int column) {
    ldmatrix_x4_trans(a, tile + swizzle<ROW>(row + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2));
}
// Two right operands side by side from a block [16 k][16 n]: registers 0, 1 and 2, 3.
template <int ROW>
KLAB_DEVICE void load_right(uint32_t (&b)[4], const unsigned char* tile, int lane, int row, int column) {
    ldmatrix_x4_trans(b, tile + swizzle<ROW>(row + lane % 16, column / 8 + lane / 16));
}
// The same from a tile that holds it transposed: block [16 n][16 k].
template <int ROW>
KLAB_DEVICE void load_right_transposed(uint32_t (&b)[4], const unsigned char* tile, int lane, int row, int column) {
    ldmatrix_x4(b, tile + swizzle<ROW>(row + lane / 16 * 8 + lane % 8, column / 8 + lane / 8 % 2));
}
KLAB_DEVICE void multiply_pair(float (&low)[4], float (&high)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_m16n8k16<ELEMENT>(low, a, first);
    mma_m16n8k16<ELEMENT>(high, a, second);
}
// Two neighbouring accumulator tiles hold exactly the elements of one left operand, in the same lanes.
KLAB_DEVICE void pack_left(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
    a[0] = pack2<ELEMENT>(low[0], low[1]);
    a[1] = pack2<ELEMENT>(low[2], low[3]);
    a[2] = pack2<ELEMENT>(high[0], high[1]);
    a[3] = pack2<ELEMENT>(high[2], high[3]);
}
"""

SCAN = (
    COMMON
    + r"""
constexpr int TILES = KEY_DIM / 8, STEPS = KEY_DIM / 16;
constexpr int GATES_BYTES = 3 * CHUNK * 4;
constexpr int STAGE_BYTES = 3 * K_BYTES + S_BYTES + GATES_BYTES;

// A warp holds 16 columns of the state, transposed, as accumulators: rows value 16 warp + lane / 4 (and + 8),
// columns key 8 t + 2 (lane % 4) (and + 1). As accumulators they are a left operand, and also the right operand of the product with a
// query, in the same lanes: the state never goes through shared memory, and warps wait for each other only where a stage of the ring
// changes.
KLAB_KERNEL(delta_scan, THREADS)(
    const ELEMENT* q, const ELEMENT* k, const STATE* initial_state, const int* sequences, const ELEMENT* values, const ELEMENT* keys,
    const ELEMENT* weights, const float* gates, ELEMENT* out, STATE* final_state, int heads, int group, int64_t q_token, int64_t q_head,
    int64_t k_token, int64_t k_head, int64_t state_sequence, int64_t state_head, int64_t state_row) {
    int warp = thread_idx() / 32, lane = thread_idx() % 32, head = block_idx_y(), sequence = block_idx_z();
    int first_chunk = sequences[4 * sequence], chunks = sequences[4 * sequence + 1];
    int64_t first = sequences[4 * sequence + 2];
    int length = sequences[4 * sequence + 3];
    int column = (block_idx_x() * WARPS + warp) * 16, j = 2 * (lane % 4);
    unsigned char* smem = shared_memory<unsigned char>();
    q += first * q_token + head / group * q_head;
    k += first * k_token + head / group * k_head;
    int64_t at = static_cast<int64_t>(first_chunk) * heads + head;
    values += (at * VALUE_DIM + column + lane / 4) * CHUNK + j;
    keys += at * CHUNK * KEY_DIM;
    weights += at * CHUNK * CHUNK;
    gates += at * 3 * CHUNK;
    out += (first * heads + head) * VALUE_DIM + column + j;

    // keys, weights, gates, k and q of a chunk, in one group.
    auto copy_chunk = [&](int chunk) {
        if (chunk < chunks) {
            unsigned char* stage = smem + chunk % STAGES * STAGE_BYTES;
            int64_t ahead = static_cast<int64_t>(chunk) * heads;
            int count = length - chunk * CHUNK;
            copy_rows<KEY_DIM>(stage, keys + ahead * CHUNK * KEY_DIM, KEY_DIM, CHUNK);
            copy_rows<KEY_DIM>(stage + K_BYTES, k + chunk * CHUNK * k_token, k_token, count);
            copy_rows<KEY_DIM>(stage + 2 * K_BYTES, q + chunk * CHUNK * q_token, q_token, count);
            copy_rows<CHUNK>(stage + 3 * K_BYTES, weights + ahead * CHUNK * CHUNK, CHUNK, CHUNK);
            for (int i = thread_idx(); i < GATES_BYTES / 16; i += THREADS)
                cp_async_16(stage + 3 * K_BYTES + S_BYTES + 16 * i, gates + ahead * 3 * CHUNK + 4 * i, true);
        }
        cp_async_commit();
    };
    uint32_t next[8][2];
    auto load_values = [&](int chunk) {
        if (chunk >= chunks) return;
        const ELEMENT* from = values + static_cast<int64_t>(chunk) * heads * VALUE_DIM * CHUNK;
        KLAB_UNROLL
        for (int n = 0; n < 8; ++n) {
            next[n][0] = *reinterpret_cast<const uint32_t*>(from + 8 * n);
            next[n][1] = *reinterpret_cast<const uint32_t*>(from + 8 * CHUNK + 8 * n);
        }
    };
    KLAB_UNROLL
    for (int i = 0; i < STAGES - 1; ++i) copy_chunk(i);
    load_values(0);

    float state[TILES][4];
    initial_state += sequence * state_sequence + head * state_head + column + lane / 4;
    KLAB_UNROLL
    for (int t = 0; t < TILES; ++t) {
        KLAB_UNROLL
        for (int e = 0; e < 4; ++e) state[t][e] = to_float(initial_state[(8 * t + j + e % 2) * state_row + e / 2 * 8]);
    }

    KLAB_NO_UNROLL
    for (int chunk = 0; chunk < chunks; ++chunk) {
        float correction[8][4];  // [value][token]
        KLAB_UNROLL
        for (int n = 0; n < 8; ++n) {
            KLAB_UNROLL
            for (int h = 0; h < 2; ++h) {
                Pair pair = unpack2<ELEMENT>(next[n][h]);
                correction[n][2 * h] = -pair.x;
                correction[n][2 * h + 1] = -pair.y;
            }
        }
        load_values(chunk + 1);
        cp_async_wait<(STAGES > 1 ? STAGES - 2 : 0)>();
        sync_threads();  // this chunk is here for everybody, and nobody reads the one before any more
        copy_chunk(chunk + STAGES - 1);
        const unsigned char* stage = smem + chunk % STAGES * STAGE_BYTES;
        const float* factors = reinterpret_cast<const float*>(stage + 3 * K_BYTES + S_BYTES);

        int here = opaque(lane);
        // keys S - values, then queries S. The state is packed for each: its packed form would take 32 registers in between.
        KLAB_UNROLL
        for (int step = 0; step < STEPS; ++step) {
            uint32_t narrow[4];
            pack_left(narrow, state[2 * step], state[2 * step + 1]);
            KLAB_UNROLL
            for (int n = 0; n < 8; n += 2) {
                uint32_t b[4];
                load_right_transposed<K_ROW>(b, stage, here, 8 * n, 16 * step);
                multiply_pair(correction[n], correction[n + 1], narrow, b);
            }
        }
        float read[4][2][4] = {};  // [token][value]
        KLAB_UNROLL
        for (int step = 0; step < STEPS; ++step) {
            uint32_t narrow[4];
            pack_left(narrow, state[2 * step], state[2 * step + 1]);
            uint32_t right[4] = {narrow[0], narrow[2], narrow[1], narrow[3]};
            KLAB_UNROLL
            for (int m = 0; m < 4; ++m) {
                uint32_t a[4];
                load_left<K_ROW>(a, stage + 2 * K_BYTES, here, 16 * m, 16 * step);
                multiply_pair(read[m][0], read[m][1], a, right);
            }
        }
        KLAB_UNROLL
        for (int m = 0; m < 4; ++m) {
            KLAB_UNROLL
            for (int e = 0; e < 8; ++e) read[m][e / 4][e % 4] *= factors[16 * m + lane / 4 + e / 2 % 2 * 8];
        }
        KLAB_UNROLL
        for (int step = 0; step < 4; ++step) {
            uint32_t narrow[4];
            KLAB_UNROLL
            for (int e = 0; e < 8; ++e) correction[2 * step + e / 4][e % 4] *= -1.0f;
            pack_left(narrow, correction[2 * step], correction[2 * step + 1]);
            uint32_t right[4] = {narrow[0], narrow[2], narrow[1], narrow[3]};
            KLAB_UNROLL
            for (int m = step; m < 4; ++m) {
                uint32_t a[4];
                load_left<S_ROW>(a, stage + 3 * K_BYTES, here, 16 * m, 16 * step);
                multiply_pair(read[m][0], read[m][1], a, right);
            }
        }
        KLAB_UNROLL
        for (int m = 0; m < 4; ++m) {
            KLAB_UNROLL
            for (int h = 0; h < 2; ++h) {
                int token = chunk * CHUNK + 16 * m + lane / 4 + 8 * h;
                if (token >= length) continue;
                KLAB_UNROLL
                for (int n = 0; n < 2; ++n)
                    *reinterpret_cast<uint32_t*>(out + static_cast<int64_t>(token) * heads * VALUE_DIM + 8 * n) =
                        pack2<ELEMENT>(read[m][n][2 * h], read[m][n][2 * h + 1]);
            }
        }

        float whole = factors[2 * CHUNK];
        KLAB_UNROLL
        for (int t = 0; t < TILES; ++t) {
            KLAB_UNROLL
            for (int e = 0; e < 4; ++e) state[t][e] *= whole;
        }
        KLAB_UNROLL
        for (int step = 0; step < 4; ++step) {
            KLAB_UNROLL
            for (int e = 0; e < 8; ++e) correction[2 * step + e / 4][e % 4] *= factors[CHUNK + 16 * step + e / 4 * 8 + j + e % 2];
            uint32_t left[4];
            pack_left(left, correction[2 * step], correction[2 * step + 1]);
            KLAB_UNROLL
            for (int t = 0; t < TILES; t += 2) {
                uint32_t b[4];
                load_right<K_ROW>(b, stage + K_BYTES, here, 16 * step, 8 * t);
                multiply_pair(state[t], state[t + 1], left, b);
            }
        }
    }

    final_state += (static_cast<int64_t>(sequence) * heads + head) * KEY_DIM * VALUE_DIM + column + lane / 4;
    KLAB_UNROLL
    for (int t = 0; t < TILES; ++t) {
        KLAB_UNROLL
        for (int e = 0; e < 4; ++e) final_state[(8 * t + j + e % 2) * VALUE_DIM + e / 2 * 8] = from_float<STATE>(state[t][e]);
    }
}
"""
)
