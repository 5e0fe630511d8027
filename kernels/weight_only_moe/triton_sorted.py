"""Packed experts for many tokens: choices sorted by expert, nibbles unpacked and scaled in registers as the matrix unit's first operand."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import torch_dtype
from klab.kernels.expert_routing import experts_hit, most_blocks
from klab.kernels.triton_align import Aligned, align, workspace
from klab.kernels.triton_experts import activate, sum_experts
from klab.kernels.triton_support import cdiv, next_power_of_2, pipeline_smem_bytes
from klab.kernels.weight_only_moe._triton_unpack import factors, numbers
from klab.kernels.weight_only_moe.problem import WeightOnlyMoe

MAX_SUMS_PER_THREAD = 64
# Unpacked weights per thread and step, two 16-bit ones to a register.
MAX_WEIGHTS_PER_THREAD = 64


@dataclass(frozen=True)
class SortedConfig(Config):
    """A CTA multiplies block_m sorted choices by block_n rows of their expert's weights, block_k weights at a time; group_m blocks of
    choices share the weights in L2.
    """

    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    group_m: int = 1
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _product(
    x,
    w,
    scale,
    out,
    topk_weights,
    slots,
    block_experts,
    padded,
    n,
    k,
    blocks_m,
    choices,
    stride_x,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    stride_out,
    stride_tw,
    CHOICES_PER_X: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile = tl.program_id(0)
    per_group = GROUP_M * tl.cdiv(n, BLOCK_N)
    first_m = tile // per_group * GROUP_M
    rows = min(blocks_m - first_m, GROUP_M)
    tile_m = first_m + tile % per_group % rows
    tile_n = tile % per_group // rows
    if tile_m * BLOCK_M >= tl.load(padded):
        return
    choice = tl.load(slots + tile_m * BLOCK_M + tl.arange(0, BLOCK_M))
    inside_m = choice < choices
    expert = tl.load(block_experts + tile_m).to(tl.int64)

    HALF: tl.constexpr = BLOCK_K // 2
    # Columns of a step that share a scale, in pairs, and how many scales a step has.
    PAIRS: tl.constexpr = GROUP // 2 if GROUP < BLOCK_K else HALF
    SCALES: tl.constexpr = HALF // PAIRS
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    pairs = tl.arange(0, HALF)
    groups = tl.arange(0, SCALES)
    inside_n = tile_n * BLOCK_N + offs_n < n
    row_n = (tile_n * BLOCK_N + offs_n).to(tl.int64)
    x_tile = x + (choice // CHOICES_PER_X)[:, None].to(tl.int64) * stride_x + offs_k[None, :]
    w_tile = w + expert * stride_we + row_n[:, None] * stride_wn + pairs[None, :]
    scales = scale + expert * stride_se + row_n[:, None] * stride_sn
    DTYPE: tl.constexpr = x.dtype.element_ty

    # Weights are the first operand, 64 of their rows for wgmma; the few rows of x are the second.
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        a = tl.load(x_tile, mask=inside_m[:, None] & (offs_k < k - start)[None, :], other=0.0)
        packed = tl.load(w_tile, mask=inside_n[:, None] & (2 * pairs < k - start)[None, :], other=0).to(tl.int32)
        group = start // GROUP + groups
        factor = factors(tl.load(scales + group[None, :], mask=inside_n[:, None] & (group * GROUP < k)[None, :], other=0), MX)
        spread = tl.reshape(tl.broadcast_to(factor[:, :, None], (BLOCK_N, SCALES, PAIRS)), (BLOCK_N, HALF))
        even, odd = tl.split(tl.reshape(a, (BLOCK_M, HALF, 2)))
        low = (numbers(packed & 15, MX) * spread).to(DTYPE)
        high = (numbers(packed >> 4, MX) * spread).to(DTYPE)
        sums = tl.dot(low, tl.trans(even), sums, input_precision="ieee")
        sums = tl.dot(high, tl.trans(odd), sums, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += HALF

    if WEIGHTED:
        sums *= tl.load(topk_weights + choice // TOP_K * stride_tw + choice % TOP_K, mask=inside_m, other=0.0)[None, :]
    to = out + choice[None, :].to(tl.int64) * stride_out + row_n[:, None]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside_m[None, :] & inside_n[:, None])


def fits(problem: WeightOnlyMoe, config: SortedConfig, chip: Chip) -> str | None:
    """Tiles are powers of two; stages fit shared memory, sums and unpacked weights registers."""
    c, p = config, problem
    if any(value < 1 or value & (value - 1) for value in (c.block_m, c.block_n, c.block_k, c.num_warps)):
        return "tiles and warps must be powers of two"
    if min(c.block_m, c.block_n) < 16 or c.block_k < 32 or max(c.block_m, c.block_n, c.block_k) > 256:
        return "tiles go from 16 (32 along k) to 256"
    if min(c.group_m, c.num_stages) < 1:
        return "group_m and num_stages must be at least 1"
    if p.local * p.plain.up_rows >= 2**31:
        return "too large for 32-bit counts of rows"
    threads = 32 * c.num_warps
    if c.num_warps > 16 or (c.block_n // 16) * (c.block_m // 8) < c.num_warps:
        return "too many warps for the tile"
    if c.block_m * c.block_n // threads > MAX_SUMS_PER_THREAD or c.block_n * c.block_k // threads > MAX_WEIGHTS_PER_THREAD:
        return "the sums and the unpacked weights would spill registers"
    # Per stage x and the packed weights; x once more, sorted into even and odd columns. float32 takes both unpacked halves through memory.
    size = 4 if p.dtype == "float32" else 2
    staged = size * c.block_m * c.block_k + c.block_n * c.block_k // 2
    if pipeline_smem_bytes(staged, c.num_stages, size * (c.block_m + c.block_n) * c.block_k) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def default(problem: WeightOnlyMoe, chip: Chip) -> SortedConfig:
    """As many rows as a visited expert has, up to 64, by 64 rows of weights."""
    p = problem
    hit = experts_hit(p.tokens, p.experts, p.top_k, p.skew, p.local)
    block_m = min(64, max(16, next_power_of_2(int(p.plain.visits / hit) if hit else 1)))
    block_k = 64 if p.dtype == "float32" else 128
    return SortedConfig(block_m, 64, block_k, 1 if block_m == 16 else 8, 4, 2 if p.dtype == "float32" else 3)


def space(problem: WeightOnlyMoe, chip: Chip) -> Iterator[SortedConfig]:
    """All tiles, shallow to deep."""
    for bm, bn, bk in product((16, 32, 64, 128), (32, 64, 128), (64, 128, 256)):
        for group, warps, stages in product((1, 8), (2, 4, 8), (2, 3, 4)):
            yield SortedConfig(bm, bn, bk, group, warps, stages)


@dataclass(frozen=True)
class _Workspace:
    """Per device: the sorted choices and what one step leaves for the next."""

    aligned: Aligned
    up: torch.Tensor
    active: torch.Tensor
    down: torch.Tensor


@kernel(WeightOnlyMoe, backend="triton", config=SortedConfig, space=space, default=default, fits=fits)
def triton_sorted(problem: WeightOnlyMoe, config: SortedConfig, chip: Chip) -> Launch:
    """Triton: align, gate and up, activation, down with router weights, sum; weights are unpacked and scaled to 16 bits in registers."""
    p, c = problem, config
    blocks_m = most_blocks(p.tokens * p.top_k, p.local, c.block_m)
    workspaces: dict[torch.device, _Workspace] = {}

    def on(device: torch.device) -> _Workspace:
        if device not in workspaces:
            choices, dtype = p.tokens * p.top_k, torch_dtype(p.dtype)
            widths = (p.plain.up_rows, p.intermediate, p.hidden)
            rows = (torch.empty((choices, width), dtype=dtype, device=device) for width in widths)
            workspaces[device] = _Workspace(workspace(choices, p.local, c.block_m, device), *rows)
        return workspaces[device]

    def matmul(x: torch.Tensor, name: str, out: torch.Tensor, inputs: Tensors, at: Aligned) -> None:
        w, scale, down = inputs[name], inputs[f"{name}_scale"], name == "w_down"
        n, k = p.shapes[name]
        _product[(blocks_m * cdiv(n, c.block_n),)](
            x,
            w,
            scale,
            out,
            inputs["topk_weights"],
            at.slots,
            at.block_experts,
            at.padded,
            n,
            k,
            blocks_m,
            p.tokens * p.top_k,
            x.stride(0),
            *w.stride()[:2],
            *scale.stride()[:2],
            out.stride(0),
            inputs["topk_weights"].stride(0),
            CHOICES_PER_X=1 if down else p.top_k,
            TOP_K=p.top_k,
            WEIGHTED=down,
            MX=p.format == "mxfp4",
            GROUP=p.group,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            GROUP_M=c.group_m,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        )

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        ids, to = inputs["topk_ids"], on(inputs["x"].device)
        align(ids, p.local, c.block_m, to.aligned)
        matmul(inputs["x"], "w_gate_up", to.up, inputs, to.aligned)
        activate(p.plain, to.up, ids, to.active, to.active)
        matmul(to.active, "w_down", to.down, inputs, to.aligned)
        sum_experts(p.plain, to.down, ids, outputs["out"])

    return launch
