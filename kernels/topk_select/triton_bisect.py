# Triton's parameters have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Top-k by bisection in Triton: a program holds a chunk of a row in registers and halves the interval of the k-th largest score.

Scores are compared as integers of the same order, so every interval ends; it ends as soon as exactly k scores lie above a bound, which
takes about 20 counts for 16k random floats, and 11 where two of three bounds are interpolated at first. A row
longer than a chunk goes through rounds: the best of each chunk, then the best of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.topk_select._rounds import chunk_sizes, default_chunk, rounds_of, unfit, workspaces
from klab.kernels.topk_select.problem import TopkSelect
from klab.kernels.triton_support import next_power_of_2

PIECE_PER_THREAD = 4  # scores whose positions are found at once
INTERPOLATED = tl.constexpr(9)  # counts before plain bisection, which ends what interpolation does not (many equal scores)


@dataclass(frozen=True)
class BisectConfig(Config):
    """A program takes `chunk` scores (a power of two) at a time; rows that are longer take several rounds."""

    chunk: int = 16384
    num_warps: int = 16


@triton.jit
def _keys(scores, at, width):
    """Scores, and integers that are ordered as they are: negative floats count backwards. Behind the row's end they are -inf."""
    value = tl.load(scores + at, mask=at < width, other=float("-inf")).to(tl.float32)
    bits = value.to(tl.int32, bitcast=True)
    return value, bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _select(
    scores,
    columns,
    out_scores,
    out_columns,
    width,
    chunks,
    scores_row,
    columns_row,
    out_row,
    TOP_K: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """The TOP_K best of one chunk of a row. FIRST: columns are positions; LAST: only columns are written. Hidden places hold -1."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    begin = tl.program_id(0) % chunks * CHUNK
    scores += row * scores_row
    _, key = _keys(scores, begin + tl.arange(0, CHUNK), width)

    # At least TOP_K keys are >= low (or low is that of -inf), fewer are >= high; the k-th largest is in between.
    least = tl.full((), -0x7F800001, dtype=tl.int32)
    low = least.to(tl.int64)
    high = tl.max(key, axis=0).to(tl.int64) + 1
    if tl.sum((key > least).to(tl.int32), axis=0) > TOP_K:
        low = tl.min(key, axis=0).to(tl.int64)
        below, over, count, steps = CHUNK + 0, 0, TOP_K + 1, 0
        while (low + 1 < high) & (count != TOP_K):
            middle = (low + high) >> 1
            if (steps < INTERPOLATED) & (steps % 3 != 2):
                # Where the k-th would be, were the scores between the bounds spread evenly.
                middle = low + (high - low) * (below - TOP_K) // (below - over)
                middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
            count = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), axis=0)
            if count >= TOP_K:
                low = middle
                below = count
            else:
                high = middle
                over = count
            steps += 1
    bound = low.to(tl.int32)
    # Above the bound all are chosen; at it, as many as are missing, but never a hidden one. The chunk is read again, from L1 or L2, in
    # pieces: positions of the whole chunk at once would spill.
    missing = TOP_K - tl.sum((key > bound).to(tl.int32), axis=0)
    to = row * out_row + tl.program_id(0) % chunks * TOP_K
    above_before = tl.full((), 0, dtype=tl.int32)
    equal_before = tl.full((), 0, dtype=tl.int32)
    for piece in tl.range(0, CHUNK, PIECE):
        at = begin + piece + tl.arange(0, PIECE)
        value, own = _keys(scores, at, width)
        above = (own > bound).to(tl.int32)
        equal = ((own == bound) & (bound != least)).to(tl.int32)
        # Both running counts in one scan: at most 32768 of each.
        counts = tl.cumsum(above * 65536 + equal, axis=0)
        ties = equal_before + (counts & 0xFFFF)
        chosen = (above > 0) | ((equal > 0) & (ties <= missing))
        place = above_before + (counts >> 16) + tl.minimum(ties, missing) - 1
        found = at
        if not FIRST:
            found = tl.load(columns + row * columns_row + at, mask=chosen, other=-1)
        tl.store(out_columns + to + place, found, mask=chosen)
        if not LAST:
            tl.store(out_scores + to + place, value, mask=chosen)
        above_before += tl.sum(above, axis=0)
        equal_before += tl.sum(equal, axis=0)
    total = above_before + tl.minimum(equal_before, missing)
    offs_k = tl.arange(0, BLOCK_K)
    is_hole = (offs_k >= total) & (offs_k < TOP_K)
    tl.store(out_columns + to + offs_k, tl.full((BLOCK_K,), -1, dtype=tl.int32), mask=is_hole)
    if not LAST:
        tl.store(out_scores + to + offs_k, tl.full((BLOCK_K,), float("-inf"), dtype=tl.float32), mask=is_hole)


def fits(problem: TopkSelect, config: BisectConfig, chip: Chip) -> str | None:
    """See `unfit`."""
    return unfit(problem, config.chunk, config.num_warps)


def default(problem: TopkSelect, chip: Chip) -> BisectConfig:
    """See `default_chunk`."""
    return BisectConfig(*default_chunk(problem, chip))


def space(problem: TopkSelect, chip: Chip) -> Iterator[BisectConfig]:
    """Chunks of 1024 to 32768 scores (or the row), 1 to 32 warps."""
    for chunk, warps in product(chunk_sizes(problem), (1, 2, 4, 8, 16, 32)):
        yield BisectConfig(chunk, warps)


@kernel(TopkSelect, backend="triton", config=BisectConfig, space=space, default=default, fits=fits)
def triton_bisect(problem: TopkSelect, config: BisectConfig, chip: Chip) -> Launch:
    """Triton top-k: chunks of a row in registers, the threshold by bisection of ordered integers, positions by a scan."""
    rounds, top_k = rounds_of(problem, config.chunk, config.num_warps), problem.top_k
    between: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        scores, out = inputs["scores"], outputs["indices"]
        if out.device not in between:
            between[out.device] = workspaces(problem, rounds, out.device)
        columns = out  # not read in the first round
        for i, r in enumerate(rounds):
            to_scores, to_columns = (scores, out) if r.last else between[out.device][i]
            _select[(problem.rows * r.chunks,)](
                scores,
                columns,
                to_scores,
                to_columns,
                r.width,
                r.chunks,
                scores.stride(0),
                columns.stride(0),
                to_columns.stride(0),
                TOP_K=top_k,
                CHUNK=r.chunk,
                PIECE=min(r.chunk, 32 * config.num_warps * PIECE_PER_THREAD),
                BLOCK_K=next_power_of_2(top_k),
                FIRST=r.first,
                LAST=r.last,
                num_warps=config.num_warps,
            )
            scores, columns = to_scores, to_columns

    return launch
