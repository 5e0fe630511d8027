"""Packed experts for a handful of tokens: two launches, no sorting; each choice streams its expert's nibbles once."""

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
from klab.kernels.triton_experts import silu_and_mul
from klab.kernels.triton_support import cdiv, next_power_of_2
from klab.kernels.weight_only_moe._triton_unpack import factors, numbers
from klab.kernels.weight_only_moe.problem import WeightOnlyMoe

# Tokens that choose the same expert read its weights twice here: above this many choices per expert sorting them pays.
MOST_CHOICES_PER_EXPERT = 1.0


@dataclass(frozen=True)
class FewConfig(Config):
    """A program of num_warps warps has `up_n` activated columns of one choice, or `down_n` output columns of one token, and reads block_k
    weights of each row at a time, num_stages of them ahead.
    """

    up_n: int = 8
    down_n: int = 8
    block_k: int = 512
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _products(w, scale, rows, row_scales, pair, group, low, high, inside, scaled, MX: tl.constexpr):
    """[columns, groups, pairs] products of packed weights with the even (low) and odd (high) elements of a vector."""
    packed = tl.load(w + rows[:, None, None] + pair[None, :, :], mask=inside, other=0).to(tl.int32)
    factor = factors(tl.load(scale + row_scales[:, None] + group[None, :], mask=scaled, other=0), MX)
    return (numbers(packed & 15, MX) * low[None, :, :] + numbers(packed >> 4, MX) * high[None, :, :]) * factor[:, :, None]


