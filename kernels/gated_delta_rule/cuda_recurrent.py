"""The gated delta rule token by token in CUDA C++, the state in registers: decoding, and the few tokens of a speculative step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.gated_delta_rule._cuda_rows import row_strides
from klab.kernels.gated_delta_rule.problem import NORM_EPSILON, GatedDeltaRule

# Each token waits for the one before it, about a microsecond: chunks are faster from a few dozen on.
MAX_TOKENS = 64

SOURCE = r"""
#include "device.cuh"
using namespace klab;

constexpr int THREADS = 32 * WARPS;
constexpr int COLUMNS = 16 / sizeof(STATE);      // of the state, 16 bytes, that a lane holds in each of its rows
constexpr int BLOCK_V = LANES_V * COLUMNS;       // columns of a block
constexpr int LANE_ROWS = 32 / LANES_V;          // rows that a warp touches at once
constexpr int ROWS = KEY_DIM / (LANE_ROWS * WARPS);  // rows of a lane
constexpr int PER_LANE = KEY_DIM / 32;           // elements of a query or key that a lane brings
constexpr float LOG2_E = 1.4426950408889634f;

template <class T>
KLAB_DEVICE void unpack(float (&to)[16 / sizeof(T)], const Vec16& v) {
    KLAB_UNROLL
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            to[i] = bits_float(v.word[i]);
        } else {
            Pair pair = unpack2<T>(v.word[i]);
            to[2 * i] = pair.x;
            to[2 * i + 1] = pair.y;
        }
    }
}

template <class T>
KLAB_DEVICE Vec16 pack(const float (&from)[16 / sizeof(T)]) {
    Vec16 v;
    KLAB_UNROLL
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4)
            v.word[i] = float_bits(from[i]);
        else
            v.word[i] = pack2<T>(from[2 * i], from[2 * i + 1]);
    }
    return v;
}

// A lane's columns of v, or of the output.
template <class T>
KLAB_DEVICE void load_values(float (&to)[COLUMNS], const T* from) {
    KLAB_UNROLL
    for (int i = 0; i < COLUMNS; ++i) to[i] = to_float(from[i]);
}

template <class T>
KLAB_DEVICE void store_values(T* to, const float (&from)[COLUMNS]) {
    if constexpr (sizeof(T) == 2) {
        KLAB_UNROLL
        for (int i = 0; i < COLUMNS; i += 2) reinterpret_cast<uint32_t*>(to)[i / 2] = pack2<T>(from[i], from[i + 1]);
    } else {
        KLAB_UNROLL
        for (int i = 0; i < COLUMNS; ++i) to[i] = from_float<T>(from[i]);
    }
}

// x^-1/2 for a positive x: the fast functions, and one step of Newton's method for the last bits.
KLAB_DEVICE float reciprocal_root(float x) {
    float y = exp2f_fast(-0.5f * log2f_fast(x));
    return y * (1.5f - 0.5f * x * y * y);
}

