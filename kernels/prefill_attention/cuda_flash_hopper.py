"""FlashAttention for Hopper in CUDA C++: warpgroup products (wgmma), one warpgroup that only copies, softmax under the other's products.

The schedule is that of FlashAttention-3 (Shah et al., arXiv 2407.08608): a warpgroup computes the scores of the next keys while its values
of the last ones are still being multiplied, and two warpgroups take turns at the tensor cores. Whole blocks of packed keys and values come
by TMA; queries, pages of any size, and the block in which a sequence ends (behind it lies another) by cp.async.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cupy  # noqa: F401  absent CuPy makes this file "unavailable" when it is found, not when it is launched

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64, TensorMap
from klab.kernels.mma_attention import refusal, row_strides
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.prefill_tiles import Tiles
from klab.kernels.wgmma import wgmma_functions

if TYPE_CHECKING:
    import torch

SOURCE = r"""
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
"""


@dataclass(frozen=True)
class HopperConfig(Config):
    """A block of threads takes 64 `consumers` queries of one head and steps over keys in tiles of `block_n`, `stages` of them in memory.

    `tma`: whole blocks of keys come by the copy engine, else by cp.async of 128 threads, whose 170 instructions for 128 keys and head
    dimension 128 take an eighth of the issue slots that the products leave. `take_turns`: the warpgroups issue their products in turn, so that one softens while the other multiplies; else as it comes.
    `heads_inner`: neighbouring blocks differ in head, else in queries of one head (fewer keys and values compete for the L2 cache).
    """

    consumers: int = 2
    block_n: int = 128
    stages: int = 2
    tma: bool = False
    take_turns: bool = True
    heads_inner: bool = True


def smem_bytes(problem: PrefillAttention, config: HopperConfig) -> int:
    """Panels of 64 columns (rows of 128 bytes) for queries, keys and values; the barriers; 1 KiB to begin at a multiple of it."""
    d, dv = (-(-dim // 64) * 128 for dim in (problem.head_dim, problem.dim_v))
    return 64 * config.consumers * d + config.stages * config.block_n * (d + dv) + 16 + 32 * config.stages + 1024


# Of 65,536 registers, in multiples of 8 a thread: what the producer leaves to each of two or three warpgroups.
REGISTERS = {1: (56, 240), 2: (40, 232), 3: (32, 160)}


def registers(problem: PrefillAttention, config: HopperConfig) -> int:
    """Estimated registers of a consumer: output, scores, packed weights, and 30 for addresses, maxima and sums.

    ptxas reports the 168 (or 128) that every thread starts with. By this count NVRTC 13.0 spills nothing up to the limit.
    """
    return problem.dim_v // 2 + config.block_n // 2 + config.block_n // 4 + 30


def fits(problem: PrefillAttention, config: HopperConfig, chip: Chip) -> str | None:
    """None when it can run; otherwise the reason in a few words."""
    if chip.target != 90:
        return "wgmma is Hopper's: sm_90 only"
    refused = problem.unserved("sinks", "softcap", "page_size", "kv_tokens") or refusal(problem, chip, multiple=8)
    if refused:
        return refused
    if config.consumers not in REGISTERS or config.block_n % 16 or not 16 <= config.block_n <= 256 or not 1 <= config.stages <= 8:
        return "consumers are 1 to 3, block_n is a multiple of 16 up to 256, stages are 1 to 8"
    if config.take_turns and config.consumers < 2:
        return "one warpgroup has nobody to take turns with"
    if config.tma and (problem.page_size or problem.head_dim % 64 or problem.dim_v % 64):
        return "the copy engine's boxes are of 64 columns and of packed keys"
    if smem_bytes(problem, config) > chip.smem_per_block_bytes:
        return f"needs {smem_bytes(problem, config)} B of shared memory, {chip.name} has {chip.smem_per_block_bytes}"
    if registers(problem, config) > REGISTERS[config.consumers][1]:
        return f"would spill: about {registers(problem, config)} registers per thread of {REGISTERS[config.consumers][1]}"
    return None


def space(problem: PrefillAttention, chip: Chip) -> Iterator[HopperConfig]:
    """Every combination that may be worth a measurement; invalid ones are dropped by `fits`."""
    for inner, turns, tma, stages, n, consumers in itertools.product(
        (True, False), (True, False), (True, False), (2, 3, 4), (64, 80, 96, 112, 128, 144, 160, 176, 192, 224), (2, 3, 1)
    ):
        yield HopperConfig(consumers, n, stages, tma, turns, inner)


def default(problem: PrefillAttention, chip: Chip) -> HopperConfig:
    """The longest steps that fit, in two warpgroups, or three where heads are short; a causal mask or a window wastes more of long ones."""
    consumers, lengths = (3, (128, 96)) if max(problem.head_dim, problem.dim_v) <= 64 else (2, (176, 128, 96, 80, 64))
    if problem.window and problem.window <= 512:
        consumers, lengths = 2, (64,)
    elif problem.causal:
        lengths = tuple(n for n in lengths if n <= 128)
    preferred = [HopperConfig(consumers, n, tma=tma) for n in lengths for tma in (True, False)]
    preferred += [HopperConfig(2, 64), HopperConfig(2, 64, 1), HopperConfig(2, 32, 1)]
    return next((config for config in preferred if fits(problem, config, chip) is None), preferred[-1])


def _as_matrix(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, dim] as one matrix of all heads side by side, with whatever lies between them."""
    return x.as_strided((x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]), (x.stride(0), 1))


