"""Shapes, limits and splits that the kernels of latent_attention and sparse_latent_attention share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

from klab.kernels.contract import Chip, Config
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.split_rule import COMBINE_TILES, MERGE_TILES, OVERHEAD_TILES, choose_splits, tiles_per_split
from klab.kernels.triton_support import KIB, cdiv, next_power_of_2

if TYPE_CHECKING:
    from klab.kernels.latent_attention.problem import LatentAttention
    from klab.kernels.sparse_latent_attention.problem import SparseLatentAttention

MAX_SPLITS = 256
# Programs per SM that draw the whole bandwidth; counting more, where more fit, would make the split rule cut for slots that bring nothing.
MAX_PROGRAMS_PER_SM = 2


@dataclass(frozen=True)
class LatentShape:
    """What both operators come down to: `sequences` groups of `rows` = q_len * heads query rows, each over its own list of keys.

    lengths: keys of each sequence. listed: slots come from a list of `lengths[0]` entries, otherwise from a page table and a length.
    narrow: the cache is fp8.
    """

    lengths: tuple[int, ...]
    heads: int
    q_len: int
    rank: int
    rope: int
    page_size: int
    scale: float
    dtype: str
    listed: bool = False
    narrow: bool = False

    @property
    def sequences(self) -> int:
        """Groups of rows."""
        return len(self.lengths)

    @property
    def rows(self) -> int:
        """Query rows that read the same keys."""
        return self.heads * self.q_len

    @property
    def dim(self) -> int:
        """Elements of a cached row."""
        return self.rank + self.rope

    @property
    def size(self) -> int:
        """Bytes of an element of a query."""
        return SIZE_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of a cached row."""
        return self.dim * (1 if self.narrow else self.size)


@lru_cache(maxsize=1024)
def shape_of(problem: LatentAttention | SparseLatentAttention) -> LatentShape:
    """The problem as the kernels see it."""
    common = (problem.kv_lora_rank, problem.rope_dim, problem.page_size, problem.scale, problem.dtype)
    if problem.operator == "sparse_latent_attention":
        return LatentShape((problem.topk,) * problem.tokens, problem.heads, 1, *common, listed=True)  # type: ignore[union-attr]
    return LatentShape(problem.kv_lens, problem.heads, problem.q_len, *common, narrow=bool(problem.kv_dtype))  # type: ignore[union-attr]


def split_counts(chosen: int) -> list[int]:
    """Candidates: the rule's choice (0), no split, and powers of two within a factor of four of the choice."""
    near = {2**i for i in range(9) if chosen <= 4 * 2**i and 2**i <= 4 * chosen} | {1}
    return [0, *sorted(near - {chosen})]


def choose(shape: LatentShape, chip: Chip, *, block_m: int, block_n: int, programs_per_sm: int) -> int:
    """Ranges of the longest sequence by the split rule, for programs of block_m rows that step through block_n keys.

    A partial result is rank floats per row, 128 KiB for 64 rows: as much as two tiles of 64 keys. Writing it is part of a program's
    overhead, and reading it, by the whole chip at once, what another range adds to the merge.
    """
    tile = block_n * shape.row_bytes
    slots = chip.sm_count * max(1, min(MAX_PROGRAMS_PER_SM, programs_per_sm))
    unit = 32 * KIB / tile  # the rule's constants are for tiles of 32 KiB
    return choose_splits(
        [cdiv(length, block_n) for length in shape.lengths],
        shape.sequences * cdiv(shape.rows, block_m),
        slots,
        overhead_tiles=OVERHEAD_TILES * unit + min(block_m, shape.rows) * shape.rank * 4 / tile,
        merge_tiles=MERGE_TILES * unit + shape.sequences * shape.rows * shape.rank * 4 / (slots * tile),
        combine_tiles=COMBINE_TILES * unit,
        max_splits=MAX_SPLITS,
    )


def unfit_splits(shape: LatentShape, chip: Chip, *, block_n: int, num_splits: int, chosen: int) -> str | None:
    """Why `num_splits` (0: the rule's `chosen`) ranges cannot be, or None."""
    if block_n > max(16, next_power_of_2(max(shape.lengths))):
        return "block_n is larger than the context"
    blocks = cdiv(max(shape.lengths), block_n)
    if not 0 <= num_splits <= min(blocks, MAX_SPLITS) or (num_splits and cdiv(blocks, cdiv(blocks, num_splits)) != num_splits):
        return f"num_splits={num_splits} leaves ranges of the {blocks} blocks empty"
    if chosen > 1 and chosen * shape.sequences * shape.rows * (shape.rank + 1) * 4 > chip.memory_bytes // 16:
        return "the partial results need too much memory"
    return None


def per_split(shape: LatentShape, block_n: int, splits: int) -> int:
    """Blocks of one range when the longest sequence is cut into `splits`."""
    return tiles_per_split(cdiv(max(shape.lengths), block_n), splits)


# ------------------------------------------------------------------------------------------------------------- the Triton kernels
@dataclass(frozen=True)
class LatentConfig(Config):
    """A program takes `block_m` query rows and `block_n` keys per step; the longest sequence is cut into `num_splits` ranges (0: by rule).

    `early_merge` launches the merge while the last ranges are still being read (programmatic dependent launch). `recompute` keeps the
    compiler from moving what does not change out of the loop: addresses and operand descriptors are made anew instead of spilled.
    """

    block_m: int = 64
    block_n: int = 64
    num_splits: int = 0
    num_warps: int = 8
    num_stages: int = 2
    early_merge: bool = False
    recompute: bool = False


