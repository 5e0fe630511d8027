"""Sampling in CUDA C++ without a sort: chunks of the vocabulary, candidates, and bisection among them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel
import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.row_tiles import is_power_of_2
from klab.kernels.sampling.problem import Sampling
from klab.kernels.triton_support import cdiv

SOURCE = '#include "sampling.cuh"\nusing namespace klab;'
CHOOSE_SOURCE = '#include "sampling_choose.cuh"\nusing namespace klab;'
GROUP_LANES = 8  # as in sampling.cuh
BOUND_STEPS = 12
MAX_ROWS = 65535
MAX_CHUNKS = 2048


@dataclass(frozen=True)
class ChunkConfig(Config):
    """A chunk is `threads` times `vectors` times 16 bytes; `candidates` of a row are held in registers by `choose_threads` threads."""

    threads: int = 256
    vectors: int = 4
    candidates: int = 4096
    choose_threads: int = 256


def _chunk(problem: Sampling, config: ChunkConfig) -> int:
    """Logits of a chunk."""
    return config.threads * config.vectors * 16 // SIZE_BYTES[problem.dtype]


def _smem_bytes(problem: Sampling, config: ChunkConfig) -> tuple[int, int]:
    """Of finding candidates and of choosing among them."""
    c, chunks = config, cdiv(problem.vocab, _chunk(problem, config))
    warps = c.threads // 32
    maxima = chunks * c.threads // GROUP_LANES
    return 4 * (warps * (2 + c.vectors) + maxima), 4 * (c.choose_threads // 16 + 32 * cdiv(chunks, 32) + 2 * c.candidates)


def fits(problem: Sampling, config: ChunkConfig, chip: Chip) -> str | None:
    """Chunks and candidates are held in registers, a row's maxima in shared memory."""
    c = config
    if not is_power_of_2(c.threads, c.vectors, c.candidates, c.choose_threads):
        return "all are powers of two"
    if not (64 <= c.threads <= 1024 and c.vectors <= 8 and 64 <= c.choose_threads <= 1024):
        return "64 to 1024 threads, up to 8 vectors"
    if c.threads * c.vectors > 2048:
        return "the chunk would spill registers"  # 32 B a thread with 512 x 8 on sm_90
    if c.vectors > 1 and _chunk(problem, c) >= 2 * problem.vocab:
        return "a chunk is larger than the vocabulary"
    if cdiv(problem.vocab, _chunk(problem, c)) > MAX_CHUNKS or problem.rows > MAX_ROWS:
        return f"more than {MAX_CHUNKS} chunks or {MAX_ROWS} rows"
    if not problem.filtered:
        default = ChunkConfig()
        alike = (c.candidates, c.choose_threads) == (default.candidates, default.choose_threads)
        return None if alike else "without top_k and top_p there are no candidates"
    if not c.choose_threads <= c.candidates <= 32 * c.choose_threads:
        return "a thread holds 1 to 32 candidates"
    if 3 * c.candidates // c.choose_threads + 32 > 65536 // c.choose_threads:
        return "the candidates would spill registers"
    if max(_smem_bytes(problem, c)) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def default(problem: Sampling, chip: Chip) -> ChunkConfig:
    """Chunks of 16 KB, smaller where there are too few to fill the chip twice; 16 candidates a thread."""
    threads, vectors = 256, 4
    while vectors > 1 and problem.rows * cdiv(problem.vocab, _chunk(problem, ChunkConfig(threads, vectors))) < 2 * chip.sm_count:
        vectors //= 2
    return ChunkConfig(threads, vectors)


def space(problem: Sampling, chip: Chip) -> Iterator[ChunkConfig]:
    """Chunks of 1 to 64 KB, and candidates where there are any."""
    last = list(product((1024, 2048, 4096, 8192, 16384), (128, 256, 512, 1024))) if problem.filtered else [(4096, 256)]
    for (candidates, choose_threads), threads, vectors in product(last, (64, 128, 256, 512), (1, 2, 4, 8)):
        yield ChunkConfig(threads, vectors, candidates, choose_threads)


