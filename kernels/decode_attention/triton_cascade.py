# Triton's parameters have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Cascade decoding: the keys of a prefix that all sequences share are read once, for the queries of the whole batch.

The query rows of all sequences on one key/value head form tiles of 64 or 128 rows, which pass over the prefix as in prefill (matrix
units instead of bandwidth). The keys behind the prefix are read per sequence as in split-KV decoding, and the results are merged by
their log-sum-exp (Juravsky et al., Hydragen, 2024; Ye et al., Cascade Inference, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.decode_attention._triton_launch import (
    MAX_SPLITS,
    Prefix,
    block_n_of,
    caches,
    ranges_launch,
    rows_of,
    rule_of,
    stages_of,
    unfit_splits,
    width_of,
    would_spill,
)
from klab.kernels.decode_attention._triton_ranges import capped, halved_queries, pages_of, two_of
from klab.kernels.decode_attention._triton_read import read_range
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.split_rule import COMBINE_TILES, MERGE_TILES, OVERHEAD_TILES, choose_splits, tiles_per_split
from klab.kernels.triton_support import INTERPRETED, KIB, cdiv, next_power_of_2

MAX_SUFFIX_ROWS = 64
# Compiled for sm_90 and sm_100: 176 takes up to 254 registers. fp8 is converted on its way: 168 takes as many, 176 spills 88 bytes.
MAX_REGISTERS_FOR_PREFIX = 176
MAX_REGISTERS_FOR_FP8_PREFIX = 168


@dataclass(frozen=True)
class CascadeConfig(Config):
    """The prefix: tiles of `prefix_m` query rows x `prefix_n` keys, cut into `prefix_splits` ranges (0: by the split rule).

    The keys behind it, per sequence: `block_n` keys per step, `num_splits` ranges (0: by the rule). `early_merge` launches the merge and
    `overlap` the second pass while the pass before is still running (programmatic dependent launch).
    """

    prefix_m: int = 128
    prefix_n: int = 64
    prefix_splits: int = 0
    prefix_warps: int = 8
    prefix_stages: int = 3
    block_n: int = 64
    num_splits: int = 0
    num_warps: int = 4
    num_stages: int = 3
    early_merge: bool = False
    overlap: bool = False


@triton.jit
def _read_prefix(
    q,
    k,
    v,
    k_scale,
    v_scale,
    pages,
    partial,
    lse,
    scale_log2,
    rows,
    prefix,
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
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NARROW: tl.constexpr,
    EVEN: tl.constexpr,
    UNIT: tl.constexpr,
    SAME_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SIGNAL: tl.constexpr,
):
    """One range of the prefix for BLOCK_M of the `rows` query rows of one key/value head. EVEN: the prefix is whole blocks.

    Strides of k and v are in UNIT elements. NARROW: an element of k and v is a pair of fp8 columns, and so are BLOCK_D and BLOCK_DV.
    """
    PACK: tl.constexpr = 2 if NARROW else 1
    WHOLE: tl.constexpr = PAGE_SIZE % BLOCK_N == 0
    if SIGNAL:
        tl.extra.cuda.gdc_launch_dependents()
    # Tiles of the same keys are neighbours, so that all but the first read them from L2.
    row_tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    split = program // row_tiles // KV_HEADS
    kv_head = program // row_tiles % KV_HEADS
    row = program % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    sequence = row // (GROUP * Q_LEN)
    token = row // GROUP % Q_LEN
    head = kv_head * GROUP + row % GROUP
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    offs_n = tl.arange(0, BLOCK_N)
    is_d = offs_d < HEAD_DIM // PACK
    is_dv = offs_dv < DIM_V // PACK

    q_rows = q + sequence.to(tl.int64) * q_batch + token * q_token + head * q_head
    scale = scale_log2
    if NARROW:
        queries, odd_queries, size = halved_queries(q_rows, is_row, HEAD_DIM, BLOCK_D)
        scale = scale_log2 * tl.load(k_scale + kv_head) * size[:, None]
    else:
        queries = tl.load(q_rows[:, None] + offs_d[None, :], mask=is_row[:, None] & is_d[None, :], other=0.0)
    k_of_head = k + kv_head.to(tl.int64) * k_head * UNIT
    v_of_head = v + kv_head.to(tl.int64) * v_head * UNIT

    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    values = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    odd_values = values
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(prefix, BLOCK_N))
    page = pages_of(pages, begin * BLOCK_N, begin * BLOCK_N + offs_n, prefix, WHOLE, PAGE_SIZE)
    for block in tl.range(begin, end):
        key = block * BLOCK_N + offs_n
        k_rows = (page.to(tl.int64) * k_page + key % PAGE_SIZE * k_token) * UNIT
        v_rows = k_rows
        if not SAME_ROWS:
            v_rows = (page.to(tl.int64) * v_page + key % PAGE_SIZE * v_token) * UNIT
        page = pages_of(pages, (block + 1) * BLOCK_N, key + BLOCK_N, prefix, WHOLE, PAGE_SIZE)
        if EVEN and HEAD_DIM == PACK * BLOCK_D:
            keys = tl.load(k_of_head + k_rows[:, None] + offs_d[None, :])
        else:
            keys = tl.load(k_of_head + k_rows[:, None] + offs_d[None, :], mask=(key < prefix)[:, None] & is_d[None, :], other=0.0)
        if NARROW:
            keys, odd_keys = two_of(keys)
            scores = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="ieee")
            scores = tl.dot(odd_queries, tl.trans(odd_keys.to(queries.dtype)), scores, input_precision="ieee")
        else:
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        scores = capped(scores * scale, SOFTCAP)
        if not EVEN:
            scores = tl.where((key < prefix)[None, :], scores, float("-inf"))
        # Every range has a key and every row sees it: no maximum stays infinite.
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        decay = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        largest = larger
        if EVEN and DIM_V == PACK * BLOCK_DV:
            news = tl.load(v_of_head + v_rows[:, None] + offs_dv[None, :])
        else:
            news = tl.load(v_of_head + v_rows[:, None] + offs_dv[None, :], mask=(key < prefix)[:, None] & is_dv[None, :], other=0.0)
        values *= decay[:, None]
        weights = weights.to(queries.dtype)
        if NARROW:
            news, odd_news = two_of(news)
            odd_values *= decay[:, None]
            odd_values = tl.dot(weights, odd_news.to(queries.dtype), odd_values, input_precision="ieee")
        values = tl.dot(weights, news.to(queries.dtype), values, input_precision="ieee")

    if NARROW:
        values = tl.interleave(values, odd_values) * tl.load(v_scale + kv_head)
    columns_v = tl.arange(0, PACK * BLOCK_DV)
    at = ((sequence * Q_LEN + token) * (KV_HEADS * GROUP) + head).to(tl.int64) * columns + split
    is_stored = is_row[:, None] & (columns_v < DIM_V)[None, :]
    tl.store(partial + at[:, None] * DIM_V + columns_v[None, :], values / total[:, None], mask=is_stored)
    tl.store(lse + at, largest + tl.log2(total), mask=is_row)