@triton.jit
def _up(
    x,
    w,
    scale,
    ids,
    active,
    n,
    k,
    stride_x,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    stride_ids,
    stride_active,
    TOP_K: tl.constexpr,
    LOCAL: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    MX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    choice = tl.program_id(0)
    token = choice // TOP_K
    expert = tl.load(ids + token * stride_ids + choice % TOP_K).to(tl.int64)
    if expert >= LOCAL:
        return
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    PAIRS: tl.constexpr = GROUP // 2
    groups = tl.arange(0, GROUPS)
    pairs = groups[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = column < n
    x += token.to(tl.int64) * stride_x
    w += expert * stride_we
    scale += expert * stride_se
    gate_rows = column.to(tl.int64)
    up_rows = (column + n).to(tl.int64)
    gates = tl.zeros((BLOCK_N, GROUPS, PAIRS), dtype=tl.float32)
    ups = tl.zeros((BLOCK_N, GROUPS, PAIRS), dtype=tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        pair = start // 2 + pairs
        group = start // GROUP + groups
        here = 2 * pair < k
        low = tl.load(x + 2 * pair, mask=here, other=0.0).to(tl.float32)
        high = tl.load(x + 2 * pair + 1, mask=here, other=0.0).to(tl.float32)
        inside = inside_n[:, None, None] & here[None, :, :]
        scaled = inside_n[:, None] & (group * GROUP < k)[None, :]
        gates += _products(w, scale, gate_rows * stride_wn, gate_rows * stride_sn, pair, group, low, high, inside, scaled, MX)
        if GATED:
            ups += _products(w, scale, up_rows * stride_wn, up_rows * stride_sn, pair, group, low, high, inside, scaled, MX)
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
    scale,
    ids,
    topk_weights,
    out,
    n,
    k,
    stride_active,
    stride_we,
    stride_wn,
    stride_se,
    stride_sn,
    stride_ids,
    stride_tw,
    stride_out,
    TOP_K: tl.constexpr,
    LOCAL: tl.constexpr,
    MX: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    token = tl.program_id(0)
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    PAIRS: tl.constexpr = GROUP // 2
    groups = tl.arange(0, GROUPS)
    pairs = groups[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = column < n
    rows = column.to(tl.int64)
    sums = tl.zeros((BLOCK_N, GROUPS, PAIRS), dtype=tl.float32)
    # One loop over the steps of all of the token's experts: the next expert's weights are under way while the last one's are added.
    steps = tl.cdiv(k, BLOCK_K)
    for step in tl.range(0, TOP_K * steps, num_stages=STAGES):
        i = step // steps
        start = step % steps * BLOCK_K
        pair = start // 2 + pairs
        group = start // GROUP + groups
        expert = tl.load(ids + token * stride_ids + i).to(tl.int64)
        here = (expert < LOCAL) & (2 * pair < k)
        weight = tl.load(topk_weights + token * stride_tw + i)
        values = active + (token * TOP_K + i) * stride_active
        low = tl.load(values + 2 * pair, mask=here, other=0.0) * weight
        high = tl.load(values + 2 * pair + 1, mask=here, other=0.0) * weight
        inside = inside_n[:, None, None] & here[None, :, :]
        scaled = inside_n[:, None] & (group * GROUP < k)[None, :] & (expert < LOCAL)
        of_expert = rows * stride_wn + expert * stride_we
        sums += _products(w, scale, of_expert, rows * stride_sn + expert * stride_se, pair, group, low, high, inside, scaled, MX)
    result = tl.sum(tl.sum(sums, axis=2), axis=1)
    tl.store(out + token.to(tl.int64) * stride_out + column, result.to(out.dtype.element_ty), mask=inside_n)


def fits(problem: WeightOnlyMoe, config: FewConfig, chip: Chip) -> str | None:
    """Few choices per expert, whole groups in a step, and partial sums that fit registers."""
    c, p = config, problem
    if any(value < 1 or value & (value - 1) for value in (c.up_n, c.down_n, c.block_k, c.num_warps)) or c.num_warps > 16:
        return "columns, block_k and warps must be powers of two, at most 16 warps"
    if p.tokens * p.top_k > MOST_CHOICES_PER_EXPERT * p.experts and p.tokens > 1:
        return "many tokens share an expert: sorting them pays"
    if c.block_k < p.group or c.block_k > max(p.group, next_power_of_2(max(p.hidden, p.intermediate))):
        return f"block_k goes from a group ({p.group}) to the rows' length"
    if c.num_stages < 1:
        return "num_stages must be at least 1"
    if max(c.up_n * (2 if p.gated else 1), c.down_n) * c.block_k // 2 // (32 * c.num_warps) > 32:
        return "the partial sums would spill registers"
    return None


def default(problem: WeightOnlyMoe, chip: Chip) -> FewConfig:
    """8 bytes per thread and load where the rows are long enough, and enough programs to fill the chip."""
    p = problem
    block_k = max(p.group, min(512, next_power_of_2(min(p.hidden, p.intermediate) + 1) // 2))
    up_n = down_n = max(1, 4096 // block_k)
    while up_n > 4 and p.tokens * p.top_k * cdiv(p.intermediate, up_n) < 2 * chip.sm_count:
        up_n //= 2
    while down_n > 4 and p.tokens * cdiv(p.hidden, down_n) < 2 * chip.sm_count:
        down_n //= 2
    return FewConfig(up_n, down_n, block_k, 4, 3)


def space(problem: WeightOnlyMoe, chip: Chip) -> Iterator[FewConfig]:
    """All shapes of a program whose threads have a word each to load."""
    for up_n, down_n, block_k, warps, stages in product((2, 4, 8, 16), (2, 4, 8, 16, 32), (128, 256, 512, 1024), (2, 4, 8), (1, 2, 3, 4)):
        if min(up_n, down_n) * block_k >= 8 * 32 * warps:
            yield FewConfig(up_n, down_n, block_k, warps, stages)


@kernel(WeightOnlyMoe, backend="triton", config=FewConfig, space=space, default=default, fits=fits)
def triton_few(problem: WeightOnlyMoe, config: FewConfig, chip: Chip) -> Launch:
    """Triton for few tokens, 2 launches: nibbles unpacked in registers, products in float32; down sums a token's experts in registers."""
    p, c = problem, config
    kept: dict[torch.device, torch.Tensor] = {}
    same = {"MX": p.format == "mxfp4", "GROUP": p.group, "BLOCK_K": c.block_k, "STAGES": c.num_stages, "num_warps": c.num_warps}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, ids, weights, out = (inputs["x"], inputs["topk_ids"], inputs["topk_weights"], outputs["out"])
        if x.device not in kept:
            # float32: a few rows, which stay in L2.
            kept[x.device] = torch.empty((p.tokens * p.top_k, p.intermediate), dtype=torch.float32, device=x.device)
        active = kept[x.device]
        up, up_scale, down, down_scale = (inputs[name] for name in ("w_gate_up", "w_gate_up_scale", "w_down", "w_down_scale"))
        _up[(p.tokens * p.top_k, cdiv(p.intermediate, c.up_n))](
            x,
            up,
            up_scale,
            ids,
            active,
            p.intermediate,
            p.hidden,
            x.stride(0),
            *up.stride()[:2],
            *up_scale.stride()[:2],
            ids.stride(0),
            active.stride(0),
            TOP_K=p.top_k,
            LOCAL=p.local,
            GATED=p.gated,
            LIMIT=p.swiglu_limit,
            BLOCK_N=c.up_n,
            **same,
        )
        _down[(p.tokens, cdiv(p.hidden, c.down_n))](
            active,
            down,
            down_scale,
            ids,
            weights,
            out,
            p.hidden,
            p.intermediate,
            active.stride(0),
            *down.stride()[:2],
            *down_scale.stride()[:2],
            ids.stride(0),
            weights.stride(0),
            out.stride(0),
            TOP_K=p.top_k,
            LOCAL=p.local,
            BLOCK_N=c.down_n,
            **same,
        )

    return launch