@kernel(Sampling, backend="cuda", config=ChunkConfig, fits=fits, default=default, space=space)
def cuda_bisect(problem: Sampling, config: ChunkConfig, chip: Chip) -> Launch:
    """CUDA C++, no sort: statistics and candidates by chunks, then bisection among a row's candidates (two launches without filters)."""
    p, c = problem, config
    chunk = _chunk(p, c)
    chunks, groups = cdiv(p.vocab, chunk), c.threads // GROUP_LANES
    piece = 16 // SIZE_BYTES[p.dtype]
    defines: dict[str, str | int] = {"ELEMENT": ELEMENT[p.dtype], "THREADS": c.threads, "VECTORS": c.vectors, "BOUND_STEPS": BOUND_STEPS}
    warps, (candidates_smem, choose_smem) = c.threads // 32, _smem_bytes(p, c)
    stats = CudaKernel(SOURCE, "chunk_stats", chip, defines, 8 * warps)
    merge = CudaKernel(SOURCE, "merge_greedy", chip, defines)
    pick = CudaKernel(SOURCE, "pick_from_chunk", chip, defines, 4 * warps * c.vectors)
    find = CudaKernel(SOURCE, "chunk_candidates", chip, defines, candidates_smem)
    choosing = {**defines, "CANDIDATES": c.candidates, "CHOOSE_THREADS": c.choose_threads}
    choose = CudaKernel(CHOOSE_SOURCE, "choose", chip, choosing, choose_smem)
    per_unit = 1.0 if p.greedy else math.log2(math.e) / p.temperature
    top_k = p.top_k if 0 < p.top_k < p.vocab else 0
    work: dict[torch.device, dict[str, torch.Tensor]] = {}

    def workspace(device: torch.device) -> dict[str, torch.Tensor]:
        def new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        found = {"max": new(torch.float32, p.rows, chunks), "sum": new(torch.float32, p.rows, chunks)}
        if p.filtered:
            found["group_max"] = new(torch.float32, p.rows, chunks * groups)
            found["value"] = new(torch.float32, p.rows, chunks * chunk)
            found["place"] = new(torch.int32, p.rows, chunks * chunk)
            found["count"] = new(torch.int32, p.rows, chunks)
        return found

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        logits, draw, token = inputs["logits"], inputs["draw"], outputs["token"]
        if logits.device not in work:
            work[logits.device] = workspace(logits.device)
        w = work[logits.device]
        aligned = int(logits.data_ptr() % 16 == 0 and logits.stride(0) % piece == 0)
        stride = Int64(logits.stride(0))
        stats.launch(
            (chunks, p.rows, 1),
            c.threads,
            [
                logits, w["max"], w["sum"], w.get("group_max", w["max"]), p.vocab, chunks, int(p.greedy), int(p.filtered), aligned, stride,
                per_unit,
            ],
        )  # fmt: skip
        if p.greedy:
            merge.launch((p.rows, 1, 1), 32, [w["max"], w["sum"], token, chunks])
        elif not p.filtered:
            pick.launch((p.rows, 1, 1), c.threads, [logits, w["max"], w["sum"], draw, token, p.vocab, chunks, aligned, stride, per_unit])
        else:
            lists = [w["value"], w["place"], w["count"]]
            find.launch(
                (chunks, p.rows, 1),
                c.threads,
                [
                    logits, w["max"], w["sum"], w["group_max"], *lists, p.vocab, chunks, top_k, aligned, stride, per_unit, p.top_p,
                    (1.0 - p.top_p) / p.vocab,
                ],
            )  # fmt: skip
            choose.launch((p.rows, 1, 1), c.choose_threads, [*lists, w["max"], w["sum"], draw, token, chunks, top_k, per_unit, p.top_p])

    return launch
