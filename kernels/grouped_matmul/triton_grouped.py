"""A grouped matmul in Triton: tiles find their expert from the offsets on the device; weights and rows come by TMA or by pointers."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.expert_routing import experts_hit, most_blocks
from klab.kernels.grouped_matmul.problem import BLOCK, GroupedMatmul
from klab.kernels.triton_support import cdiv, ensure_allocator, next_power_of_2, pipeline_smem_bytes, row_is_aligned

# As in a plain matmul, 128 float32 sums per thread leave room for pointers; fp8 blocks keep a step's sums beside the scaled ones.
MAX_SUMS_PER_THREAD = {"": 128, "fp8_block": 64}
MAX_FMAS_PER_STEP_FP32 = 4096


@dataclass(frozen=True)
class GroupedConfig(Config):
    """A CTA computes block_m rows of one expert by block_n columns, block_k at a time; group_m blocks of rows are walked column by column.

    persistent: one CTA per SM walks the tiles, and starts on the next while the last is stored; otherwise one CTA per tile.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group_m: int = 8
    num_warps: int = 8
    num_stages: int = 3
    tma: bool = True
    persistent: bool = False


@triton.jit
def _grouped(
    x,
    x_scale,
    w,
    w_scale,
    out,
    offsets,
    rows,
    n,
    k,
    stride_x,
    stride_xs,
    stride_we,
    stride_wn,
    stride_wse,
    stride_wsn,
    stride_out,
    EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CTAS: tl.constexpr,
    TMA: tl.constexpr,
):
    experts = tl.arange(0, EXPERTS_PADDED)
    first = tl.load(offsets + experts, mask=experts < EXPERTS, other=0)
    end = tl.load(offsets + experts + 1, mask=experts < EXPERTS, other=0)
    blocks = tl.cdiv(end - first, BLOCK_M)
    blocks_end = tl.cumsum(blocks, axis=0)
    tiles_m = tl.sum(blocks, axis=0)
    tiles_n = tl.cdiv(n, BLOCK_N)
    per_group = GROUP_M * tiles_n
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if TMA:
        # One matrix of all experts' rows: a tile that reaches into the next expert's reads it, and does not store it.
        x_tiles = tl.make_tensor_descriptor(x, shape=[rows, k], strides=[stride_x, 1], block_shape=[BLOCK_M, BLOCK_K])
        w_tiles = tl.make_tensor_descriptor(w, shape=[EXPERTS * n, k], strides=[stride_wn, 1], block_shape=[BLOCK_N, BLOCK_K])

    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, CTAS):
        first_m = tile // per_group * GROUP_M
        group_rows = min(tiles_m - first_m, GROUP_M)
        tile_m = first_m + tile % per_group % group_rows
        column = tile % per_group // group_rows * BLOCK_N
        mine = (tile_m >= blocks_end - blocks) & (tile_m < blocks_end)
        expert = tl.sum(tl.where(mine, experts, 0), axis=0)
        row = tl.sum(tl.where(mine, first + (tile_m - blocks_end + blocks) * BLOCK_M, 0), axis=0)
        inside_m = row + offs_m < tl.sum(tl.where(mine, end, 0), axis=0)
        inside_n = column + offs_n < n
        x_tile = x + row.to(tl.int64) * stride_x + offs_m[:, None] * stride_x + offs_k[None, :]
        w_tile = w + expert.to(tl.int64) * stride_we + column.to(tl.int64) * stride_wn + offs_n[None, :] * stride_wn + offs_k[:, None]
        if SCALE_BLOCK > 0:
            xs = x_scale + row.to(tl.int64) * stride_xs + offs_m * stride_xs
            ws = w_scale + expert.to(tl.int64) * stride_wse
            if BLOCK_N <= SCALE_BLOCK:
                ws += column // SCALE_BLOCK * stride_wsn
            else:
                ws += (column + offs_n) // SCALE_BLOCK * stride_wsn

        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, k, BLOCK_K):
            if TMA:
                a = x_tiles.load([row, start])
                b = w_tiles.load([expert * n + column, start]).T
            else:
                inside_k = offs_k < k - start
                a = tl.load(x_tile, mask=inside_m[:, None] if EVEN_K else inside_m[:, None] & inside_k[None, :], other=0.0)
                if EVEN_K and EVEN_N:
                    b = tl.load(w_tile)
                elif EVEN_K:
                    b = tl.load(w_tile, mask=inside_n[None, :], other=0.0)
                else:
                    b = tl.load(w_tile, mask=inside_n[None, :] & inside_k[:, None], other=0.0)
                x_tile += BLOCK_K
                w_tile += BLOCK_K
            if SCALE_BLOCK > 0:
                scale = tl.load(xs + start // SCALE_BLOCK, mask=inside_m, other=0.0)
                if BLOCK_N <= SCALE_BLOCK:
                    sums += tl.dot(a, b) * (scale * tl.load(ws + start // SCALE_BLOCK))[:, None]
                else:
                    sums += tl.dot(a, b) * scale[:, None] * tl.load(ws + start // SCALE_BLOCK, mask=inside_n, other=0.0)[None, :]
            else:
                sums = tl.dot(a, b, sums, input_precision="ieee")
        to = out + row.to(tl.int64) * stride_out + column
        if BLOCK_N < 256:
            tl.store(
                to + offs_m[:, None] * stride_out + offs_n[None, :],
                sums.to(out.dtype.element_ty),
                mask=inside_m[:, None] & inside_n[None, :],
            )
        else:
            # In halves: the addresses of all 128 elements of a thread beside its sums spill 32 bytes on sm_100.
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, HALF)), (0, 2, 1)))
            offs_h = tl.arange(0, HALF)[None, :]
            to += offs_m[:, None] * stride_out + offs_h
            tl.store(to, left.to(out.dtype.element_ty), mask=inside_m[:, None] & (column + offs_h < n))
            tl.store(to + HALF, right.to(out.dtype.element_ty), mask=inside_m[:, None] & (column + HALF + offs_h < n))