def batch_rows(problem: DecodeAttention) -> int:
    """Query rows of the whole batch on one key/value head."""
    return problem.batch * rows_of(problem)


def suffix_m(problem: DecodeAttention) -> int:
    """Query rows of one program behind the prefix; tensor cores take 16 at least."""
    return min(MAX_SUFFIX_ROWS, max(16, next_power_of_2(rows_of(problem))))


def _smem_bytes(problem: DecodeAttention, rows: int, block_n: int, stages: int) -> int:
    """Shared memory of one program, an upper bound: the stages of keys and values, the queries, the weights; fp8 also as fp16."""
    size, cache = SIZE_BYTES[problem.dtype], SIZE_BYTES[problem.cache_dtype]
    dim, dim_v = next_power_of_2(problem.head_dim), next_power_of_2(problem.dim_v)
    widened = 2 * block_n * (dim + dim_v) if problem.kv_dtype and rows >= 64 else 0
    loop = stages * block_n * (dim + dim_v) * cache + widened + rows * (dim + block_n) * size
    return max(loop, rows * dim_v * 4) + KIB


def _prefix_registers(problem: DecodeAttention, config: CascadeConfig) -> int:
    """Registers of a thread for the sums, the scores before and after the exponential, and the pointers of the loads."""
    threads, widest = 32 * config.prefix_warps, next_power_of_2(max(problem.head_dim, problem.dim_v))
    loads = config.prefix_n * widest * SIZE_BYTES[problem.cache_dtype] // 16 // threads
    return config.prefix_m * (next_power_of_2(problem.dim_v) + 2 * config.prefix_n) // threads + 4 * loads


