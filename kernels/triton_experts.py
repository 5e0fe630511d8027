"""The steps around the expert matrix products: quantise rows, activate, sum over a token's experts."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from klab.kernels.fused_moe.problem import BLOCK, SWIGLU_ALPHA, FusedMoe
from klab.kernels.triton_support import INTERPRETED, cdiv, next_power_of_2

FP8_MAX = tl.constexpr(448.0)
LEAST_AMAX = tl.constexpr(1e-12)
ALPHA = tl.constexpr(SWIGLU_ALPHA)
# Triton's interpreter drops the carry into the exponent when it rounds to fp8 (15.9 becomes 8): there, values are rounded to fp8's three
# bits first, so that the cast is exact.
CAST_LOSES_CARRY = tl.constexpr(INTERPRETED)
# 128-column blocks per program: 8 of 16-bit values are 2 KB, a 16-byte load for each of 128 threads.
BLOCKS_PER_PROGRAM = 8


@triton.jit
def to_fp8(values):
    """fp8 values [.., 128] of float32 ones and their scales [..], as quantize.quantize_fp8 has them."""
    scale = tl.maximum(tl.max(tl.abs(values), axis=1), LEAST_AMAX) / FP8_MAX
    scaled = tl.minimum(tl.maximum(values / scale[:, None], 0.0 - FP8_MAX), FP8_MAX)
    if CAST_LOSES_CARRY:
        bits = scaled.to(tl.int32, bitcast=True)
        scaled = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return scaled.to(tl.float8e4nv), scale


@triton.jit
def as_fp8(values):
    """float32 values [.., 128] as the fp8 ones with a scale per row that stand for them."""
    quantised, scale = to_fp8(values)
    return quantised.to(tl.float32) * scale[:, None]


@triton.jit
def silu_and_mul(gate, up, LIMIT: tl.constexpr):
    """silu(gate) * up in float32, or gpt-oss's clamped form where LIMIT > 0."""
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        return gate / (1.0 + tl.exp(gate * (0.0 - ALPHA))) * up
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _quantize(x, to, scales, width, stride_x, stride_to, stride_scales, BLOCKS: tl.constexpr, SCALE_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    values = tl.load(x + row * stride_x + column, mask=column < width, other=0.0).to(tl.float32)
    quantised, scale = to_fp8(values)
    tl.store(to + row * stride_to + column, quantised, mask=column < width)
    tl.store(scales + row * stride_scales + block, scale, mask=block * SCALE_BLOCK < width)


@triton.jit
def _activate(
    up_rows,
    to,
    scales,
    ids,
    width,
    top_k,
    stride_ids,
    stride_up,
    stride_to,
    stride_scales,
    LOCAL: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    FP8: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    choice = tl.program_id(0)
    if tl.load(ids + choice // top_k * stride_ids + choice % top_k) >= LOCAL:
        return
    row = choice.to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    inside = column < width
    values = tl.load(up_rows + row * stride_up + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        values = silu_and_mul(values, tl.load(up_rows + row * stride_up + width + column, mask=inside, other=0.0).to(tl.float32), LIMIT)
    else:
        values = tl.maximum(values, 0.0) * tl.maximum(values, 0.0)
    if FP8:
        quantised, scale = to_fp8(tl.where(inside, values, 0.0))
        tl.store(to + row * stride_to + column, quantised, mask=inside)
        tl.store(scales + row * stride_scales + block, scale, mask=block * SCALE_BLOCK < width)
    else:
        tl.store(to + row * stride_to + column, values.to(to.dtype.element_ty), mask=inside)


@triton.jit
def _sum(rows, out, ids, width, stride_ids, stride_rows, stride_out, TOP_K: tl.constexpr, LOCAL: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(TOP_K):
        here = tl.load(ids + token * stride_ids + i) < LOCAL
        total += tl.load(rows + (token * TOP_K + i) * stride_rows + column, mask=inside & here, other=0.0).to(tl.float32)
    tl.store(out + token * stride_out + column, total.to(out.dtype.element_ty), mask=inside)


def quantize_rows(x: torch.Tensor, to: torch.Tensor, scales: torch.Tensor) -> None:
    """Enqueue: fp8 rows of x [rows, width] with a scale per 128 columns."""
    rows, width = x.shape
    blocks = min(BLOCKS_PER_PROGRAM, next_power_of_2(cdiv(width, BLOCK)))
    grid = (rows, cdiv(width, BLOCK * blocks))
    _quantize[grid](x, to, scales, width, x.stride(0), to.stride(0), scales.stride(0), BLOCKS=blocks, SCALE_BLOCK=BLOCK, num_warps=4)


def activate(problem: FusedMoe, up_rows: torch.Tensor, ids: torch.Tensor, to: torch.Tensor, scales: torch.Tensor) -> None:
    """Enqueue: [choices, up_rows] to [choices, intermediate], in fp8 with `scales` if so; other GPUs' rows are left."""
    width = problem.intermediate
    blocks = min(BLOCKS_PER_PROGRAM, next_power_of_2(cdiv(width, BLOCK)))
    _activate[(ids.numel(), cdiv(width, BLOCK * blocks))](
        up_rows,
        to,
        scales,
        ids,
        width,
        problem.top_k,
        ids.stride(0),
        up_rows.stride(0),
        to.stride(0),
        scales.stride(0),
        LOCAL=problem.local,
        GATED=problem.gated,
        LIMIT=problem.swiglu_limit,
        FP8=bool(problem.format),
        BLOCKS=blocks,
        SCALE_BLOCK=BLOCK,
        num_warps=4,
    )


def sum_experts(problem: FusedMoe, rows: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Enqueue: out[t] = the sum of its local experts' rows [choices, hidden], always in the order of the choices."""
    block = min(1024, next_power_of_2(problem.hidden))
    _sum[(problem.tokens, cdiv(problem.hidden, block))](
        rows,
        out,
        ids,
        problem.hidden,
        ids.stride(0),
        rows.stride(0),
        out.stride(0),
        TOP_K=problem.top_k,
        LOCAL=problem.local,
        BLOCK=block,
        num_warps=4,
    )