def fits(problem: GroupedMatmul, config: GroupedConfig, chip: Chip) -> str | None:
    """Tiles are powers of two; stages fit shared memory and sums fit registers; TMA needs aligned rows."""
    c, size = config, _operand_bytes(problem)
    bm, bn, bk, warps = c.block_m, c.block_n, c.block_k, c.num_warps
    if any(value < 1 or value & (value - 1) for value in (bm, bn, bk, warps)):
        return "tiles and warps must be powers of two"
    if min(bm, bn) < 16 or bk < (32 if problem.format else 16) or max(bm, bn, bk) > 256:
        return "tiles go from 16 (fp8: 32 along k) to 256"
    if problem.format and (chip.target < 89 or bk > BLOCK):
        return "fp8 blocks need compute capability 8.9 and block_k of at most 128"
    if min(c.group_m, c.num_stages) < 1:
        return "group_m and num_stages must be at least 1"
    if bk > max(32, next_power_of_2(problem.k)) or bn > max(16, next_power_of_2(problem.n)):
        return "the tile is larger than the matrix"
    fp32 = problem.dtype == "float32" and not problem.format
    if c.tma and (chip.target < 90 or fp32 or not row_is_aligned(problem.k, size)):
        return "tensor descriptors need Hopper, 8 or 16 bits and rows in multiples of 16 bytes"
    if max(problem.k * max(bm, bn), problem.experts * problem.n) >= 2**31:
        return "rows are too long for 32-bit offsets within a tile"
    threads = 32 * warps
    if warps > 16 or (bm // 16) * (bn // 8) < warps:
        return "too many warps for the tile"
    if bm * bn // threads > (64 if fp32 else MAX_SUMS_PER_THREAD[problem.format]):
        return "the sums would spill registers"
    if fp32 and bm * bn * bk // threads > MAX_FMAS_PER_STEP_FP32:
        return "one step would unroll too many multiply-adds"
    if pipeline_smem_bytes((bm + bn) * bk * size, c.num_stages) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def _operand_bytes(problem: GroupedMatmul) -> int:
    return SIZE_BYTES["float8_e4m3fn" if problem.format else problem.dtype]


def _rows_per_expert(problem: GroupedMatmul) -> float:
    return problem.rows / experts_hit(problem.tokens, problem.experts, problem.top_k, problem.skew)


def default(problem: GroupedMatmul, chip: Chip) -> GroupedConfig:
    """Rows by how many a visited expert has; large tiles by TMA for prefills, thin ones with deep pipelines for decode steps."""
    rows, size = _rows_per_expert(problem), _operand_bytes(problem)
    bm = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 96 else 128
    if problem.dtype == "float32" and not problem.format:
        config = GroupedConfig(min(bm, 64), 64, 32, 1, 4, 2, False)
    elif not row_is_aligned(problem.k, size):
        # Rows that start anywhere are loaded element by element: small tiles keep their pointers in registers.
        config = GroupedConfig(min(bm, 64), 64, 64 if problem.format else 32, 1, 4, 2, False)
    elif problem.format:
        config = GroupedConfig(bm, 128, 128, 8, 8 if bm == 128 else 4, 4)
    elif bm == 128:
        config = GroupedConfig(128, 256 if rows >= 256 and problem.n >= 256 else 128, 64, 8, 8, 3)
    else:
        config = GroupedConfig(bm, 128 if bm == 64 else 64, 128, 8 if bm == 64 else 1, 4, 4)
    bn, bk = min(config.block_n, max(16, next_power_of_2(problem.n))), min(config.block_k, max(32, next_power_of_2(problem.k)))
    warps = config.num_warps
    while (config.block_m // 16) * (bn // 8) < warps:
        warps //= 2
    config = replace(config, block_n=bn, block_k=bk, num_warps=warps, tma=config.tma and chip.target >= 90)
    while config.num_stages > 2 and fits(problem, config, chip) == "too much shared memory":
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def space(problem: GroupedMatmul, chip: Chip) -> Iterator[GroupedConfig]:
    """All tiles that are not hopeless for the shape, by TMA and by pointers, persistent or not."""
    rows = _rows_per_expert(problem)
    for bm, bn, bk in product((16, 32, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128, 256)):
        if (bm > 16 and bm >= 4 * rows) or 16 * bm <= rows:
            continue  # most rows are padding, or the weights are read from L2 too often
        blocks = most_blocks(problem.rows, problem.experts, bm)
        for group, warps, stages, tma, persistent in product((1, 8, 16), (4, 8), (2, 3, 4, 5, 6), (True, False), (False, True)):
            if (group > 1 and group // 2 >= blocks) or bm * bn < 256 * warps or stages - 1 > cdiv(problem.k, bk):
                continue  # the same order as fewer; idle warps, idle stages
            if persistent and blocks * cdiv(problem.n, bn) <= chip.sm_count:
                continue  # nothing to walk
            yield GroupedConfig(bm, bn, bk, group, warps, stages, tma, persistent)


def _for_tma(tensor: torch.Tensor, size: int) -> bool:
    """Whether its rows start at multiples of 16 bytes. A view whose rows do not goes by pointers."""
    return tensor.stride(-2) * size % 16 == 0 and tensor.data_ptr() % 16 == 0


@kernel(GroupedMatmul, backend="triton", config=GroupedConfig, space=space, default=default, fits=fits)
def triton_grouped(problem: GroupedMatmul, config: GroupedConfig, chip: Chip) -> Launch:
    """Triton, one launch: rows and weights by tensor descriptors or pointers, fp8 blocks scaled in float32, persistent or not."""
    p, c, size = problem, config, _operand_bytes(problem)
    tiles = most_blocks(p.rows, p.experts, c.block_m) * cdiv(p.n, c.block_n)
    ctas = min(tiles, chip.sm_count) if c.persistent else tiles

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        tma = c.tma and all(_for_tma(tensor, size) for tensor in (x, w)) and (p.experts == 1 or w.stride(0) == p.n * w.stride(1))
        if tma:
            ensure_allocator(x.device)
        x_scale, w_scale = (inputs["x_scale"], inputs["w_scale"]) if p.format else (x, w)
        _grouped[(ctas,)](
            x,
            x_scale,
            w,
            w_scale,
            out,
            inputs["offsets"],
            p.rows,
            p.n,
            p.k,
            x.stride(0),
            x_scale.stride(0),
            w.stride(0),
            w.stride(1),
            w_scale.stride(0),
            w_scale.stride(1),
            out.stride(0),
            EXPERTS=p.experts,
            EXPERTS_PADDED=next_power_of_2(p.experts),
            SCALE_BLOCK=BLOCK if p.format else 0,
            EVEN_N=p.n % c.block_n == 0,
            EVEN_K=p.k % c.block_k == 0,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            GROUP_M=c.group_m,
            CTAS=ctas,
            TMA=tma,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        )

    return launch
