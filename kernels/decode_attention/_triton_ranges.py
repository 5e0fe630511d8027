# Triton's parameters have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What the split-KV Triton kernels share: which keys a program reads, where its result goes, and the merge of a sequence's ranges.

Every sequence is cut into ranges of the same number of blocks. Lengths are read on the device: the grid is sized by the longest
sequence, and programs behind a shorter sequence's end stop at once (Dao et al., Flash-Decoding, 2023).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from klab.kernels.contract import Chip, Launch, Tensors
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.split_rule import COMBINE_TILES, MERGE_TILES, OVERHEAD_TILES, choose_splits, tiles_per_split
from klab.kernels.triton_support import INTERPRETED, KIB, cdiv, next_power_of_2

LOG2_E = 1.4426950408889634
MAX_SPLITS = 256
MERGE_ELEMENTS = 4096  # partial values that a merge program holds at once: 32 registers with 4 warps

# Programs per SM that draw the whole bandwidth: each keeps 64 KiB under way, and 4.8 TB/s x 1 us / 132 SMs is 36 KiB. Counting more,
# where more fit, would make the split rule cut 256 programs on 132 SMs in three to fill slots that bring nothing.
MAX_PROGRAMS_PER_SM = 2
REGISTERS_PER_THREAD = 160  # compiled: 95 to 170 with 4 warps


