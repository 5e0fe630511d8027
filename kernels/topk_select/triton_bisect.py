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
from klab.kernels.topk_select.problem import TopkSelect
from klab.kernels.triton_support import cdiv, next_power_of_2

MAX_PER_THREAD = 64  # scores, a register each
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


def rounds(problem: TopkSelect, chunk: int) -> list[int]:
    """The width of a row in each round; the last one fits a chunk."""
    widths = [problem.width]
    while widths[-1] > chunk:
        widths.append(cdiv(widths[-1], chunk) * problem.top_k)
    return widths


def fits(problem: TopkSelect, config: BisectConfig, chip: Chip) -> str | None:
    """A chunk is held in registers, and is at least twice as long as what is chosen of it where a row takes several rounds."""
    chunk, warps = config.chunk, config.num_warps
    if any(value < 1 or value & (value - 1) for value in (chunk, warps)) or warps > 32:
        return "chunk and num_warps must be powers of two, num_warps at most 32"
    if not 16 <= chunk <= 32768 or chunk > max(16, next_power_of_2(problem.width)):
        return "chunk is 16 to 32768 and no longer than the row"
    if problem.width > chunk and chunk < 2 * problem.top_k:
        return "a round must leave fewer scores than it is given: chunk is at least twice top_k"
    if problem.top_k > 32767:
        return "positions are counted in 15 bits"
    if chunk > MAX_PER_THREAD * 32 * warps or (warps > 1 and chunk < 32 * warps):
        return "a thread holds 1 to 64 scores"
    return None


def default(problem: TopkSelect, chip: Chip) -> BisectConfig:
    """The row if a chunk holds it, or chunks of four times what is chosen where more of them are needed to fill the chip."""
    row = max(16, next_power_of_2(problem.width))
    chunk = min(row, 32768)
    if problem.rows * cdiv(problem.width, chunk) < 2 * chip.sm_count:
        chunk = min(chunk, max(1024, next_power_of_2(4 * problem.top_k)))
    chunk = max(chunk, min(row, next_power_of_2(2 * problem.top_k)))
    return BisectConfig(chunk, max(1, min(16, chunk // 256)))


def space(problem: TopkSelect, chip: Chip) -> Iterator[BisectConfig]:
    """Chunks of 1024 to 32768 scores (or the row), 1 to 32 warps."""
    own = min(32768, max(16, next_power_of_2(problem.width)))
    for chunk, warps in product(sorted({1024, 2048, 4096, 8192, 16384, 32768, own}), (1, 2, 4, 8, 16, 32)):
        yield BisectConfig(chunk, warps)


@kernel(TopkSelect, backend="triton", config=BisectConfig, space=space, default=default, fits=fits)
def triton_bisect(problem: TopkSelect, config: BisectConfig, chip: Chip) -> Launch:
    """Triton top-k: chunks of a row in registers, the threshold by bisection of ordered integers, positions by a scan."""
    widths, top_k = rounds(problem, config.chunk), problem.top_k

    def chunk_of(width: int) -> int:
        return min(config.chunk, max(16, 32 * config.num_warps, next_power_of_2(width)))

    workspaces: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def workspace(device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if device not in workspaces:
            workspaces[device] = [
                (
                    torch.empty((problem.rows, width), dtype=torch.float32, device=device),
                    torch.empty((problem.rows, width), dtype=torch.int32, device=device),
                )
                for width in widths[1:]
            ]
        return workspaces[device]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        scores, out = inputs["scores"], outputs["indices"]
        between = workspace(scores.device)
        columns = out  # not read in the first round
        for i, width in enumerate(widths):
            last = i + 1 == len(widths)
            to_scores, to_columns = (scores, out) if last else between[i]
            chunk = chunk_of(width)
            chunks = cdiv(width, chunk)
            _select[(problem.rows * chunks,)](
                scores,
                columns,
                to_scores,
                to_columns,
                width,
                chunks,
                scores.stride(0),
                columns.stride(0),
                to_columns.stride(0),
                TOP_K=top_k,
                CHUNK=chunk,
                PIECE=min(chunk, 32 * config.num_warps * PIECE_PER_THREAD),
                BLOCK_K=next_power_of_2(top_k),
                FIRST=i == 0,
                LAST=last,
                num_warps=config.num_warps,
            )
            scores, columns = to_scores, to_columns

    return launch