KLAB_KERNEL(delta_recurrent, THREADS)(
    const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, const float* g, const float* beta, const STATE* initial_state,
    const int* seq_offsets, ELEMENT* out, STATE* final_state, int heads, int group, int64_t q_token, int64_t q_head, int64_t k_token,
    int64_t k_head, int64_t v_token, int64_t v_head, int64_t g_token, int64_t beta_token, int64_t state_sequence, int64_t state_head,
    int64_t state_row, int one_each, int qk_norm, float scale, float epsilon) {
    int warp = thread_idx() / 32, lane = thread_idx() % 32, sequence = block_idx_y();
    constexpr int BLOCKS = VALUE_DIM / BLOCK_V;
    int head = block_idx_x() / BLOCKS, column = block_idx_x() % BLOCKS * BLOCK_V + lane % LANES_V * COLUMNS;
    int first_row = warp * LANE_ROWS * ROWS + lane / LANES_V;  // and every LANE_ROWS-th from there
    initial_state += sequence * state_sequence + head * state_head + first_row * state_row + column;

    // All of the state is under way before anything else is waited for.
    Vec16 raw[ROWS];
    KLAB_UNROLL
    for (int i = 0; i < ROWS; ++i) raw[i] = load_16_once(initial_state + i * LANE_ROWS * state_row);
    int first = sequence, end = sequence + 1;
    if (!one_each) {
        first = seq_offsets[sequence];
        end = seq_offsets[sequence + 1];
    }
    q += head / group * q_head + first * q_token;
    k += head / group * k_head + first * k_token;
    v += head * v_head + first * v_token + column;
    g += first * g_token + head;
    beta += first * beta_token + head;
    out += (static_cast<int64_t>(first) * heads + head) * VALUE_DIM + column;

    // Each warp has its own copy of the query and the key, and needs no other warp for them; partial sums pass between the warps, in
    // one of two places in turn, so that one barrier per token is enough.
    float* keys = shared_memory<float>() + warp * 2 * KEY_DIM;
    float* queries = keys + KEY_DIM;
    float* sums = shared_memory<float>() + WARPS * 2 * KEY_DIM;
    float state[ROWS][COLUMNS];
    KLAB_UNROLL
    for (int i = 0; i < ROWS; ++i) unpack<STATE>(state[i], raw[i]);

    for (int t = first; t < end; ++t) {
        float key[PER_LANE], query[PER_LANE], value[COLUMNS];
        KLAB_UNROLL
        for (int i = 0; i < PER_LANE; ++i) {
            key[i] = to_float(k[i * 32 + lane]);
            query[i] = to_float(q[i * 32 + lane]);
        }
        load_values(value, v);
        float decay = exp2f_fast(*g * LOG2_E), rate = *beta;
        float key_square = 0.0f, query_square = 0.0f, both = 0.0f;
        KLAB_UNROLL
        for (int i = 0; i < PER_LANE; ++i) {
            key_square = fused_multiply_add(key[i], key[i], key_square);
            query_square = fused_multiply_add(query[i], query[i], query_square);
            both = fused_multiply_add(key[i], query[i], both);
        }
        float key_scale = 1.0f, query_scale = scale;
        if (qk_norm) {
            key_scale = reciprocal_root(warp_sum<32>(key_square) + epsilon);
            query_scale = scale * reciprocal_root(warp_sum<32>(query_square) + epsilon);
        }
        both = warp_sum<32>(both) * key_scale * query_scale;
        sync_warp();
        KLAB_UNROLL
        for (int i = 0; i < PER_LANE; ++i) {
            keys[i * 32 + lane] = key[i] * key_scale;
            queries[i * 32 + lane] = query[i] * query_scale;
        }
        sync_warp();

        // Both read the state as it was: what the correction adds to the output is (key . query) times it.
        float remembered[COLUMNS] = {}, read[COLUMNS] = {};
        KLAB_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            float at_key = keys[first_row + i * LANE_ROWS], at_query = queries[first_row + i * LANE_ROWS];
            KLAB_UNROLL
            for (int c = 0; c < COLUMNS; ++c) {
                remembered[c] = fused_multiply_add(state[i][c], at_key, remembered[c]);
                read[c] = fused_multiply_add(state[i][c], at_query, read[c]);
            }
        }
        KLAB_UNROLL
        for (int c = 0; c < COLUMNS; ++c) {
            KLAB_UNROLL
            for (int mask = LANES_V; mask < 32; mask *= 2) {
                remembered[c] += shfl_xor(remembered[c], mask);
                read[c] += shfl_xor(read[c], mask);
            }
        }
        if (WARPS > 1) {
            float* place = sums + (t - first) % 2 * WARPS * 2 * BLOCK_V;
            if (lane < LANES_V) {
                KLAB_UNROLL
                for (int c = 0; c < COLUMNS; ++c) {
                    place[warp * 2 * BLOCK_V + lane * COLUMNS + c] = remembered[c];
                    place[warp * 2 * BLOCK_V + BLOCK_V + lane * COLUMNS + c] = read[c];
                }
            }
            sync_threads();
            KLAB_UNROLL
            for (int c = 0; c < COLUMNS; ++c) {
                remembered[c] = read[c] = 0.0f;
                KLAB_UNROLL
                for (int w = 0; w < WARPS; ++w) {
                    remembered[c] += place[w * 2 * BLOCK_V + lane % LANES_V * COLUMNS + c];
                    read[c] += place[w * 2 * BLOCK_V + BLOCK_V + lane % LANES_V * COLUMNS + c];
                }
            }
        }
        float correction[COLUMNS], result[COLUMNS];
        KLAB_UNROLL
        for (int c = 0; c < COLUMNS; ++c) {
            correction[c] = rate * (value[c] - decay * remembered[c]);
            result[c] = fused_multiply_add(both, correction[c], decay * read[c]);
        }
        if (thread_idx() < LANES_V) store_values(out, result);
        KLAB_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            float at_key = keys[first_row + i * LANE_ROWS];
            KLAB_UNROLL
            for (int c = 0; c < COLUMNS; ++c) state[i][c] = fused_multiply_add(at_key, correction[c], decay * state[i][c]);
        }
        q += q_token;
        k += k_token;
        v += v_token;
        g += g_token;
        beta += beta_token;
        out += heads * VALUE_DIM;
    }

    final_state += ((static_cast<int64_t>(sequence) * heads + head) * KEY_DIM + first_row) * VALUE_DIM + column;
    KLAB_UNROLL
    for (int i = 0; i < ROWS; ++i) store_16(final_state + i * LANE_ROWS * VALUE_DIM, pack<STATE>(state[i]));
}
"""


@dataclass(frozen=True)
class RecurrentConfig(Config):
    """lanes_v lanes, 16 bytes each, lie side by side along a row of the state; the rows go to the warp's other lanes and the warps."""

    lanes_v: int = 8
    warps: int = 1


