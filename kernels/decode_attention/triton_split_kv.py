"""Split-KV flash decoding: each program reads one range of one sequence's keys for all query heads that share them.

The query heads of a group, times q_len, are the rows of one matrix, so every key and value is read once. All warps of a program work
on the same block of keys; ranges of a long sequence are read at the same time and merged in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.decode_attention._triton_launch import (
    block_n_of,
    ranges_launch,
    rows_of,
    rule_of,
    split_counts,
    stages_of,
    unfit_splits,
    would_spill,
)
from klab.kernels.decode_attention._triton_read import read_range
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.triton_support import KIB, next_power_of_2

MAX_ROWS = 64  # more query rows go to further programs, which read the same keys from L2
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


def block_m_of(problem: DecodeAttention) -> int:
    """Query rows of one program; tensor cores take 16 at least."""
    return min(MAX_ROWS, max(16, next_power_of_2(rows_of(problem))))


def smem_bytes(problem: DecodeAttention, config: SplitKvConfig) -> int:
    """Shared memory of one program, an upper bound: the stages of keys and values, the queries, the weights on their way to tl.dot.

    Triton keeps one stage less than `num_stages` in shared memory, but all of them for the warp-group instructions of 64 rows.
    """
    size, cache, rows = SIZE_BYTES[problem.dtype], SIZE_BYTES[problem.cache_dtype], block_m_of(problem)
    dim, dim_v = next_power_of_2(problem.head_dim), next_power_of_2(problem.dim_v)
    buffers = config.num_stages if rows == 64 and config.num_warps >= 4 and size == 2 else max(1, config.num_stages - 1)
    loop = buffers * config.block_n * (dim + dim_v) * cache + rows * (dim + config.block_n) * size
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
    if problem.kv_dtype and (min(problem.head_dim, problem.dim_v) < 32 or (problem.head_dim | problem.dim_v) % 2):
        return "fp8 caches are read in pairs: head dimensions are even and at least 32"
    if smem_bytes(problem, config) > chip.smem_per_block_bytes:
        return "too much shared memory"
    if warps * 8 > max(block_n, next_power_of_2(problem.dim_v)):
        return "too many warps for the tile"
    if would_spill(problem, block_m_of(problem), block_n, warps):
        return "the tile would spill registers"
    steps = block_m_of(problem) * block_n * next_power_of_2(max(problem.head_dim, problem.dim_v)) // (32 * warps)
    if problem.dtype == "float32" and steps > MAX_FMAS_PER_STEP_FP32:
        return "one step would unroll too many multiply-adds"
    chosen = split_count(problem, config, chip)
    return unfit_splits(problem, chip, block_n=block_n, num_splits=config.num_splits, chosen=chosen, early_merge=config.early_merge)


def default(problem: DecodeAttention, chip: Chip) -> SplitKvConfig:
    """About 32 KiB of keys and values per step and 48 KiB on their way; more warps where four cannot hold the sums."""
    # More rows, or multiply-adds without tensor cores, need more threads to hold their sums.
    rows = block_m_of(problem)
    block_n = block_n_of(problem, rows)
    wide = rows > 32 or (problem.dtype == "float32" and block_n > 16) or would_spill(problem, rows, block_n, 4)
    config = SplitKvConfig(block_n=block_n, num_warps=8 if wide else 4, num_stages=stages_of(problem, block_n))
    return config if smem_bytes(problem, config) <= chip.smem_per_block_bytes // 2 else replace(config, num_stages=3)


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
        read_range,
        problem,
        splits=split_count(problem, config, chip),
        early_merge=config.early_merge,
        block_m=block_m_of(problem),
        block_n=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
