# Triton's parameters have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What the split-KV Triton kernels share: which keys a program reads, where its result goes, and the merge of a sequence's ranges.

Every sequence is cut into ranges of the same number of blocks. Lengths are read on the device: the grid is sized by the longest
sequence, and programs behind a shorter sequence's end stop at once (Dao et al., Flash-Decoding, 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from klab.kernels import triton_support

INTERPRETED: tl.constexpr = tl.constexpr(triton_support.INTERPRETED)


@triton.jit
def first_key(length, Q_LEN: tl.constexpr, WINDOW: tl.constexpr, FIRST: tl.constexpr):
    """The first key of a sequence that its queries see, from key FIRST on (0 where there is a window)."""
    return tl.maximum(length - Q_LEN - WINDOW + 1, 0) if WINDOW else FIRST + length * 0


@triton.jit
def locate(
    kv_lens,
    splits,
    blocks_per_split,
    HEAD_TILES: tl.constexpr,
    Q_LEN: tl.constexpr,
    WINDOW: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(tile of heads, split, sequence, its length, key where its blocks begin, first block, block behind the last) of this program.

    Blocks count from key FIRST, or from the first key in the window: a window of 128 keys is one block of 128, not parts of two.
    """
    # Neighbouring programs read neighbouring heads of the same pages: together they read whole DRAM rows.
    program = tl.program_id(0)
    split = program // HEAD_TILES % splits
    sequence = program // HEAD_TILES // splits
    length = tl.load(kv_lens + sequence)
    base = first_key(length, Q_LEN, WINDOW, FIRST)
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(length - base, BLOCK_N))
    return program % HEAD_TILES, split, sequence, length, base, begin, end


@triton.jit
def pages_of(pages, first, key, length, WHOLE: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """The page of each key of a block (its first is `first`), or with WHOLE the one page that holds it; 0 behind the sequence's end."""
    if WHOLE:
        page = tl.load(pages + first // PAGE_SIZE, mask=first < length, other=0)
    else:
        page = tl.load(pages + key // PAGE_SIZE, mask=key < length, other=0)
    return page


@triton.jit
def two_of(pairs):
    """(elements in the low bytes, those in the high bytes) of pairs of e4m3 numbers in int16, in fp16, which holds them exactly.

    Loaded as pairs, fp8 tiles go to the tensor cores' registers as 16-bit tiles do. Loaded as bytes, the values cost one load from
    shared memory per byte (Triton 3.7), and a loop over 64 keys 1100 instructions instead of 700.
    """
    if INTERPRETED:
        low = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        high = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        low, high = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 sorted;
                .reg .b16 low, high;
                prmt.b32 sorted, $2, 0, 0x3120;
                mov.b32 {low, high}, sorted;
                cvt.rn.f16x2.e4m3x2 $0, low;
                cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return low, high


@triton.jit
def halved_queries(q_rows, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(even columns, odd columns, [rows] what to multiply their products by) of the queries at `q_rows`, for `two_of` an fp8 cache.

    Queries of 16 bits become fp16 with their row's power of two taken out, since bf16 does not convert to fp8's fp16 otherwise.
    """
    column = 2 * tl.arange(0, BLOCK_D)[None, :]
    is_query = is_row[:, None] & (column < HEAD_DIM)
    even = tl.load(q_rows[:, None] + column, mask=is_query, other=0.0)
    odd = tl.load(q_rows[:, None] + column + 1, mask=is_query, other=0.0)
    wide_even, wide_odd = even.to(tl.float32), odd.to(tl.float32)
    size = tl.maximum(tl.max(tl.abs(wide_even), axis=1), tl.max(tl.abs(wide_odd), axis=1))
    size = tl.exp2(tl.floor(tl.log2(tl.where(size > 0.0, size, 1.0))))
    compute: tl.constexpr = tl.float32 if even.dtype == tl.float32 else tl.float16
    return (wide_even / size[:, None]).to(compute), (wide_odd / size[:, None]).to(compute), size


@triton.jit
def capped(logits, SOFTCAP: tl.constexpr):
    """cap * tanh(x / cap) of logits in units of log 2: tanh(x) = 1 - 2 / (exp(2 x) + 1), whose error is that of float32 at any x."""
    if SOFTCAP > 0:
        bound: tl.constexpr = SOFTCAP * 1.4426950408889634
        logits = bound - 2.0 * bound / (tl.exp2(logits * (2.0 / SOFTCAP)) + 1.0)
    return logits


@triton.jit
def store_rows(
    values,
    log_sum,
    row,
    sequence,
    split,
    kv_head,
    out,
    partial,
    lse,
    columns,
    out_batch,
    out_token,
    out_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """Write [rows, BLOCK_DV] to the output, or (not DIRECT) as partial result `split` of `columns`, with the log2 of its weights' sum.

    `sequence` and `row` (of the sequence's rows of this head) are numbers or one number per row.
    """
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    offs_dv = tl.arange(0, BLOCK_DV)
    is_row = row < GROUP * Q_LEN
    is_stored = is_row[:, None] & (offs_dv < DIM_V)[None, :]
    if DIRECT:
        to = out + sequence.to(tl.int64) * out_batch + token * out_token + head * out_head
        tl.store(to[:, None] + offs_dv[None, :], values.to(out.dtype.element_ty), mask=is_stored)
    else:
        at = ((sequence * Q_LEN + token) * (KV_HEADS * GROUP) + head).to(tl.int64) * columns + split
        tl.store(partial + at[:, None] * DIM_V + offs_dv[None, :], values, mask=is_stored)
        tl.store(lse + at, log_sum, mask=is_row)


@triton.jit
def merge_ranges(
    partial,
    lse,
    kv_lens,
    sinks,
    out,
    columns,
    blocks_per_split,
    out_batch,
    out_token,
    out_head,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    DIM_V: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    FIRST: tl.constexpr,
    PREFIX_COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WAIT: tl.constexpr,
):
    """The weighted mean of one query head's partial results, PREFIX_COLUMNS of the keys before FIRST first; zeros for an empty sequence."""
    program = tl.program_id(0)
    sequence = program // (Q_LEN * HEADS)
    length = tl.load(kv_lens + sequence)
    blocks = tl.cdiv(length - first_key(length, Q_LEN, WINDOW, FIRST), BLOCK_N)
    ranges = tl.where(length > 0, PREFIX_COLUMNS + tl.cdiv(blocks, blocks_per_split), 0)
    row = program.to(tl.int64) * columns
    offs_dv = tl.arange(0, BLOCK_DV)
    is_dv = offs_dv < DIM_V
    if WAIT:
        tl.extra.cuda.gdc_wait()

    largest = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.full((), 0.0, dtype=tl.float32)
    if SINKS:
        largest = tl.load(sinks + program % HEADS) * 1.4426950408889634
        total += 1.0
    values = tl.zeros((BLOCK_DV,), dtype=tl.float32)
    for start in tl.range(0, ranges, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        is_split = split < ranges
        logs = tl.load(lse + row + split, mask=is_split, other=float("-inf"))
        parts = tl.load(partial + (row + split)[:, None] * DIM_V + offs_dv[None, :], mask=is_split[:, None] & is_dv[None, :], other=0.0)
        larger = tl.maximum(largest, tl.max(logs, axis=0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # a row may see nothing of a range: -inf - -inf would be NaN
        decay = tl.exp2(largest - shift)
        weights = tl.exp2(logs - shift)
        total = total * decay + tl.sum(weights, axis=0)
        values = values * decay + tl.sum(parts * weights[:, None], axis=0)
        largest = larger
    values = values / tl.where(total > 0.0, total, 1.0)
    to = out + sequence.to(tl.int64) * out_batch + program // HEADS % Q_LEN * out_token + program % HEADS * out_head
    tl.store(to + offs_dv, values.to(out.dtype.element_ty), mask=is_dv)
