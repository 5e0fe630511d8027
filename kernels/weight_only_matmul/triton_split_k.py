"""A fused matmul in Triton: packed weights are unpacked in registers, where Hopper's tensor core takes its first operand from."""

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
from klab.kernels.errors import UsageError
from klab.kernels.triton_support import INTERPRETED, cdiv, next_power_of_2, pipeline_smem_bytes
from klab.kernels.weight_only_matmul._unpack_ptx import unpack_ptx
from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul

# One thread holds block_n * block_m / (32 num_warps) float32 sums, twice where each group is scaled by itself, and its part of the
# unpacked tile, two weights to a register.
MAX_SUMS_PER_THREAD = 128
MAX_WEIGHTS_PER_THREAD = 128
REDUCE_BLOCK = 512
# Weights per 16-bit word of the packed matrix.
PER_WORD = {"int4": 4, "fp8": 2}
TYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16}


@dataclass(frozen=True)
class SplitKConfig(Config):
    """A CTA computes block_m x block_n outputs over 1/split_k of k, block_k at a time."""

    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4


@triton.jit
def _unpack(words, PER_WORD: tl.constexpr, DTYPE: tl.constexpr, TYPES: tl.constexpr, PTX: tl.constexpr):
    """16-bit words of packed weights as PER_WORD tensors of DTYPE: number i has the weights of k = i, i + PER_WORD, ..."""
    if PTX != "":
        if PER_WORD == 4:
            a, b, c, d = tl.inline_asm_elementwise(PTX, "=r,=r,=r,=r,r", [words], dtype=TYPES, is_pure=True, pack=2)
        else:
            a, b = tl.inline_asm_elementwise(PTX, "=r,=r,r", [words], dtype=TYPES, is_pure=True, pack=2)
            c, d = a, b
    elif PER_WORD == 4:
        a = ((words << 12) >> 12).to(DTYPE)
        b = ((words << 8) >> 12).to(DTYPE)
        c = ((words << 4) >> 12).to(DTYPE)
        d = (words >> 12).to(DTYPE)
    else:
        a = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
        b = ((words >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
        c, d = a, b
    return a, b, c, d


@triton.jit
def _weight_only_tile(
    x,
    w,
    scale,
    out,
    m,
    n,
    k,
    stride_xm,
    stride_wn,
    stride_sn,
    stride_om,
    stride_on,
    stride_split,
    GROUP: tl.constexpr,
    PER_WORD: tl.constexpr,
    PTX: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    tiles_m = tl.cdiv(m, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    split = tl.program_id(1)
    k_per_split = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
    k_start = split * k_per_split
    k_end = min(k_start + k_per_split, k)

    WORDS: tl.constexpr = BLOCK_K // PER_WORD
    DTYPE: tl.constexpr = x.dtype.element_ty
    # Where the tile starts is reckoned in 64 bits, offsets within it in 32.
    start_m = (tile_m * BLOCK_M).to(tl.int64)
    start_n = (tile_n * BLOCK_N).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    rows_n = tl.arange(0, BLOCK_N)
    offs_n = rows_n[:, None]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    offs_w = tl.arange(0, WORDS)[None, :]
    inside_m = tile_m * BLOCK_M + offs_m < m
    inside_rows = tile_n * BLOCK_N + rows_n < n
    inside_n = tile_n * BLOCK_N + offs_n < n
    x += start_m * stride_xm + k_start
    w += start_n * stride_wn + k_start // PER_WORD
    scale += start_n * stride_sn + rows_n * stride_sn
    x_offsets = offs_m * stride_xm + offs_k
    w_offsets = offs_n * stride_wn + offs_w

    # Weights are the first operand, 64 rows of n for wgmma; the few rows of x are the second.
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if GROUP > 0:
        next_scale = tl.load(scale + k_start // GROUP, mask=inside_rows & (k_start < k), other=0.0)
    for k_now in range(k_start, k_end, BLOCK_K):
        if EVEN_K:
            rows = tl.load(x + x_offsets) if EVEN_M else tl.load(x + x_offsets, mask=inside_m, other=0.0)
            words = tl.load(w + w_offsets) if EVEN_N else tl.load(w + w_offsets, mask=inside_n, other=0)
        else:
            left = k - k_now
            rows = tl.load(x + x_offsets, mask=inside_m & (offs_k < left), other=0.0)
            words = tl.load(w + w_offsets, mask=inside_n & (offs_w < left // PER_WORD), other=0)
        if GROUP > 0:
            now_scale = next_scale.to(tl.float32)
            # A step ahead: loads of 2 bytes are too narrow for the asynchronous pipeline.
            k_next = k_now + BLOCK_K
            next_scale = tl.load(scale + k_next // GROUP, mask=inside_rows & (k_next < k_end), other=0.0)
        first = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32) if GROUP > 0 else sums

        w0, w1, w2, w3 = _unpack(words, PER_WORD, DTYPE, TYPES, PTX)
        if PER_WORD == 4:
            evens, odds = tl.split(rows.reshape(BLOCK_M, WORDS, 2, 2))
            x0, x2 = tl.split(evens)
            x1, x3 = tl.split(odds)
            part = tl.dot(w0, tl.trans(x0), first)
            part = tl.dot(w1, tl.trans(x1), part)
            part = tl.dot(w2, tl.trans(x2), part)
            part = tl.dot(w3, tl.trans(x3), part)
        else:
            x0, x1 = tl.split(rows.reshape(BLOCK_M, WORDS, 2))
            part = tl.dot(w0, tl.trans(x0), first)
            part = tl.dot(w1, tl.trans(x1), part)
        sums = sums + part * now_scale[:, None] if GROUP > 0 else part
        x += BLOCK_K
        w += WORDS
    if GROUP == 0:
        sums *= tl.load(scale, mask=inside_rows, other=0.0).to(tl.float32)[:, None]

    out += split.to(tl.int64) * stride_split + start_m * stride_om + start_n * stride_on
    columns_m = tl.arange(0, BLOCK_M)[None, :]
    inside = (tile_m * BLOCK_M + columns_m < m) & inside_n
    tl.store(out + columns_m * stride_om + offs_n * stride_on, sums.to(out.dtype.element_ty), mask=inside)


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


def fits(problem: WeightOnlyMatmul, config: SplitKConfig, chip: Chip) -> str | None:
    """Tiles are powers of two no larger than the padded problem, steps lie within a group; stages fit shared memory, sums registers."""
    bm, bn, bk, warps, splits = config.block_m, config.block_n, config.block_k, config.num_warps, config.split_k
    if problem.dtype not in TYPES:
        return f"{problem.dtype} has no tensor-core product of full precision"
    per_word = PER_WORD[problem.format]
    if problem.k % per_word:
        return f"reads weights in words of 16 bits: k is a multiple of {per_word}"
    if any(value < 1 or value & (value - 1) for value in (bm, bn, bk, warps, splits)):
        return "tiles, splits and warps must be powers of two"
    if min(bm, bn) < 16 or bk < 16 * per_word:
        return f"tl.dot needs tiles of at least 16, and block_k {16 * per_word}"
    if config.num_stages < 1:
        return "num_stages must be at least 1"
    for block, size, least, name in ((bm, problem.m, 16, "m"), (bn, problem.n, 16, "n"), (bk, problem.k, 16 * per_word, "k")):
        if block > max(least, next_power_of_2(size)):
            return f"block_{name} is larger than {name}"
    if problem.group and problem.group < problem.k and problem.group % bk:
        return "a step along k would have several scales"
    if splits > cdiv(problem.k, bk):
        return "more splits than steps along k"
    if warps > 16 or (bn // 16) * (bm // 8) < warps:
        return "too many warps for the tile"
    threads = 32 * warps
    if bm * bn // threads * (2 if problem.group else 1) > MAX_SUMS_PER_THREAD or bn * bk // threads > MAX_WEIGHTS_PER_THREAD:
        return "the sums and the unpacked weights would spill registers"
    # Per stage x and the packed weights; x once more, sorted by the place in a word.
    if pipeline_smem_bytes(2 * bm * bk + 2 * bn * bk // per_word, config.num_stages, 2 * bm * bk) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def _block_k(problem: WeightOnlyMatmul) -> int:
    """The largest step up to 128 that the groups allow, and k needs."""
    least = 16 * PER_WORD[problem.format]
    step = max(least, min(128, next_power_of_2(problem.k)))
    while step > least and problem.group and problem.group < problem.k and problem.group % step:
        step //= 2
    return step


def default(problem: WeightOnlyMatmul, chip: Chip) -> SplitKConfig:
    """All rows of x up to 64 by 128 rows of weights where they fill the chip, 64 otherwise; enough splits for every SM."""
    bm = min(64, max(16, next_power_of_2(problem.m)))
    # 128 rows share what it costs to sort x: 2.3 instructions per weight instead of 3 for 16 rows of x.
    wide = cdiv(problem.n, 128) >= 2 * chip.sm_count
    bn, bk = min(128 if wide else 64, max(16, next_power_of_2(problem.n))), _block_k(problem)
    warps = 8 if bn == 128 and bm > 16 else 4
    while (bn // 16) * (bm // 8) < warps:
        warps //= 2
    tiles, steps, splits = cdiv(problem.m, bm) * cdiv(problem.n, bn), cdiv(problem.k, bk), 1
    # Fewer than 4 steps per split would not pay for the second pass.
    while tiles * splits < chip.sm_count and 8 * splits <= steps and splits < 16:
        splits *= 2
    return SplitKConfig(bm, bn, bk, splits, warps, 5 if bm == 16 else 4)


def space(problem: WeightOnlyMatmul, chip: Chip) -> Iterator[SplitKConfig]:
    """All tiles that are not hopeless for the shape, from few stages to as many as fit."""
    for bm, bn, bk in product((16, 32, 64, 128), (16, 32, 64, 128, 256), (32, 64, 128, 256)):
        if bm > max(16, next_power_of_2(problem.m)) or problem.m > 4 * bm:
            continue  # a tile that more than doubles the rows is waste, small ones read the weights too often
        tiles, steps = cdiv(problem.m, bm) * cdiv(problem.n, bn), cdiv(problem.k, bk)
        for split_k, warps, stages in product((1, 2, 4, 8, 16), (2, 4, 8), (2, 3, 4, 5, 6)):
            if split_k > 1 and (tiles * split_k > 8 * chip.sm_count or steps < 2 * split_k):
                continue  # the chip is full without it, or a split is too short to pipeline
            if (stages - 1) * split_k <= steps or stages == 2:
                yield SplitKConfig(bm, bn, bk, split_k, warps, stages)


@kernel(WeightOnlyMatmul, backend="triton", config=SplitKConfig, space=space, default=default, fits=fits)
def triton_split_k(problem: WeightOnlyMatmul, config: SplitKConfig, chip: Chip) -> Launch:
    """Triton: weights unpacked by PTX bit tricks into the matrix unit's first operand, groups scaled in float32, deterministic split-K."""
    m, n, k, splits = problem.m, problem.n, problem.k, config.split_k
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n), splits)
    per_word = PER_WORD[problem.format]
    partials: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, scale, out = inputs["x"], inputs["w"], inputs["scale"], outputs["out"]
        if w.stride(0) % 2 or w.data_ptr() % 2:
            raise UsageError("triton_split_k needs rows of weights at even addresses")
        to = out
        if splits > 1:
            if out.device not in partials:
                partials[out.device] = torch.empty((splits, m, n), dtype=torch.float32, device=out.device)
            to = partials[out.device]
        _weight_only_tile[grid](
            x,
            w.view(torch.int16),
            scale,
            to,
            m,
            n,
            k,
            x.stride(0),
            w.stride(0) // 2,
            scale.stride(0),
            *to.stride()[-2:],
            m * n,
            # One group is one scale per row, which the sums are multiplied by at the end.
            GROUP=problem.group if problem.groups > 1 else 0,
            PER_WORD=per_word,
            # The interpreter knows no PTX: there the same is written in Triton's operators.
            PTX="" if INTERPRETED else unpack_ptx(problem.format, problem.dtype),
            TYPES=(TYPES[problem.dtype],) * per_word,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
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
