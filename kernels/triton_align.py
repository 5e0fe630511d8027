"""Sort the choices of experts on the device: a counting sort in one launch for a decode step, in two for a prefill.

What the engines call align: `slots` lists the choices (token * top_k + position) by expert, each expert's part padded to a multiple of
block_m with the number of choices, which marks a row that is none; `block_experts` names the expert of every block of block_m slots;
`padded` [1] is the length used. The order within an expert is that of the tokens, so the same routing gives the same bits.
"""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from klab.kernels.expert_routing import most_blocks
from klab.kernels.triton_support import cdiv, next_power_of_2

# Choices per program. 1024 x 1024 comparisons give the ranks within it: 2 us, and 128 programs for 16384 tokens of 8 experts.
CHUNK = 1024


@triton.jit
def _count(ids, counts, choices, top_k, stride_ids, LOCAL: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    choice = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids + choice // top_k * stride_ids + choice % top_k, mask=choice < choices, other=LOCAL)
    # The bin behind the last local expert counts what is computed elsewhere.
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), tl.histogram(tl.minimum(expert, LOCAL), BINS))


@triton.jit
def _place(
    ids,
    counts,
    slots,
    block_experts,
    padded,
    choices,
    top_k,
    stride_ids,
    LOCAL: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANKED: tl.constexpr,
):
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    at = tl.arange(0, CHUNK)
    choice = chunk * CHUNK + at
    expert = tl.minimum(tl.load(ids + choice // top_k * stride_ids + choice % top_k, mask=choice < choices, other=LOCAL), LOCAL)
    if CHUNKS == 1:
        count = tl.histogram(expert, BINS)
        before = tl.zeros((BINS,), dtype=tl.int32)
    else:
        count = tl.zeros((BINS,), dtype=tl.int32)
        before = tl.zeros((BINS,), dtype=tl.int32)
        for one in range(CHUNKS):
            found = tl.load(counts + one * BINS + bins)
            count += found
            before += tl.where(one < chunk, found, 0)
    count = tl.where(bins < LOCAL, count, 0)
    blocks = (count + BLOCK_M - 1) // BLOCK_M
    end = tl.cumsum(blocks, axis=0)
    first = (end - blocks) * BLOCK_M
    if chunk == 0:
        tl.store(padded, tl.sum(blocks, axis=0) * BLOCK_M)

    # The programs share the padding and the blocks' experts.
    longest = tl.max(blocks, axis=0)
    for i in range(chunk, longest, CHUNKS):
        tl.store(block_experts + end - blocks + i, bins, mask=i < blocks)
    for i in range(chunk, BLOCK_M, CHUNKS):
        slot = first + count + i
        tl.store(slots + slot, choices, mask=slot < end * BLOCK_M)

    rank = tl.zeros((CHUNK,), dtype=tl.int32)
    for start in range(0, CHUNK, RANKED):
        earlier = start + tl.arange(0, RANKED)
        other_choice = chunk * CHUNK + earlier
        other = tl.load(ids + other_choice // top_k * stride_ids + other_choice % top_k, mask=other_choice < choices, other=-1)
        rank += tl.sum(((other[None, :] == expert[:, None]) & (earlier[None, :] < at[:, None])).to(tl.int32), axis=1)
    slot = tl.gather(first + before, expert, 0) + rank
    tl.store(slots + slot, choice, mask=(choice < choices) & (expert < LOCAL))


@dataclass(frozen=True)
class Aligned:
    """Where a launch finds its sorted choices."""

    slots: torch.Tensor
    block_experts: torch.Tensor
    padded: torch.Tensor
    counts: torch.Tensor


def workspace(choices: int, local: int, block_m: int, device: torch.device) -> Aligned:
    """Fresh tensors for `align`."""
    blocks, chunks = most_blocks(choices, local, block_m), cdiv(choices, _chunk(choices))
    sizes = (blocks * block_m, blocks, 1, chunks * _bins(local) if chunks > 1 else 1)
    return Aligned(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))


def align(ids: torch.Tensor, local: int, block_m: int, to: Aligned) -> None:
    """Enqueue the sort of ids [tokens, top_k] into `to`; choices of experts >= local are left out."""
    choices, top_k = ids.numel(), ids.shape[1]
    chunk, bins = _chunk(choices), _bins(local)
    chunks = cdiv(choices, chunk)
    if chunks > 1:
        _count[(chunks,)](ids, to.counts, choices, top_k, ids.stride(0), LOCAL=local, BINS=bins, CHUNK=chunk, num_warps=8)
    _place[(chunks,)](
        ids,
        to.counts,
        to.slots,
        to.block_experts,
        to.padded,
        choices,
        top_k,
        ids.stride(0),
        LOCAL=local,
        BINS=bins,
        CHUNK=chunk,
        CHUNKS=chunks,
        BLOCK_M=block_m,
        RANKED=16 if chunk > 512 else min(chunk, 32),
        num_warps=8,
    )


def _chunk(choices: int) -> int:
    return min(CHUNK, max(32, next_power_of_2(choices)))


def _bins(local: int) -> int:
    return max(32, next_power_of_2(local + 1))