@triton.jit
def locate(kv_lens, splits, blocks_per_split, HEAD_TILES: tl.constexpr, Q_LEN: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tile of heads, split, sequence, its length, first block, block behind the last) of this program."""
    # Neighbouring programs read neighbouring heads of the same pages: together they read whole DRAM rows.
    program = tl.program_id(0)
    split = program // HEAD_TILES % splits
    sequence = program // HEAD_TILES // splits
    length = tl.load(kv_lens + sequence)
    begin = split * blocks_per_split
    if WINDOW:
        begin += tl.maximum(length - Q_LEN - WINDOW + 1, 0) // BLOCK_N
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(length, BLOCK_N))
    return program % HEAD_TILES, split, sequence, length, begin, end


@triton.jit
def pages_of(pages, block, key, length, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of each key of a block, or the one page that holds the block; 0 behind the sequence's end."""
    if PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(pages + block * BLOCK_N // PAGE_SIZE, mask=block * BLOCK_N < length, other=0)
    else:
        page = tl.load(pages + key // PAGE_SIZE, mask=key < length, other=0)
    return page


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
    splits,
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
    """Write [rows, BLOCK_DV] to the output, or (not DIRECT) as the partial result of this split with the log2 of its weights' sum."""
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    offs_dv = tl.arange(0, BLOCK_DV)
    is_row = row < GROUP * Q_LEN
    is_stored = is_row[:, None] & (offs_dv < DIM_V)[None, :]
    if DIRECT:
        to = out + sequence.to(tl.int64) * out_batch + token * out_token + head * out_head
        tl.store(to[:, None] + offs_dv[None, :], values.to(out.dtype.element_ty), mask=is_stored)
    else:
        at = ((sequence * Q_LEN + token) * (KV_HEADS * GROUP) + head).to(tl.int64) * splits + split
        tl.store(partial + at[:, None] * DIM_V + offs_dv[None, :], values, mask=is_stored)
        tl.store(lse + at, log_sum, mask=is_row)


@triton.jit
def merge_ranges(
    partial,
    lse,
    kv_lens,
    out,
    splits,
    blocks_per_split,
    out_batch,
    out_token,
    out_head,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    DIM_V: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WAIT: tl.constexpr,
):
    """The weighted mean of one query head's partial results; zeros for an empty sequence."""
    program = tl.program_id(0)
    sequence = program // (Q_LEN * HEADS)
    length = tl.load(kv_lens + sequence)
    blocks = tl.cdiv(length, BLOCK_N)
    if WINDOW:
        blocks -= tl.maximum(length - Q_LEN - WINDOW + 1, 0) // BLOCK_N
    ranges = tl.cdiv(blocks, blocks_per_split)
    row = program.to(tl.int64) * splits
    offs_dv = tl.arange(0, BLOCK_DV)
    is_dv = offs_dv < DIM_V
    if WAIT:
        tl.extra.cuda.gdc_wait()

    largest = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.full((), 0.0, dtype=tl.float32)
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


def span_of(problem: DecodeAttention, length: int) -> int:
    """Keys of a sequence of this length that its queries see."""
    return min(length, problem.window + problem.q_len - 1) if problem.window else length


def blocks_of(problem: DecodeAttention, block_n: int, length: int) -> int:
    """Steps of block_n keys that a sequence of this length takes at most. A window may begin in the middle of a block."""
    return min(cdiv(length, block_n), cdiv(span_of(problem, length) - 1, block_n) + 1)


def longest_of(problem: DecodeAttention, block_n: int) -> int:
    """Steps of block_n keys that the longest sequence takes at most."""
    return blocks_of(problem, block_n, problem.max_kv_len)


def rows_of(problem: DecodeAttention) -> int:
    """Query rows that read the same keys: the heads of a group times the new tokens."""
    return problem.q_len * problem.heads // problem.kv_heads


def programs_of(problem: DecodeAttention, block_m: int) -> int:
    """Programs without splits."""
    return problem.batch * problem.kv_heads * cdiv(rows_of(problem), block_m)


def rule_of(problem: DecodeAttention, chip: Chip, *, block_m: int, block_n: int, num_warps: int, smem_bytes: int) -> int:
    """Ranges of the longest sequence by the split rule, for the programs of this shape that this chip runs at once.

    The rule looks at all lengths (a serving engine knows them when it schedules a step); the kernels get them from the device.
    """
    fitting = (chip.smem_per_sm_bytes // (smem_bytes + KIB), 65536 // (32 * num_warps * REGISTERS_PER_THREAD))
    slots = chip.sm_count * max(1, min(MAX_PROGRAMS_PER_SM, *fitting))
    # The rule's unit is the time of a tile of 32 KiB.
    unit = 32 * KIB / (block_n * (problem.head_dim + problem.dim_v) * SIZE_BYTES[problem.dtype])
    return choose_splits(
        [blocks_of(problem, block_n, length) for length in problem.kv_lens],
        programs_of(problem, block_m),
        slots,
        overhead_tiles=OVERHEAD_TILES * unit,
        merge_tiles=MERGE_TILES * unit,
        combine_tiles=COMBINE_TILES * unit,
        max_splits=MAX_SPLITS,
    )


def unfit_splits(problem: DecodeAttention, chip: Chip, *, block_n: int, num_splits: int, chosen: int, early_merge: bool) -> str | None:
    """Why `num_splits` (0: the rule's `chosen`) ranges cannot be, or None."""
    if block_n > max(16, next_power_of_2(span_of(problem, problem.max_kv_len))):
        return "block_n is larger than the context"
    blocks = longest_of(problem, block_n)
    if not 0 <= num_splits <= min(blocks, MAX_SPLITS) or (num_splits and cdiv(blocks, cdiv(blocks, num_splits)) != num_splits):
        return f"num_splits={num_splits} leaves ranges of the {blocks} blocks empty"
    if early_merge and chosen == 1:
        return "with one range there is no merge to launch early"
    if chosen * problem.batch * problem.q_len * problem.heads * (problem.dim_v + 1) * 4 > chip.memory_bytes // 16:
        return "the partial results need too much memory"
    return None


def split_counts(chosen: int) -> list[int]:
    """Candidates: the rule's choice (0), no split, and powers of two within a factor of four of the choice."""
    near = {2**i for i in range(9) if chosen <= 4 * 2**i and 2**i <= 4 * chosen} | {1}
    return [0, *sorted(near - {chosen})]


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
    **shape: int,
) -> Launch:
    """The launch of `read_range` over all ranges and, where there are several per sequence, of the merge.

    `shape` holds the further compile-time arguments of `read_range`.
    """
    blocks_per_split = tiles_per_split(longest_of(problem, block_n), splits)
    rows = problem.batch * problem.q_len * problem.heads
    block_dv = next_power_of_2(problem.dim_v)
    per_16_bytes = 16 // SIZE_BYTES[problem.dtype]
    early = early_merge and not INTERPRETED
    workspaces: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k, v, out = inputs["q"], inputs["k_cache"], inputs["v_cache"], outputs["out"]
        table, lens = inputs["block_table"], inputs["kv_lens"]
        partial = lse = out
        if splits > 1:
            if out.device not in workspaces:
                new = torch.empty(rows * splits * (problem.dim_v + 1), dtype=torch.float32, device=out.device)
                workspaces[out.device] = new[: rows * splits * problem.dim_v], new[rows * splits * problem.dim_v :]
            partial, lse = workspaces[out.device]
        strides = (*k.stride()[:3], *v.stride()[:3])
        # Triton sees alignment only in multiples of 16 elements. Counted in 16-byte units, rows padded by 16 bytes load as wide.
        unit = per_16_bytes if all(stride % per_16_bytes == 0 for stride in strides) else 1
        read_range[(programs_of(problem, block_m) * splits,)](
            q,
            k,
            v,
            table,
            lens,
            out,
            partial,
            lse,
            problem.scale * LOG2_E,
            splits,
            blocks_per_split,
            *q.stride()[:3],
            *(stride // unit for stride in strides),
            table.stride(0),
            *out.stride()[:3],
            KV_HEADS=problem.kv_heads,
            GROUP=problem.heads // problem.kv_heads,
            Q_LEN=problem.q_len,
            HEAD_DIM=problem.head_dim,
            DIM_V=problem.dim_v,
            PAGE_SIZE=problem.page_size,
            WINDOW=problem.window,
            UNIT=unit,
            SAME_ROWS=strides[:2] == strides[3:5],
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=next_power_of_2(problem.head_dim),
            BLOCK_DV=block_dv,
            DIRECT=splits == 1,
            SIGNAL=early,
            num_warps=num_warps,
            num_stages=num_stages,
            **shape,
        )
        if splits > 1:
            merge_ranges[(rows,)](
                partial,
                lse,
                lens,
                out,
                splits,
                blocks_per_split,
                *out.stride()[:3],
                HEADS=problem.heads,
                Q_LEN=problem.q_len,
                DIM_V=problem.dim_v,
                WINDOW=problem.window,
                BLOCK_N=block_n,
                BLOCK_DV=block_dv,
                BLOCK_S=min(next_power_of_2(splits), MERGE_ELEMENTS // block_dv),
                WAIT=early,
                num_warps=4,
                launch_pdl=early,
            )

    return launch