def uses_wide_unit(shape: LatentShape, config: LatentConfig) -> bool:
    """Whether tl.dot becomes wgmma or tcgen05: 64 rows, whole warp groups, 16-bit operands."""
    return config.block_m >= 64 and config.num_warps >= 4 and shape.size == 2


def triton_smem_bytes(shape: LatentShape, config: LatentConfig, chip: Chip) -> int:
    """Shared memory of one program, as compiled by Triton 3.7 for sm_90 and sm_100: queries, the stages of cached rows, the weights."""
    rows, keys = config.block_m, config.block_n
    own = rows * shape.dim * shape.size
    tile = keys * shape.row_bytes
    if shape.narrow:  # the stages are fp8, the operands that they become are kept once
        return own + max(1, config.num_stages - 1) * tile + keys * shape.dim * shape.size + rows * keys * shape.size + KIB
    if not uses_wide_unit(shape, config):
        return max(own + max(1, config.num_stages - 1) * tile + rows * keys * shape.size, rows * shape.rank * 4) + KIB
    if chip.target >= 100 and config.num_stages > 1:
        # The rows of a step stay until its second product is done: two copies more, of the latent alone.
        return own + (config.num_stages + 2) * keys * shape.rank * shape.size + config.num_stages * keys * shape.rope * shape.size + KIB
    return own + config.num_stages * tile + KIB


def triton_splits(shape: LatentShape, config: LatentConfig, chip: Chip) -> int:
    """Ranges of the longest sequence: as configured, or by the split rule."""
    if config.num_splits:
        return config.num_splits
    fitting = min(chip.smem_per_sm_bytes // (triton_smem_bytes(shape, config, chip) + KIB), 65536 // (32 * config.num_warps * 168))
    return choose(shape, chip, block_m=config.block_m, block_n=config.block_n, programs_per_sm=fitting)


def triton_fits(shape: LatentShape, config: LatentConfig, chip: Chip) -> str | None:
    """Tiles are powers of two within the problem; stages fit shared memory, sums fit registers, no range is empty."""
    rows, keys, warps = config.block_m, config.block_n, config.num_warps
    if any(value < 16 or value & (value - 1) for value in (shape.rank, shape.rope)):
        return "kv_lora_rank and rope_dim must be powers of two from 16 on"
    if any(value < 1 or value & (value - 1) for value in (rows, keys, warps)):
        return "block_m, block_n and num_warps must be powers of two"
    if not (16 <= rows <= 64 and 16 <= keys <= 256 and warps <= 16 and config.num_stages >= 1):
        return "block_m is 16 to 64, block_n 16 to 256, num_warps 1 to 16, num_stages at least 1"
    if rows > max(16, 2 * next_power_of_2(shape.rows)):
        return "block_m is more than twice what the queries fill"
    if triton_smem_bytes(shape, config, chip) > chip.smem_per_block_bytes:
        return "too much shared memory"
    threads = 32 * warps
    if rows * shape.rank // threads > 128:
        return "the sums would spill registers"
    if keys * shape.row_bytes // 16 // threads > 48:  # compiled: 72 spill 900 bytes
        return "the loads of a step would spill registers"
    if shape.dtype == "float32" and rows * keys * shape.rank // threads > 512:
        return "one step would unroll too many multiply-adds"
    chosen = triton_splits(shape, config, chip)
    if config.early_merge and chosen == 1:
        return "with one range there is no merge to launch early"
    return unfit_splits(shape, chip, block_n=keys, num_splits=config.num_splits, chosen=chosen)


def triton_default(shape: LatentShape, chip: Chip) -> LatentConfig:
    """As many rows as there are, up to the 64 that make the large matrix units run; keys so that two tiles and the queries fit."""
    rows = min(64, max(16, next_power_of_2(shape.rows)))
    longest = max(16, next_power_of_2(max(shape.lengths)))
    if shape.dtype == "float32":
        return LatentConfig(16, min(16, longest), num_warps=8, num_stages=2)
    if rows < 64:
        return LatentConfig(rows, min(32, longest), num_warps=4 if rows == 16 else 8, num_stages=3)
    # Compiled: what spills nothing. The plain loop spills 8 bytes with `recompute`, the fp8 one 370 and tcgen05's 32 without; the
    # gathering one spills 48 at 64 keys on sm_90 either way.
    if chip.target >= 100 or shape.narrow:
        return LatentConfig(rows, min(32, longest), num_warps=8, num_stages=2, recompute=True)
    keys, stages = (32, 3) if shape.listed else (64, 2)
    return LatentConfig(rows, min(keys, longest), num_warps=8, num_stages=stages)


def triton_space(shape: LatentShape, chip: Chip) -> Iterator[LatentConfig]:
    """16 to 64 rows, 16 to 128 keys, 4 to 16 warps, 1 to 4 stages, both kinds of loop; the rule's splits and powers of two around them."""
    for rows, keys, warps, stages, recompute in product((16, 32, 64), (16, 32, 64, 128), (4, 8, 16), (1, 2, 3, 4), (False, True)):
        rule = LatentConfig(rows, keys, 0, warps, stages, recompute=recompute)
        if triton_fits(shape, rule, chip) is None:
            for splits, early in product(split_counts(triton_splits(shape, rule, chip)), (False, True)):
                yield LatentConfig(rows, keys, splits, warps, stages, early, recompute)
