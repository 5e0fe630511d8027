"""The first stage of the chunked gated delta rule in CUDA C++: every chunk and head at once, what the scan needs of it.

The inverse of the chunk's equations is computed in float32 sums of 16-bit products; see `_triton_chunks.py` for the mathematics and
`_cuda_chunks.py` for what is handed on.
"""

from __future__ import annotations

from klab.kernels.gated_delta_rule._cuda_chunks import COMMON

PREPARE = (
    COMMON
    + r"""
constexpr float LOG2_E = 1.4426950408889634f;

// x^-1/2 for a positive x: the fast functions, and one step of Newton's method for the last bits.
KLAB_DEVICE float reciprocal_root(float x) {
    float y = exp2f_fast(-0.5f * log2f_fast(x));
    return y * (1.5f - 0.5f * x * y * y);
}

// Two threads per row: the reciprocal norm of 64 rows, or 1 without the norm.
KLAB_DEVICE void norms(float* to, const unsigned char* tile, bool qk_norm, float epsilon) {
    int row = thread_idx() / 2, half = thread_idx() % 2;
    float square = 0.0f;
    KLAB_UNROLL
    for (int i = 0; i < KEY_DIM / 16; ++i) {
        Vec16 v = load_16(tile + swizzle<K_ROW>(row, half * (KEY_DIM / 16) + i));
        KLAB_UNROLL
        for (int j = 0; j < 4; ++j) {
            Pair pair = unpack2<ELEMENT>(v.word[j]);
            square = fused_multiply_add(pair.x, pair.x, fused_multiply_add(pair.y, pair.y, square));
        }
    }
    square += shfl_xor(square, 1);
    if (half == 0) to[row] = qk_norm ? reciprocal_root(square + epsilon) : 1.0f;
}

// A warp's 16 rows of x y^T for 64 rows each of x and y, left of the diagonal's block and on it.
KLAB_DEVICE void products(float (&sums)[8][4], const unsigned char* x, const unsigned char* y, int warp) {
    int lane = thread_idx() % 32;
    KLAB_UNROLL
    for (int step = 0; step < KEY_DIM / 16; ++step) {
        uint32_t a[4];
        load_left<K_ROW>(a, x, lane, 16 * warp, 16 * step);
        KLAB_UNROLL
        for (int n = 0; n < 8; n += 2) {
            if (n / 2 > warp) continue;
            uint32_t b[4];
            load_right_transposed<K_ROW>(b, y, lane, 8 * n, 16 * step);
            multiply_pair(sums[n], sums[n + 1], a, b);
        }
    }
}

// A warp's accumulators to its 16 rows of a square tile: tiles first..last, each column times `factor` where there is one.
KLAB_DEVICE void store_tiles(unsigned char* tile, const float (&sums)[8][4], int warp, int first, int last, const float* factor) {
    int lane = thread_idx() % 32;
    KLAB_UNROLL
    for (int n = 0; n < 8; ++n) {
        if (n < first || n > last) continue;
        float left = factor ? factor[8 * n + 2 * (lane % 4)] : 1.0f, right = factor ? factor[8 * n + 2 * (lane % 4) + 1] : 1.0f;
        KLAB_UNROLL
        for (int h = 0; h < 2; ++h)
            *reinterpret_cast<uint32_t*>(tile + swizzle<S_ROW>(16 * warp + 8 * h + lane / 4, n) + 4 * (lane % 4)) =
                pack2<ELEMENT>(sums[n][2 * h] * left, sums[n][2 * h + 1] * right);
    }
}

KLAB_KERNEL(delta_prepare, THREADS)(
    const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, const float* g, const float* beta, const int* chunk_rows, ELEMENT* values,
    ELEMENT* keys, ELEMENT* weights, float* gates, int heads, int group, int64_t q_token, int64_t q_head, int64_t k_token,
    int64_t k_head, int64_t v_token, int64_t v_head, int64_t g_token, int64_t beta_token, int qk_norm,
    float scale, float epsilon) {
    int warp = thread_idx() / 32, lane = thread_idx() % 32, head = block_idx_y();
    int64_t first = chunk_rows[2 * block_idx_x()];
    int count = chunk_rows[2 * block_idx_x() + 1];
    unsigned char* k_tile = shared_memory<unsigned char>();
    unsigned char* q_tile = k_tile + K_BYTES;
    unsigned char* v_tile = q_tile + K_BYTES;
    unsigned char* t_tile = v_tile + V_BYTES;
    unsigned char* p_tile = t_tile + S_BYTES;
    float* total = reinterpret_cast<float*>(p_tile + S_BYTES);  // decay from the chunk's beginning, in units of log2
    float *rate = total + CHUNK, *k_norm = rate + CHUNK, *q_norm = k_norm + CHUNK, *k_factor = q_norm + CHUNK;
    copy_rows<KEY_DIM>(k_tile, k + first * k_token + head / group * k_head, k_token, count);
    copy_rows<KEY_DIM>(q_tile, q + first * q_token + head / group * q_head, q_token, count);
    cp_async_commit();
    copy_rows<VALUE_DIM>(v_tile, v + first * v_token + head * v_head, v_token, count);
    cp_async_commit();
    // A token that does not exist corrects nothing (beta 0) and lets nothing decay (g 0). A lane has two tokens.
    if (warp == 0) {
        float low = 2 * lane < count ? g[(first + 2 * lane) * g_token + head] * LOG2_E : 0.0f;
        float high = 2 * lane + 1 < count ? g[(first + 2 * lane + 1) * g_token + head] * LOG2_E : 0.0f;
        float up_to = low + high;
        KLAB_UNROLL
        for (int distance = 1; distance < 32; distance *= 2) {
            float other = shfl(up_to, (lane - distance) & 31);
            if (lane >= distance) up_to += other;
        }
        total[2 * lane] = up_to - high;
        total[2 * lane + 1] = up_to;
    } else if (warp == 1) {
        KLAB_UNROLL
        for (int i = lane; i < CHUNK; i += 32) rate[i] = i < count ? beta[(first + i) * beta_token + head] : 0.0f;
    }
    cp_async_wait<1>();
    sync_threads();
    norms(k_norm, k_tile, qk_norm, epsilon);
    norms(q_norm, q_tile, qk_norm, epsilon);
    sync_threads();
    int64_t at = static_cast<int64_t>(block_idx_x()) * heads + head;
    if (thread_idx() < CHUNK) {
        int i = thread_idx();
        float to_end = exp2f_fast(total[CHUNK - 1] - total[i]), from_start = exp2f_fast(total[i]);
        gates[at * 3 * CHUNK + i] = from_start * q_norm[i] * scale;
        gates[at * 3 * CHUNK + CHUNK + i] = to_end * k_norm[i];
        gates[at * 3 * CHUNK + 2 * CHUNK + i] = exp2f_fast(total[CHUNK - 1]);
        k_factor[i] = rate[i] * k_norm[i] * from_start;
    }

    // Elements of a warp's 16 x 64 part of a square: rows i and i + 8, columns 8 n + j and 8 n + j + 1.
    int i = 16 * warp + lane / 4, j = 2 * (lane % 4);
    float sums[8][4] = {};
    products(sums, q_tile, k_tile, warp);
    weights += at * CHUNK * CHUNK;
    KLAB_UNROLL
    for (int n = 0; n < 8; ++n) {
        KLAB_UNROLL
        for (int h = 0; h < 2; ++h) {
            int row = i + 8 * h;
            float w[2];
            KLAB_UNROLL
            for (int e = 0; e < 2; ++e) {
                int column = 8 * n + j + e;
                float factor = k_norm[column] * q_norm[row] * scale * exp2f_fast(column <= row ? total[row] - total[column] : 0.0f);
                w[e] = column <= row ? sums[n][2 * h + e] * factor : 0.0f;
            }
            *reinterpret_cast<uint32_t*>(weights + row * CHUNK + 8 * n + j) = pack2<ELEMENT>(w[0], w[1]);
        }
    }
    float a[8][4] = {}, t[8][4];
    products(a, k_tile, k_tile, warp);
    KLAB_UNROLL
    for (int n = 0; n < 8; ++n) {
        KLAB_UNROLL
        for (int e = 0; e < 4; ++e) {
            int row = i + e / 2 * 8, column = 8 * n + j + e % 2;
            float factor = k_norm[row] * k_norm[column] * rate[row] * exp2f_fast(column < row ? total[row] - total[column] : 0.0f);
            a[n][e] = column < row ? a[n][e] * factor : 0.0f;
            t[n][e] = row == column ? 1.0f : (row ^ column) == 1 ? -a[n][e] : 0.0f;
        }
    }

    // T = (I + A)^-1 from blocks of 2 on its diagonal to the whole: two blocks T1 and T2 of a size become one of twice the size, with
    // -T2 A21 T1 below. Up to 16 rows a warp is by itself. No power of A appears, which for keys that are alike would grow beyond all
    // precision.
    KLAB_UNROLL
    for (int level = 1; level < 6; ++level) {
        int warps = level < 4 ? 1 : 1 << (level - 4);  // whose rows make a block of 2^level rows, from 16 on
        int block = warp / warps * warps;              // the first of them
        bool active = level < 4 || warp / warps % 2 == 1;
        int below = level < 4 ? warp : block - warps;  // 16-column step where A21 begins; T2 begins at `block`
        store_tiles(t_tile, t, warp, 0, 2 * warp + 1, nullptr);
        if (level < 4)
            sync_warp();
        else
            sync_threads();
        float part[8][4] = {};
        KLAB_UNROLL
        for (int step = 0; step < 4; ++step) {
            if (!active || step < below || step >= below + warps) continue;
            float masked[2][4];
            KLAB_UNROLL
            for (int e = 0; e < 8; ++e) {
                int row = i + e / 2 % 2 * 8, column = 16 * step + 8 * (e / 4) + j + e % 2;
                masked[e / 4][e % 4] = ((row ^ column) >> level) == 1 ? -a[2 * step + e / 4][e % 4] : 0.0f;
            }
            uint32_t left[4];
            pack_left(left, masked[0], masked[1]);
            KLAB_UNROLL
            for (int n = 0; n < 8; n += 2) {
                if (n / 2 < below || n / 2 > step) continue;  // T is zero right of its diagonal
                uint32_t b[4];
                load_right<S_ROW>(b, t_tile, lane, 16 * step, 8 * n);
                multiply_pair(part[n], part[n + 1], left, b);
            }
        }
        if (active) store_tiles(p_tile, part, warp, 2 * below, 2 * (below + warps) - 1, nullptr);
        if (level < 4)
            sync_warp();
        else
            sync_threads();
        KLAB_UNROLL
        for (int step = 0; step < 4; ++step) {
            if (!active || step < block || step >= block + warps) continue;
            uint32_t left[4];
            pack_left(left, t[2 * step], t[2 * step + 1]);
            KLAB_UNROLL
            for (int n = 0; n < 8; n += 2) {
                if (n / 2 < below || n / 2 >= below + warps) continue;
                uint32_t b[4];
                load_right<S_ROW>(b, p_tile, lane, 16 * step, 8 * n);
                multiply_pair(t[n], t[n + 1], left, b);
            }
        }
    }
    cp_async_wait<0>();
    sync_threads();
    store_tiles(t_tile, t, warp, 0, 2 * warp + 1, rate);
    store_tiles(p_tile, t, warp, 0, 2 * warp + 1, k_factor);
    sync_threads();

    values += at * VALUE_DIM * CHUNK;
    for (int row = 16 * warp; row < VALUE_DIM; row += 16 * WARPS) {
        float solved[8][4] = {};
        KLAB_UNROLL
        for (int step = 0; step < 4; ++step) {
            uint32_t left[4];
            load_left_transposed<V_ROW>(left, v_tile, lane, 16 * step, row);
            KLAB_UNROLL
            for (int n = 2 * step; n < 8; n += 2) {
                uint32_t b[4];
                load_right_transposed<S_ROW>(b, t_tile, lane, 8 * n, 16 * step);
                multiply_pair(solved[n], solved[n + 1], left, b);
            }
        }
        KLAB_UNROLL
        for (int n = 0; n < 8; ++n) {
            KLAB_UNROLL
            for (int h = 0; h < 2; ++h)
                *reinterpret_cast<uint32_t*>(values + (row + lane / 4 + 8 * h) * CHUNK + 8 * n + j) =
                    pack2<ELEMENT>(solved[n][2 * h], solved[n][2 * h + 1]);
        }
    }
    keys += at * CHUNK * KEY_DIM;
    for (int column = 16 * warp; column < KEY_DIM; column += 16 * WARPS) {
        uint32_t b[4][4];
        KLAB_UNROLL
        for (int step = 0; step < 4; ++step) load_right<K_ROW>(b[step], k_tile, lane, 16 * step, column);
        KLAB_UNROLL
        for (int m = 0; m < 4; ++m) {
            float solved[2][4] = {};
            KLAB_UNROLL
            for (int step = 0; step <= m; ++step) {
                uint32_t left[4];
                load_left<S_ROW>(left, p_tile, lane, 16 * m, 16 * step);
                multiply_pair(solved[0], solved[1], left, b[step]);
            }
            KLAB_UNROLL
            for (int e = 0; e < 4; ++e)
                *reinterpret_cast<uint32_t*>(keys + (16 * m + lane / 4 + 8 * (e % 2)) * KEY_DIM + column + 8 * (e / 2) + j) =
                    pack2<ELEMENT>(solved[e / 2][2 * (e % 2)], solved[e / 2][2 * (e % 2) + 1]);
        }
    }
}
"""
)
