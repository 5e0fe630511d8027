"""A matmul per head in Triton: tiles of one head each, read and written where the heads of a token lie together."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.batched_matmul.problem import BatchedMatmul
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.triton_support import cdiv, next_power_of_2, pipeline_smem_bytes

# One thread holds block_m * block_n / (32 num_warps) float32 sums; 128 leaves half of its 255 registers for pointers and operands.
MAX_SUMS_PER_THREAD = 128
# float32 has no tensor cores under IEEE rules: every multiply-add is an unrolled instruction, and its operands are registers too.
MAX_SUMS_PER_THREAD_FP32 = 64
MAX_FMAS_PER_STEP_FP32 = 4096
# Elements of x and w that a thread brings per step, eight to a pointer: with 256 some configurations of two warps spill.
MAX_LOADS_PER_THREAD = 192


@dataclass(frozen=True)
class BatchedConfig(Config):
    """A CTA computes block_m x block_n outputs of one head, block_k of k at a time.

    weights_first makes the weights the first operand, whose 64 rows Hopper's matrix unit wants filled: right for few tokens.
    """

    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    weights_first: bool = False
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _batched_tile(
    x,
    w,
    out,
    m,
    n,
    k,
    stride_xm,
    stride_xb,
    stride_wb,
    stride_wn,
    stride_om,
    stride_ob,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    # Rows first: CTAs that run together share the tile of weights in L2.
    tiles_m = tl.cdiv(m, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    head = tl.program_id(1).to(tl.int64)

    start_m = (tile_m * BLOCK_M).to(tl.int64)
    start_n = (tile_n * BLOCK_N).to(tl.int64)
    x += head * stride_xb + start_m * stride_xm
    w += head * stride_wb + start_n * stride_wn
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    x_offsets = offs_m * stride_xm + offs_k
    w_offsets = offs_n * stride_wn + offs_k
    inside_m = tile_m * BLOCK_M + offs_m < m
    inside_n = tile_n * BLOCK_N + offs_n < n
    sums = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHTS_FIRST else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k_now in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(x + x_offsets) if EVEN_M else tl.load(x + x_offsets, mask=inside_m, other=0.0)
            b = tl.load(w + w_offsets) if EVEN_N else tl.load(w + w_offsets, mask=inside_n, other=0.0)
        else:
            left = k - k_now
            a = tl.load(x + x_offsets, mask=inside_m & (offs_k < left), other=0.0)
            b = tl.load(w + w_offsets, mask=inside_n & (offs_k < left), other=0.0)
        if WEIGHTS_FIRST:
            sums = tl.dot(b, tl.trans(a), sums, input_precision="ieee")
        else:
            sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
        x += BLOCK_K
        w += BLOCK_K

    if WEIGHTS_FIRST:
        sums = tl.trans(sums)
    columns = tl.arange(0, BLOCK_N)[None, :]
    out += head * stride_ob + start_m * stride_om + start_n
    tl.store(out + offs_m * stride_om + columns, sums.to(out.dtype.element_ty), mask=inside_m & (tile_n * BLOCK_N + columns < n))


def fits(problem: BatchedMatmul, config: BatchedConfig, chip: Chip) -> str | None:
    """Tiles are powers of two no larger than the padded problem; stages fit shared memory and sums fit registers."""
    bm, bn, bk, warps = config.block_m, config.block_n, config.block_k, config.num_warps
    if problem.batch > 65535:
        return f"a grid has no {problem.batch} heads"
    if any(value < 1 or value & (value - 1) for value in (bm, bn, bk, warps)):
        return "tiles and warps must be powers of two"
    if min(bm, bn, bk) < 16:
        return "tl.dot needs tiles of at least 16"
    if config.num_stages < 1:
        return "num_stages must be at least 1"
    for block, size, name in ((bm, problem.m, "m"), (bn, problem.n, "n"), (bk, problem.k, "k")):
        if block > max(16, next_power_of_2(size)):
            return f"block_{name} is larger than {name}"
    if max(problem.batch, 1) * max(problem.n, problem.k) * max(bm, bn) >= 2**31:
        return "rows are too long for 32-bit offsets within a tile"
    threads = 32 * warps
    if warps > 16 or (bm // 16) * (bn // 8) < warps:
        return "too many warps for the tile"
    fp32 = problem.dtype == "float32"
    if config.weights_first and (bn < 64 or warps < 4 or fp32):
        return "weights first is for the matrix unit, which wants 64 of their rows and four warps"
    if (bm + bn) * bk // threads > MAX_LOADS_PER_THREAD:
        return "the pointers of one step would spill registers"
    if bm * bn // threads > (MAX_SUMS_PER_THREAD_FP32 if fp32 else MAX_SUMS_PER_THREAD):
        return "the sums would spill registers"
    if fp32 and bm * bn * bk // threads > MAX_FMAS_PER_STEP_FP32:
        return "one step would unroll too many multiply-adds"
    if pipeline_smem_bytes((bm + bn) * bk * SIZE_BYTES[problem.dtype], config.num_stages) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def default(problem: BatchedMatmul, chip: Chip) -> BatchedConfig:
    """For few tokens all of them with 64 columns, weights first; square tiles for many."""
    # Triton learns alignment only of sizes that 16 divides. Rows of others are loaded element by element, which takes one pointer each.
    small = problem.dtype == "float32" or problem.k % 16 != 0
    padded_m, padded_n, padded_k = (max(16, next_power_of_2(size)) for size in (problem.m, problem.n, problem.k))
    bm = min(padded_m, 64 if small else 128)
    bn = min(padded_n, 128 if bm == 128 else 64)
    bk = min(padded_k, 32 if small else 128 if bm <= 32 else 64)
    warps = 4 if bm <= 64 else 8
    while (bm // 16) * (bn // 8) < warps:
        warps //= 2
    first = bm < 64 <= bn and problem.dtype != "float32"
    return BatchedConfig(bm, bn, bk, first, warps, max(1, min(3, cdiv(problem.k, bk))))


def space(problem: BatchedMatmul, chip: Chip) -> Iterator[BatchedConfig]:
    """All tiles that are not hopeless for the shape, from few stages to as many as k has steps."""
    fp32 = problem.dtype == "float32"
    for bm, bn, bk in product((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), (16, 32) if fp32 else (32, 64, 128, 256)):
        # A tile that more than doubles the rows is waste, one 8 times below m reads the weights from L2 too often.
        if bm > max(16, next_power_of_2(problem.m)) or (bm < 64 and problem.m >= 8 * bm):
            continue
        for first, warps, stages in product((False, True), (2, 4, 8), (1, 2, 3, 4, 5)):
            if (
                bm * bn < 1024 * warps // 2
                or stages > max(1, cdiv(problem.k, bk))
                or (first and (fp32 or bm >= 128 or bn < 64 or warps < 4))
            ):
                continue  # idle warps, idle stages, and an order for few rows
            yield BatchedConfig(bm, bn, bk, first, warps, stages)


@kernel(BatchedMatmul, backend="triton", config=BatchedConfig, space=space, default=default, fits=fits)
def triton_tiled(problem: BatchedMatmul, config: BatchedConfig, chip: Chip) -> Launch:
    """Triton with pointers: a head per row of the grid, weights as first operand where tokens are few; no copies around it."""
    m, n, k = problem.m, problem.n, problem.k
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n), problem.batch)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        _batched_tile[grid](
            x,
            w,
            out,
            m,
            n,
            k,
            x.stride(0),
            x.stride(1),
            w.stride(0),
            w.stride(1),
            out.stride(0),
            out.stride(1),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            WEIGHTS_FIRST=config.weights_first,
            EVEN_M=m % config.block_m == 0,
            EVEN_N=n % config.block_n == 0,
            EVEN_K=k % config.block_k == 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    return launch
