"""Flash attention in Triton with plain pointers: any row stride, any lengths, one program per block of query rows and head."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton compiles the source of its functions and evaluates their annotations: they cannot carry Python types.)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.prefill_attention._triton_softmax import (
    LOG2_E,
    feature_constants,
    first_sums,
    keys_seen,
    scales_of,
    soften,
    store_rows,
    work_of,
)
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.prefill_tiles import Tiles, padded, split_dim
from klab.kernels.triton_support import pipeline_smem_bytes


@dataclass(frozen=True)
class FlashConfig(Config):
    """Rows and keys per step, warps, stages of the load pipeline, and how programs map to work.

    `pack_gqa`: the query heads of one key head share a tile (rows are token x head), which wastes less of the causal diagonal and
    fills a tile when few tokens are new. `heads_fastest`: neighbouring programs differ in head (they share keys), not in tile.
    """

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 2
    pack_gqa: bool = False
    heads_fastest: bool = True


@triton.jit
def _rows(base, table, row, rows, stride_page, stride, PAGE: tl.constexpr, CHECK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pointers [BLOCK_N] to rows row.. of a sequence: packed behind `base`, or in pages of the cache at `base`."""
    n = tl.arange(0, BLOCK_N)
    if PAGE == 0:
        at = base + tl.cast(row, tl.int64) * stride + n * stride
    elif PAGE % BLOCK_N == 0:
        page = tl.load(table + row // PAGE)
        at = base + page.to(tl.int64) * stride_page + (row % PAGE + n) * stride
    else:
        token = row + n
        page = tl.load(table + token // PAGE, mask=token < rows, other=0) if CHECK_ROWS else tl.load(table + token // PAGE)
        at = base + page.to(tl.int64) * stride_page + token % PAGE * stride
    return at


@triton.jit
def _load(at, n, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, REAL: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """[len(at), WIDTH] from column FIRST of the rows `at`; columns from REAL on are zero, and with CHECK_ROWS rows n from `rows` on are."""
    column = FIRST + tl.arange(0, WIDTH)
    block_at = at[:, None] + column[None, :]
    if CHECK_ROWS and REAL < FIRST + WIDTH:
        block = tl.load(block_at, mask=(n < rows)[:, None] & (column < REAL)[None, :], other=0.0)
    elif CHECK_ROWS:
        block = tl.load(block_at, mask=(n < rows)[:, None], other=0.0)
    elif REAL < FIRST + WIDTH:
        block = tl.load(block_at, mask=(column < REAL)[None, :], other=0.0)
    else:
        block = tl.load(block_at)
    return block


@triton.jit
def _attend(
    acc,
    total,
    top,
    q0,
    q1,
    k,
    v,
    table,
    stride_kp,
    stride_kt,
    stride_vp,
    stride_vt,
    first,
    last,
    position,
    kv_len,
    log2_scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold keys [first, last) into the running output, sum and maximum (logits in units of log2). MASKED: some pairs are hidden.

    PRECISION matters to float32 alone: exact products ("ieee") have no tensor core and unroll into 8 KB of spills at head dimension
    256; three TF32 products ("tf32x3") keep 21 bits, 40 times finer than the tolerance. Narrow keys and values are exact in 16 bits.
    """
    n = tl.arange(0, BLOCK_N)
    for start in tl.range(first, last, BLOCK_N):
        k_at = _rows(k, table, start, kv_len, stride_kp, stride_kt, PAGE, MASKED, BLOCK_N)
        k0 = _load(k_at, n, kv_len - start, 0, D0, D, MASKED).to(q0.dtype)
        logits = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
        if D1 > 0:
            k1 = _load(k_at, n, kv_len - start, D0, D1, D, MASKED).to(q0.dtype)
            logits = tl.dot(q1, tl.trans(k1), logits, input_precision=PRECISION)
        weights, decay, total, top = soften(
            logits, total, top, start, position, kv_len, log2_scale, MASKED, CAUSAL, WINDOW, SOFTCAP, BLOCK_N
        )
        acc = acc * decay[:, None]
        v_at = _rows(v, table, start, kv_len, stride_vp, stride_vt, PAGE, MASKED, BLOCK_N)
        values = _load(v_at, n, kv_len - start, 0, DV_PAD, DV, MASKED).to(q0.dtype)
        acc = tl.dot(weights.to(q0.dtype), values, acc, input_precision=PRECISION)
    return acc, total, top


@triton.jit
def flash_forward(
    q,
    k,
    v,
    out,
    tiles,
    table,
    sinks,
    k_scale,
    v_scale,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_table,
    tile_count,
    log2_scale,
    UNITS: tl.constexpr,
    ROWS_PER_TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    NARROW: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS_FASTEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One block of query rows of one unit (a query head, or with packing the heads of one key head) over all keys it sees.

    k and v are packed tensors, or caches of pages whose numbers are in `table`.
    """
    # Of arguments the compiler knows multiples of 16 only: counted in eights, heads of 72 columns are loaded 16 bytes at a time.
    stride_qt, stride_qh, stride_ot, stride_oh = stride_qt * UNIT, stride_qh * UNIT, stride_ot * UNIT, stride_oh * UNIT
    stride_kp, stride_kt, stride_kh = stride_kp * UNIT, stride_kt * UNIT, stride_kh * UNIT
    stride_vp, stride_vt, stride_vh = stride_vp * UNIT, stride_vt * UNIT, stride_vh * UNIT
    unit, q_start, q_len, kv_start, kv_len, block, sequence = work_of(tiles, tile_count, UNITS, HEADS_FASTEST)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // ROWS_PER_TOKEN
    head = unit * ROWS_PER_TOKEN + row % ROWS_PER_TOKEN
    inside = (token < q_len)[:, None]
    position = kv_len - q_len + token
    q_row = q + (q_start + token).to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qh
    d0 = tl.arange(0, D0)[None, :]
    q0 = tl.load(q_row + d0, mask=inside & (d0 < D), other=0.0) if D < D0 else tl.load(q_row + d0, mask=inside, other=0.0)
    q1 = q0
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)[None, :]
        q1 = tl.load(q_row + d1, mask=inside & (d1 < D), other=0.0)

    kv_head = unit * ROWS_PER_TOKEN // GROUP
    k += kv_head * stride_kh
    v += kv_head * stride_vh
    if PAGE == 0:
        k += kv_start.to(tl.int64) * stride_kt
        v += kv_start.to(tl.int64) * stride_vt
    else:
        table += sequence * stride_table
    log2_scale, value_scale = scales_of(k_scale, v_scale, kv_head, log2_scale, NARROW)
    begin, full_begin, full_end, end = keys_seen(q_len, kv_len, block, ROWS_PER_TOKEN, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, DV_PAD], dtype=tl.float32)
    top, total = first_sums(sinks, head, SINKS, BLOCK_M)
    if WINDOW > 0:
        acc, total, top = _attend(
            acc, total, top, q0, q1, k, v, table, stride_kp, stride_kt, stride_vp, stride_vt, begin, tl.minimum(full_begin, end),
            position, kv_len, log2_scale, True, CAUSAL, WINDOW, SOFTCAP, PAGE, BLOCK_N, D, D0, D1, DV, DV_PAD, PRECISION,
        )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q0, q1, k, v, table, stride_kp, stride_kt, stride_vp, stride_vt, full_begin, full_end,
        position, kv_len, log2_scale, False, CAUSAL, WINDOW, SOFTCAP, PAGE, BLOCK_N, D, D0, D1, DV, DV_PAD, PRECISION,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q0, q1, k, v, table, stride_kp, stride_kt, stride_vp, stride_vt, tl.maximum(full_begin, full_end), end,
        position, kv_len, log2_scale, True, CAUSAL, WINDOW, SOFTCAP, PAGE, BLOCK_N, D, D0, D1, DV, DV_PAD, PRECISION,
    )  # fmt: skip
    store_rows(out, acc, total, value_scale, q_start, token, head, inside, stride_ot, stride_oh, DV, DV_PAD)


def fits(problem: PrefillAttention, config: FlashConfig, chip: Chip) -> str | None:
    """Shared memory holds the queries and the pipeline's key and value blocks; registers hold logits, weights and output."""
    size = SIZE_BYTES[problem.dtype]
    d, dv = sum(split_dim(problem.head_dim)), padded(problem.dim_v)
    if problem.scale <= 0:
        return "needs a positive scale (the running maximum is scaled after it is taken)"
    if config.pack_gqa and problem.heads == problem.kv_heads:
        return "pack_gqa needs several query heads per key head"
    if problem.dtype == "float32":
        # mma.sync with the queries in registers, twice (3 x TF32 splits each operand in two): 32x32 spilled 1032 B at head
        # dimension 256, 16x32 none at 128. From 64 rows on tcgen05 would take 608 of 512 tensor memory columns.
        if config.block_m * d > 4096 or config.block_n > 32:
            return "float32 fits at most 4096 query elements and 32 keys a tile"
    else:
        if config.block_m < 16 * config.num_warps:
            return "a warp holds at least 16 rows, else every maximum goes through shared memory"
        # Per thread: the output and the logits in float32, the weights in half of that. 255 is the limit; 176 of them left 88 B of
        # spills (head dimension 256, 128x64, 8 warps, sm_90), 224 left 544 to 800 B.
        registers = config.block_m * (dv + 1.5 * config.block_n) / (32 * config.num_warps)
        if registers > 200:
            return f"needs about {registers:.0f} registers a thread for its tile alone"
    smem = pipeline_smem_bytes(config.block_n * (d + dv) * size, config.num_stages, config.block_m * d * size)
    if smem > chip.smem_per_block_bytes:
        return f"needs {smem >> 10} KiB of shared memory, the chip has {chip.smem_per_block_bytes >> 10}"
    return None


def space(problem: PrefillAttention, chip: Chip) -> Iterator[FlashConfig]:
    """Tiles from 64x32 to 256x64 (float32: 16x16 to 32x32); the order of programs varies last, since it matters least."""
    rows, keys = ((16, 32), (16, 32)) if problem.dtype == "float32" else ((64, 128, 256), (32, 64, 128))
    for heads_fastest, pack, stages, warps, n, m in product((True, False), (False, True), (2, 3, 4), (4, 8), keys, rows):
        yield FlashConfig(m, n, warps, stages, pack, heads_fastest)


def default(problem: PrefillAttention, chip: Chip) -> FlashConfig:
    """128x64 with 8 warps: no spills up to head dimension 192/128 on sm_90 and sm_100, 104 B at 256."""
    if problem.dtype == "float32":
        return FlashConfig(32 if problem.head_dim <= 64 else 16, 32, 4 if problem.head_dim <= 192 else 8, 2)
    return FlashConfig(128, 64, 8, 2)


@kernel(PrefillAttention, backend="triton", config=FlashConfig, space=space, default=default, fits=fits)
def triton_flash(problem: PrefillAttention, config: FlashConfig, chip: Chip) -> Launch:
    """Triton flash attention: online softmax, pointer loads, full and masked blocks apart."""
    rows = problem.heads // problem.kv_heads if config.pack_gqa else 1
    tiles = Tiles(problem, config.block_m, rows)
    units = problem.heads // rows
    d0, d1 = split_dim(problem.head_dim)
    constants: dict[str, Any] = feature_constants(problem) | {
        "UNITS": units,
        "ROWS_PER_TOKEN": rows,
        "HEADS_FASTEST": config.heads_fastest,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "D0": d0,
        "D1": d1,
        "DV_PAD": padded(problem.dim_v),
        "PRECISION": "tf32x3" if problem.dtype == "float32" else "ieee",
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, out = inputs["q"], outputs["out"]
        k, v = (inputs[f"{name}_cache" if problem.page_size else name] for name in "kv")
        # What the code of this problem does not read is any pointer.
        table, sinks, k_scale, v_scale = (inputs.get(name, q) for name in ("block_table", "sinks", "k_scale", "v_scale"))
        unit = 8 if problem.head_dim % 16 and not any(s % 8 for x in (q, k, v, out) for s in x.stride()[:-1]) else 1
        # Of q, k, v and out, in the kernel's order: from page to page, token to token and head to head.
        strides = [s // unit for x in (q, k, v, out) for s in ((0, *x.stride())[-4:-1] if x is k or x is v else x.stride()[:2])]
        flash_forward[(len(tiles) * units,)](
            q, k, v, out, tiles.on(q.device), table, sinks, k_scale, v_scale, *strides,
            table.stride(0), len(tiles), problem.scale * LOG2_E, UNIT=unit, **constants,
        )  # fmt: skip

    return launch
