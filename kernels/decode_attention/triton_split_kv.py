# Triton's parameters have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Split-KV flash decoding: each program reads one range of one sequence's keys for all query heads that share them.

The query heads of a group, times q_len, are the rows of one matrix, so every key and value is read once. All warps of a program work
on the same block of keys; ranges of a long sequence are read at the same time and merged in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.decode_attention._triton_ranges import (
    locate,
    pages_of,
    ranges_launch,
    rows_of,
    rule_of,
    span_of,
    split_counts,
    store_rows,
    unfit_splits,
)
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.triton_support import KIB, next_power_of_2

MAX_ROWS = 64  # more query rows go to further programs, which read the same keys from L2
# Compiled for sm_90: 160 takes 226 registers; 192 spills 80 bytes, and 32 loads of a key or value per thread spill 180 to 290.
MAX_REGISTERS_FOR_TILES = 160
# float32 has no tensor cores under IEEE rules, so every multiply-add is an instruction: 1024 of them spill up to 870 bytes, 2048 more.
MAX_FMAS_PER_STEP_FP32 = 512


@dataclass(frozen=True)
class SplitKvConfig(Config):
    """A program takes `block_n` keys per step; the longest sequence is cut into `num_splits` ranges (0: by the split rule).

    `early_merge` launches the merge while the last ranges are still being read (programmatic dependent launch).
    """

    block_n: int = 64
    num_splits: int = 0
    num_warps: int = 4
    num_stages: int = 3
    early_merge: bool = False