def prefix_split_count(problem: DecodeAttention, config: CascadeConfig, chip: Chip) -> int:
    """Ranges of the prefix: as configured, or by the split rule for one program per SM (a tile of 128 rows takes most of one)."""
    tiles = cdiv(problem.shared_prefix, config.prefix_n)
    if config.prefix_splits:
        return config.prefix_splits
    programs = problem.kv_heads * cdiv(batch_rows(problem), config.prefix_m)
    unit = 32 * KIB / (config.prefix_n * (problem.head_dim + problem.dim_v) * SIZE_BYTES[problem.cache_dtype])
    chosen = choose_splits(
        [tiles],
        programs,
        chip.sm_count * (2 if config.prefix_m == 64 else 1),
        overhead_tiles=OVERHEAD_TILES * unit,
        merge_tiles=MERGE_TILES * unit,
        combine_tiles=COMBINE_TILES * unit,
        max_splits=MAX_SPLITS,
    )
    return cdiv(tiles, tiles_per_split(tiles, chosen))


def split_count(problem: DecodeAttention, config: CascadeConfig, chip: Chip) -> int:
    """Ranges of the longest sequence behind the prefix: as configured, or by the split rule."""
    return config.num_splits or rule_of(
        problem,
        chip,
        block_m=suffix_m(problem),
        block_n=config.block_n,
        num_warps=config.num_warps,
        smem_bytes=_smem_bytes(problem, suffix_m(problem), config.block_n, config.num_stages),
        first=problem.shared_prefix,
    )


def fits(problem: DecodeAttention, config: CascadeConfig, chip: Chip) -> str | None:
    """There is a prefix and no window; blocks are powers of two; stages fit shared memory, sums fit registers, no range is empty."""
    if not problem.shared_prefix:
        return "is for sequences that share a prefix"
    if problem.window:
        return "with a window most sequences see nothing of the prefix"
    if SIZE_BYTES[problem.dtype] != 2:
        return "is for 16-bit dtypes"
    blocks = (config.prefix_m, config.prefix_n, config.prefix_warps, config.block_n, config.num_warps)
    if any(value < 1 or value & (value - 1) for value in blocks) or min(config.prefix_stages, config.num_stages) < 1:
        return "blocks and warps must be powers of two, stages at least 1"
    if not 16 <= config.prefix_m <= 128 or not 16 <= config.prefix_n <= 256 or not 16 <= config.block_n <= 256:
        return "prefix_m is 16 to 128, prefix_n and block_n 16 to 256"
    if max(problem.head_dim, problem.dim_v) > 256 or min(problem.head_dim, problem.dim_v) < 16:
        return "head dimensions are 16 to 256"
    if problem.kv_dtype and (min(problem.head_dim, problem.dim_v) < 32 or (problem.head_dim | problem.dim_v) % 2):
        return "fp8 caches are read in pairs: head dimensions are even and at least 32"
    if config.prefix_m > max(16, next_power_of_2(batch_rows(problem))):
        return "prefix_m is more than the batch has rows"
    if config.prefix_m // 16 < config.prefix_warps and config.prefix_warps * 8 > config.prefix_n:
        return "too many warps for the tile"
    if config.prefix_n > max(16, next_power_of_2(problem.shared_prefix)):
        return "prefix_n is larger than the prefix"
    tiles = cdiv(problem.shared_prefix, config.prefix_n)
    splits = config.prefix_splits
    if not 0 <= splits <= min(tiles, MAX_SPLITS) or (splits and cdiv(tiles, cdiv(tiles, splits)) != splits):
        return f"prefix_splits={splits} leaves ranges of the {tiles} blocks empty"
    sizes = ((config.prefix_m, config.prefix_n, config.prefix_stages), (suffix_m(problem), config.block_n, config.num_stages))
    if any(_smem_bytes(problem, *size) > chip.smem_per_block_bytes for size in sizes):
        return "too much shared memory"
    most = MAX_REGISTERS_FOR_FP8_PREFIX if problem.kv_dtype else MAX_REGISTERS_FOR_PREFIX
    if _prefix_registers(problem, config) > most or would_spill(problem, suffix_m(problem), config.block_n, config.num_warps):
        return "the tile would spill registers"
    if config.num_warps * 8 > max(config.block_n, next_power_of_2(problem.dim_v)):
        return "too many warps for the tile"
    chosen = split_count(problem, config, chip) + prefix_split_count(problem, config, chip)
    return unfit_splits(
        problem,
        chip,
        block_n=config.block_n,
        num_splits=config.num_splits,
        chosen=chosen,
        early_merge=config.early_merge,
        first=problem.shared_prefix,
    )


