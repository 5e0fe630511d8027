"""Top-k by bisection in CUDA C++: a block holds a chunk of a row in registers, with one barrier per count.

Scores are compared as unsigned integers of the same order. No atomics: the same scores give the same choice, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  absent CuPy makes this file "unavailable" when it is found, not when it is launched
import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.topk_select._rounds import chunk_sizes, default_chunk, rounds_of, unfit, workspaces
from klab.kernels.topk_select.problem import TopkSelect

SOURCE = r"""
#include "device.cuh"
using namespace klab;

constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK = THREADS * PER_THREAD;
constexpr int INTERPOLATED = 9;                  // counts before plain bisection, which ends what interpolation does not
constexpr uint32_t HIDDEN = 0x007fffffu;         // the key of -inf

// An unsigned integer that is ordered as the score is: negative floats count backwards, below the positive ones.
KLAB_DEVICE uint32_t key_of(float score) {
    uint32_t bits = float_bits(score);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
KLAB_DEVICE float score_of(uint32_t key) { return bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The sum of every thread's number. Calls use `slots` [2][WARPS] in turn, so that one barrier is enough.
KLAB_DEVICE uint32_t block_sum(uint32_t value, uint32_t* slots, int turn) {
    KLAB_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) value += shfl_xor(value, mask);
    uint32_t* mine = slots + turn % 2 * WARPS;
    if (thread_idx() % 32 == 0) mine[thread_idx() / 32] = value;
    sync_threads();
    uint32_t total = 0;
    KLAB_UNROLL
    for (int w = 0; w < WARPS; ++w) total += mine[w];
    return total;
}
// The largest of every thread's number; as above.
KLAB_DEVICE uint32_t block_max(uint32_t value, uint32_t* slots, int turn) {
    KLAB_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
        uint32_t other = shfl_xor(value, mask);
        value = other > value ? other : value;
    }
    uint32_t* mine = slots + turn % 2 * WARPS;
    if (thread_idx() % 32 == 0) mine[thread_idx() / 32] = value;
    sync_threads();
    uint32_t largest = 0;
    KLAB_UNROLL
    for (int w = 0; w < WARPS; ++w) largest = mine[w] > largest ? mine[w] : largest;
    return largest;
}

