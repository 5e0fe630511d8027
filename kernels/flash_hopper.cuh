// FlashAttention for Hopper: the device code of prefill_attention/cuda_flash_hopper.py, which writes score_product and value_product (the
// warpgroup products of its block sizes) before it includes this, and whose defines are the capitals that nothing here defines.
//
// Warpgroup 0 copies: queries, and blocks of BLOCK_N keys and of values into rings of STAGES. The others take 64 queries each. A barrier per
// slot says that it is full (all 128 copying threads arrive), another that it is empty (one lane of each warp that has read it arrives).
#pragma once
#include "attention.cuh"
#include "tma.cuh"

using namespace klab;

constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int BLOCK_M = 64 * CONSUMERS;
constexpr int K_STEPS = ceil_div(HEAD_DIM, 16);  // of 16 columns; the last one may end in 8 zeros
constexpr int K_PANELS = ceil_div(HEAD_DIM, 64), V_PANELS = ceil_div(HEAD_DIM_V, 64);
constexpr int Q_PANEL = BLOCK_M * 128, KV_PANEL = BLOCK_N * 128;
constexpr int Q_BYTES = K_PANELS * Q_PANEL, K_BYTES = K_PANELS * KV_PANEL, V_BYTES = V_PANELS * KV_PANEL;
constexpr int SMEM_BYTES = Q_BYTES + STAGES * (K_BYTES + V_BYTES);  // and the barriers behind it
constexpr int PAGE = max_of(PAGE_SIZE, 1);
constexpr int LAG = STAGES > 1 ? 2 : 0;  // groups of copies under way while the next is issued

struct Barriers {
    uint64_t full_q, empty_q, full_k[STAGES], empty_k[STAGES], full_v[STAGES], empty_v[STAGES];
};

// One block of queries of one head. Keys and positions count from key `begin`, which is a multiple of BLOCK_N; they are taken from the last
// block of keys to the first.
struct Work {
    int head, sequence, q_start, rows, position, kv_start, begin, kv_len, count, blocks;
};

KLAB_DEVICE Work work_of(const int* tiles, int number, int heads, int tile_count, int window) {
    const int* tile = tiles + 6 * (HEADS_INNER ? number / heads : number % tile_count);
    int q_len = tile[1], kv_len = tile[3], first_row = tile[4] * BLOCK_M;
    Work work;
    work.head = HEADS_INNER ? number % heads : number / tile_count;
    work.sequence = tile[5];
    work.q_start = tile[0] + first_row;
    work.rows = min_of(BLOCK_M, q_len - first_row);
    int position = (CAUSAL ? kv_len - q_len : 0) + first_row;
    work.begin = WINDOWED ? max_of(0, position - window + 1) / BLOCK_N * BLOCK_N : 0;
    work.position = position - work.begin;
    work.kv_start = tile[2] + work.begin;
    work.kv_len = kv_len - work.begin;
    work.count = CAUSAL ? work.position + work.rows : kv_len;
    work.blocks = ceil_div(work.count, BLOCK_N);
    return work;
}

// The producer's 128 threads: rows 0 .. ROWS - 1 of `DIM` columns to panels; row i begins at row_at(i), or is zero if that is null.
template <int ROWS, int DIM, class RowAt>
KLAB_DEVICE void copy_rows(unsigned char* panels, RowAt row_at) {
    int thread = thread_idx() % 128, row = thread / 8, chunk = thread % 8;
    unsigned char* to = panels + swizzle<128>(row, chunk);
    KLAB_UNROLL
    for (int i = 0; i < ceil_div(ROWS, 16); ++i) {
        if (ROWS % 16 == 0 || row + 16 * i < ROWS) {
            const ELEMENT* from = row_at(row + 16 * i);
            KLAB_UNROLL
            for (int panel = 0; panel < ceil_div(DIM, 64); ++panel) {
                int column = panel * 64 + chunk * 8;
                if (column < round_up(DIM, 16))
                    cp_async_16(to + panel * ROWS * 128 + i * 16 * 128, from + column, from != nullptr && column < DIM);
            }
        }
    }
}

