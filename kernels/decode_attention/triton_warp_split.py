# Triton's parameters have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Split-KV flash decoding whose warps do not wait for each other: each keeps the softmax of its own keys.

With 16 query rows, warps that share a block of keys meet at six barriers per block: for the maximum of a row, and to pass the weights
through shared memory to the second product. Here a batched tl.dot gives each warp its own keys of the block (Triton puts the warps
along the batch dimension), so a row's maximum and its weights stay in one warp's registers, and only the two barriers of the load
pipeline remain (compiled for sm_90 and sm_100). The warps' results are merged once, behind the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.decode_attention._triton_launch import (
    ranges_launch,
    rows_of,
    rule_of,
    span_of,
    split_counts,
    unfit_splits,
)
from klab.kernels.decode_attention._triton_ranges import capped, halved_queries, locate, pages_of, store_rows, two_of
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.triton_support import KIB, next_power_of_2

MAX_ROWS = 64
# Compiled for sm_90 and sm_100: 160 takes up to 202 registers, 192 spills 16 to 128 bytes.
MAX_REGISTERS_FOR_TILES = 160


@dataclass(frozen=True)
class WarpSplitConfig(Config):
    """Each of `num_warps` warps takes `warp_n` keys per step; the longest sequence is cut into `num_splits` ranges (0: by the rule).

    `early_merge` launches the merge while the last ranges are still being read (programmatic dependent launch).
    """

    warp_n: int = 16
    num_splits: int = 0
    num_warps: int = 4
    num_stages: int = 3
    early_merge: bool = False

    @property
    def block_n(self) -> int:
        """Keys of a step."""
        return self.warp_n * self.num_warps