def default(problem: DecodeAttention, chip: Chip) -> CascadeConfig:
    """128 rows where the batch has as many and the sums fit; about 32 KiB of keys and values per step."""
    rows = next_power_of_2(batch_rows(problem))
    prefix_m = max(16, min(128, rows))
    prefix_n = max(16, min(64 if problem.dim_v <= 128 else 32, next_power_of_2(problem.shared_prefix)))
    block_n = block_n_of(problem, suffix_m(problem), problem.shared_prefix)
    wide = suffix_m(problem) > 32 or would_spill(problem, suffix_m(problem), block_n, 4)
    return CascadeConfig(
        prefix_m=prefix_m,
        prefix_n=prefix_n,
        prefix_warps=8 if prefix_m == 128 else 4 if prefix_n >= 32 else 2,
        prefix_stages=3 if _smem_bytes(problem, prefix_m, prefix_n, 3) <= chip.smem_per_block_bytes else 2,
        block_n=block_n,
        num_stages=stages_of(problem, block_n),
        num_warps=min(8 if wide else 4, max(block_n, next_power_of_2(problem.dim_v)) // 8),
    )


def space(problem: DecodeAttention, chip: Chip) -> Iterator[CascadeConfig]:
    """Tiles of 64 or 128 rows by 32 to 128 keys; behind the prefix blocks of 32 to 128 keys; the rule's ranges and some around them."""
    tiles = product(((64, 4), (128, 4), (128, 8), (16, 4)), (64, 32, 128), (3, 2))
    steps = [(64, 4, 3), (64, 4, 4), (128, 4, 3), (32, 4, 4), (64, 8, 3), (64, 4, 2)]
    for ((prefix_m, prefix_warps), prefix_n, prefix_stages), (block_n, warps, stages) in product(tiles, steps):
        rule = CascadeConfig(prefix_m, prefix_n, 0, prefix_warps, prefix_stages, block_n, 0, warps, stages)
        if fits(problem, rule, chip) is not None:
            continue
        chosen = prefix_split_count(problem, rule, chip)
        for prefix_splits, splits in product(sorted({0, chosen // 2, 2 * chosen}), (0, 1, 2)):
            for early, overlap in ((False, False), (True, False), (True, True)):
                yield replace(rule, prefix_splits=prefix_splits, num_splits=splits, early_merge=early, overlap=overlap)


def _prefix_pass(problem: DecodeAttention, config: CascadeConfig, ranges: int) -> Prefix:
    """The launch of `_read_prefix` for `ranges` ranges."""
    # The block table of the longest sequence has the prefix's pages; an empty sequence has none.
    longest = problem.kv_lens.index(problem.max_kv_len)
    blocks_per_split = tiles_per_split(cdiv(problem.shared_prefix, config.prefix_n), ranges)

    def launch(inputs: Tensors, partial: torch.Tensor, lse: torch.Tensor, columns: int) -> None:
        q = inputs["q"]
        k, v, strides, unit = caches(problem, inputs)
        _read_prefix[(ranges * problem.kv_heads * cdiv(batch_rows(problem), config.prefix_m),)](
            q,
            k,
            v,
            inputs.get("k_scale", q),
            inputs.get("v_scale", q),
            inputs["block_table"][longest],
            partial,
            lse,
            problem.scale * math.log2(math.e),
            batch_rows(problem),
            problem.shared_prefix,
            columns,
            blocks_per_split,
            *q.stride()[:3],
            *strides,
            KV_HEADS=problem.kv_heads,
            GROUP=problem.heads // problem.kv_heads,
            Q_LEN=problem.q_len,
            HEAD_DIM=problem.head_dim,
            DIM_V=problem.dim_v,
            PAGE_SIZE=problem.page_size,
            SOFTCAP=float(problem.softcap),
            NARROW=bool(problem.kv_dtype),
            EVEN=problem.shared_prefix % config.prefix_n == 0,
            UNIT=unit,
            SAME_ROWS=strides[:2] == strides[3:5],
            BLOCK_M=config.prefix_m,
            BLOCK_N=config.prefix_n,
            BLOCK_D=width_of(problem, problem.head_dim),
            BLOCK_DV=width_of(problem, problem.dim_v),
            SIGNAL=config.overlap and not INTERPRETED,
            num_warps=config.prefix_warps,
            num_stages=config.prefix_stages,
        )

    return launch


@kernel(DecodeAttention, backend="triton", config=CascadeConfig, space=space, default=default, fits=fits)
def triton_cascade(problem: DecodeAttention, config: CascadeConfig, chip: Chip) -> Launch:
    """Triton cascade decoding: a shared prefix read once for all sequences' queries, the rest per sequence, merged by log-sum-exp."""
    ranges = prefix_split_count(problem, config, chip)
    return ranges_launch(
        read_range,
        problem,
        splits=split_count(problem, config, chip),
        early_merge=config.early_merge,
        block_m=suffix_m(problem),
        block_n=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        prefix=_prefix_pass(problem, config, ranges),
        prefix_columns=ranges,
        overlap=config.overlap,
    )
