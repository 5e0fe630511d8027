"""mxfp8, mxfp4 and nvfp4 without block-scaled tensor cores: elements become bfloat16 in registers, products run on those."""

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
from klab.kernels.scaled_matmul import _tiles
from klab.kernels.scaled_matmul._microscales import expand
from klab.kernels.scaled_matmul.problem import MICRO, PACKED, ScaledMatmul
from klab.kernels.triton_support import INTERPRETED, cdiv, next_power_of_2, pipeline_smem_bytes

REDUCE_BLOCK = 512
# Expanded elements are registers too: 64 sums a thread and 8192 elements a CTA compile without spills.
MAX_SUMS_PER_THREAD = 64
MAX_EXPANDED_PER_THREAD = 128


@dataclass(frozen=True)
class UpcastConfig(Config):
    """A CTA computes block_m x block_n outputs over 1/split_k of k, block_k at a time; `group_m` rows of tiles are walked together."""

    block_m: int = 64
    block_n: int = 64
    block_k: int = 128
    group_m: int = 8
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _upcast(
    x,
    w,
    out,
    x_scale,
    w_scale,
    x_global,
    w_global,
    m,
    n,
    k,
    stride_x,
    stride_w,
    stride_out,
    stride_split,
    stride_xs,
    stride_ws,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    PER_BYTE: tl.constexpr,
    GLOBAL: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    BYTES_K: tl.constexpr = BLOCK_K // PER_BYTE
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    per_group = GROUP_M * tiles_n
    first_m = tile // per_group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    offs_m = (first_m + tile % per_group % rows) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tile % per_group // rows * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    inside_m = offs_m < m
    inside_n = offs_n < n
    k_per_split = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
    k_start = split * k_per_split
    k_end = min(k_start + k_per_split, k)

    offs_k = tl.arange(0, BYTES_K)[None, :]
    offs_s = tl.arange(0, BLOCK_K // VECTOR)[None, :]
    x += offs_m.to(tl.int64) * stride_x + offs_k
    w += offs_n.to(tl.int64) * stride_w + offs_k
    x_scale += offs_m.to(tl.int64) * stride_xs + offs_s
    w_scale += offs_n.to(tl.int64) * stride_ws + offs_s
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k_now in range(k_start, k_end, BLOCK_K):
        inside_k = k_now // PER_BYTE + offs_k < k // PER_BYTE
        inside_s = k_now // VECTOR + offs_s < k // VECTOR
        a = tl.load(x + k_now // PER_BYTE, mask=inside_m & inside_k, other=0.0)
        b = tl.load(w + k_now // PER_BYTE, mask=inside_n & inside_k, other=0.0)
        a_scale = tl.load(x_scale + k_now // VECTOR, mask=inside_m & inside_s, other=0.0)
        b_scale = tl.load(w_scale + k_now // VECTOR, mask=inside_n & inside_s, other=0.0)
        # Every product of an element and its scale has at most 6 significant bits: bfloat16 holds it exactly.
        wide_a = expand(a, a_scale, BLOCK_M, BLOCK_K, VECTOR).to(WIDE)
        wide_b = expand(b, b_scale, BLOCK_N, BLOCK_K, VECTOR).to(WIDE)
        sums = tl.dot(wide_a, wide_b.T, sums, input_precision="ieee")
    if GLOBAL:
        sums *= tl.load(x_global) * tl.load(w_global)
    columns = offs_n.reshape(1, BLOCK_N)
    to = out + split.to(tl.int64) * stride_split + offs_m.to(tl.int64) * stride_out + columns
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside_m & (columns < n))


@triton.jit
def _sum_splits(partial, out, m, n, stride_out, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # Always in the order of the splits: the same inputs give the same bits, which atomics would not.
    for split in tl.static_range(SPLIT_K):
        total += tl.load(partial + (split * m + row) * n + columns, mask=inside, other=0.0)
    tl.store(out + row * stride_out + columns, total.to(out.dtype.element_ty), mask=inside)


def fits(problem: ScaledMatmul, config: UpcastConfig, chip: Chip) -> str | None:
    """Tiles are powers of two no larger than the padded problem; stages fit shared memory, sums and expanded elements registers."""
    bm, bn, bk, warps = config.block_m, config.block_n, config.block_k, config.num_warps
    if problem.format not in MICRO:
        return "is for mxfp8, mxfp4 and nvfp4"
    if chip.target < 80:
        return "bfloat16 products need compute capability 8.0"
    why = _tiles.refused_tile(problem, bm, bn, bk, warps, least_m=16)
    if why is not None:
        return why
    if min(config.group_m, config.num_stages) < 1 or config.split_k < 1 or config.split_k & (config.split_k - 1):
        return "group_m and num_stages must be at least 1, and split_k a power of two"
    if config.split_k > cdiv(problem.k, bk):
        return "more splits than steps along k"
    if config.split_k > 1 and config.split_k * problem.m * problem.n * 4 > chip.memory_bytes // 16:
        return "the partial sums need too much memory"
    threads = 32 * warps
    if bm * bn // threads > MAX_SUMS_PER_THREAD or max(bm, bn) * bk // threads > MAX_EXPANDED_PER_THREAD:
        return "the sums, or the expanded elements, would spill registers"
    per_byte = 2 if problem.format in PACKED else 1
    stage_bytes = (bm + bn) * (bk // per_byte + bk // MICRO[problem.format])
    # The expanded tiles pass through shared memory once, on their way to the layout of the product.
    if pipeline_smem_bytes(stage_bytes, config.num_stages, (bm + bn) * bk * 2) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def default(problem: ScaledMatmul, chip: Chip) -> UpcastConfig:
    """64x64 tiles, thin ones and splits for small m."""
    padded_m, padded_n, padded_k = (
        next_power_of_2(max(least, size)) for least, size in ((16, problem.m), (16, problem.n), (32, problem.k))
    )
    bm, bn, bk = min(padded_m, 64), min(padded_n, 64), min(padded_k, 128)
    warps = 4
    while (bm // 16) * (bn // 8) < warps:
        warps //= 2
    while max(bm, bn) * bk // (32 * warps) > MAX_EXPANDED_PER_THREAD:
        bk //= 2
    steps, splits = cdiv(problem.k, bk), 1
    # One CTA per SM at least; fewer than 4 steps per split would not pay for the second pass.
    while _tiles.tiles(problem, bm, bn) * splits < chip.sm_count and 8 * splits <= steps and splits < 16:
        splits *= 2
    return UpcastConfig(bm, bn, bk, 8 if problem.m > bm else 1, splits, warps, 3)


def space(problem: ScaledMatmul, chip: Chip) -> Iterator[UpcastConfig]:
    """All tiles that are not hopeless for the shape."""
    for bm, bn, bk in product((16, 32, 64, 128), (32, 64, 128, 256), (32, 64, 128, 256)):
        if bm > max(16, next_power_of_2(problem.m)) or (bm < 64 and problem.m >= 8 * bm):
            continue
        tiles_m, tiles = cdiv(problem.m, bm), _tiles.tiles(problem, bm, bn)
        for split_k, warps, stages, group_m in product((1, 2, 4, 8, 16), (4, 8), (2, 3, 4, 5), (1, 8)):
            if split_k > 1 and (tiles * split_k > 8 * chip.sm_count or cdiv(problem.k, bk) < 2 * split_k):
                continue  # the chip is full without it, or a split is too short to pipeline
            if (group_m > 1 and group_m > tiles_m) or bm * bn < 512 * warps or (stages - 1) * split_k > cdiv(problem.k, bk):
                continue  # the same order as fewer; idle warps, idle stages
            yield UpcastConfig(bm, bn, bk, group_m, split_k, warps, stages)


@kernel(ScaledMatmul, backend="triton", config=UpcastConfig, space=space, default=default, fits=fits)
def triton_upcast(problem: ScaledMatmul, config: UpcastConfig, chip: Chip) -> Launch:
    """Emulated: mx and nvfp4 blocks are expanded exactly to bfloat16 in registers; saves bandwidth, not products."""
    m, n, k, splits, vector = problem.m, problem.n, problem.k, config.split_k, MICRO[problem.format]
    grid = (_tiles.tiles(problem, config.block_m, config.block_n), splits)
    partials: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        x_scale, w_scale = inputs["x_scale"], inputs["w_scale"]
        to = out
        if splits > 1:
            if out.device not in partials:
                partials[out.device] = torch.empty((splits, m, n), dtype=torch.float32, device=out.device)
            to = partials[out.device]
        _upcast[grid](
            x,
            w,
            to,
            x_scale,
            w_scale,
            inputs.get("x_global", x_scale),
            inputs.get("w_global", w_scale),
            m,
            n,
            k,
            x.stride(0),
            w.stride(0),
            to.stride(-2),
            m * n,
            x_scale.stride(0),
            w_scale.stride(0),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            VECTOR=vector,
            PER_BYTE=2 if problem.format in PACKED else 1,
            GLOBAL=problem.format == "nvfp4",
            GROUP_M=config.group_m,
            SPLIT_K=splits,
            # Triton's interpreter computes on the bit patterns of bfloat16.
            WIDE=tl.float32 if INTERPRETED else tl.bfloat16,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            _sum_splits[(m, cdiv(n, REDUCE_BLOCK))](to, out, m, n, out.stride(0), SPLIT_K=splits, BLOCK=REDUCE_BLOCK, num_warps=4)

    return launch
