"""A fused MoE in CUDA C++: sort, gate and up with the activation in the epilogue, down with the router's weights, sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cupy  # noqa: F401  where it is absent, so is this kernel
import torch

from klab.kernels.contract import Chip, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import torch_dtype
from klab.kernels.expert_routing import experts_hit, most_blocks
from klab.kernels.expert_tiles import TileConfig, tile_default, tile_fits, tile_space
from klab.kernels.fused_moe._cuda_align import Align, Aligned
from klab.kernels.fused_moe.problem import FusedMoe

SUM_THREADS = 256

SOURCE = r"""
#include "expert_mma.cuh"
using namespace klab;

using Tile = ExpertTile<ELEMENT, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, WARPS_M, WARPS_N, PAIRED, ALIGNED>;
constexpr float LOG2E = 1.4426950408889634f;

KLAB_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp2f_fast(-LOG2E * x)); }

// PAIRED: silu(gate) up, or with limit > 0 gpt-oss's clamped form; otherwise relu(gate)^2.
KLAB_DEVICE float activated(float gate, float up, float limit) {
    if (!PAIRED) return max_of(gate, 0.0f) * max_of(gate, 0.0f);
    if (limit > 0.0f) {
        gate = min_of(gate, limit);
        return gate * sigmoid(1.702f * gate) * (min_of(max_of(up, -limit), limit) + 1.0f);
    }
    return gate * sigmoid(gate) * up;
}

// Rows of x times the experts' weights: `columns` of them, with PAIRED as many more behind. DOWN: weighted, not activated.
KLAB_KERNEL(experts, Tile::threads)(const ELEMENT* __restrict__ x, const ELEMENT* __restrict__ w, const float* __restrict__ topk_weights,
                                    const int* __restrict__ slots, const int* __restrict__ block_experts, const int* __restrict__ padded,
                                    ELEMENT* __restrict__ out, int columns, int k, int choices, int top_k, float limit, int64_t x_stride,
                                    int64_t expert_stride, int64_t w_stride, int64_t out_stride, int64_t topk_stride) {
    char* shared = shared_memory<char>();
    const int tiles_m = padded[0] / BLOCK_M, tiles_n = ceil_div(columns, Tile::columns);
    if (block_idx_x() >= tiles_m * tiles_n) return;
    const int first_m = block_idx_x() / (GROUP_M * tiles_n) * GROUP_M, in_group = block_idx_x() % (GROUP_M * tiles_n);
    const int group_rows = min_of(tiles_m - first_m, GROUP_M);
    const int tile_m = first_m + in_group % group_rows, n0 = in_group / group_rows * Tile::columns;
    const int* rows = slots + tile_m * BLOCK_M;

    Tile tile;
    tile.start([&](int row) { return rows[row] < choices ? x + (DOWN ? rows[row] : rows[row] / top_k) * x_stride : nullptr; },
               w + block_experts[tile_m] * expert_stride + n0 * w_stride, w_stride, columns - n0, columns * w_stride);
    tile.multiply(shared, k, x);
    tile.stage_out(shared, [&](int row, float first, float second) {
        if (!DOWN) return activated(first, second, limit);
        const int choice = rows[row];
        return choice < choices ? first * topk_weights[choice / top_k * topk_stride + choice % top_k] : 0.0f;
    });
    sync_threads();
    store_tile<ELEMENT, BLOCK_M, Tile::columns, Tile::threads, ALIGNED_OUT>(
        shared, [&](int row) { return rows[row] < choices ? out + rows[row] * out_stride + n0 : nullptr; }, columns - n0);
}
"""

SUM_SOURCE = r"""
#include "device.cuh"
using namespace klab;

constexpr int EACH = ALIGNED ? 8 : 1;  // columns per thread

