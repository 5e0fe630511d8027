"""Sort the choices of experts on the device, in CUDA C++: a counting sort in one launch for a decode step, in two for a prefill.

The result is that of triton_align.py: `slots` lists the choices by expert, each expert's part padded to a multiple of block_m with the
number of choices; `block_experts` names the expert of every block; `padded` [1] is the length used. Ranks come from shuffles, not from
atomics: the order within an expert is that of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from klab.kernels.contract import Chip
from klab.kernels.cuda_module import CudaKernel
from klab.kernels.expert_routing import most_blocks

WARPS = 8

SOURCE = r"""
#include "expert_mma.cuh"
using namespace klab;

constexpr int WARPS = 8, CHUNK = WARPS * 32 * ROUNDS;  // choices per block: ROUNDS for each lane
static_assert(THREADS == WARPS * 32, "what the launch says");

// The expert that a choice fell on; `local` for one that is not computed here.
KLAB_DEVICE int expert_of(const int* ids, int choice, int choices, int top_k, int ids_stride, int local) {
    return choice < choices ? min_of(ids[choice / top_k * ids_stride + choice % top_k], local) : local;
}

// Count this warp's choices by expert into `found`, which is zero; ranks[r] becomes how many of them came before, for the same expert.
KLAB_DEVICE void rank_choices(const int* ids, int choices, int top_k, int ids_stride, int local, int* found, int (&experts)[ROUNDS],
                              int (&ranks)[ROUNDS]) {
    const int lane = thread_idx() % 32, first = block_idx_x() * CHUNK + thread_idx() / 32 * 32 * ROUNDS + lane;
    KLAB_UNROLL
    for (int r = 0; r < ROUNDS; ++r) {
        const int mine = expert_of(ids, first + r * 32, choices, top_k, ids_stride, local);
        int before = 0, same = 0;
        KLAB_UNROLL
        for (int other = 0; other < 32; ++other) {
            const bool equal = static_cast<int>(shfl(static_cast<uint32_t>(mine), other)) == mine;
            before += equal && other < lane;
            same += equal;
        }
        const int earlier = mine < local ? found[mine] : 0;
        sync_warp();
        if (mine < local && before == same - 1) found[mine] = earlier + same;
        sync_warp();
        experts[r] = mine;
        ranks[r] = earlier + before;
    }
}

KLAB_KERNEL(count_choices, THREADS)(const int* __restrict__ ids, int* __restrict__ counts, int choices, int top_k, int ids_stride,
                                    int local) {
    int* found = shared_memory<int>();
    for (int i = thread_idx(); i < WARPS * local; i += THREADS) found[i] = 0;
    sync_threads();
    int experts[ROUNDS], ranks[ROUNDS];
    rank_choices(ids, choices, top_k, ids_stride, local, found + thread_idx() / 32 * local, experts, ranks);
    sync_threads();
    for (int e = thread_idx(); e < local; e += THREADS) {
        int sum = 0;
        for (int w = 0; w < WARPS; ++w) sum += found[w * local + e];
        counts[block_idx_x() * local + e] = sum;
    }
}

KLAB_KERNEL(place_choices, THREADS)(const int* __restrict__ ids, const int* __restrict__ counts, int* __restrict__ slots,
                                    int* __restrict__ block_experts, int* __restrict__ padded, int choices, int top_k, int ids_stride,
                                    int local, int chunks, int block_m) {
    int* found = shared_memory<int>();
    int* total = found + WARPS * local;
    int* first = total + local;
    const int lane = thread_idx() % 32, warp = thread_idx() / 32, chunk = block_idx_x();
    for (int i = thread_idx(); i < WARPS * local; i += THREADS) found[i] = 0;
    sync_threads();
    int experts[ROUNDS], ranks[ROUNDS];
    rank_choices(ids, choices, top_k, ids_stride, local, found + warp * local, experts, ranks);
    sync_threads();
    // What came before each warp, in this block and in the blocks before it.
    for (int e = thread_idx(); e < local; e += THREADS) {
        int before = 0, all = 0;
        for (int c = 0; c < (chunks > 1 ? chunks : 0); ++c) {
            const int count = counts[c * local + e];
            all += count;
            before += c < chunk ? count : 0;
        }
        for (int w = 0; w < WARPS; ++w) {
            const int count = found[w * local + e];
            found[w * local + e] = before;
            before += count;
        }
        total[e] = chunks > 1 ? all : before;
    }
    sync_threads();
    if (warp == 0) {
        const int per_lane = ceil_div(local, 32), end = min_of((lane + 1) * per_lane, local);
        int blocks = 0;
        for (int e = lane * per_lane; e < end; ++e) blocks += ceil_div(total[e], block_m);
        int at = sum_before(blocks, lane);
        if (lane == 31 && chunk == 0) padded[0] = (at + blocks) * block_m;
        for (int e = lane * per_lane; e < end; ++e) {
            first[e] = at * block_m;
            at += ceil_div(total[e], block_m);
        }
    }
    sync_threads();
    // The blocks share the padding and the experts' names.
    for (int e = chunk * WARPS + warp; e < local; e += chunks * WARPS) {
        const int blocks = ceil_div(total[e], block_m);
        for (int i = lane; i < blocks; i += 32) block_experts[first[e] / block_m + i] = e;
        for (int i = total[e] + lane; i < blocks * block_m; i += 32) slots[first[e] + i] = choices;
    }
    KLAB_UNROLL
    for (int r = 0; r < ROUNDS; ++r)
        if (experts[r] < local)
            slots[first[experts[r]] + found[warp * local + experts[r]] + ranks[r]] = chunk * CHUNK + (warp * ROUNDS + r) * 32 + lane;
}
"""


@dataclass(frozen=True)
class Aligned:
    """Where a launch finds its sorted choices."""

    slots: torch.Tensor
    block_experts: torch.Tensor
    padded: torch.Tensor
    counts: torch.Tensor


class Align:
    """The launches that sort `choices` choices of `top_k` per token among `local` experts, in blocks of `block_m`."""

    def __init__(self, choices: int, top_k: int, local: int, block_m: int, chip: Chip) -> None:
        self._choices, self._top_k, self._local, self._block_m = choices, top_k, local, block_m
        # One round each while a block takes all; four keep the blocks of a prefill few, whose counts every block reads.
        rounds = 1 if choices <= 32 * WARPS else 4
        self._chunks = -(-choices // (32 * WARPS * rounds))
        defines = {"ROUNDS": rounds, "THREADS": 32 * WARPS}
        self._count = CudaKernel(SOURCE, "count_choices", chip, defines, 4 * WARPS * local)
        self._place = CudaKernel(SOURCE, "place_choices", chip, defines, 4 * (WARPS + 2) * local)

    def workspace(self, device: torch.device) -> Aligned:
        """Fresh tensors for `launch`."""
        blocks = most_blocks(self._choices, self._local, self._block_m)
        sizes = (blocks * self._block_m, blocks, 1, self._chunks * self._local if self._chunks > 1 else 1)
        return Aligned(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))

    def launch(self, ids: torch.Tensor, to: Aligned) -> None:
        """Enqueue the sort of ids [tokens, top_k]; choices of experts >= local are left out."""
        grid, threads = (self._chunks, 1, 1), 32 * WARPS
        shape = [self._choices, self._top_k, ids.stride(0), self._local]
        if self._chunks > 1:
            self._count.launch(grid, threads, [ids, to.counts, *shape])
        self._place.launch(grid, threads, [ids, to.counts, to.slots, to.block_experts, to.padded, *shape, self._chunks, self._block_m])
