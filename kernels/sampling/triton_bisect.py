"""Sampling in Triton without a sort: chunks of the vocabulary, candidates, and bisection among them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.row_tiles import is_power_of_2, refusal
from klab.kernels.sampling._triton_steps import choose, chunk_candidates, chunk_stats, merge_greedy, pick_from_chunk
from klab.kernels.sampling.problem import Sampling
from klab.kernels.triton_support import cdiv, next_power_of_2

GROUP = 128
MAX_ROWS = 65535  # programs along y
# Halvings of the range of a row's maxima: a bound within 1/4096 of it leaves few candidates too many.
BOUND_STEPS = 12
MAX_CHUNKS = 1024


@dataclass(frozen=True)
class ChunkConfig(Config):
    """Logits of a chunk, and warps that read it; candidates that the last step holds in registers, and its warps."""

    chunk: int = 4096
    num_warps: int = 8
    candidates: int = 4096
    choose_warps: int = 8


def fits(problem: Sampling, config: ChunkConfig, chip: Chip) -> str | None:
    """Chunks and candidates are held in registers."""
    c = config
    if not is_power_of_2(c.chunk, c.candidates):
        return "chunk and candidates must be powers of two"
    if c.chunk < GROUP or c.chunk > max(GROUP, next_power_of_2(problem.vocab)):
        return f"a chunk is at least {GROUP} and no larger than the vocabulary"
    chunks = cdiv(problem.vocab, c.chunk)
    if chunks > MAX_CHUNKS:
        return f"more than {MAX_CHUNKS} chunks"
    if problem.rows > MAX_ROWS:
        return "too many rows"
    if not problem.filtered and (c.candidates, c.choose_warps) != (ChunkConfig.candidates, ChunkConfig.choose_warps):
        return "without top_k and top_p there are no candidates"
    if problem.filtered and not next_power_of_2(chunks) <= c.candidates <= next_power_of_2(chunks) * c.chunk:
        return "candidates are at least one of each chunk and at most all"
    # Kept beside a candidate: its key, its weight and its place.
    # Finding candidates takes 7 registers for each logit of a thread with 8 warps, 4 with 32.
    return refusal(c.chunk, c.num_warps, 16 if problem.filtered else 4) or (
        refusal(max(c.candidates, 32 * c.choose_warps), c.choose_warps, 12) if problem.filtered else None
    )


def default(problem: Sampling, chip: Chip) -> ChunkConfig:
    """Chunks of 4096, smaller where there are too few to fill the chip twice; 4 candidates a thread (8 spill 8 B on sm_90)."""
    chunk = max(GROUP, min(4096, next_power_of_2(problem.vocab)))
    while chunk > 1024 and problem.rows * cdiv(problem.vocab, chunk) < 2 * chip.sm_count:
        chunk //= 2
    while cdiv(problem.vocab, chunk) > MAX_CHUNKS:
        chunk *= 2
    if not problem.filtered:
        return ChunkConfig(chunk, max(1, chunk // 512))
    columns = next_power_of_2(cdiv(problem.vocab, chunk))
    candidates = min(max(2048, columns), columns * chunk)
    return ChunkConfig(chunk, max(1, chunk // 512), candidates, max(1, min(16, candidates // 128)))


def space(problem: Sampling, chip: Chip) -> Iterator[ChunkConfig]:
    """Chunks of 512 to 16384 with 4 to 32 logits a thread, and candidates where there are any."""
    last = (
        product((1024, 2048, 4096, 8192, 16384), (4, 8, 16)) if problem.filtered else [(ChunkConfig.candidates, ChunkConfig.choose_warps)]
    )
    for (candidates, choose_warps), chunk, warps in product(list(last), (512, 1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16, 32)):
        if 4 * 32 * warps <= chunk <= 32 * 32 * warps:
            yield ChunkConfig(chunk, warps, candidates, choose_warps)


@kernel(Sampling, backend="triton", config=ChunkConfig, space=space, default=default, fits=fits)
def triton_bisect(problem: Sampling, config: ChunkConfig, chip: Chip) -> Launch:
    """Triton, no sort: statistics and candidates by chunks, then bisection among a row's candidates (two launches without filters)."""
    p, c = problem, config
    chunks = cdiv(p.vocab, c.chunk)
    columns, groups = next_power_of_2(chunks), c.chunk // GROUP
    grid = (chunks, p.rows)
    per_unit = 1.0 if p.greedy else math.log2(math.e) / p.temperature
    top_k = p.top_k if 0 < p.top_k < p.vocab else 0
    work: dict[torch.device, dict[str, torch.Tensor]] = {}

    def workspace(device: torch.device) -> dict[str, torch.Tensor]:
        def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        found = {"max": new(torch.float32, p.rows, chunks)}
        found["sum"] = found["max"] if p.greedy else new(torch.float32, p.rows, chunks)
        found["count"] = new(torch.int32, p.rows, chunks)
        found["group_max"] = new(torch.float32, p.rows, chunks * groups) if p.filtered else found["max"]
        if p.filtered:
            found["value"] = new(torch.float32, p.rows, chunks * c.chunk)
            found["place"] = new(torch.int32, p.rows, chunks * c.chunk)
        return found

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        logits, draw, token = inputs["logits"], inputs["draw"], outputs["token"]
        if logits.device not in work:
            work[logits.device] = workspace(logits.device)
        w = work[logits.device]
        read = (logits, logits.stride(0), p.vocab, per_unit)
        chunk_stats[grid](
            *read, w["max"], w["sum"], w["count"], w["group_max"], CHUNKS=chunks, GROUPS=groups, GROUP=GROUP, GREEDY=p.greedy,
            FILTERED=p.filtered, num_warps=c.num_warps,
        )  # fmt: skip
        if p.greedy:
            merge_greedy[(p.rows,)](w["max"], w["count"], token, CHUNKS=chunks, COLUMNS=columns, num_warps=1)
        elif not p.filtered:
            pick_from_chunk[(p.rows,)](
                *read, w["max"], w["sum"], draw, token, CHUNKS=chunks, COLUMNS=columns, CHUNK=c.chunk, num_warps=c.num_warps
            )  # fmt: skip
        else:
            chunk_candidates[grid](
                *read, p.top_p, (1.0 - p.top_p) / p.vocab, w["max"], w["sum"], w["group_max"], w["value"], w["place"], w["count"],
                TOP_K=top_k, CHUNKS=chunks, COLUMNS=columns, GROUPS=groups, GROUP_COLUMNS=next_power_of_2(chunks * groups),
                CHUNK=c.chunk, STEPS=BOUND_STEPS, num_warps=c.num_warps,
            )  # fmt: skip
            choose[(p.rows,)](
                w["value"], w["place"], w["count"], w["max"], w["sum"], per_unit, p.top_p, draw, token, TOP_K=top_k, NUCLEUS=p.top_p < 1,
                CHUNKS=chunks, COLUMNS=columns, CHUNK=c.chunk, WIDTH=c.candidates // columns, num_warps=c.choose_warps,
            )  # fmt: skip

    return launch
