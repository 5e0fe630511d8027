"""A tiled product with plain pointers: fp8 and int8, one scale per tensor, row or block; split-K for the small m of decoding."""

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
from klab.kernels.scaled_matmul.problem import ScaledMatmul
from klab.kernels.triton_support import cdiv, next_power_of_2, pipeline_smem_bytes

REDUCE_BLOCK = 512


@dataclass(frozen=True)
class TiledConfig(Config):
    """A CTA computes block_m x block_n outputs over 1/split_k of k, block_k at a time.

    `group_m` rows of tiles are walked column by column, so that their weights are read from L2 once per group. `promote` adds the tensor
    core's sums to float32 ones every so many k (0: never), where they are fp8 without block scales; Hopper's own keep 14 bits.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 128
    group_m: int = 8
    split_k: int = 1
    promote: int = 0
    num_warps: int = 8
    num_stages: int = 3


@triton.jit
def _tile(
    x,
    w,
    out,
    x_scale,
    w_scale,
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
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PROMOTE: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    INTEGERS: tl.constexpr = x.dtype.element_ty == tl.int8
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    per_group = GROUP_M * tiles_n
    first_m = tile // per_group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    tile_m = first_m + tile % per_group % rows
    tile_n = tile % per_group // rows

    # Where the tile starts is reckoned in 64 bits, offsets within it in 32: that takes half the registers.
    start_m = (tile_m * BLOCK_M).to(tl.int64)
    start_n = (tile_n * BLOCK_N).to(tl.int64)
    k_per_split = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
    k_start = split * k_per_split
    k_end = min(k_start + k_per_split, k)
    x += start_m * stride_x + k_start
    w += start_n * stride_w + k_start

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_offsets = offs_m[:, None] * stride_x + offs_k[None, :]
    w_offsets = offs_k[:, None] + offs_n[None, :] * stride_w
    inside_m = tile_m * BLOCK_M + offs_m < m
    inside_n = tile_n * BLOCK_N + offs_n < n
    x_scale += (start_m + offs_m) * stride_xs
    if SCALE_BLOCK == 0 or SCALE_BLOCK % BLOCK_N != 0:
        w_scale += (start_n + offs_n) // max(SCALE_BLOCK, 1) * stride_ws
    else:
        w_scale += start_n // SCALE_BLOCK * stride_ws

    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGERS else tl.float32)
    # With `num_stages` on the loop itself the scales are copied ahead too, not only what the product reads.
    for k_now in tl.range(k_start, k_end, BLOCK_K, num_stages=STAGES):
        # An edge is masked only where there is one: unmasked loads pipeline and vectorise without predicates.
        if EVEN_K:
            a = tl.load(x + x_offsets) if EVEN_M else tl.load(x + x_offsets, mask=inside_m[:, None], other=0.0)
            b = tl.load(w + w_offsets) if EVEN_N else tl.load(w + w_offsets, mask=inside_n[None, :], other=0.0)
        else:
            left = k - k_now
            a = tl.load(x + x_offsets, mask=inside_m[:, None] & (offs_k[None, :] < left), other=0.0)
            b = tl.load(w + w_offsets, mask=inside_n[None, :] & (offs_k[:, None] < left), other=0.0)
        if SCALE_BLOCK == 0:
            if INTEGERS:
                sums = tl.dot(a, b, sums, out_dtype=tl.int32)
            elif PROMOTE == 0:
                sums = tl.dot(a, b, sums)
            else:
                sums = tl.dot(a, b, sums, max_num_imprecise_acc=PROMOTE)
        else:
            block = k_now // SCALE_BLOCK
            a_scale = tl.load(x_scale + block, mask=inside_m, other=0.0)
            if SCALE_BLOCK % BLOCK_N == 0:
                sums += tl.dot(a, b) * (a_scale * tl.load(w_scale + block))[:, None]
            else:
                b_scale = tl.load(w_scale + block, mask=inside_n, other=0.0)
                sums += tl.dot(a, b) * (a_scale[:, None] * b_scale[None, :])
        x += BLOCK_K
        w += BLOCK_K

    total = sums.to(tl.float32)
    if SCALE_BLOCK == 0:
        total *= tl.load(x_scale, mask=inside_m, other=0.0)[:, None]
        total *= tl.load(w_scale, mask=inside_n, other=0.0)[None, :]
    out += split.to(tl.int64) * stride_split + start_m * stride_out + start_n
    to = out + offs_m[:, None] * stride_out + offs_n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


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


def fits(problem: ScaledMatmul, config: TiledConfig, chip: Chip) -> str | None:
    """Tiles are powers of two no larger than the padded problem; stages fit shared memory and sums fit registers."""
    bm, bn, bk, warps = config.block_m, config.block_n, config.block_k, config.num_warps
    if chip.target < 89 and problem.format != "int8_row":
        return "fp8 products need compute capability 8.9"
    why = _tiles.refused_format(problem) or _tiles.refused_tile(problem, bm, bn, bk, warps, least_m=16)
    why = why or _tiles.refused_promotion(problem, config.promote, bk, chip)
    if why is not None:
        return why
    if min(config.group_m, config.num_stages) < 1 or config.split_k < 1 or config.split_k & (config.split_k - 1):
        return "group_m and num_stages must be at least 1, and split_k a power of two"
    if max(problem.n, problem.k) * max(bm, bn, bk) >= 2**31:
        return "rows are too long for 32-bit offsets within a tile"
    if config.split_k > cdiv(problem.k, bk):
        return "more splits than steps along k"
    if config.split_k > 1 and config.split_k * problem.m * problem.n * 4 > chip.memory_bytes // 16:
        return "the partial sums need too much memory"
    most = _tiles.MAX_PROMOTED_SUMS_PER_THREAD if _tiles.is_promoted(problem, config.promote) else _tiles.MAX_SUMS_PER_THREAD
    if bm * bn // (32 * warps) > most:
        return "the sums would spill registers"
    # With block scales, two float32 per row and column and stage travel along.
    scales = 4 * (bm + bn) if problem.format == "fp8_block" else 0
    if pipeline_smem_bytes((bm + bn) * bk + scales, config.num_stages) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def default(problem: ScaledMatmul, chip: Chip) -> TiledConfig:
    """Thin tiles and enough splits to fill the chip for small m (bandwidth bound); square ones for large m."""
    padded_m, padded_n = (max(16, next_power_of_2(size)) for size in (problem.m, problem.n))
    padded_k = max(32, next_power_of_2(problem.k))
    # Rows of no multiple of 16 bytes are loaded element by element, which takes one pointer each.
    aligned = problem.k % 16 == 0
    bm, bk = min(padded_m, 128 if aligned else 64), min(padded_k, 128 if aligned else 32)
    bn = min(padded_n, 128 if bm == 128 else 64)
    if problem.format == "fp8_block" and bm == 128:
        bm = 64  # three CTAs share an SM: while one promotes its sums, another has the tensor cores
    if problem.format != "fp8_block" and bm == 128 and _tiles.tiles(problem, 128, 256) >= 2 * chip.sm_count:
        bn = min(padded_n, 256)
    # With block scales ptxas holds four warps of 32x64 to 96 registers, of 64x128 to 168, and spills for sm_100; eight take 72 and 107.
    warps = 8 if bm == 128 or (problem.format == "fp8_block" and chip.target >= 100 and bm >= 32) else 4
    while (bm // 16) * (bn // 8) < warps:
        warps //= 2
    steps, splits = cdiv(problem.k, bk), 1
    # One CTA per SM at least; fewer than 4 steps per split would not pay for the second pass.
    while _tiles.tiles(problem, bm, bn) * splits < chip.sm_count and 8 * splits <= steps and splits < 16:
        splits *= 2
    stages = 6 if bm <= 32 else 4 if bm == 64 else 3
    return TiledConfig(bm, bn, bk, 8 if problem.m > bm else 1, splits, 0, warps, stages)


def space(problem: ScaledMatmul, chip: Chip) -> Iterator[TiledConfig]:
    """All tiles that are not hopeless for the shape, from few stages to as many as fit."""
    promotions = (0, 128) if problem.format in ("fp8_tensor", "fp8_row") and chip.target == 90 else (0,)
    for bm, bn, bk in product((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (64, 128, 256)):
        # A tile that more than doubles the rows is waste, one 8 times below m reads the weights from L2 too often.
        if bm > max(16, next_power_of_2(problem.m)) or (bm < 64 and problem.m >= 8 * bm):
            continue
        tiles_m, tiles = cdiv(problem.m, bm), _tiles.tiles(problem, bm, bn)
        for split_k, warps, stages, group_m, promote in product((1, 2, 4, 8, 16), (2, 4, 8), (2, 3, 4, 5, 6), (1, 8, 16), promotions):
            if split_k > 1 and (tiles * split_k > 8 * chip.sm_count or cdiv(problem.k, bk) < 2 * split_k):
                continue  # the chip is full without it, or a split is too short to pipeline
            if group_m > 1 and group_m > tiles_m:
                continue  # the same order as fewer
            if bm * bn < 512 * warps or (stages - 1) * split_k > cdiv(problem.k, bk):
                continue  # idle warps, idle stages
            yield TiledConfig(bm, bn, bk, group_m, split_k, promote, warps, stages)


@kernel(ScaledMatmul, backend="triton", config=TiledConfig, space=space, default=default, fits=fits)
def triton_tiled(problem: ScaledMatmul, config: TiledConfig, chip: Chip) -> Launch:
    """Triton with pointers, fp8 and int8: block scales promoted in float32, swizzled tiles, deterministic split-K."""
    m, n, k, splits = problem.m, problem.n, problem.k, config.split_k
    grid = (_tiles.tiles(problem, config.block_m, config.block_n), splits)
    partials: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        to = out
        if splits > 1:
            if out.device not in partials:
                partials[out.device] = torch.empty((splits, m, n), dtype=torch.float32, device=out.device)
            to = partials[out.device]
        _tile[grid](
            x,
            w,
            to,
            inputs["x_scale"],
            inputs["w_scale"],
            m,
            n,
            k,
            x.stride(0),
            w.stride(0),
            to.stride(-2),
            m * n,
            *_tiles.row_strides(problem, inputs),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            SPLIT_K=splits,
            PROMOTE=config.promote,
            SCALE_BLOCK=_tiles.scale_block(problem),
            EVEN_M=m % config.block_m == 0,
            EVEN_N=n % config.block_n == 0,
            EVEN_K=k % config.block_k == 0,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            _sum_splits[(m, cdiv(n, REDUCE_BLOCK))](to, out, m, n, out.stride(0), SPLIT_K=splits, BLOCK=REDUCE_BLOCK, num_warps=4)

    return launch
