"""The host side of the split-KV Triton kernels: how many ranges, the workspace, and the launch of ranges and merge."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from klab.kernels.contract import Chip, Launch, Tensors
from klab.kernels.decode_attention._triton_ranges import merge_ranges
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.errors import UsageError
from klab.kernels.split_rule import COMBINE_TILES, MERGE_TILES, OVERHEAD_TILES, choose_splits, tiles_per_split
from klab.kernels.triton_support import INTERPRETED, KIB, cdiv, next_power_of_2

MAX_SPLITS = 256
MERGE_ELEMENTS = 4096  # partial values that a merge program holds at once: 32 registers with 4 warps

# Programs per SM that draw the whole bandwidth: each keeps 64 KiB under way, and 4.8 TB/s x 1 us / 132 SMs is 36 KiB. Counting more,
# where more fit, would make the split rule cut 256 programs on 132 SMs in three to fill slots that bring nothing.
MAX_PROGRAMS_PER_SM = 2
REGISTERS_PER_THREAD = 160  # compiled: 95 to 170 with 4 warps
# Compiled for sm_90: 160 takes 226 registers; 192 spills 80 bytes, and 32 loads of a key or value per thread spill 180 to 290.
MAX_REGISTERS_FOR_TILES = 160
# An fp8 tile is there as bytes and as fp16: 112 takes up to 230 registers, 128 spills 16 bytes.
MAX_REGISTERS_FOR_FP8_TILES = 112


def span_of(problem: DecodeAttention, length: int, first: int = 0) -> int:
    """Keys of a sequence of this length, from key `first` on, that its queries see."""
    return min(length, problem.window + problem.q_len - 1) if problem.window else max(0, length - first)


def blocks_of(problem: DecodeAttention, block_n: int, length: int, first: int = 0) -> int:
    """Steps of block_n keys that a sequence of this length takes."""
    return cdiv(span_of(problem, length, first), block_n)


def longest_of(problem: DecodeAttention, block_n: int, first: int = 0) -> int:
    """Steps of block_n keys that the longest sequence takes: the most of all."""
    return blocks_of(problem, block_n, problem.max_kv_len, first)


def rows_of(problem: DecodeAttention) -> int:
    """Query rows that read the same keys: the heads of a group times the new tokens."""
    return problem.q_len * problem.heads // problem.kv_heads


def programs_of(problem: DecodeAttention, block_m: int) -> int:
    """Programs without splits."""
    return problem.batch * problem.kv_heads * cdiv(rows_of(problem), block_m)


def rule_of(problem: DecodeAttention, chip: Chip, *, block_m: int, block_n: int, num_warps: int, smem_bytes: int, first: int = 0) -> int:
    """Ranges of the longest sequence by the split rule, for the programs of this shape that this chip runs at once.

    The rule looks at all lengths (a serving engine knows them when it schedules a step); the kernels get them from the device.
    """
    fitting = (chip.smem_per_sm_bytes // (smem_bytes + KIB), 65536 // (32 * num_warps * REGISTERS_PER_THREAD))
    slots = chip.sm_count * max(1, min(MAX_PROGRAMS_PER_SM, *fitting))
    # The rule's unit is the time of a tile of 32 KiB.
    unit = 32 * KIB / (block_n * (problem.head_dim + problem.dim_v) * SIZE_BYTES[problem.cache_dtype])
    return choose_splits(
        [blocks_of(problem, block_n, length, first) for length in problem.kv_lens],
        programs_of(problem, block_m),
        slots,
        overhead_tiles=OVERHEAD_TILES * unit,
        merge_tiles=MERGE_TILES * unit,
        combine_tiles=COMBINE_TILES * unit,
        max_splits=MAX_SPLITS,
    )


def unfit_splits(
    problem: DecodeAttention, chip: Chip, *, block_n: int, num_splits: int, chosen: int, early_merge: bool, first: int = 0
) -> str | None:
    """Why `num_splits` (0: the rule's `chosen`) ranges cannot be, or None."""
    if block_n > max(16, next_power_of_2(span_of(problem, problem.max_kv_len, first))):
        return "block_n is larger than the context"
    blocks = longest_of(problem, block_n, first)
    if not 0 <= num_splits <= min(blocks, MAX_SPLITS) or (num_splits and cdiv(blocks, cdiv(blocks, num_splits)) != num_splits):
        return f"num_splits={num_splits} leaves ranges of the {blocks} blocks empty"
    if early_merge and chosen == 1 and not first:
        return "with one range there is no merge to launch early"
    if chosen * problem.batch * problem.q_len * problem.heads * (problem.dim_v + 1) * 4 > chip.memory_bytes // 16:
        return "the partial results need too much memory"
    return None


def would_spill(problem: DecodeAttention, rows: int, block_n: int, num_warps: int) -> bool:
    """Whether `read_range` needs more registers than there are for a tile of this many query rows by block_n keys."""
    threads = 32 * num_warps
    dim_v, widest = next_power_of_2(problem.dim_v), next_power_of_2(max(problem.head_dim, problem.dim_v))
    # Registers of a thread: the sums, the scores before and after the exponential, a 64-bit pointer per 16 bytes of a key or value.
    loads = block_n * widest * SIZE_BYTES[problem.cache_dtype] // 16 // threads
    tiles = rows * (dim_v + 2 * block_n) // threads + 4 * loads
    most = MAX_REGISTERS_FOR_FP8_TILES if problem.kv_dtype else MAX_REGISTERS_FOR_TILES
    # 32 rows with 32 scores per thread: 255 registers and 16 to 56 bytes spilled, at any head dimension.
    return loads > 16 or tiles > most or (rows == 32 and rows * block_n // threads >= 32)


def block_n_of(problem: DecodeAttention, rows: int, first: int = 0) -> int:
    """Keys of a step: about 32 KiB of keys and values, but no more scores than the registers hold beside them."""
    row_bytes = next_power_of_2((problem.head_dim + problem.dim_v) * SIZE_BYTES[problem.cache_dtype])
    most = 64 if rows == 32 else 128
    return max(16, min(most, 32 * KIB // row_bytes, next_power_of_2(span_of(problem, problem.max_kv_len, first))))


def stages_of(problem: DecodeAttention, block_n: int) -> int:
    """Stages of the loads of a program, of which all but one wait: 3 to 5, so that about 48 KiB are on their way."""
    step_bytes = block_n * (problem.head_dim + problem.dim_v) * SIZE_BYTES[problem.cache_dtype]
    return min(5, max(3, 1 + cdiv(48 * KIB, step_bytes)))


def split_counts(chosen: int) -> list[int]:
    """Candidates: the rule's choice (0), no split, and powers of two within a factor of four of the choice."""
    near = {2**i for i in range(9) if chosen <= 4 * 2**i and 2**i <= 4 * chosen} | {1}
    return [0, *sorted(near - {chosen})]


def width_of(problem: DecodeAttention, dim: int) -> int:
    """Elements of a row of a tile that holds `dim` columns of the cache: pairs of columns in fp8."""
    return next_power_of_2(dim // 2 if problem.kv_dtype else dim)


def caches(problem: DecodeAttention, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor, list[int], int]:
    """(k, v, strides of pages, tokens and heads of k, then of v, in units; elements of a unit). fp8 comes as pairs in int16.

    Triton sees alignment only in multiples of 16 elements. Counted in 16-byte units, rows padded by 16 bytes load as wide.
    """
    k, v = inputs["k_cache"], inputs["v_cache"]
    if problem.kv_dtype:
        if any(stride % 2 for stride in (*k.stride()[:3], *v.stride()[:3])):
            raise UsageError(f"fp8 caches are read in pairs of columns: make their strides even ({k.stride()}, {v.stride()})")
        k, v = k.view(torch.int16), v.view(torch.int16)
    strides = [*k.stride()[:3], *v.stride()[:3]]
    per_16_bytes = 16 // k.element_size()
    unit = per_16_bytes if all(stride % per_16_bytes == 0 for stride in strides) else 1
    return k, v, [stride // unit for stride in strides], unit


Prefix = Callable[[Tensors, torch.Tensor, torch.Tensor, int], None]
"""`(inputs, partial, lse, columns)`: write the first partial results of every row."""


def ranges_launch(
    read_range: Any,
    problem: DecodeAttention,
    *,
    splits: int,
    early_merge: bool,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    prefix: Prefix | None = None,
    prefix_columns: int = 0,
    overlap: bool = False,
    **shape: int,
) -> Launch:
    """The launch of `read_range` over all ranges and, where there are several partial results per row, of the merge.

    `prefix` writes the results of the shared prefix as `prefix_columns` columns, and the ranges are of the keys behind it. With `overlap`
    it has signalled that the ranges may start. `shape` holds the further compile-time arguments of `read_range`.
    """
    first = problem.shared_prefix if prefix else 0
    blocks_per_split = tiles_per_split(longest_of(problem, block_n, first), splits)
    columns = prefix_columns + splits
    rows = problem.batch * problem.q_len * problem.heads
    block_dv = next_power_of_2(problem.dim_v)
    early = early_merge and columns > 1 and not INTERPRETED
    overlaps = overlap and prefix is not None and not INTERPRETED
    softcap = float(problem.softcap)
    workspaces: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, table, lens, out = inputs["q"], inputs["block_table"], inputs["kv_lens"], outputs["out"]
        sinks, k_scale, v_scale = (inputs.get(name, q) for name in ("sinks", "k_scale", "v_scale"))
        partial = lse = out
        if columns > 1:
            if out.device not in workspaces:
                new = torch.empty(rows * columns * (problem.dim_v + 1), dtype=torch.float32, device=out.device)
                workspaces[out.device] = new[: rows * columns * problem.dim_v], new[rows * columns * problem.dim_v :]
            partial, lse = workspaces[out.device]
        if prefix is not None:
            prefix(inputs, partial, lse, columns)
        k, v, strides, unit = caches(problem, inputs)
        read_range[(programs_of(problem, block_m) * splits,)](
            q,
            k,
            v,
            k_scale,
            v_scale,
            sinks,
            table,
            lens,
            out,
            partial,
            lse,
            problem.scale * math.log2(math.e),
            splits,
            columns,
            blocks_per_split,
            *q.stride()[:3],
            *strides,
            table.stride(0),
            *out.stride()[:3],
            KV_HEADS=problem.kv_heads,
            GROUP=problem.heads // problem.kv_heads,
            Q_LEN=problem.q_len,
            HEAD_DIM=problem.head_dim,
            DIM_V=problem.dim_v,
            PAGE_SIZE=problem.page_size,
            WINDOW=problem.window,
            SOFTCAP=softcap,
            SINKS=problem.sinks and columns == 1,
            NARROW=bool(problem.kv_dtype),
            FIRST=first,
            PREFIX_COLUMNS=prefix_columns,
            UNIT=unit,
            SAME_ROWS=strides[:2] == strides[3:5],
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=width_of(problem, problem.head_dim),
            BLOCK_DV=width_of(problem, problem.dim_v),
            DIRECT=columns == 1,
            SIGNAL=early,
            WAIT=overlaps,
            num_warps=num_warps,
            num_stages=num_stages,
            launch_pdl=overlaps,
            **shape,
        )
        if columns > 1:
            merge_ranges[(rows,)](
                partial,
                lse,
                lens,
                sinks,
                out,
                columns,
                blocks_per_split,
                *out.stride()[:3],
                HEADS=problem.heads,
                Q_LEN=problem.q_len,
                DIM_V=problem.dim_v,
                WINDOW=problem.window,
                SINKS=problem.sinks,
                FIRST=first,
                PREFIX_COLUMNS=prefix_columns,
                BLOCK_N=block_n,
                BLOCK_DV=block_dv,
                BLOCK_S=min(next_power_of_2(columns), MERGE_ELEMENTS // block_dv),
                WAIT=early,
                num_warps=4,
                launch_pdl=early,
            )

    return launch
