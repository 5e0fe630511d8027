"""A fused matmul in Triton: packed weights are unpacked in registers, where the tensor core takes its first operand from."""

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
from klab.kernels.triton_support import INTERPRETED, cdiv, next_power_of_2, pipeline_smem_bytes
from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul

# One thread holds block_n * block_m / (32 num_warps) sums, twice where groups are scaled one by one, and its part of the unpacked tile.
MAX_SUMS_PER_THREAD = 128
MAX_WEIGHTS_PER_THREAD = 128
REDUCE_BLOCK = 512

# Four packed bytes become two tensors of four numbers, those of the low and of the high halves. A byte in each 16-bit half, its nibble with
# the sign bit turned (value + 8) put into the mantissa of 128 (bf16) or 1024 (fp16); then 136 or 1032 is subtracted. 12 instructions for
# 8 weights, where conversions by Triton's own operators take 5 for each.
UNPACK = """
{{
.reg .b32 p<2>, q<2>;
prmt.b32 p0, $4, 0, 0x4140;
prmt.b32 p1, $4, 0, 0x4342;
shr.u32 q0, p0, 4;
shr.u32 q1, p1, 4;
lop3.b32 p0, p0, 0x000f000f, {magic}, 0x6a;
lop3.b32 p1, p1, 0x000f000f, {magic}, 0x6a;
lop3.b32 q0, q0, 0x000f000f, {magic}, 0x6a;
lop3.b32 q1, q1, 0x000f000f, {magic}, 0x6a;
{subtract} $0, p0, {one}, {offset};
{subtract} $1, p1, {one}, {offset};
{subtract} $2, q0, {one}, {offset};
{subtract} $3, q1, {one}, {offset};
}}
"""
_BF16 = {"magic": "0x43084308", "one": "pone", "offset": "poff", "subtract": "fma.rn.bf16x2"}


def unpack_asm(dtype: str) -> str:
    """The PTX for one dtype; its constants are 128 + 8 and 1024 + 8 with the sign bit of the nibble turned, 1.0, and -136 and -1032."""
    # fp16: 0x6400 is 1024, 0x3c00 is 1, 0xe408 is -1032; bf16: 0x4300 is 128, 0x3f80 is 1, 0xc308 is -136.
    if dtype == "float16":
        return UNPACK.format(magic="0x64086408", one="one", offset="offset", subtract="fma.rn.f16x2").replace(
            ".reg .b32 p<2>, q<2>;", ".reg .b32 p<2>, q<2>, one, offset;\nmov.b32 one, 0x3c003c00;\nmov.b32 offset, 0xe408e408;"
        )
    return UNPACK.format(magic="0x43084308", one="one", offset="offset", subtract="fma.rn.bf16x2").replace(
        ".reg .b32 p<2>, q<2>;", ".reg .b32 p<2>, q<2>, one, offset;\nmov.b32 one, 0x3f803f80;\nmov.b32 offset, 0xc308c308;"
    )


@dataclass(frozen=True)
class SplitKConfig(Config):
    block_m: int = 16
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    pairs: str = "split"


@triton.jit
def _halves(packed, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Bytes of two's-complement nibbles as two tensors of DTYPE: the low halves and the high halves."""
    if ASM != "":
        low, high = tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [packed], dtype=(DTYPE, DTYPE), is_pure=True, pack=4)
    else:
        signed = packed.to(tl.int8, bitcast=True)
        low = ((signed << 4) >> 4).to(DTYPE)
        high = (signed >> 4).to(DTYPE)
    return low, high


@triton.jit
def _weight_only_tile(
    x, w, scale, out, m, n, k,
    stride_xm, stride_wn, stride_sn, stride_om, stride_on, stride_split,
    GROUP: tl.constexpr, INT4: tl.constexpr, ASM: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(m, BLOCK_M)
    tile_m = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    split = tl.program_id(1)
    start_n = (tile_n * BLOCK_N).to(tl.int64)
    start_m = (tile_m * BLOCK_M).to(tl.int64)
    k_per_split = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
    k_start = split * k_per_split
    k_end = min(k_start + k_per_split, k)

    W_COLUMNS: tl.constexpr = BLOCK_K // 2 if INT4 else BLOCK_K
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    rows_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    offs_w = tl.arange(0, W_COLUMNS)[None, :]
    inside_m = tile_m * BLOCK_M + offs_m < m
    inside_n = tile_n * BLOCK_N + offs_n < n
    x_tile = x + start_m * stride_xm + k_start + offs_m * stride_xm + offs_k
    w_tile = w + start_n * stride_wn + (k_start // 2 if INT4 else k_start) + offs_n * stride_wn + offs_w
    scale_tile = scale + start_n * stride_sn + rows_n * stride_sn
    inside_rows = tile_n * BLOCK_N + rows_n < n
    DTYPE: tl.constexpr = x.dtype.element_ty

    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k_now in range(k_start, k_end, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_tile) if EVEN_M else tl.load(x_tile, mask=inside_m, other=0.0)
            b = tl.load(w_tile) if EVEN_N else tl.load(w_tile, mask=inside_n, other=0.0)
        else:
            left = k - k_now
            a = tl.load(x_tile, mask=inside_m & (offs_k < left), other=0.0)
            b = tl.load(w_tile, mask=inside_n & (offs_w < (left // 2 if INT4 else left)), other=0.0)
        if GROUP > 0:
            s = tl.load(scale_tile + k_now // GROUP, mask=inside_rows, other=0.0).to(tl.float32)
            before = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            before = sums
        if INT4:
            low, high = _halves(b, DTYPE, ASM)
            if PAIRS == "join":
                part = tl.dot(tl.join(low, high).reshape(BLOCK_N, BLOCK_K), tl.trans(a), before)
            else:
                even, odd = tl.split(a.reshape(BLOCK_M, BLOCK_K // 2, 2))
                part = tl.dot(low, tl.trans(even), before)
                part = tl.dot(high, tl.trans(odd), part)
        else:
            part = tl.dot(b.to(DTYPE), tl.trans(a), before)
        sums = sums + part * s[:, None] if GROUP > 0 else part
        x_tile += BLOCK_K
        w_tile += W_COLUMNS
    if GROUP == 0:
        sums *= tl.load(scale_tile, mask=inside_rows, other=0.0).to(tl.float32)[:, None]

    out += split.to(tl.int64) * stride_split + start_m * stride_om + start_n * stride_on
    offs_m = tl.arange(0, BLOCK_M)[None, :]
    inside = (tile_m * BLOCK_M + offs_m < m) & inside_n
    tl.store(out + offs_m * stride_om + offs_n * stride_on, sums.to(out.dtype.element_ty), mask=inside)


@kernel(WeightOnlyMatmul, backend="triton", config=SplitKConfig)
def triton_split_k(problem: WeightOnlyMatmul, config: SplitKConfig, chip: Chip) -> Launch:
    """x"""
    m, n, k, splits = problem.m, problem.n, problem.k, config.split_k
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n), splits)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, scale, out = inputs["x"], inputs["w"], inputs["scale"], outputs["out"]
        _weight_only_tile[grid](
            x, w, scale, out, m, n, k, x.stride(0), w.stride(0), scale.stride(0), *out.stride(), m * n,
            GROUP=problem.group, INT4=problem.format == "int4", ASM="" if INTERPRETED else unpack_asm(problem.dtype),
            PAIRS=config.pairs, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, SPLIT_K=splits,
            EVEN_M=m % config.block_m == 0, EVEN_N=n % config.block_n == 0, EVEN_K=k % config.block_k == 0,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    return launch