// The TOP_K best of one chunk of a row. FIRST: columns are positions; LAST: only columns are written. Places left over hold -1.
KLAB_KERNEL(select_best, THREADS)(const ELEMENT* scores, const int* columns, float* out_scores, int* out_columns, int width, int chunks,
                                  int64_t scores_row, int64_t columns_row, int64_t out_row) {
    uint32_t* slots = shared_memory<uint32_t>();
    int64_t row = block_idx_x() / chunks;
    int begin = block_idx_x() % chunks * CHUNK, lane = thread_idx() % 32, turn = 0;
    scores += row * scores_row + begin;
    columns += FIRST ? 0 : row * columns_row + begin;
    out_columns += row * out_row + static_cast<int64_t>(block_idx_x() % chunks) * TOP_K;
    out_scores += LAST ? 0 : row * out_row + static_cast<int64_t>(block_idx_x() % chunks) * TOP_K;
    width -= begin;
    uint32_t keys[PER_THREAD], visible = 0, largest = 0, smallest = 0;
    KLAB_UNROLL
    for (int i = 0; i < PER_THREAD; ++i) {
        int at = i * THREADS + thread_idx();
        keys[i] = at < width ? key_of(to_float(scores[at])) : HIDDEN;
    }
    KLAB_UNROLL
    for (int i = 0; i < PER_THREAD; ++i) {
        visible += keys[i] > HIDDEN;
        largest = keys[i] > largest ? keys[i] : largest;
        smallest = ~keys[i] > smallest ? ~keys[i] : smallest;
    }
    visible = block_sum(visible, slots, turn++);
    // At least TOP_K keys are >= low (or low is that of -inf), fewer are >= high.
    uint64_t low = HIDDEN, high = 0;
    if (visible > TOP_K) {
        high = static_cast<uint64_t>(block_max(largest, slots, turn++)) + 1;
        low = ~block_max(smallest, slots, turn++);
        uint32_t below = CHUNK, over = 0, count = TOP_K + 1;
        for (int step = 0; low + 1 < high && count != TOP_K; ++step) {
            uint64_t middle = (low + high) / 2;
            if (step < INTERPOLATED && step % 3 != 2) {
                // Where the k-th would be, were the scores between the bounds spread evenly.
                middle = low + (high - low) * (below - TOP_K) / (below - over);
                middle = middle <= low ? low + 1 : middle >= high ? high - 1 : middle;
            }
            uint32_t bound = static_cast<uint32_t>(middle), mine = 0;
            KLAB_UNROLL
            for (int i = 0; i < PER_THREAD; ++i) mine += keys[i] >= bound;
            count = block_sum(mine, slots, turn++);
            if (count >= TOP_K) low = middle, below = count;
            else high = middle, over = count;
        }
    }
    // Above the bound all are chosen; at it, as many as are missing, but never a hidden one. Both are counted in one number.
    uint32_t bound = static_cast<uint32_t>(low), own = 0;
    KLAB_UNROLL
    for (int i = 0; i < PER_THREAD; ++i) own += keys[i] > bound ? 0x10000u : keys[i] == bound && bound != HIDDEN ? 1u : 0u;
    uint32_t before = own;  // of this thread and those before it in its warp
    KLAB_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
        uint32_t other = shfl(before, max_of(lane - distance, 0));
        before += lane >= distance ? other : 0u;
    }
    uint32_t* mine = slots + turn % 2 * WARPS;
    if (lane == 31) mine[thread_idx() / 32] = before;
    sync_threads();
    uint32_t total = 0, warps_before = 0;
    KLAB_UNROLL
    for (int w = 0; w < WARPS; ++w) {
        if (w < thread_idx() / 32) warps_before += mine[w];
        total += mine[w];
    }
    before += warps_before - own;
    int missing = TOP_K - static_cast<int>(total >> 16), above = before >> 16, ties = before & 0xffffu;
    KLAB_UNROLL
    for (int i = 0; i < PER_THREAD; ++i) {
        bool over = keys[i] > bound, equal = keys[i] == bound && bound != HIDDEN;
        if (over || (equal && ties < missing)) {
            int place = above + min_of(ties, missing), at = i * THREADS + thread_idx();
            out_columns[place] = FIRST ? begin + at : columns[at];
            if (!LAST) out_scores[place] = score_of(keys[i]);
        }
        above += over;
        ties += equal;
    }
    int chosen = static_cast<int>(total >> 16) + min_of(static_cast<int>(total & 0xffffu), missing);
    for (int i = chosen + thread_idx(); i < TOP_K; i += THREADS) {
        out_columns[i] = -1;
        if (!LAST) out_scores[i] = -infinity();
    }
}
"""


@dataclass(frozen=True)
class CudaBisectConfig(Config):
    """A block of `warps` warps takes `chunk` scores (a power of two) at a time; rows that are longer take several rounds."""

    chunk: int = 16384
    warps: int = 16


def fits(problem: TopkSelect, config: CudaBisectConfig, chip: Chip) -> str | None:
    """See `unfit`."""
    return unfit(problem, config.chunk, config.warps)


def default(problem: TopkSelect, chip: Chip) -> CudaBisectConfig:
    """See `default_chunk`."""
    return CudaBisectConfig(*default_chunk(problem, chip))


def space(problem: TopkSelect, chip: Chip) -> Iterator[CudaBisectConfig]:
    """Chunks of 1024 to 32768 scores (or the row), 1 to 32 warps."""
    for chunk, warps in product(chunk_sizes(problem), (1, 2, 4, 8, 16, 32)):
        yield CudaBisectConfig(chunk, warps)


@kernel(TopkSelect, backend="cuda", config=CudaBisectConfig, space=space, default=default, fits=fits)
def cuda_bisect(problem: TopkSelect, config: CudaBisectConfig, chip: Chip) -> Launch:
    """CUDA C++ top-k: chunks of a row in registers, the threshold by bisection with one barrier per count, positions by warp scans."""
    rounds = rounds_of(problem, config.chunk, config.warps)
    kernels = [
        CudaKernel(
            SOURCE,
            "select_best",
            chip,
            {
                "ELEMENT": ELEMENT[problem.dtype] if r.first else "float",
                "TOP_K": problem.top_k,
                "WARPS": config.warps,
                "PER_THREAD": r.chunk // (32 * config.warps),
                "FIRST": int(r.first),
                "LAST": int(r.last),
            },
            2 * 4 * config.warps,
        )
        for r in rounds
    ]
    between: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    unused: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        scores, out = inputs["scores"], outputs["indices"]
        if out.device not in between:
            between[out.device] = workspaces(problem, rounds, out.device)
            unused[out.device] = torch.empty((1, 1), dtype=torch.float32, device=out.device)
        columns = out  # not read in the first round
        for i, (r, select) in enumerate(zip(rounds, kernels, strict=True)):
            to_scores, to_columns = (unused[out.device], out) if r.last else between[out.device][i]
            strides = [Int64(tensor.stride(0)) for tensor in (scores, columns, to_columns)]
            args = [scores, columns, to_scores, to_columns, r.width, r.chunks, *strides]
            select.launch((problem.rows * r.chunks, 1, 1), 32 * config.warps, args)
            scores, columns = to_scores, to_columns

    return launch
