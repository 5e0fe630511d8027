"""Rotation and cache write in Triton: a program takes some heads of one token, of the queries, the keys or the values."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.rope_cache.problem import RopeCache
from klab.kernels.row_tiles import is_power_of_2, refusal, warps_for
from klab.kernels.triton_fp8 import to_fp8
from klab.kernels.triton_support import cdiv, next_power_of_2


@dataclass(frozen=True)
class HeadsConfig(Config):
    """Query heads, and key and value heads, of a program (a latent row counts as one head)."""

    q_heads: int = 16
    kv_heads: int = 8
    num_warps: int = 4


@triton.jit
def _narrow(x, scale_ptr, head, heads, dtype: tl.constexpr, FP8: tl.constexpr):
    if FP8:
        return to_fp8(x / tl.load(scale_ptr + head, mask=head < heads, other=1.0))
    return x.to(dtype)


@triton.jit
def _copy(x, out, first, width, x_stride, out_stride, scale_ptr, head, heads, BLOCK: tl.constexpr, FP8: tl.constexpr):
    """Columns first .. first + width - 1 of [heads] rows."""
    column = tl.arange(0, BLOCK)[None, :]
    here = (head < heads) & (column < width)
    row = tl.load(x + head * x_stride + first + column, mask=here, other=0.0, eviction_policy="evict_first")
    out_type: tl.constexpr = out.dtype.element_ty
    narrow = _narrow(row.to(tl.float32), scale_ptr, head, heads, out_type, True) if FP8 else row
    tl.store(out + head * out_stride + first + column, narrow, mask=here)


@triton.jit
def _turn(
    x, out, cos_ptr, sin_ptr, x_stride, out_stride, scale_ptr, head, heads,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """The first 2 HALF columns of [heads] rows, turned; `head` is [heads, 1]."""
    out_type: tl.constexpr = out.dtype.element_ty
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    cos = tl.load(cos_ptr + pair, mask=pair < HALF, other=0.0)
    sin = tl.load(sin_ptr + pair, mask=pair < HALF, other=0.0)
    if INTERLEAVED:
        # Read and written as whole rows; the pairs are taken apart in registers.
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        here = (head < heads) & (column < 2 * HALF)
        both = tl.load(x + head * x_stride + column, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        a, b = tl.split(tl.reshape(both, (both.shape[0], BLOCK_HALF, 2)))
        both = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (both.shape[0], 2 * BLOCK_HALF))
        tl.store(out + head * out_stride + column, _narrow(both, scale_ptr, head, heads, out_type, FP8), mask=here)
    else:
        here = (head < heads) & (pair < HALF)
        at, to = x + head * x_stride + pair, out + head * out_stride + pair
        a = tl.load(at, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b = tl.load(at + HALF, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(to, _narrow(a * cos - b * sin, scale_ptr, head, heads, out_type, FP8), mask=here)
        tl.store(to + HALF, _narrow(b * cos + a * sin, scale_ptr, head, heads, out_type, FP8), mask=here)


@triton.jit
def _rope_cache(
    q, k, v, q_out, k_cache, v_cache, k_scale, v_scale, positions, cos, sin, slots,
    q_token, q_head, k_token, k_head, v_token, v_head, table_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, K_AT: tl.constexpr, K_ROW: tl.constexpr,
    V_ROW: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ROTARY: tl.constexpr, FP8: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr, Q_TILES: tl.constexpr, KV_TILES: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Keys go to columns K_AT.. of cache rows of K_ROW, values to the front of cache rows of V_ROW (with a latent the two are one row).

    Without a cache the keys of a token go to the row of that token.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if ROTARY:
        position = tl.load(positions + token).to(tl.int64)
        cos += position * table_stride
        sin += position * table_stride
    if part < Q_TILES:
        query = part * Q_BLOCK + tl.arange(0, Q_BLOCK)[:, None]
        q += token * q_token
        q_out += token * Q_HEADS * DIM
        _turn(q, q_out, cos, sin, q_head, DIM, k_scale, query, Q_HEADS, HALF, BLOCK_HALF, INTERLEAVED, False)
        if BLOCK_REST:
            _copy(q, q_out, 2 * HALF, DIM - 2 * HALF, q_head, DIM, k_scale, query, Q_HEADS, BLOCK_REST, False)
    else:
        slot = tl.load(slots + token).to(tl.int64) if CACHE else token
        head = (part - Q_TILES) % KV_TILES * KV_BLOCK + tl.arange(0, KV_BLOCK)[:, None]
        if part < Q_TILES + KV_TILES:
            k += token * k_token
            k_cache += slot * KV_HEADS * K_ROW + K_AT
            if ROTARY:
                _turn(k, k_cache, cos, sin, k_head, K_ROW, k_scale, head, KV_HEADS, HALF, BLOCK_HALF, INTERLEAVED, FP8)
            if BLOCK_REST:
                _copy(k, k_cache, 2 * HALF, DIM - 2 * HALF, k_head, K_ROW, k_scale, head, KV_HEADS, BLOCK_REST, FP8)
        else:
            _copy(v + token * v_token, v_cache + slot * KV_HEADS * V_ROW, 0, DIM_V, v_head, V_ROW, v_scale, head, KV_HEADS, BLOCK_V, FP8)


def _kv_heads(problem: RopeCache) -> int:
    return 1 if problem.latent else problem.kv_heads


def _values(problem: RopeCache) -> int:
    """Columns of a row that is only copied: a value's or the latent's."""
    return problem.latent or problem.dim_v * problem.cache


def fits(problem: RopeCache, config: HeadsConfig, chip: Chip) -> str | None:
    """The heads of a program are held in registers."""
    c = config
    if not is_power_of_2(c.q_heads, c.kv_heads):
        return "heads must be powers of two"
    if c.q_heads > next_power_of_2(problem.heads) or c.kv_heads > next_power_of_2(_kv_heads(problem)):
        return "more heads than there are"
    widest = max(c.q_heads * next_power_of_2(problem.head_dim), c.kv_heads * next_power_of_2(max(problem.head_dim, _values(problem))))
    # The narrower part of the two leaves lanes that repeat others' work: no reason to refuse.
    return refusal(max(widest, 32 * c.num_warps), c.num_warps, 4)


def default(problem: RopeCache, chip: Chip) -> HeadsConfig:
    """About 2048 elements of queries a program, fewer where there are too few programs to fill the chip; keys and values in one each."""
    q_heads = min(next_power_of_2(problem.heads), max(1, 2048 // next_power_of_2(problem.head_dim)))
    while q_heads > 1 and problem.tokens * cdiv(problem.heads, q_heads) < 4 * chip.sm_count and q_heads * problem.head_dim > 512:
        q_heads //= 2
    width = next_power_of_2(max(problem.head_dim, _values(problem)))
    kv_heads = min(next_power_of_2(_kv_heads(problem)), max(1, 4096 // width))
    largest = max(q_heads * next_power_of_2(problem.head_dim), kv_heads * width)
    return HeadsConfig(q_heads, kv_heads, warps_for(largest, 16))


def space(problem: RopeCache, chip: Chip) -> Iterator[HeadsConfig]:
    """Heads of a program and warps."""
    for q_heads, kv_heads, warps in product((1, 2, 4, 8, 16, 32, 64, 128), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        if not problem.rotary and q_heads > 1:
            continue  # no queries
        yield HeadsConfig(q_heads, kv_heads, warps)


@kernel(RopeCache, backend="triton", config=HeadsConfig, space=space, default=default, fits=fits)
def triton_rope(problem: RopeCache, config: HeadsConfig, chip: Chip) -> Launch:
    """Triton, one launch: queries, keys and values turned, narrowed and written."""
    p, c = problem, config
    kv_heads, values = _kv_heads(p), _values(p)
    half = p.turned // 2 if p.rotary else 0
    rest = p.head_dim - 2 * half
    q_tiles, kv_tiles = cdiv(p.heads, c.q_heads) if p.rotary else 0, cdiv(kv_heads, c.kv_heads)
    k_row = p.latent + p.head_dim
    grid = (p.tokens, q_tiles + (1 + p.cache) * kv_tiles)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        if p.latent:
            k, v, caches = inputs["k_rope"][:, None], inputs["latent"][:, None], [outputs["cache"]] * 2
            scales = [inputs.get("kv_scale", k)] * 2
        elif not p.cache:
            k = v = inputs["k"]
            caches, scales = [outputs["k"]] * 2, [k] * 2
        else:
            k, v, caches = inputs["k"], inputs["v"], [outputs["k_cache"], outputs["v_cache"]]
            scales = [inputs.get("k_scale", k), inputs.get("v_scale", k)]
        q, q_out = (side.get("q_rope" if p.latent else "q", k) for side in (inputs, outputs))
        cos = inputs.get("cos", k)
        _rope_cache[grid](
            q, k, v, q_out, *caches, *scales, inputs.get("positions", k), cos, inputs.get("sin", k), inputs.get("slot_mapping", k),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0),
            Q_HEADS=p.heads, KV_HEADS=kv_heads, DIM=p.head_dim, DIM_V=values, K_AT=p.latent, K_ROW=k_row,
            V_ROW=k_row if p.latent else p.dim_v, HALF=half, INTERLEAVED=p.interleaved, ROTARY=p.rotary, FP8=bool(p.kv_dtype),
            BLOCK_HALF=next_power_of_2(half), BLOCK_REST=next_power_of_2(rest) if rest else 0, BLOCK_V=next_power_of_2(values),
            Q_TILES=q_tiles, KV_TILES=kv_tiles, Q_BLOCK=c.q_heads, KV_BLOCK=c.kv_heads, CACHE=p.cache,
            num_warps=c.num_warps,
        )  # fmt: skip

    return launch
