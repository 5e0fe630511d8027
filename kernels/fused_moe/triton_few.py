"""A fused MoE for a handful of tokens: two launches, no sorting; each choice streams its expert's weights once."""

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
from klab.kernels.fused_moe.problem import BLOCK, FusedMoe
from klab.kernels.triton_experts import as_fp8, silu_and_mul
from klab.kernels.triton_support import cdiv, next_power_of_2

# Tokens that choose the same expert read its weights twice here (the second time from L2, if it is soon): above this many choices per
# expert sorting them pays.
MOST_CHOICES_PER_EXPERT = 1.0


@dataclass(frozen=True)
class FewConfig(Config):
    """A program of num_warps warps has `up_n` activated columns of one choice, or `down_n` output columns of one token, and reads block_k
    elements of each weight row at a time, num_stages of them ahead.
    """

    up_n: int = 8
    down_n: int = 8
    block_k: int = 512
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _up(
    x,
    w,
    w_scale,
    ids,
    active,
    n,
    k,
    stride_x,
    stride_we,
    stride_wn,
    stride_wse,
    stride_wsn,
    stride_ids,
    stride_active,
    TOP_K: tl.constexpr,
    LOCAL: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    choice = tl.program_id(0)
    token = choice // TOP_K
    expert = tl.load(ids + token * stride_ids + choice % TOP_K).to(tl.int64)
    if expert >= LOCAL:
        return
    # A step is [columns, blocks with a scale each, elements of a block]; without scales it is one block.
    SUB: tl.constexpr = SCALE_BLOCK if SCALE_BLOCK > 0 else BLOCK_K
    BLOCKS: tl.constexpr = BLOCK_K // SUB
    block = tl.arange(0, BLOCKS)
    offs_k = block[:, None] * SUB + tl.arange(0, SUB)[None, :]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = column < n
    x += token.to(tl.int64) * stride_x
    w += expert * stride_we
    gate_rows = column[:, None, None].to(tl.int64) * stride_wn
    up_rows = (column + n)[:, None, None].to(tl.int64) * stride_wn
    if SCALE_BLOCK > 0:
        gate_scales = w_scale + expert * stride_wse + (column // SCALE_BLOCK * stride_wsn)[:, None] + block[None, :]
        up_scales = w_scale + expert * stride_wse + ((column + n) // SCALE_BLOCK * stride_wsn)[:, None] + block[None, :]
    gates = tl.zeros((BLOCK_N, BLOCKS, SUB), dtype=tl.float32)
    ups = tl.zeros((BLOCK_N, BLOCKS, SUB), dtype=tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        at = start + offs_k
        inside = inside_n[:, None, None] & (at < k)[None, :, :]
        gate = tl.load(w + gate_rows + at[None, :, :], mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
        if SCALE_BLOCK > 0:
            values = as_fp8(values)
            scaled = inside_n[:, None] & (start + block * SUB < k)[None, :]
            gate *= tl.load(gate_scales + start // SUB, mask=scaled, other=0.0)[:, :, None]
        gates += gate * values[None, :, :]
        if GATED:
            up = tl.load(w + up_rows + at[None, :, :], mask=inside, other=0.0).to(tl.float32)
            if SCALE_BLOCK > 0:
                up *= tl.load(up_scales + start // SUB, mask=scaled, other=0.0)[:, :, None]
            ups += up * values[None, :, :]
    gate_sum = tl.sum(tl.sum(gates, axis=2), axis=1)
    if GATED:
        result = silu_and_mul(gate_sum, tl.sum(tl.sum(ups, axis=2), axis=1), LIMIT)
    else:
        result = tl.maximum(gate_sum, 0.0) * tl.maximum(gate_sum, 0.0)
    tl.store(active + choice * stride_active + column, result, mask=inside_n)


@triton.jit
def _down(
    active,
    w,
    w_scale,
    ids,
    topk_weights,
    out,
    n,
    k,
    stride_active,
    stride_we,
    stride_wn,
    stride_wse,
    stride_wsn,
    stride_ids,
    stride_tw,
    stride_out,
    TOP_K: tl.constexpr,
    LOCAL: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    token = tl.program_id(0)
    SUB: tl.constexpr = SCALE_BLOCK if SCALE_BLOCK > 0 else BLOCK_K
    BLOCKS: tl.constexpr = BLOCK_K // SUB
    block = tl.arange(0, BLOCKS)
    offs_k = block[:, None] * SUB + tl.arange(0, SUB)[None, :]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = column < n
    rows = column[:, None, None].to(tl.int64) * stride_wn
    sums = tl.zeros((BLOCK_N, BLOCKS, SUB), dtype=tl.float32)
    # One loop over the steps of all of the token's experts: the next expert's weights are under way while the last one's are added.
    steps = tl.cdiv(k, BLOCK_K)
    for step in tl.range(0, TOP_K * steps, num_stages=STAGES):
        i = step // steps
        start = step % steps * BLOCK_K
        at = start + offs_k
        expert = tl.load(ids + token * stride_ids + i).to(tl.int64)
        here = (expert < LOCAL) & (at < k)
        inside = inside_n[:, None, None] & here[None, :, :]
        weights = tl.load(w + expert * stride_we + rows + at[None, :, :], mask=inside, other=0.0).to(tl.float32)
        values = tl.load(active + (token * TOP_K + i) * stride_active + at, mask=here, other=0.0)
        if SCALE_BLOCK > 0:
            values = as_fp8(values)
            scales = w_scale + expert * stride_wse + (column // SCALE_BLOCK * stride_wsn)[:, None] + (start // SUB + block)[None, :]
            scaled = inside_n[:, None] & (start + block * SUB < k)[None, :] & (expert < LOCAL)
            weights *= tl.load(scales, mask=scaled, other=0.0)[:, :, None]
        sums += weights * (values * tl.load(topk_weights + token * stride_tw + i))[None, :, :]
    result = tl.sum(tl.sum(sums, axis=2), axis=1)
    tl.store(out + token.to(tl.int64) * stride_out + column, result.to(out.dtype.element_ty), mask=inside_n)


def fits(problem: FusedMoe, config: FewConfig, chip: Chip) -> str | None:
    """Few choices per expert, and partial sums that fit registers."""
    c, p = config, problem
    if any(value < 1 or value & (value - 1) for value in (c.up_n, c.down_n, c.block_k, c.num_warps)) or c.num_warps > 16:
        return "columns, block_k and warps must be powers of two, at most 16 warps"
    if p.tokens * p.top_k > MOST_CHOICES_PER_EXPERT * p.experts and p.tokens > 1:
        return "many tokens share an expert: sorting them pays"
    if c.block_k < (BLOCK if p.format else 32) or c.block_k > max(BLOCK, next_power_of_2(max(p.hidden, p.intermediate))):
        return "block_k goes from 32 (fp8: 128) to the rows' length"
    if c.num_stages < 1:
        return "num_stages must be at least 1"
    if p.format and chip.target < 89:
        return "fp8 needs compute capability 8.9"
    sums = max(c.up_n * (2 if p.gated else 1), c.down_n) * c.block_k // (32 * c.num_warps)
    if sums > 64:
        return "the partial sums would spill registers"
    return None


def default(problem: FusedMoe, chip: Chip) -> FewConfig:
    """16 bytes per thread and load, and enough programs to fill the chip."""
    p = problem
    # The largest power of two within both rows, so that few lanes are idle.
    block_k = max(BLOCK if p.format else 32, min(512, next_power_of_2(min(p.hidden, p.intermediate) + 1) // 2))
    up_n = down_n = max(1, 4096 // block_k)
    while up_n > 4 and p.tokens * p.top_k * cdiv(p.intermediate, up_n) < 2 * chip.sm_count:
        up_n //= 2
    while down_n > 4 and p.tokens * cdiv(p.hidden, down_n) < 2 * chip.sm_count:
        down_n //= 2
    warps = 4
    while warps > 1 and max(up_n * (2 if p.gated else 1), down_n) * block_k < 8 * 32 * warps:
        warps //= 2
    return FewConfig(up_n, down_n, block_k, warps, 3)


def space(problem: FusedMoe, chip: Chip) -> Iterator[FewConfig]:
    """All shapes of a program whose threads have work."""
    for up_n, down_n, block_k, warps, stages in product((2, 4, 8, 16), (2, 4, 8, 16, 32), (128, 256, 512, 1024), (2, 4, 8), (1, 2, 3, 4)):
        # 16 bytes at least for each thread to load.
        if min(up_n, down_n) * block_k >= (16 if problem.format else 8) * 32 * warps:
            yield FewConfig(up_n, down_n, block_k, warps, stages)


@kernel(FusedMoe, backend="triton", config=FewConfig, space=space, default=default, fits=fits)
def triton_few(problem: FusedMoe, config: FewConfig, chip: Chip) -> Launch:
    """Triton for few tokens, 2 launches: matrix-vector products on the choices as they come; down sums a token's experts in registers."""
    p, c = problem, config
    kept: dict[torch.device, torch.Tensor] = {}
    scale_block = BLOCK if p.format else 0

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, ids, gate_up, down, weights = (inputs[name] for name in ("x", "topk_ids", "w_gate_up", "w_down", "topk_weights"))
        if x.device not in kept:
            # float32: a few rows, which stay in L2.
            kept[x.device] = torch.empty((p.tokens * p.top_k, p.intermediate), dtype=torch.float32, device=x.device)
        active = kept[x.device]
        up_scale, down_scale = (inputs["w_gate_up_scale"], inputs["w_down_scale"]) if p.format else (gate_up, down)
        _up[(p.tokens * p.top_k, cdiv(p.intermediate, c.up_n))](
            x,
            gate_up,
            up_scale,
            ids,
            active,
            p.intermediate,
            p.hidden,
            x.stride(0),
            *gate_up.stride()[:2],
            *up_scale.stride()[:2],
            ids.stride(0),
            active.stride(0),
            TOP_K=p.top_k,
            LOCAL=p.local,
            GATED=p.gated,
            LIMIT=p.swiglu_limit,
            SCALE_BLOCK=scale_block,
            BLOCK_N=c.up_n,
            BLOCK_K=c.block_k,
            STAGES=c.num_stages,
            num_warps=c.num_warps,
        )
        _down[(p.tokens, cdiv(p.hidden, c.down_n))](
            active,
            down,
            down_scale,
            ids,
            weights,
            outputs["out"],
            p.hidden,
            p.intermediate,
            active.stride(0),
            *down.stride()[:2],
            *down_scale.stride()[:2],
            ids.stride(0),
            weights.stride(0),
            outputs["out"].stride(0),
            TOP_K=p.top_k,
            LOCAL=p.local,
            SCALE_BLOCK=scale_block,
            BLOCK_N=c.down_n,
            BLOCK_K=c.block_k,
            STAGES=c.num_stages,
            num_warps=c.num_warps,
        )

    return launch
