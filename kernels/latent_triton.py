# Triton's parameters have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What the Triton kernels of latent_attention and sparse_latent_attention share: one range of keys for a tile of rows, and the merge.

All heads of MLA read the same cached rows, so heads times new tokens are the rows of one matrix, and a tile of cached rows is loaded
once: it is the keys and, but for its last columns, the values. Ranges of a long sequence are read at the same time and merged in
float32 (Dao et al., Flash-Decoding, 2023). Lengths are read on the device: programs behind a shorter sequence's end stop at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from klab.kernels.contract import Launch, Tensors
from klab.kernels.latent_tiles import LatentConfig, LatentShape
from klab.kernels.triton_support import INTERPRETED, cdiv, next_power_of_2

LOG2_E = 1.4426950408889634
MERGE_ELEMENTS = 4096  # partial values that a merge program holds at once: 32 registers with 4 warps


@triton.jit
def slots_of(slots, block, key, length, LISTED: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """LISTED: the slot of each key of a block, -1 where there is none. Otherwise its page, or the one page that holds the whole block."""
    if LISTED:
        found = tl.load(slots + key, mask=key < length, other=-1)
    elif PAGE_SIZE % BLOCK_N == 0:
        found = tl.load(slots + block * BLOCK_N // PAGE_SIZE, mask=block * BLOCK_N < length, other=0)
    else:
        found = tl.load(slots + key // PAGE_SIZE, mask=key < length, other=0)
    return found


@triton.jit
def rows_at(page, row, cache_page, cache_row, UNIT: tl.constexpr):
    """Where a cached row begins, in elements. Counted in 16 bytes, 32 bits reach 34 GB of one layer's cache, and save registers."""
    wide = UNIT == 1
    return page.to(tl.int64) * cache_page + row * cache_row if wide else (page * cache_page + row * cache_row).to(tl.int64) * UNIT


@triton.jit
def read_latents(
    q,
    cache,
    slots,
    lens,
    cache_scale,
    out,
    partial,
    lse,
    scale_log2,
    splits,
    blocks_per_split,
    q_batch,
    q_token,
    q_head,
    cache_page,
    cache_row,
    slots_row,
    out_batch,
    out_token,
    out_head,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    LISTED: tl.constexpr,
    SCALED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIRECT: tl.constexpr,
    SIGNAL: tl.constexpr,
    RECOMPUTE: tl.constexpr,
):
    """One range of one sequence (LISTED > 0: of one token's list of so many slots) for BLOCK_M rows. Cache strides are in UNIT elements."""
    ROW_TILES: tl.constexpr = (HEADS * Q_LEN + BLOCK_M - 1) // BLOCK_M
    if SIGNAL:
        tl.extra.cuda.gdc_launch_dependents()
    # Neighbouring programs are the row tiles of one range: the second finds its rows in L2.
    program = tl.program_id(0)
    split = program // ROW_TILES % splits
    sequence = (program // ROW_TILES // splits).to(tl.int64)
    length = LISTED
    if not LISTED:
        length = tl.load(lens + sequence)
    begin = split * blocks_per_split
    end = tl.minimum(begin + blocks_per_split, tl.cdiv(length, BLOCK_N))
    # Nobody reads the partial result of an empty range. Without splits the zeros of an empty sequence must be written.
    if (not DIRECT) and (begin >= end):
        return
    row = program % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < HEADS * Q_LEN
    offs_n = tl.arange(0, BLOCK_N)
    offs_rank = tl.arange(0, RANK)
    offs_rope = tl.arange(0, ROPE)

    q_rows = q + sequence * q_batch + row // HEADS * q_token + row % HEADS * q_head
    q_latent = tl.load(q_rows[:, None] + offs_rank[None, :], mask=is_row[:, None], other=0.0)
    q_rope = tl.load(q_rows[:, None] + RANK + offs_rope[None, :], mask=is_row[:, None], other=0.0)
    own = slots + sequence * slots_row
    # The last key that a row sees. Rows behind the last one compute on zeros and are never stored.
    position = length - Q_LEN + row // HEADS
    if SCALED:
        factor = tl.load(cache_scale)
        scale_log2 *= factor

    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    totals = tl.zeros((BLOCK_M,), dtype=tl.float32)
    values = tl.zeros((BLOCK_M, RANK), dtype=tl.float32)
    # Looked up one step ahead and carried over: loaded in the step that uses it, it would take a stage of the software pipeline.
    found = slots_of(own, begin, begin * BLOCK_N + offs_n, length, LISTED, PAGE_SIZE, BLOCK_N)
    for block in tl.range(begin, end, disable_licm=RECOMPUTE):
        key = block * BLOCK_N + offs_n
        if LISTED:
            is_key = found >= 0
            slot = tl.where(is_key, found, 0)
            rows = rows_at(slot // PAGE_SIZE, slot % PAGE_SIZE, cache_page, cache_row, UNIT)
        else:
            is_key = key < length
            rows = rows_at(found, key % PAGE_SIZE, cache_page, cache_row, UNIT)
        found = slots_of(own, block + 1, key + BLOCK_N, length, LISTED, PAGE_SIZE, BLOCK_N)
        latent = tl.load(cache + rows[:, None] + offs_rank[None, :], mask=is_key[:, None], other=0.0)
        rope = tl.load(cache + RANK + rows[:, None] + offs_rope[None, :], mask=is_key[:, None], other=0.0)
        if SCALED:
            latent = latent.to(q.dtype.element_ty)
            rope = rope.to(q.dtype.element_ty)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee") * scale_log2
        visible = is_key[None, :]
        if Q_LEN > 1:
            visible = visible & (key[None, :] <= position[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        # A row that has seen no key yet: -inf - -inf would be NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        decay = tl.exp2(largest - shift)
        weights = tl.exp2(scores - shift[:, None])
        totals = totals * decay + tl.sum(weights, axis=1)
        largest = larger
        values = tl.dot(weights.to(latent.dtype), latent, values * decay[:, None], input_precision="ieee")

    seen = totals > 0.0
    values = values / tl.where(seen, totals, 1.0)[:, None]
    if SCALED:
        values *= factor
    if DIRECT:
        to = out + sequence * out_batch + row // HEADS * out_token + row % HEADS * out_head
        tl.store(to[:, None] + offs_rank[None, :], values.to(out.dtype.element_ty), mask=is_row[:, None])
    else:
        at = (sequence * (Q_LEN * HEADS) + row) * splits + split
        tl.store(partial + at[:, None] * RANK + offs_rank[None, :], values, mask=is_row[:, None])
        tl.store(lse + at, tl.where(seen, largest + tl.log2(tl.where(seen, totals, 1.0)), float("-inf")), mask=is_row)


@triton.jit
def merge_latents(
    partial,
    lse,
    lens,
    out,
    splits,
    blocks_per_split,
    out_batch,
    out_token,
    out_head,
    HEADS: tl.constexpr,
    Q_LEN: tl.constexpr,
    RANK: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WAIT: tl.constexpr,
):
    """The weighted mean of one query row's partial results; zeros for an empty sequence."""
    program = tl.program_id(0)
    sequence = (program // (Q_LEN * HEADS)).to(tl.int64)
    length = LISTED
    if not LISTED:
        length = tl.load(lens + sequence)
    ranges = tl.cdiv(tl.cdiv(length, BLOCK_N), blocks_per_split)
    row = program.to(tl.int64) * splits
    offs_rank = tl.arange(0, RANK)
    if WAIT:
        tl.extra.cuda.gdc_wait()
    largest = tl.full((), float("-inf"), dtype=tl.float32)
    total = tl.full((), 0.0, dtype=tl.float32)
    values = tl.zeros((RANK,), dtype=tl.float32)
    for start in tl.range(0, ranges, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        is_split = split < ranges
        logs = tl.load(lse + row + split, mask=is_split, other=float("-inf"))
        parts = tl.load(partial + (row + split)[:, None] * RANK + offs_rank[None, :], mask=is_split[:, None], other=0.0)
        larger = tl.maximum(largest, tl.max(logs, axis=0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # a row may see nothing of a range: -inf - -inf would be NaN
        decay = tl.exp2(largest - shift)
        weights = tl.exp2(logs - shift)
        total = total * decay + tl.sum(weights, axis=0)
        values = values * decay + tl.sum(parts * weights[:, None], axis=0)
        largest = larger
    values = values / tl.where(total > 0.0, total, 1.0)
    to = out + sequence * out_batch + program // HEADS % Q_LEN * out_token + program % HEADS * out_head
    tl.store(to + offs_rank, values.to(out.dtype.element_ty))


def latents_launch(shape: LatentShape, *, splits: int, blocks_per_split: int, config: LatentConfig) -> Launch:
    """The launch of `read_latents` over all ranges and, where there are several per sequence, of the merge.

    inputs: q, kv_cache, and block_table with kv_lens, or indices; kv_scale where the cache is fp8.
    """
    early = config.early_merge and not INTERPRETED
    workspaces: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, cache, out = inputs["q"], inputs["kv_cache"], outputs["out"]
        slots = inputs["indices"] if shape.listed else inputs["block_table"]
        lens = slots if shape.listed else inputs["kv_lens"]
        partial = lse = out
        if splits > 1:
            if out.device not in workspaces:
                entries = shape.rows * shape.sequences * splits
                new = torch.empty(entries * (shape.rank + 1), dtype=torch.float32, device=out.device)
                workspaces[out.device] = new[: entries * shape.rank], new[entries * shape.rank :]
            partial, lse = workspaces[out.device]
        # Triton sees alignment only in multiples of 16 elements. Counted in 16-byte units, rows padded by 16 bytes load as wide.
        per_16_bytes = 16 // cache.element_size()
        unit = per_16_bytes if all(stride % per_16_bytes == 0 for stride in cache.stride()[:2]) else 1
        # A sparse query is a batch of one token each.
        q_strides, out_strides = ((t.stride(0), *t.stride()[-3:-1]) for t in (q, out))
        read_latents[(shape.sequences * cdiv(shape.rows, config.block_m) * splits,)](
            q,
            cache,
            slots,
            lens,
            inputs["kv_scale"] if shape.narrow else lse,
            out,
            partial,
            lse,
            shape.scale * LOG2_E,
            splits,
            blocks_per_split,
            *q_strides,
            *(stride // unit for stride in cache.stride()[:2]),
            slots.stride(0),
            *out_strides,
            HEADS=shape.heads,
            Q_LEN=shape.q_len,
            RANK=shape.rank,
            ROPE=shape.rope,
            PAGE_SIZE=shape.page_size,
            LISTED=shape.lengths[0] if shape.listed else 0,
            SCALED=shape.narrow,
            UNIT=unit,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            DIRECT=splits == 1,
            SIGNAL=early,
            RECOMPUTE=config.recompute,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            merge_latents[(shape.sequences * shape.rows,)](
                partial,
                lse,
                lens,
                out,
                splits,
                blocks_per_split,
                *out_strides,
                HEADS=shape.heads,
                Q_LEN=shape.q_len,
                RANK=shape.rank,
                LISTED=shape.lengths[0] if shape.listed else 0,
                BLOCK_N=config.block_n,
                BLOCK_S=max(1, min(next_power_of_2(splits), MERGE_ELEMENTS // shape.rank)),
                WAIT=early,
                num_warps=4,
                launch_pdl=early,
            )

    return launch
