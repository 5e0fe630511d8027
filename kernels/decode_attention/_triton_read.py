# Triton's parameters have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The program that reads one range of one sequence's keys, all of its warps at the same block of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from klab.kernels.decode_attention._triton_ranges import capped, halved_queries, locate, pages_of, store_rows, two_of


@triton.jit
def read_range(
    q,
    k,
    v,
    k_scale,
    v_scale,
    sinks,
    block_table,
    kv_lens,
    out,
    partial,
    lse,
    scale_log2,
    splits,
    columns,
    blocks_per_split,
    q_batch,
    q_token,
    q_head,
    k_page,
    k_token,
    k_head,
    v_page,
    v_token,
    v_head,
    table_row,
    out_batch,
    out_token,
    out_head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    NARROW: tl.constexpr,
    FIRST: tl.constexpr,
    PREFIX_COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    SAME_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DIRECT: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
):
    """One range of one sequence for BLOCK_M rows of one key/value head.

    Strides of k and v are in UNIT elements. NARROW: an element of k and v is a pair of fp8 columns, and so are BLOCK_D and BLOCK_DV.
    """
    ROW_TILES: tl.constexpr = (GROUP * Q_LEN + BLOCK_M - 1) // BLOCK_M
    if SIGNAL:
        tl.extra.cuda.gdc_launch_dependents()
    HEAD_TILES: tl.constexpr = KV_HEADS * ROW_TILES
    WHOLE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0 and WINDOW == 0
    tile, split, sequence, length, base, begin, end = locate(kv_lens, splits, blocks_per_split, HEAD_TILES, Q_LEN, WINDOW, FIRST, BLOCK_N)
    # Nobody reads the partial result of an empty range. Without splits the zeros of an empty sequence must be written.
    if (not DIRECT) and (begin >= end):
        return
    kv_head = tile // ROW_TILES
    row = tile % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_n = tl.arange(0, BLOCK_N)
    PACK: tl.constexpr = 2 if NARROW else 1
    is_d = offs_d < HEAD_DIM // PACK
    is_dv = offs_dv < DIM_V // PACK

    q_rows = q + sequence.to(tl.int64) * q_batch + row // GROUP * q_token + (kv_head * GROUP + row % GROUP) * q_head
    is_row = row < GROUP * Q_LEN
    scale = scale_log2
    if NARROW:
        queries, odd_queries, size = halved_queries(q_rows, is_row, HEAD_DIM, BLOCK_D)
        scale = scale_log2 * tl.load(k_scale + kv_head) * size[:, None]
    else:
        queries = tl.load(q_rows[:, None] + offs_d[None, :], mask=is_row[:, None] & is_d[None, :], other=0.0)
    k_of_head = k + kv_head.to(tl.int64) * k_head * UNIT
    v_of_head = v + kv_head.to(tl.int64) * v_head * UNIT
    pages = block_table + sequence.to(tl.int64) * table_row
    # The last key that a row sees. Rows behind the last one compute on zeros and are never stored.
    position = length - Q_LEN + row // GROUP

    largest = tl.full((BLOCK_M,), 0.0 if SINKS else float("-inf"), dtype=tl.float32)
    # Summed over the keys once, after the loop: a sum across warps in each step would cost three more barriers.
    totals = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    odd_values = values
    if SINKS:
        # As if the sink had been the first key, with a value of zero.
        largest += tl.load(sinks + kv_head * GROUP + row % GROUP) * 1.4426950408889634
        totals += tl.where(offs_n == 0, 1.0, 0.0)[None, :]
    # The page numbers are loaded one step ahead and carried over. Loaded in the step that uses them, they would take a stage of the
    # software pipeline each: Triton 3.7 then has one block under way with 3 stages, instead of two.
    first = base + begin * BLOCK_N
    page = pages_of(pages, first, first + offs_n, length, WHOLE, PAGE_SIZE)
    for block in tl.range(begin, end):
        first = base + block * BLOCK_N
        key = first + offs_n
        is_key = key < length
        k_rows = (page.to(tl.int64) * k_page + key % PAGE_SIZE * k_token) * UNIT
        v_rows = k_rows
        if not SAME_ROWS:
            v_rows = (page.to(tl.int64) * v_page + key % PAGE_SIZE * v_token) * UNIT
        page = pages_of(pages, first + BLOCK_N, key + BLOCK_N, length, WHOLE, PAGE_SIZE)
        if HEAD_DIM == PACK * BLOCK_D:
            keys = tl.load(k_of_head + k_rows[:, None] + offs_d[None, :], mask=is_key[:, None], other=0.0)
        else:
            keys = tl.load(k_of_head + k_rows[:, None] + offs_d[None, :], mask=is_key[:, None] & is_d[None, :], other=0.0)
        if NARROW:
            keys, odd_keys = two_of(keys)
            scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee")
            scores = tl.dot(odd_queries, tl.trans(odd_keys.to(queries.dtype)), scores, input_precision="ieee")
        else:
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        scores = capped(scores * scale, SOFTCAP)
        visible = is_key[None, :]
        if Q_LEN > 1:
            visible = visible & (key[None, :] <= position[:, None])
        if WINDOW:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))

        larger = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has seen no key yet: -inf - -inf would be NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        decay = tl.exp2(largest - shift)
        weights = tl.exp2(scores - shift[:, None])
        totals = totals * decay[:, None] + weights
        largest = larger
        # Masked here too: what lies behind the end of a page may be NaN, and 0 * NaN is NaN.
        if DIM_V == PACK * BLOCK_DV:
            news = tl.load(v_of_head + v_rows[:, None] + offs_dv[None, :], mask=is_key[:, None], other=0.0)
        else:
            news = tl.load(v_of_head + v_rows[:, None] + offs_dv[None, :], mask=is_key[:, None] & is_dv[None, :], other=0.0)
        values *= decay[:, None]
        weights = weights.to(queries.dtype)
        if NARROW:
            news, odd_news = two_of(news)
            odd_values *= decay[:, None]
            odd_values = tl.dot(weights, odd_news.to(queries.dtype), odd_values, input_precision="ieee")
        values = tl.dot(weights, news.to(queries.dtype), values, input_precision="ieee")

    total = tl.sum(totals, axis=1)
    seen = total > 0.0
    if NARROW:
        values = tl.interleave(values, odd_values) * tl.load(v_scale + kv_head)
    values = values / tl.where(seen, total, 1.0)[:, None]
    if WAIT:
        tl.extra.cuda.gdc_wait()
    store_rows(
        values,
        tl.where(seen, largest + tl.log2(tl.where(seen, total, 1.0)), float("-inf")),
        row,
        sequence,
        PREFIX_COLUMNS + split,
        kv_head,
        out,
        partial,
        lse,
        columns,
        out_batch,
        out_token,
        out_head,
        KV_HEADS,
        GROUP,
        Q_LEN,
        DIM_V,
        PACK * BLOCK_DV,
        DIRECT,
    )