KLAB_KERNEL(flash_forward_hopper, THREADS)(
#if TMA
    KLAB_TENSOR_MAP(k_map), KLAB_TENSOR_MAP(v_map),
#endif
    const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, const int* tiles, const int* block_table, const void* sinks, ELEMENT* out,
    int heads, int group, int tile_count, int q_token, int q_head, int64_t k_page, int k_token, int k_head, int64_t v_page, int v_token,
    int v_head, int out_token, int out_head, int table_width, int window, float scale_log2, float softcap) {
    unsigned char* smem = shared_memory<unsigned char>();
    smem += (0u - shared_address(smem)) & 1023u;  // panels begin at multiples of 1024 bytes
    Barriers* barriers = reinterpret_cast<Barriers*>(smem + SMEM_BYTES);
    if (thread_idx() == 0) {
        // A warp's first lane arrives for the warp at what consumers have read; every producer thread arrives for its own copies.
        barrier_init(&barriers->full_q, 128);
        barrier_init(&barriers->empty_q, 4 * CONSUMERS);
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(&barriers->full_k[i], 128);
            barrier_init(&barriers->full_v[i], 128);
            barrier_init(&barriers->empty_k[i], 4 * CONSUMERS);
            barrier_init(&barriers->empty_v[i], 4 * CONSUMERS);
        }
        barrier_init_fence();
    }
    sync_threads();
    const int works = tile_count * heads;
    int turn = 0, blocks_before = 0;  // works, and blocks of keys in them, that this block of threads has done

    if (thread_idx() < 128) {
        if constexpr (CONSUMERS > 1) release_registers<PRODUCER_REGISTERS>();
        uint64_t* older = nullptr;
        uint64_t* newer = nullptr;
        auto finish_older = [&]() {
            if (older == nullptr) return;
            fence_async_proxy();
            barrier_arrive(older);
        };
        // Close the group of copies that fills what `barrier` stands for, and say so LAG groups later.
        auto issued = [&](uint64_t* barrier) {
            cp_async_commit();
            cp_async_wait<LAG>();
            if (LAG == 0) older = barrier;
            finish_older();
            older = newer;
            newer = barrier;
        };
        auto flush = [&]() {
            cp_async_wait<0>();
            if (LAG > 0) {
                finish_older();
                older = newer;
                finish_older();
            }
            older = newer = nullptr;
        };
        KLAB_NO_UNROLL
        for (int number = block_idx_x(); number < works; number += grid_dim_x(), ++turn) {
            Work work = work_of(tiles, number, heads, tile_count, window);
            const ELEMENT* queries = q + static_cast<int64_t>(work.q_start) * q_token + work.head * q_head;
            const ELEMENT* keys = k + work.head / group * k_head;
            const ELEMENT* values = v + work.head / group * v_head;
            const int* pages = block_table + (PAGE_SIZE > 0 ? static_cast<int64_t>(work.sequence) * table_width : 0);
            auto row_of = [&](const ELEMENT* base, int64_t page_stride, int stride, int key) -> const ELEMENT* {
                if (key >= work.count) return nullptr;
                if constexpr (PAGE_SIZE > 0) {
                    int token = work.begin + key;
                    return base + pages[token / PAGE] * page_stride + token % PAGE * stride;
                } else {
                    return base + static_cast<int64_t>(work.kv_start + key) * stride;
                }
            };
            auto copy_block = [&](int i, bool of_keys) {
                int turn_of_block = blocks_before + i, stage = turn_of_block % STAGES, key = (work.blocks - 1 - i) * BLOCK_N;
                uint64_t* full = of_keys ? &barriers->full_k[stage] : &barriers->full_v[stage];
                unsigned char* to = smem + Q_BYTES + (of_keys ? stage * K_BYTES : STAGES * K_BYTES + stage * V_BYTES);
                if (LAG == 0) flush();
                barrier_wait(of_keys ? &barriers->empty_k[stage] : &barriers->empty_v[stage], (turn_of_block / STAGES & 1) ^ 1);
#if TMA
                if (key + BLOCK_N <= work.kv_len) {
                    if (thread_idx() > 0) {
                        barrier_arrive(full);
                    } else {
                        int column = work.head / group * (of_keys ? k_head : v_head);
                        barrier_arrive_expect(full, of_keys ? K_BYTES : V_BYTES);
                        for (int panel = 0; panel < (of_keys ? K_PANELS : V_PANELS); ++panel)
                            tma_load(to + panel * KV_PANEL, of_keys ? k_map : v_map, full, column + panel * 64, work.kv_start + key);
                    }
                    flush();
                    return;
                }
#endif
                if (of_keys)
                    copy_rows<BLOCK_N, HEAD_DIM>(to, [&](int row) { return row_of(keys, k_page, k_token, key + row); });
                else
                    copy_rows<BLOCK_N, HEAD_DIM_V>(to, [&](int row) { return row_of(values, v_page, v_token, key + row); });
                issued(full);
            };
            barrier_wait(&barriers->empty_q, (turn & 1) ^ 1);
            copy_rows<BLOCK_M, HEAD_DIM>(smem, [&](int row) -> const ELEMENT* {
                return row < work.rows ? queries + static_cast<int64_t>(row) * q_token : nullptr;
            });
            issued(&barriers->full_q);
            KLAB_NO_UNROLL
            for (int i = 0; i < work.blocks; ++i) {
                copy_block(i, true);
                if (i > 0) copy_block(i - 1, false);
            }
            copy_block(work.blocks - 1, false);
            flush();
            blocks_before += work.blocks;
        }
        return;
    }

    if constexpr (CONSUMERS > 1) claim_registers<CONSUMER_REGISTERS>();  // two warpgroups have all they can use
    // The same for the whole warp, and the compiler knows: in a branch that lanes could take alone it would wait behind every product.
    const int consumer = static_cast<int>(shfl(static_cast<uint32_t>(thread_idx() / 128), 0)) - 1;
    const int lane = thread_idx() % 32, pair = lane % 4;
    const int warp_row = consumer * 64 + thread_idx() % 128 / 32 * 16;
    const uint32_t q_at = shared_address(smem) + consumer * 64 * 128, k_at = shared_address(smem) + Q_BYTES;
    const uint32_t v_at = k_at + STAGES * K_BYTES;
    auto released = [&](uint64_t* barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    auto wait_for_turn = [&]() {
        if (TAKE_TURNS) named_barrier_sync(1 + consumer, 256);
    };
    auto next_turn = [&]() {
        if (TAKE_TURNS) named_barrier_arrive(1 + (consumer + 1) % CONSUMERS, 256);
    };
    if (TAKE_TURNS && consumer == CONSUMERS - 1) next_turn();  // the first warpgroup may begin

    KLAB_NO_UNROLL
    for (int number = block_idx_x(); number < works; number += grid_dim_x(), ++turn) {
        Work work = work_of(tiles, number, heads, tile_count, window);
        // Of the blocks of keys, from the last to the first, this warpgroup sees those from `from` to `to`.
        int first = work.position + consumer * 64, last = work.position + min_of(consumer * 64 + 64, work.rows) - 1;
        int from = CAUSAL ? min_of(work.blocks, max_of(0, work.blocks - 1 - last / BLOCK_N)) : 0;
        int to = WINDOWED ? work.blocks - max_of(0, first - window + 1) / BLOCK_N : work.blocks;
        if (consumer * 64 >= work.rows) from = to = work.blocks;
        first += warp_row - consumer * 64;  // of this warp

        float sums[HEAD_DIM_V / 8][4] = {};
        float scores[BLOCK_N / 8][4];
        uint32_t weights[BLOCK_N / 16][4];
        float row_max[2], row_sum[2], shrink[2];
        // A sink is a key before all others, without a value. Its weight counts once: in the share of the first of four lanes.
        row_max[0] = row_max[1] = SINKS ? static_cast<const float*>(sinks)[work.head] * LOG2_E : -infinity();
        row_sum[0] = row_sum[1] = SINKS && pair == 0 ? 1.0f : 0.0f;

        auto await = [&](uint64_t* full, int i) { barrier_wait(&full[(blocks_before + i) % STAGES], (blocks_before + i) / STAGES & 1); };
        auto release = [&](uint64_t* empty, int i) { released(&empty[(blocks_before + i) % STAGES]); };
        // What only other warpgroups see.
        auto pass = [&](int i, bool turns) {
            await(barriers->full_k, i);
            release(barriers->empty_k, i);
            if (turns) wait_for_turn(), next_turn();
            await(barriers->full_v, i);
            release(barriers->empty_v, i);
        };
        auto multiply_keys = [&](int i) {
            uint32_t tile = k_at + (blocks_before + i) % STAGES * K_BYTES;
            KLAB_UNROLL
            for (int step = 0; step < K_STEPS; ++step)
                score_product(scores, panel_rows(q_at + step / 4 * Q_PANEL + step % 4 * 32),
                              panel_rows(tile + step / 4 * KV_PANEL + step % 4 * 32), step > 0);
            wgmma_commit();
        };
        auto multiply_values = [&](int i) {
            uint32_t tile = v_at + (blocks_before + i) % STAGES * V_BYTES;
            KLAB_UNROLL
            for (int step = 0; step < BLOCK_N / 16; ++step)
                value_product(sums, weights[step], panel_columns(tile + step * 16 * 128, KV_PANEL), true);
            wgmma_commit();
        };
        auto soften_block = [&](int i) {
            int key = (work.blocks - 1 - i) * BLOCK_N;
            if (SOFTCAP) {
                float(&capped)[1][BLOCK_N / 8][4] = reinterpret_cast<float(&)[1][BLOCK_N / 8][4]>(scores);
                cap_scores(capped, scale_log2, softcap);
            }
            if (key + BLOCK_N > (CAUSAL ? first + 1 : work.count) || (WINDOWED && key <= first + 15 - window)) {
                int origin = key + 2 * pair, seen_from = first + lane / 4 - origin;
                KLAB_UNROLL
                for (int n = 0; n < BLOCK_N / 8; ++n) {
                    KLAB_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        int column = n * 8 + j % 2, position = seen_from + j / 2 * 8;
                        if ((CAUSAL ? column > position : column >= work.count - origin) || (WINDOWED && column <= position - window))
                            scores[n][j] = -infinity();
                    }
                }
            }
            KLAB_UNROLL
            for (int half = 0; half < 2; ++half)
                shrink[half] = soften_scores(scores, half, SOFTCAP ? 1.0f : scale_log2, row_max[half], row_sum[half]);
        };

        barrier_wait(&barriers->full_q, turn & 1);
        KLAB_NO_UNROLL
        for (int i = 0; i < from; ++i) pass(i, from < to || i > 0);
        if (from < to) {
            await(barriers->full_k, from);
            wgmma_fence();
            multiply_keys(from);
            wgmma_wait<0>();
            release(barriers->empty_k, from);
            soften_block(from);
            pack_weights<ELEMENT>(weights, scores);
            KLAB_NO_UNROLL
            for (int i = from + 1; i < to; ++i) {
                await(barriers->full_k, i);
                wait_for_turn();
                wgmma_fence();
                multiply_keys(i);
                await(barriers->full_v, i - 1);
                wgmma_fence();
                multiply_values(i - 1);
                next_turn();
                wgmma_wait<1>();
                release(barriers->empty_k, i);
                soften_block(i);
                wgmma_wait<0>();
                release(barriers->empty_v, i - 1);
                KLAB_UNROLL
                for (int half = 0; half < 2; ++half) shrink_sums(sums, half, shrink[half]);
                pack_weights<ELEMENT>(weights, scores);
            }
        }
        released(&barriers->empty_q);
        if (from < to) {
            await(barriers->full_v, to - 1);
            wgmma_fence();
            multiply_values(to - 1);
            wgmma_wait<0>();
            release(barriers->empty_v, to - 1);
        }
        KLAB_NO_UNROLL
        for (int i = to; i < work.blocks; ++i) pass(i, true);
        blocks_before += work.blocks;

        KLAB_UNROLL
        for (int half = 0; half < 2; ++half) {
            float sum = warp_sum<4>(row_sum[half]);
            float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
            int row = warp_row + half * 8 + lane / 4;
            ELEMENT* to_row = out + static_cast<int64_t>(work.q_start + row) * out_token + work.head * out_head;
            KLAB_UNROLL
            for (int n = 0; n < HEAD_DIM_V / 8; n += 4) {
                uint32_t word[4] = {};
                KLAB_UNROLL
                for (int i = 0; i < 4; ++i)
                    if (n + i < HEAD_DIM_V / 8)
                        word[i] = pack2<ELEMENT>(sums[n + i][2 * half] * inverse, sums[n + i][2 * half + 1] * inverse);
                if (n + 4 <= HEAD_DIM_V / 8) {
                    // Four lanes have two columns of each of four tiles, and exchange them for eight columns of one.
                    KLAB_UNROLL
                    for (int bit = 1; bit < 4; bit *= 2) {
                        KLAB_UNROLL
                        for (int low = 0; low < 4; ++low)
                            if (!(low & bit)) {
                                uint32_t got = shfl_xor(pair & bit ? word[low] : word[low | bit], bit);
                                if (pair & bit) word[low] = got;
                                else word[low | bit] = got;
                            }
                    }
                    if (row < work.rows) store_16(to_row + (n + pair) * 8, Vec16{{word[0], word[1], word[2], word[3]}});
                } else if (row < work.rows) {
                    KLAB_UNROLL
                    for (int i = 0; i < 4; ++i)
                        if (n + i < HEAD_DIM_V / 8) *reinterpret_cast<uint32_t*>(to_row + (n + i) * 8 + 2 * pair) = word[i];
                }
            }
        }
    }
}