@triton.jit
def _read_range(
    q,
    k,
    v,
    block_table,
    kv_lens,
    out,
    partial,
    lse,
    scale_log2,
    splits,
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
    UNIT: tl.constexpr,
    SAME_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DIRECT: tl.constexpr,
    SIGNAL: tl.constexpr,
):
    """One range of one sequence for BLOCK_M rows of one key/value head. Strides of k and v are in UNIT elements."""
    ROW_TILES: tl.constexpr = (GROUP * Q_LEN + BLOCK_M - 1) // BLOCK_M
    if SIGNAL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, split, sequence, length, begin, end = locate(kv_lens, splits, blocks_per_split, KV_HEADS * ROW_TILES, Q_LEN, WINDOW, BLOCK_N)
    # Nobody reads the partial result of an empty range. Without splits the zeros of an empty sequence must be written.
    if (not DIRECT) and (begin >= end):
        return
    kv_head = tile // ROW_TILES
    row = tile % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_n = tl.arange(0, BLOCK_N)
    is_d = offs_d < HEAD_DIM
    is_dv = offs_dv < DIM_V

    q_rows = q + sequence.to(tl.int64) * q_batch + row // GROUP * q_token + (kv_head * GROUP + row % GROUP) * q_head
    queries = tl.load(q_rows[:, None] + offs_d[None, :], mask=(row < GROUP * Q_LEN)[:, None] & is_d[None, :], other=0.0)
    k_of_head = k + kv_head.to(tl.int64) * k_head * UNIT
    v_of_head = v + kv_head.to(tl.int64) * v_head * UNIT
    pages = block_table + sequence.to(tl.int64) * table_row
    # The last key that a row sees. Rows behind the last one compute on zeros and are never stored.
    position = length - Q_LEN + row // GROUP

    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    # Summed over the keys once, after the loop: a sum across warps in each step would cost three more barriers.
    totals = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    # The page numbers are loaded one step ahead and carried over. Loaded in the step that uses them, they would take a stage of the
    # software pipeline each: Triton 3.7 then has one block under way with 3 stages, instead of two.
    page = pages_of(pages, begin, begin * BLOCK_N + offs_n, length, PAGE_SIZE, BLOCK_N)
    for block in tl.range(begin, end):
        key = block * BLOCK_N + offs_n
        is_key = key < length
        k_rows = (page.to(tl.int64) * k_page + key % PAGE_SIZE * k_token) * UNIT
        v_rows = k_rows
        if not SAME_ROWS:
            v_rows = (page.to(tl.int64) * v_page + key % PAGE_SIZE * v_token) * UNIT
        page = pages_of(pages, block + 1, key + BLOCK_N, length, PAGE_SIZE, BLOCK_N)
        if HEAD_DIM == BLOCK_D:
            keys = tl.load(k_of_head + k_rows[:, None] + offs_d[None, :], mask=is_key[:, None], other=0.0)
        else:
            keys = tl.load(k_of_head + k_rows[:, None] + offs_d[None, :], mask=is_key[:, None] & is_d[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale_log2
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
        if DIM_V == BLOCK_DV:
            news = tl.load(v_of_head + v_rows[:, None] + offs_dv[None, :], mask=is_key[:, None], other=0.0)
        else:
            news = tl.load(v_of_head + v_rows[:, None] + offs_dv[None, :], mask=is_key[:, None] & is_dv[None, :], other=0.0)
        values = tl.dot(weights.to(news.dtype), news, values * decay[:, None], input_precision="ieee")

    total = tl.sum(totals, axis=1)
    seen = total > 0.0
    store_rows(
        values / tl.where(seen, total, 1.0)[:, None],
        tl.where(seen, largest + tl.log2(tl.where(seen, total, 1.0)), float("-inf")),
        row,
        sequence,
        split,
        kv_head,
        out,
        partial,
        lse,
        splits,
        out_batch,
        out_token,
        out_head,
        KV_HEADS,
        GROUP,
        Q_LEN,
        DIM_V,
        BLOCK_DV,
        DIRECT,
    )


def block_m_of(problem: DecodeAttention) -> int:
    """Query rows of one program; tensor cores take 16 at least."""
    return min(MAX_ROWS, max(16, next_power_of_2(rows_of(problem))))


def smem_bytes(problem: DecodeAttention, config: SplitKvConfig) -> int:
    """Shared memory of one program, an upper bound: the stages of keys and values, the queries, the weights on their way to tl.dot.

    Triton keeps one stage less than `num_stages` in shared memory, but all of them for the warp-group instructions of 64 rows.
    """
    size, rows = SIZE_BYTES[problem.dtype], block_m_of(problem)
    dim, dim_v = next_power_of_2(problem.head_dim), next_power_of_2(problem.dim_v)
    buffers = config.num_stages if rows == 64 and config.num_warps >= 4 and size == 2 else max(1, config.num_stages - 1)
    loop = (buffers * config.block_n * (dim + dim_v) + rows * dim + rows * config.block_n) * size
    return max(loop, rows * dim_v * 4) + KIB


def split_count(problem: DecodeAttention, config: SplitKvConfig, chip: Chip) -> int:
    """Ranges of the longest sequence: as configured, or by the split rule."""
    return config.num_splits or rule_of(
        problem,
        chip,
        block_m=block_m_of(problem),
        block_n=config.block_n,
        num_warps=config.num_warps,
        smem_bytes=smem_bytes(problem, config),
    )


def fits(problem: DecodeAttention, config: SplitKvConfig, chip: Chip) -> str | None:
    """Blocks are powers of two no larger than the context; stages fit shared memory, sums fit registers, no range is empty."""
    block_n, warps = config.block_n, config.num_warps
    if any(value < 1 or value & (value - 1) for value in (block_n, warps)):
        return "block_n and num_warps must be powers of two"
    if not 16 <= block_n <= 512 or warps > 16 or config.num_stages < 1:
        return "block_n is 16 to 512, num_warps 1 to 16, num_stages at least 1"
    if max(problem.head_dim, problem.dim_v) > 256 or min(problem.head_dim, problem.dim_v) < 16:
        return "head dimensions are 16 to 256"
    if smem_bytes(problem, config) > chip.smem_per_block_bytes:
        return "too much shared memory"
    if warps * 8 > max(block_n, next_power_of_2(problem.dim_v)):
        return "too many warps for the tile"
    threads, rows = 32 * warps, block_m_of(problem)
    widest = next_power_of_2(max(problem.head_dim, problem.dim_v))
    # Registers of a thread: the sums, the scores before and after the exponential, a 64-bit pointer per 16 bytes of a key or value.
    loads = block_n * widest * SIZE_BYTES[problem.dtype] // 16 // threads
    sums = rows * (next_power_of_2(problem.dim_v) + 2 * block_n) // threads
    if loads > 16 or sums + 4 * loads > MAX_REGISTERS_FOR_TILES:
        return "the tile would spill registers"
    if problem.dtype == "float32" and rows * block_n * widest // threads > MAX_FMAS_PER_STEP_FP32:
        return "one step would unroll too many multiply-adds"
    chosen = split_count(problem, config, chip)
    return unfit_splits(problem, chip, block_n=block_n, num_splits=config.num_splits, chosen=chosen, early_merge=config.early_merge)


def default(problem: DecodeAttention, chip: Chip) -> SplitKvConfig:
    """About 32 KiB of keys and values per step, which three stages keep on their way."""
    row_bytes = (problem.head_dim + problem.dim_v) * SIZE_BYTES[problem.dtype]
    block_n = max(16, min(128, 32 * KIB // next_power_of_2(row_bytes), next_power_of_2(span_of(problem, problem.max_kv_len))))
    # More rows, or multiply-adds without tensor cores, need more threads to hold their sums.
    wide = block_m_of(problem) > 32 or (problem.dtype == "float32" and block_n > 16)
    return SplitKvConfig(block_n=block_n, num_warps=8 if wide else 4)


def space(problem: DecodeAttention, chip: Chip) -> Iterator[SplitKvConfig]:
    """Blocks of 16 to 256 keys, 1 to 8 warps, 2 to 5 stages; the rule's split count and powers of two around it."""
    for block_n, warps, stages in product((16, 32, 64, 128, 256), (1, 2, 4, 8), (2, 3, 4, 5)):
        rule = SplitKvConfig(block_n, 0, warps, stages)
        if fits(problem, rule, chip) is None:
            for splits, early in product(split_counts(split_count(problem, rule, chip)), (False, True)):
                yield SplitKvConfig(block_n, splits, warps, stages, early)


@kernel(DecodeAttention, backend="triton", config=SplitKvConfig, space=space, default=default, fits=fits)
def triton_split_kv(problem: DecodeAttention, config: SplitKvConfig, chip: Chip) -> Launch:
    """Triton flash decoding over pages: grouped heads packed into rows, long contexts split and merged."""
    return ranges_launch(
        _read_range,
        problem,
        splits=split_count(problem, config, chip),
        early_merge=config.early_merge,
        block_m=block_m_of(problem),
        block_n=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