@kernel(PrefillAttention, backend="cuda", config=HopperConfig, space=space, default=default, fits=fits)
def cuda_flash_hopper(problem: PrefillAttention, config: HopperConfig, chip: Chip) -> Launch:
    """Warp-specialised FlashAttention in CUDA C++ for Hopper (wgmma): persistent, packed or paged, window, sinks, soft-cap, GQA."""
    producer, consumer = REGISTERS[config.consumers]
    products = wgmma_functions("score_product", config.block_n, problem.dtype, left_in_registers=False, transposed=False)
    products += wgmma_functions("value_product", problem.dim_v, problem.dtype, left_in_registers=True, transposed=True)
    flash = CudaKernel(
        SOURCE.replace("using namespace klab;", f"{products}\nusing namespace klab;", 1),
        "flash_forward_hopper",
        chip,
        {
            "ELEMENT": ELEMENT[problem.dtype],
            "HEAD_DIM": problem.head_dim,
            "HEAD_DIM_V": problem.dim_v,
            "BLOCK_N": config.block_n,
            "CONSUMERS": config.consumers,
            "STAGES": config.stages,
            "TAKE_TURNS": int(config.take_turns),
            "HEADS_INNER": int(config.heads_inner),
            "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
            "CAUSAL": int(problem.causal),
            "WINDOWED": int(problem.window > 0),
            "SINKS": int(problem.sinks),
            "SOFTCAP": int(problem.softcap > 0),
            "PAGE_SIZE": problem.page_size,
            "TMA": int(config.tma),
        },
        smem_bytes(problem, config),
    )
    tiles = Tiles(problem, 64 * config.consumers)
    scale_log2 = problem.scale * math.log2(math.e)
    keys, values = ("k_cache", "v_cache") if problem.page_size else ("k", "v")

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        tensors = {"q": inputs["q"], keys: inputs[keys], values: inputs[values], "out": outputs["out"]}
        strides = {name: row_strides("cuda_flash_hopper", name, tensor) for name, tensor in tensors.items()}
        pages = [strides[name].pop(0) if problem.page_size else 0 for name in (keys, values)]
        maps = [TensorMap(_as_matrix(inputs[name]), config.block_n) for name in (keys, values)] if config.tma else []
        # What the code of this problem does not read is any pointer.
        table, sinks = inputs.get("block_table", inputs["q_offsets"]), inputs.get("sinks", inputs["q"])
        flash.launch(
            (min(chip.sm_count, len(tiles) * problem.heads), 1, 1),
            128 * (config.consumers + 1),
            [
                *maps, inputs["q"], inputs[keys], inputs[values], tiles.on(inputs["q"].device), table, sinks, outputs["out"],
                problem.heads, problem.heads // problem.kv_heads, len(tiles), *strides["q"], Int64(pages[0]), *strides[keys],
                Int64(pages[1]), *strides[values], *strides["out"], table.stride(0), problem.window, scale_log2, float(problem.softcap),
            ],
        )  # fmt: skip

    return launch