// out[token] = the sum of the rows of its choices of local experts, in the order of the choices.
KLAB_KERNEL(sum_experts, THREADS)(const ELEMENT* __restrict__ rows, const int* __restrict__ ids, ELEMENT* __restrict__ out, int width,
                                  int top_k, int ids_stride, int local, int64_t out_stride) {
    const int token = block_idx_x(), column = (block_idx_y() * THREADS + thread_idx()) * EACH;
    if (column >= width) return;
    float sum[EACH] = {};
    for (int i = 0; i < top_k; ++i) {
        if (ids[token * ids_stride + i] >= local) continue;
        const ELEMENT* from = rows + (static_cast<int64_t>(token) * top_k + i) * width + column;
        if (ALIGNED) {
            const Vec16 v = load_16(from);
            KLAB_UNROLL
            for (int j = 0; j < EACH; ++j) sum[j] += j % 2 ? unpack2<ELEMENT>(v.word[j / 2]).y : unpack2<ELEMENT>(v.word[j / 2]).x;
        } else {
            sum[0] += to_float(*from);
        }
    }
    ELEMENT* to = out + token * out_stride + column;
    if (ALIGNED) {
        Vec16 v;
        KLAB_UNROLL
        for (int j = 0; j < EACH; j += 2) v.word[j / 2] = pack2<ELEMENT>(sum[j], sum[j + (EACH > 1)]);
        store_16(to, v);
    } else {
        *to = from_float<ELEMENT>(sum[0]);
    }
}
"""


def rows_per_expert(problem: FusedMoe) -> float:
    """Expected rows of a visited expert."""
    hit = experts_hit(problem.tokens, problem.experts, problem.top_k, problem.skew, problem.local)
    return problem.visits / hit if hit else 1.0


def fits(problem: FusedMoe, config: TileConfig, chip: Chip) -> str | None:
    """16-bit operands; see expert_tiles."""
    if problem.format:
        return "is for 16-bit weights; fp8 blocks are multiplied by the Triton kernels"
    if problem.local > 1024:
        return "sorting keeps the counts of at most 1024 experts in shared memory"
    if problem.gated and config.block_n % (32 * config.warps_n):
        return "a warp needs 16 columns of gate and 16 of up"
    return tile_fits(config, problem.dtype, chip)


def default(problem: FusedMoe, chip: Chip) -> TileConfig:
    """By the rows of a visited expert; a warp has gate and up of 16 columns."""
    config = tile_default(rows_per_expert(problem), chip)
    return replace(config, warps_n=2) if config.block_n < 32 * config.warps_n else config


def space(problem: FusedMoe, chip: Chip) -> Iterator[TileConfig]:
    """See expert_tiles."""
    yield from tile_space(rows_per_expert(problem), problem.up_rows, max(problem.hidden, problem.intermediate))


@dataclass(frozen=True)
class _Workspace:
    """Per device: the sorted choices, and the rows between the launches."""

    aligned: Aligned
    active: torch.Tensor
    down: torch.Tensor


def _in_chunks(tensor: torch.Tensor) -> bool:
    """Whether each row is whole 16-byte chunks at multiples of 16 bytes, so that no chunk runs over the row's end."""
    return tensor.shape[-1] % 8 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:-1]) and tensor.data_ptr() % 16 == 0


@kernel(FusedMoe, backend="cuda", config=TileConfig, fits=fits, default=default, space=space)
def cuda_moe(problem: FusedMoe, config: TileConfig, chip: Chip) -> Launch:
    """CUDA C++, 16 bits (fp8 blocks: Triton): sort, gate and up with the activation, down with router weights, sum; mma.sync, cp.async."""
    p, c, choices = problem, config, problem.tokens * problem.top_k
    align = Align(choices, p.top_k, p.local, c.block_m, chip)
    blocks = most_blocks(choices, p.local, c.block_m)
    defines: dict[str, str | int] = {
        "BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "STAGES": c.stages, "WARPS_M": c.warps_m, "WARPS_N": c.warps_n,
        "GROUP_M": c.group_m, "ELEMENT": ELEMENT[p.dtype],
    }  # fmt: skip
    matmuls = {
        (down, aligned, aligned_out): CudaKernel(
            SOURCE,
            "experts",
            chip,
            {
                **defines,
                "DOWN": int(down),
                "PAIRED": int(p.gated and not down),
                "ALIGNED": int(aligned),
                "ALIGNED_OUT": int(aligned_out),
            },
            c.smem_bytes,
        )
        for down in (False, True)
        for aligned in (False, True)
        for aligned_out in (False, True)
    }
    sums = {
        aligned: CudaKernel(SUM_SOURCE, "sum_experts", chip, {"ELEMENT": ELEMENT[p.dtype], "THREADS": SUM_THREADS, "ALIGNED": int(aligned)})
        for aligned in (False, True)
    }
    workspaces: dict[torch.device, _Workspace] = {}

    def multiply(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, weights: torch.Tensor, at: Aligned, *, down: bool) -> None:
        columns, tile_columns = out.shape[1], c.block_n // (2 if p.gated and not down else 1)
        strides = [Int64(x.stride(0)), Int64(w.stride(0)), Int64(w.stride(1)), Int64(out.stride(0)), Int64(weights.stride(0))]
        matmuls[down, _in_chunks(x) and _in_chunks(w), _in_chunks(out)].launch(
            (blocks * -(-columns // tile_columns), 1, 1),
            c.threads,
            [
                x,
                w,
                weights,
                at.slots,
                at.block_experts,
                at.padded,
                out,
                columns,
                x.shape[1],
                choices,
                p.top_k,
                float(p.swiglu_limit),
                *strides,
            ],
        )

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, ids, out, device = inputs["x"], inputs["topk_ids"], outputs["out"], inputs["x"].device
        if device not in workspaces:
            rows = (torch.empty((choices, n), dtype=torch_dtype(p.dtype), device=device) for n in (p.intermediate, p.hidden))
            workspaces[device] = _Workspace(align.workspace(device), *rows)
        to = workspaces[device]
        align.launch(ids, to.aligned)
        multiply(x, inputs["w_gate_up"], to.active, inputs["topk_weights"], to.aligned, down=False)
        multiply(to.active, inputs["w_down"], to.down, inputs["topk_weights"], to.aligned, down=True)
        aligned = _in_chunks(to.down) and _in_chunks(out)
        grid = (p.tokens, -(-p.hidden // (SUM_THREADS * (8 if aligned else 1))), 1)
        sums[aligned].launch(grid, SUM_THREADS, [to.down, ids, out, p.hidden, p.top_k, ids.stride(0), p.local, Int64(out.stride(0))])

    return launch
