"""What the Triton prefill kernels share: where a program works, the keys it walks over, and the online softmax with its features."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton compiles the source of its functions and evaluates their annotations: they cannot carry Python types.)

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl

from klab.kernels.prefill_attention.problem import PrefillAttention

LOG2_E = math.log2(math.e)
# Finite, below any logit: a row whose window begins after the first block would otherwise take -inf from -inf.
NO_LOGIT = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def work_of(tiles, tile_count, UNITS: tl.constexpr, HEADS_FASTEST: tl.constexpr):
    """(unit, first query token, query tokens, first key, keys, row block, sequence) of this program; see prefill_tiles.Tile."""
    program = tl.program_id(0)
    if HEADS_FASTEST:
        tile = program // UNITS
        unit = program % UNITS
    else:
        tile = program % tile_count
        unit = program // tile_count
    at = tiles + tile * 6
    return unit, tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def keys_seen(
    q_len,
    kv_len,
    block,
    ROWS_PER_TOKEN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(begin, full_begin, full_end, end): keys [begin, end) are seen by some row, [full_begin, full_end) by every row, without a mask."""
    begin = 0
    full_begin = 0
    end = kv_len
    full_end = kv_len // BLOCK_N * BLOCK_N
    if CAUSAL:
        first_position = kv_len - q_len + block * BLOCK_M // ROWS_PER_TOKEN
        last_position = kv_len - q_len + tl.minimum(q_len - 1, (block * BLOCK_M + BLOCK_M - 1) // ROWS_PER_TOKEN)
        end = tl.minimum(kv_len, last_position + 1)
        full_end = (first_position + 1) // BLOCK_N * BLOCK_N
        if WINDOW > 0:
            begin = tl.maximum(0, first_position + 1 - WINDOW) // BLOCK_N * BLOCK_N
            full_begin = (tl.maximum(0, last_position + 1 - WINDOW) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return begin, full_begin, full_end, end


@triton.jit
def first_sums(sinks, head, SINKS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(running maximum, running sum) before any key: a sink is a first key without a value."""
    if SINKS:
        top = tl.load(sinks + head) * _LOG2_E
        total = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
    else:
        top = tl.full([BLOCK_M], NO_LOGIT, dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
    return top, total


@triton.jit
def soften(
    logits,
    total,
    top,
    start,
    position,
    kv_len,
    log2_scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One step of the online softmax over the keys start.. : (weights, decay of what was summed before, running sum, running maximum).

    Logits are products without their scale; `log2_scale` brings them to units of log2.
    """
    if SOFTCAP > 0:
        # tanh y = 1 - 2 / (e^2y + 1). The instruction tanh.approx is 5e-4 off, 2% of a weight at a cap of 50.
        doubled = tl.exp2(logits * (log2_scale * (2.0 / SOFTCAP)))
        logits = (SOFTCAP * _LOG2_E) - (2.0 * SOFTCAP * _LOG2_E) / (doubled + 1.0)
    if MASKED:
        key = (start + tl.arange(0, BLOCK_N))[None, :]
        # A query's own position is below kv_len, so the causal bound covers the end of the keys too.
        seen = key <= position[:, None] if CAUSAL else key < kv_len
        if WINDOW > 0:
            seen = seen & (key > position[:, None] - WINDOW)
        logits = tl.where(seen, logits, float("-inf"))
    if SOFTCAP > 0:
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
    else:
        new_top = tl.maximum(top, tl.max(logits, 1) * log2_scale)
        weights = tl.exp2(logits * log2_scale - new_top[:, None])
    decay = tl.exp2(top - new_top)
    return weights, decay, total * decay + tl.sum(weights, 1), new_top


@triton.jit
def scales_of(k_scale, v_scale, kv_head, log2_scale, NARROW: tl.constexpr):
    """(log2_scale with the scale of narrow keys, scale of the values)."""
    value_scale = 1.0
    if NARROW:
        log2_scale = log2_scale * tl.load(k_scale + kv_head)
        value_scale = tl.load(v_scale + kv_head)
    return log2_scale, value_scale


@triton.jit
def store_rows(out, acc, total, value_scale, q_start, token, head, inside, stride_ot, stride_oh, DV: tl.constexpr, DV_PAD: tl.constexpr):
    """Write acc / total to the output rows of these tokens and heads; by pointers, since a descriptor could reach the next sequence."""
    dv = tl.arange(0, DV_PAD)[None, :]
    out_row = out + (q_start + token).to(tl.int64)[:, None] * stride_ot + head[:, None] * stride_oh
    result = (acc * (value_scale / total)[:, None]).to(out.dtype.element_ty)
    if DV < DV_PAD:
        tl.store(out_row + dv, result, mask=inside & (dv < DV))
    else:
        tl.store(out_row + dv, result, mask=inside)


def feature_constants(problem: PrefillAttention) -> dict[str, Any]:
    """The constants that say which features a kernel's code has."""
    return {
        "GROUP": problem.heads // problem.kv_heads,
        "CAUSAL": problem.causal,
        "WINDOW": problem.window,
        "SOFTCAP": float(problem.softcap),
        "SINKS": problem.sinks,
        "NARROW": bool(problem.kv_dtype),
        "PAGE": problem.page_size,
        "D": problem.head_dim,
        "DV": problem.dim_v,
    }