@triton.jit
def _read_range_by_warps(
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
    WARPS: tl.constexpr,
):
    """One range of one sequence for BLOCK_M rows of one key/value head; dimension 0 is the warp.

    Strides of k and v are in UNIT elements. NARROW: an element of k and v is a pair of fp8 columns, and so are BLOCK_D and BLOCK_DV.
    """
    ROW_TILES: tl.constexpr = (GROUP * Q_LEN + BLOCK_M - 1) // BLOCK_M
    WARP_N: tl.constexpr = BLOCK_N // WARPS
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
    warp = tl.arange(0, WARPS)
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    offs_dv = tl.arange(0, BLOCK_DV)[None, None, :]
    offs_n = warp[:, None] * WARP_N + tl.arange(0, WARP_N)[None, :]
    PACK: tl.constexpr = 2 if NARROW else 1
    is_d = offs_d < HEAD_DIM // PACK
    is_dv = offs_dv < DIM_V // PACK

    # Each warp has its own copy of the queries.
    q_rows = q + sequence.to(tl.int64) * q_batch + row // GROUP * q_token + (kv_head * GROUP + row % GROUP) * q_head
    is_row = row < GROUP * Q_LEN
    scale = scale_log2
    if NARROW:
        queries, odd_queries, size = halved_queries(q_rows, is_row, HEAD_DIM, BLOCK_D)
        queries = tl.broadcast_to(queries[None, :, :], (WARPS, BLOCK_M, BLOCK_D))
        odd_queries = tl.broadcast_to(odd_queries[None, :, :], (WARPS, BLOCK_M, BLOCK_D))
        scale = scale_log2 * tl.load(k_scale + kv_head) * size[None, :, None]
    else:
        q_rows = q_rows[None, :, None] + warp[:, None, None] * 0
        queries = tl.load(q_rows + offs_d, mask=is_row[None, :, None] & is_d, other=0.0)
    k_of_head = k + kv_head.to(tl.int64) * k_head * UNIT
    v_of_head = v + kv_head.to(tl.int64) * v_head * UNIT
    pages = block_table + sequence.to(tl.int64) * table_row
    # The last key that a row sees. Rows behind the last one compute on zeros and are never stored.
    position = length - Q_LEN + row // GROUP

    largest = tl.full((WARPS, BLOCK_M), 0.0 if SINKS else float("-inf"), dtype=tl.float32)
    total = tl.zeros((WARPS, BLOCK_M), dtype=tl.float32)
    values = tl.zeros((WARPS, BLOCK_M, BLOCK_DV), dtype=tl.float32)
    odd_values = values
    if SINKS:
        # As if the sink had been the first key of the first warp, with a value of zero.
        largest += (tl.load(sinks + kv_head * GROUP + row % GROUP) * 1.4426950408889634)[None, :]
        total += tl.where(warp == 0, 1.0, 0.0)[:, None]
    # The page numbers are loaded one step ahead, so that they take no stage of the software pipeline.
    first = base + begin * BLOCK_N
    page = pages_of(pages, first, first + offs_n, length, WHOLE, PAGE_SIZE)
    for block in tl.range(begin, end):
        first = base + block * BLOCK_N
        key = first + offs_n
        is_key = (key < length)[:, :, None]
        k_rows = (page.to(tl.int64) * k_page + key % PAGE_SIZE * k_token) * UNIT
        v_rows = k_rows
        if not SAME_ROWS:
            v_rows = (page.to(tl.int64) * v_page + key % PAGE_SIZE * v_token) * UNIT
        page = pages_of(pages, first + BLOCK_N, key + BLOCK_N, length, WHOLE, PAGE_SIZE)
        if HEAD_DIM == PACK * BLOCK_D:
            keys = tl.load(k_of_head + k_rows[:, :, None] + offs_d, mask=is_key, other=0.0)
        else:
            keys = tl.load(k_of_head + k_rows[:, :, None] + offs_d, mask=is_key & is_d, other=0.0)
        if NARROW:
            keys, odd_keys = two_of(keys)
            scores = tl.dot(queries, tl.permute(keys, (0, 2, 1)))
            scores = tl.dot(odd_queries, tl.permute(odd_keys, (0, 2, 1)), scores)
        else:
            scores = tl.dot(queries, tl.permute(keys, (0, 2, 1)))
        scores = capped(scores * scale, SOFTCAP)
        visible = (key < length)[:, None, :]
        if Q_LEN > 1:
            visible = visible & (key[:, None, :] <= position[None, :, None])
        if WINDOW:
            visible = visible & (key[:, None, :] > position[None, :, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))

        larger = tl.maximum(largest, tl.max(scores, axis=2))
        # A warp that has seen no key of a row yet: -inf - -inf would be NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        decay = tl.exp2(largest - shift)
        weights = tl.exp2(scores - shift[:, :, None])
        total = total * decay + tl.sum(weights, axis=2)
        largest = larger
        # Masked here too: what lies behind the end of a page may be NaN, and 0 * NaN is NaN.
        if DIM_V == PACK * BLOCK_DV:
            news = tl.load(v_of_head + v_rows[:, :, None] + offs_dv, mask=is_key, other=0.0)
        else:
            news = tl.load(v_of_head + v_rows[:, :, None] + offs_dv, mask=is_key & is_dv, other=0.0)
        values *= decay[:, :, None]
        if NARROW:
            news, odd_news = two_of(news)
            odd_values = tl.dot(weights.to(tl.float16), odd_news, odd_values * decay[:, :, None])
        values = tl.dot(weights.to(queries.dtype), news, values)

    top = tl.max(largest, axis=0)
    weight = tl.exp2(largest - tl.where(top == float("-inf"), 0.0, top)[None, :])
    sums = tl.sum(total * weight, axis=0)
    seen = sums > 0.0
    weight = weight / tl.where(seen, sums, 1.0)[None, :]
    if NARROW:
        weight *= tl.load(v_scale + kv_head)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    merged = tl.sum(values * weight[:, :, None], axis=0)
    if NARROW:
        merged = tl.interleave(merged, tl.sum(odd_values * weight[:, :, None], axis=0))
    store_rows(
        merged,
        tl.where(seen, top + tl.log2(tl.where(seen, sums, 1.0)), float("-inf")),
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


def block_m_of(problem: DecodeAttention) -> int:
    """Query rows of one program: each warp holds the values of all of them. Further rows read the same keys from L2."""
    return min(32 if problem.dim_v <= 64 else 16, max(16, next_power_of_2(rows_of(problem))))


def smem_bytes(problem: DecodeAttention, config: WarpSplitConfig) -> int:
    """Shared memory of one program, an upper bound: the stages, each warp's queries, and behind the loop each warp's values."""
    size, cache, rows, warps = SIZE_BYTES[problem.dtype], SIZE_BYTES[problem.cache_dtype], block_m_of(problem), config.num_warps
    dim, dim_v = next_power_of_2(problem.head_dim), next_power_of_2(problem.dim_v)
    loop = max(1, config.num_stages - 1) * config.block_n * (dim + dim_v) * cache + warps * rows * dim * size
    # 8 bytes a key: row offsets on their way between the layouts of keys and scores.
    return max(loop + 8 * config.block_n, warps * rows * dim_v * 4) + KIB


def split_count(problem: DecodeAttention, config: WarpSplitConfig, chip: Chip) -> int:
    """Ranges of the longest sequence: as configured, or by the split rule."""
    return config.num_splits or rule_of(
        problem,
        chip,
        block_m=block_m_of(problem),
        block_n=config.block_n,
        num_warps=config.num_warps,
        smem_bytes=smem_bytes(problem, config),
    )


def fits(problem: DecodeAttention, config: WarpSplitConfig, chip: Chip) -> str | None:
    """16-bit dtypes; every warp holds the values of all rows, so rows and dim_v are limited; stages fit shared memory."""
    if SIZE_BYTES[problem.dtype] != 2:
        return "is for 16-bit dtypes"
    if config.warp_n not in (16, 32, 64) or config.num_warps not in (1, 2, 4, 8) or config.num_stages < 1:
        return "warp_n is 16, 32 or 64, num_warps 1, 2, 4 or 8, num_stages at least 1"
    if max(problem.head_dim, problem.dim_v) > 256 or min(problem.head_dim, problem.dim_v) < 16:
        return "head dimensions are 16 to 256"
    if problem.kv_dtype and (min(problem.head_dim, problem.dim_v) < 32 or (problem.head_dim | problem.dim_v) % 2):
        return "fp8 caches are read in pairs: head dimensions are even and at least 32"
    if rows_of(problem) > MAX_ROWS:
        return f"more than {MAX_ROWS} query rows would read the keys too often"
    # Registers of a thread: the sums, the scores before and after the exponential, a 64-bit pointer per 16 bytes of a key or value.
    sums = block_m_of(problem) * (next_power_of_2(problem.dim_v) + 2 * config.warp_n) // 32
    loads = config.warp_n * next_power_of_2(max(problem.head_dim, problem.dim_v)) * SIZE_BYTES[problem.cache_dtype] // 16 // 32
    if sums + 4 * loads > MAX_REGISTERS_FOR_TILES:
        return "the tile would spill registers"
    if smem_bytes(problem, config) > chip.smem_per_block_bytes:
        return "too much shared memory"
    chosen = split_count(problem, config, chip)
    return unfit_splits(problem, chip, block_n=config.block_n, num_splits=config.num_splits, chosen=chosen, early_merge=config.early_merge)


def default(problem: DecodeAttention, chip: Chip) -> WarpSplitConfig:
    """Sixteen keys for each warp, four warps where the context has as many keys; an fp8 step is half the bytes, so twice as many wait."""
    warps = max(1, min(4, next_power_of_2(span_of(problem, problem.max_kv_len)) // 16))
    return WarpSplitConfig(warp_n=16, num_warps=warps, num_stages=5 if problem.kv_dtype else 3)


def space(problem: DecodeAttention, chip: Chip) -> Iterator[WarpSplitConfig]:
    """16 or 32 keys for each of 1 to 8 warps, 2 to 5 stages; the rule's split count and powers of two around it."""
    for warp_n, warps, stages in product((16, 32), (1, 2, 4, 8), (2, 3, 4, 5)):
        rule = WarpSplitConfig(warp_n, 0, warps, stages)
        if fits(problem, rule, chip) is None:
            for splits, early in product(split_counts(split_count(problem, rule, chip)), (False, True)):
                yield WarpSplitConfig(warp_n, splits, warps, stages, early)


@kernel(DecodeAttention, backend="triton", config=WarpSplitConfig, space=space, default=default, fits=fits)
def triton_warp_split(problem: DecodeAttention, config: WarpSplitConfig, chip: Chip) -> Launch:
    """Triton flash decoding over pages: every warp its own keys and softmax, so that the loop has no barriers but the pipeline's."""
    return ranges_launch(
        _read_range_by_warps,
        problem,
        splits=split_count(problem, config, chip),
        early_merge=config.early_merge,
        block_m=block_m_of(problem),
        block_n=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        WARPS=config.num_warps,
    )
