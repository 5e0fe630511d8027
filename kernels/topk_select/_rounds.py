"""Rounds of a selection: rows longer than what a program holds are cut into chunks, whose best are the row of the next round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from klab.kernels.contract import Chip
from klab.kernels.topk_select.problem import TopkSelect
from klab.kernels.triton_support import cdiv, next_power_of_2

if TYPE_CHECKING:
    import torch

MAX_PER_THREAD = 64  # scores, a register each


@dataclass(frozen=True)
class Round:
    """One launch: rows of `width` scores in `chunks` chunks of `chunk`. first: of the problem's scores; last: gives the indices."""

    width: int
    chunk: int
    chunks: int
    first: bool
    last: bool


def rounds_of(problem: TopkSelect, chunk: int, num_warps: int) -> list[Round]:
    """From the whole row to one chunk; the last chunks are no longer than they must be, but every thread has a score."""
    found: list[Round] = []
    width = problem.width
    while True:
        own = min(chunk, max(32, 32 * num_warps, next_power_of_2(width)))
        chunks = cdiv(width, own)
        found.append(Round(width, own, chunks, first=not found, last=chunks == 1))
        if chunks == 1:
            return found
        width = chunks * problem.top_k


def workspaces(problem: TopkSelect, rounds: list[Round], device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores and columns [rows, width] between the rounds."""
    import torch

    return [
        (
            torch.empty((problem.rows, later.width), dtype=torch.float32, device=device),
            torch.empty((problem.rows, later.width), dtype=torch.int32, device=device),
        )
        for later in rounds[1:]
    ]


def unfit(problem: TopkSelect, chunk: int, num_warps: int) -> str | None:
    """Why chunks of this size cannot be, or None: held in registers, and at least twice as long as what is chosen of them."""
    if any(value < 1 or value & (value - 1) for value in (chunk, num_warps)) or num_warps > 32:
        return "chunk and the warps must be powers of two, at most 32 warps"
    if not 32 <= chunk <= 32768 or chunk > max(32, next_power_of_2(problem.width)):
        return "chunk is 32 to 32768 and no longer than the row"
    if problem.width > chunk and chunk < 2 * problem.top_k:
        return "a round must leave fewer scores than it is given: chunk is at least twice top_k"
    if problem.top_k > 32767:
        return "positions are counted in 15 bits"
    if chunk > MAX_PER_THREAD * 32 * num_warps or chunk < 32 * num_warps:
        return "a thread holds 1 to 64 scores"
    return None


def default_chunk(problem: TopkSelect, chip: Chip) -> tuple[int, int]:
    """(chunk, warps): the row if a chunk holds it, or chunks of four times what is chosen where more are needed to fill the chip."""
    row = max(32, next_power_of_2(problem.width))
    chunk = min(row, 32768)
    if problem.rows * cdiv(problem.width, chunk) < 2 * chip.sm_count:
        chunk = min(chunk, max(1024, next_power_of_2(4 * problem.top_k)))
    chunk = max(chunk, min(row, next_power_of_2(2 * problem.top_k)))
    return chunk, max(1, min(16, chunk // 256))


def chunk_sizes(problem: TopkSelect) -> list[int]:
    """Candidates: 1024 to 32768 scores, and the row."""
    return sorted({1024, 2048, 4096, 8192, 16384, 32768, min(32768, max(32, next_power_of_2(problem.width)))})
