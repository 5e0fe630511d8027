"""The router in CUDA C++: one warp per token, its scores in the lanes' registers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.topk_routing.problem import TopkRouting

SOURCE = r"""
#include "device.cuh"
using namespace klab;

// Expert e lies in lane e % 32, register e / 32: consecutive lanes read consecutive logits.
constexpr int PER_LANE = ceil_div(EXPERTS, 32), GROUP_SIZE = EXPERTS / GROUPS;
constexpr float LOG2E = 1.4426950408889634f;
constexpr uint32_t NONE = 0xffffffffu;

struct Best {
    float value;
    uint32_t index;
};
// The larger; of equals the lower index.
KLAB_DEVICE Best better(Best a, Best b) { return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a; }
KLAB_DEVICE Best best_of_warp(Best mine) {
    KLAB_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) mine = better(mine, Best{shfl_xor(mine.value, mask), shfl_xor(mine.index, mask)});
    return mine;
}

KLAB_KERNEL(route, WARPS * 32)(const ELEMENT* __restrict__ logits, const float* __restrict__ bias, int* __restrict__ ids,
                               float* __restrict__ weights, int tokens, float scale, int64_t logits_stride) {
    const int lane = thread_idx() % 32, token = block_idx_x() * WARPS + thread_idx() / 32;
    if (token >= tokens) return;  // a whole warp
    const ELEMENT* row = logits + token * logits_stride;
    float score[PER_LANE], choice[PER_LANE];
    float most = -infinity();
    KLAB_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int e = i * 32 + lane;
        score[i] = e < EXPERTS ? to_float(row[e]) : -infinity();
        most = max_of(most, score[i]);
    }
    if (SIGMOID) {
        KLAB_UNROLL
        for (int i = 0; i < PER_LANE; ++i) score[i] = 1.0f / (1.0f + exp2f_fast(-LOG2E * score[i]));
    } else {
        most = warp_max<32>(most);
        float sum = 0.0f;
        KLAB_UNROLL
        for (int i = 0; i < PER_LANE; ++i) {
            score[i] = exp2f_fast(LOG2E * (score[i] - most));
            sum += score[i];
        }
        const float inverse = 1.0f / warp_sum<32>(sum);
        KLAB_UNROLL
        for (int i = 0; i < PER_LANE; ++i) score[i] *= inverse;
    }
    KLAB_UNROLL
    for (int i = 0; i < PER_LANE; ++i) {
        const int e = i * 32 + lane;
        choice[i] = e < EXPERTS ? (BIAS ? score[i] + bias[e] : score[i]) : -infinity();
    }

    if (TOPK_GROUPS < GROUPS) {
        // Lane g learns how good group g is; then the groups that fewer than TOPK_GROUPS others beat are kept.
        float mine = -infinity();
        for (int g = 0; g < GROUPS; ++g) {
            Best first{-infinity(), NONE};
            KLAB_UNROLL
            for (int i = 0; i < PER_LANE; ++i) {
                const int e = i * 32 + lane;
                if (e / GROUP_SIZE == g && e < EXPERTS) first = better(first, Best{choice[i], static_cast<uint32_t>(e)});
            }
            const Best winner = best_of_warp(first);
            float value = winner.value;
            if (BIAS) {
                float second = -infinity();
                KLAB_UNROLL
                for (int i = 0; i < PER_LANE; ++i) {
                    const int e = i * 32 + lane;
                    if (e / GROUP_SIZE == g && e < EXPERTS && static_cast<uint32_t>(e) != winner.index) second = max_of(second, choice[i]);
                }
                value += warp_max<32>(second);
            }
            if (lane == g) mine = value;
        }
        int beaten = 0;
        for (int g = 0; g < GROUPS; ++g) {
            const float other = shfl(mine, g);
            beaten += other > mine || (other == mine && g < lane);
        }
        const uint32_t kept = lane < GROUPS && beaten < TOPK_GROUPS;
        uint32_t groups = kept << lane;
        KLAB_UNROLL
        for (int mask = 16; mask > 0; mask /= 2) groups |= shfl_xor(groups, mask);
        KLAB_UNROLL
        for (int i = 0; i < PER_LANE; ++i) {
            const int e = i * 32 + lane;
            if (e < EXPERTS && !(groups >> (e / GROUP_SIZE) & 1u)) choice[i] = -infinity();
        }
    }

    // Lane i keeps the i-th choice (top_k is at most 32).
    float weight = 0.0f;
    uint32_t expert = 0;
    for (int round = 0; round < TOP_K; ++round) {
        Best first{-infinity(), NONE};
        KLAB_UNROLL
        for (int i = 0; i < PER_LANE; ++i) first = better(first, Best{choice[i], static_cast<uint32_t>(i * 32 + lane)});
        const Best winner = best_of_warp(first);
        float won = 0.0f;
        KLAB_UNROLL
        for (int i = 0; i < PER_LANE; ++i)
            if (static_cast<uint32_t>(i * 32 + lane) == winner.index) {
                won = score[i];
                choice[i] = -infinity();
            }
        won = shfl(won, static_cast<int>(winner.index % 32));
        if (lane == round) {
            weight = won;
            expert = winner.index;
        }
    }
    if (RENORMALIZE) weight /= warp_sum<32>(weight);
    if (lane < TOP_K) {
        ids[token * TOP_K + lane] = static_cast<int>(expert);
        weights[token * TOP_K + lane] = weight * scale;
    }
}
"""


@dataclass(frozen=True)
class WarpConfig(Config):
    """Tokens, and so warps, of a block."""

    warps: int = 4


def fits(problem: TopkRouting, config: WarpConfig, chip: Chip) -> str | None:
    """The choices fit the lanes of a warp and the scores their registers."""
    if config.warps < 1 or config.warps > 32:
        return "a block has 1 to 32 warps"
    if problem.top_k > 32 or problem.groups > 32:
        return "a lane keeps one choice and one group: at most 32"
    if problem.experts > 1024:
        return "more than 1024 experts spill registers"
    return None


def default(problem: TopkRouting, chip: Chip) -> WarpConfig:
    """One token per block while blocks are few: a decode step spreads over the chip."""
    return WarpConfig(1 if problem.tokens <= 4 * chip.sm_count else 4)


def space(problem: TopkRouting, chip: Chip) -> Iterator[WarpConfig]:
    """Blocks of 1 to 16 warps."""
    for warps in (1, 2, 4, 8, 16):
        yield WarpConfig(warps)


@kernel(TopkRouting, backend="cuda", config=WarpConfig, space=space, default=default, fits=fits)
def cuda_topk(problem: TopkRouting, config: WarpConfig, chip: Chip) -> Launch:
    """CUDA C++, one launch: a warp per token, argmax by shuffles."""
    p = problem
    defines: dict[str, str | int] = {
        "ELEMENT": ELEMENT[p.dtype], "EXPERTS": p.experts, "TOP_K": p.top_k, "GROUPS": p.groups, "TOPK_GROUPS": p.topk_groups,
        "SIGMOID": int(p.scoring == "sigmoid"), "BIAS": int(p.bias), "RENORMALIZE": int(p.renormalize), "WARPS": config.warps,
    }  # fmt: skip
    route = CudaKernel(SOURCE, "route", chip, defines)
    grid = (-(-p.tokens // config.warps), 1, 1)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        logits = inputs["logits"]
        # Without a bias the pointer is not followed: any float32 tensor will do.
        bias = inputs.get("bias", outputs["weights"])
        to = outputs["ids"], outputs["weights"]
        route.launch(grid, config.warps * 32, [logits, bias, *to, p.tokens, float(p.scale), Int64(logits.stride(0))])

    return launch