def _state_registers(problem: GatedDeltaRule, config: RecurrentConfig) -> int:
    """Elements of the state that a lane holds."""
    columns = 16 // SIZE_BYTES[problem.state_dtype]
    return problem.key_dim * config.lanes_v * columns // (32 * config.warps)


def fits(problem: GatedDeltaRule, config: RecurrentConfig, chip: Chip) -> str | None:
    """Rows and columns divide evenly, and a lane's part of the state fits its registers."""
    lanes_v, warps = config.lanes_v, config.warps
    if chip.target < 80:
        return "needs compute capability 8.0"
    if lanes_v not in (1, 2, 4, 8, 16, 32) or warps not in (1, 2, 4, 8):
        return "lanes_v is a power of two up to 32, warps one up to 8"
    if max(problem.seq_lens) > MAX_TOKENS:
        return f"a sequence of more than {MAX_TOKENS} tokens is faster in chunks"
    if problem.key_dim % 32 or problem.key_dim % (32 // lanes_v * warps):
        return "key_dim is not a multiple of 32, or of the rows that the warps touch at once"
    if problem.value_dim % (lanes_v * 16 // SIZE_BYTES[problem.state_dtype]):
        return "value_dim is not a multiple of the columns of a block"
    if _state_registers(problem, config) > 128:
        return "the state would spill registers"
    if problem.batch > 65535:
        return "more than 65535 sequences"
    return None


def default(problem: GatedDeltaRule, chip: Chip) -> RecurrentConfig:
    """Rows of 128 bytes and 16 KiB for a warp; rows of 64 bytes where that gives too few blocks to fill the chip."""
    columns = 16 // SIZE_BYTES[problem.state_dtype]
    lanes_v = 8
    while lanes_v > 1 and problem.value_dim % (lanes_v * columns):
        lanes_v //= 2
    if lanes_v > 4 and problem.batch * problem.value_heads * problem.value_dim // (lanes_v * columns) < 2 * chip.sm_count:
        lanes_v //= 2
    warps = 1
    while warps < 8 and _state_registers(problem, RecurrentConfig(lanes_v, warps)) > 128:
        warps *= 2
    return RecurrentConfig(lanes_v, warps)


def space(problem: GatedDeltaRule, chip: Chip) -> Iterator[RecurrentConfig]:
    """Rows of 32 to 512 bytes per block, 1 to 8 warps."""
    for warps, lanes_v in product((2, 1, 4, 8), (8, 4, 2, 16, 32)):
        yield RecurrentConfig(lanes_v, warps)


@kernel(GatedDeltaRule, backend="cuda", config=RecurrentConfig, fits=fits, default=default, space=space)
def cuda_recurrent(problem: GatedDeltaRule, config: RecurrentConfig, chip: Chip) -> Launch:
    """CUDA C++ token by token: 16-byte loads of the whole state up front, then registers; written once."""
    p, c = problem, config
    defines: dict[str, str | int] = {
        "ELEMENT": ELEMENT[p.dtype], "STATE": ELEMENT[p.state_dtype], "KEY_DIM": p.key_dim, "VALUE_DIM": p.value_dim,
        "LANES_V": c.lanes_v, "WARPS": c.warps,
    }  # fmt: skip
    block_v = c.lanes_v * 16 // SIZE_BYTES[p.state_dtype]
    smem_bytes = 4 * c.warps * (2 * p.key_dim + (4 * block_v if c.warps > 1 else 0))
    recur = CudaKernel(SOURCE, "delta_recurrent", chip, defines, smem_bytes)
    grid = (p.value_heads * p.value_dim // block_v, p.batch, 1)
    one_each = int(set(p.seq_lens) == {1})

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k, v, g, beta, state = (inputs[name] for name in ("q", "k", "v", "g", "beta", "initial_state"))
        strides = [Int64(stride) for x in (q, k, v) for stride in x.stride()[:2]]
        strides += [Int64(g.stride(0)), Int64(beta.stride(0)), *row_strides("cuda_recurrent", "initial_state", state)]
        tensors = [q, k, v, g, beta, state, inputs["seq_offsets"], outputs["out"], outputs["final_state"]]
        heads = [p.value_heads, p.value_heads // p.key_heads]
        recur.launch(grid, 32 * c.warps, [*tensors, *heads, *strides, one_each, int(p.qk_norm), p.scale, NORM_EPSILON])

    return launch
