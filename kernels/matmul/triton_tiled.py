"""A tiled matmul with plain pointers: any shape, stride and layout; split-K for the small m of decoding."""

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
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.matmul.problem import Matmul
from klab.kernels.triton_support import cdiv, next_power_of_2, pipeline_smem_bytes

# One thread holds block_m * block_n / (32 num_warps) float32 sums. 128 leaves half of its 255 registers for pointers and operands:
# 128x256 tiles compile to 204 registers with 8 warps and spill 792 bytes with 4.
MAX_SUMS_PER_THREAD = 128
# float32 has no tensor cores under IEEE rules: every multiply-add is an unrolled instruction, and its operands are registers too.
MAX_SUMS_PER_THREAD_FP32 = 64
MAX_FMAS_PER_STEP_FP32 = 4096
REDUCE_BLOCK = 512


@dataclass(frozen=True)
class TiledConfig(Config):
    """A CTA computes block_m x block_n outputs over 1/split_k of k, block_k at a time.

    `group_m` rows of tiles are walked column by column, so that their weights are read from L2 once per group.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group_m: int = 8
    split_k: int = 1
    num_warps: int = 8
    num_stages: int = 3


@triton.jit
def _tile(
    x,
    w,
    out,
    m,
    n,
    k,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_om,
    stride_on,
    stride_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    per_group = GROUP_M * tiles_n
    first_m = tile // per_group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    tile_m = first_m + tile % per_group % rows
    tile_n = tile % per_group // rows

    # Where the tile starts is reckoned in 64 bits (a logits matrix of 16384 x 152k has more than 2^31 elements), offsets within it
    # in 32: that takes half the registers.
    start_m = (tile_m * BLOCK_M).to(tl.int64)
    start_n = (tile_n * BLOCK_N).to(tl.int64)
    k_per_split = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
    k_start = split * k_per_split
    k_end = min(k_start + k_per_split, k)
    x += start_m * stride_xm + k_start.to(tl.int64) * stride_xk
    w += start_n * stride_wn + k_start.to(tl.int64) * stride_wk

    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    offs_k = tl.arange(0, BLOCK_K)
    x_offsets = offs_m * stride_xm + offs_k[None, :] * stride_xk
    w_offsets = offs_k[:, None] * stride_wk + offs_n * stride_wn
    inside_m = tile_m * BLOCK_M + offs_m < m
    inside_n = tile_n * BLOCK_N + offs_n < n
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k_now in range(k_start, k_end, BLOCK_K):
        # An edge is masked only where there is one: unmasked loads pipeline and vectorise without predicates.
        if EVEN_K:
            a = tl.load(x + x_offsets) if EVEN_M else tl.load(x + x_offsets, mask=inside_m, other=0.0)
            b = tl.load(w + w_offsets) if EVEN_N else tl.load(w + w_offsets, mask=inside_n, other=0.0)
        else:
            left = k - k_now
            a = tl.load(x + x_offsets, mask=inside_m & (offs_k[None, :] < left), other=0.0)
            b = tl.load(w + w_offsets, mask=inside_n & (offs_k[:, None] < left), other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
        x += BLOCK_K * stride_xk
        w += BLOCK_K * stride_wk

    out += split.to(tl.int64) * stride_split + start_m * stride_om + start_n * stride_on
    tl.store(out + offs_m * stride_om + offs_n * stride_on, sums.to(out.dtype.element_ty), mask=inside_m & inside_n)


@triton.jit
def _sum_splits(partial, out, m, n, stride_om, stride_on, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # Always in the order of the splits: the same inputs give the same bits, which atomics would not.
    for split in tl.static_range(SPLIT_K):
        total += tl.load(partial + (split * m + row) * n + columns, mask=inside, other=0.0)
    tl.store(out + row * stride_om + columns * stride_on, total.to(out.dtype.element_ty), mask=inside)


def fits(problem: Matmul, config: TiledConfig, chip: Chip) -> str | None:
    """Tiles are powers of two no larger than the padded problem; stages fit shared memory and sums fit registers."""
    bm, bn, bk, warps = config.block_m, config.block_n, config.block_k, config.num_warps
    if any(value < 1 or value & (value - 1) for value in (bm, bn, bk, warps, config.split_k)):
        return "tiles, splits and warps must be powers of two"
    if min(bm, bn, bk) < 16:
        return "tl.dot needs tiles of at least 16"
    if min(config.group_m, config.num_stages) < 1:
        return "group_m and num_stages must be at least 1"
    for block, size, name in ((bm, problem.m, "m"), (bn, problem.n, "n"), (bk, problem.k, "k")):
        if block > max(16, next_power_of_2(size)):
            return f"block_{name} is larger than {name}"
    if max(problem.n, problem.k) * max(bm, bn, bk) >= 2**31:
        return "rows are too long for 32-bit offsets within a tile"
    if config.split_k > cdiv(problem.k, bk):
        return "more splits than steps along k"
    if config.split_k > 1 and config.split_k * problem.m * problem.n * 4 > chip.memory_bytes // 16:
        return "the partial sums need too much memory"
    threads = 32 * warps
    if warps > 16 or (bm // 16) * (bn // 8) < warps:
        return "too many warps for the tile"
    fp32 = problem.dtype == "float32"
    if bm * bn // threads > (MAX_SUMS_PER_THREAD_FP32 if fp32 else MAX_SUMS_PER_THREAD):
        return "the sums would spill registers"
    if fp32 and bm * bn * bk // threads > MAX_FMAS_PER_STEP_FP32:
        return "one step would unroll too many multiply-adds"
    if pipeline_smem_bytes((bm + bn) * bk * SIZE_BYTES[problem.dtype], config.num_stages) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def default(problem: Matmul, chip: Chip) -> TiledConfig:
    """Thin tiles and enough splits to fill the chip for small m (bandwidth bound); square ones for large m."""
    # Triton learns alignment only of sizes that 16 divides. Rows of others are loaded element by element, which takes one pointer
    # each: 128x128x64 then spills 168 bytes, 32x64x128 712.
    small = problem.dtype == "float32" or problem.k % 16 != 0 or (problem.layout == "nn" and problem.n % 16 != 0)
    padded_m, padded_n, padded_k = (max(16, next_power_of_2(size)) for size in (problem.m, problem.n, problem.k))
    bm = min(padded_m, 64 if small else 128)
    # 128x256 tiles read half as much from L2 as 128x128 ones, where there are enough of them to fill the chip.
    wide = bm == 128 and cdiv(problem.m, 128) * cdiv(problem.n, 256) >= 2 * chip.sm_count
    bn = min(padded_n, 256 if wide else 128 if bm == 128 else 64)
    bk = min(padded_k, 32 if small else 128 if bm == 32 else 64)
    warps = 4 if bm <= 64 else 8
    while (bm // 16) * (bn // 8) < warps:
        warps //= 2
    tiles_m, tiles, steps = cdiv(problem.m, bm), cdiv(problem.m, bm) * cdiv(problem.n, bn), cdiv(problem.k, bk)
    splits = 1
    # One CTA per SM at least; fewer than 4 steps per split would not pay for the second pass.
    while tiles * splits < chip.sm_count and 8 * splits <= steps and splits < 16:
        splits *= 2
    stages = 6 if bm == 16 else 4 if bm <= 64 else 3
    return TiledConfig(bm, bn, bk, 8 if tiles_m > 1 else 1, splits, warps, stages)


def space(problem: Matmul, chip: Chip) -> Iterator[TiledConfig]:
    """All tiles that are not hopeless for the shape, from few stages to as many as fit."""
    fp32 = problem.dtype == "float32"
    blocks_m = (16, 32, 64, 128) if fp32 else (16, 32, 64, 128, 256)
    blocks_n = (16, 32, 64, 128) if fp32 else (16, 32, 64, 128, 256)
    blocks_k = (16, 32) if fp32 else (32, 64, 128, 256)
    for bm, bn, bk in product(blocks_m, blocks_n, blocks_k):
        # A tile that more than doubles the rows is waste, one 8 times below m reads the weights from L2 too often.
        if bm > max(16, next_power_of_2(problem.m)) or (bm < 64 and problem.m >= 8 * bm):
            continue
        tiles_m, tiles = cdiv(problem.m, bm), cdiv(problem.m, bm) * cdiv(problem.n, bn)
        for split_k, warps, stages, group_m in product((1, 2, 4, 8, 16), (2, 4, 8), (2, 3, 4, 5, 6), (1, 4, 8, 16)):
            if split_k > 1 and (tiles * split_k > 8 * chip.sm_count or cdiv(problem.k, bk) < 2 * split_k):
                continue  # the chip is full without it, or a split is too short to pipeline
            if group_m > 1 and group_m > tiles_m:
                continue  # the same order as fewer
            if bm * bn < 1024 * warps // 2 or (stages - 1) * split_k > cdiv(problem.k, bk):
                continue  # idle warps, idle stages
            yield TiledConfig(bm, bn, bk, group_m, split_k, warps, stages)


@kernel(Matmul, backend="triton", config=TiledConfig, space=space, default=default, fits=fits)
def triton_tiled(problem: Matmul, config: TiledConfig, chip: Chip) -> Launch:
    """Triton with pointers: swizzled tiles, software pipeline, deterministic split-K."""
    m, n, k, splits = problem.m, problem.n, problem.k, config.split_k
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n), splits)
    partials: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        stride_wk, stride_wn = w.stride() if problem.layout == "nn" else w.stride()[::-1]
        to = out
        if splits > 1:
            if out.device not in partials:
                partials[out.device] = torch.empty((splits, m, n), dtype=torch.float32, device=out.device)
            to = partials[out.device]
        _tile[grid](
            x,
            w,
            to,
            m,
            n,
            k,
            *x.stride(),
            stride_wk,
            stride_wn,
            *to.stride()[-2:],
            m * n,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            SPLIT_K=splits,
            EVEN_M=m % config.block_m == 0,
            EVEN_N=n % config.block_n == 0,
            EVEN_K=k % config.block_k == 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            _sum_splits[(m, cdiv(n, REDUCE_BLOCK))](to, out, m, n, *out.stride(), SPLIT_K=splits, BLOCK=REDUCE_BLOCK, num_warps=4)

    return launch
