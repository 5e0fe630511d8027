"""An embedding gather in CUDA C++: rows are copied 16 bytes at a time, several under way in a thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.embedding.problem import Embedding
from klab.kernels.row_tiles import is_power_of_2
from klab.kernels.triton_support import cdiv, next_power_of_2

SOURCE = r"""
#include "rows.cuh"
using namespace klab;

constexpr int CHUNK = chunk_of<ELEMENT>();

KLAB_KERNEL(gather_rows, THREADS)(const int* __restrict__ ids, const ELEMENT* __restrict__ weight, ELEMENT* __restrict__ out, int tokens,
                                  int width, int lanes, int aligned, int64_t weight_stride) {
    const int lane = thread_idx() % lanes;
    const int64_t token = static_cast<int64_t>(block_idx_x()) * (THREADS / lanes) + thread_idx() / lanes;
    if (token >= tokens) return;
    const int first = (block_idx_y() * VECTORS * lanes + lane) * CHUNK;
    const ELEMENT* from = weight + ids[token] * weight_stride;
    ELEMENT* to = out + token * width;
    Vec16 copied[VECTORS];
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int column = first + v * lanes * CHUNK;
        copied[v] = load_chunk(from + column, width - column, aligned);
    }
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int column = first + v * lanes * CHUNK;
        store_chunk(to + column, copied[v], width - column, aligned);
    }
}
"""
MAX_VECTORS = 8
MAX_THREADS = 1024
MAX_GRID_Y = 65535


@dataclass(frozen=True)
class LanesConfig(Config):
    """`lanes` threads copy a stretch of a row, `vectors` times 16 bytes each; a block of `threads` copies for threads / lanes tokens."""

    lanes: int = 128
    vectors: int = 2
    threads: int = 128


def _chunks(problem: Embedding) -> int:
    """16-byte pieces of a row."""
    return cdiv(problem.width * SIZE_BYTES[problem.dtype], 16)


def fits(problem: Embedding, config: LanesConfig, chip: Chip) -> str | None:
    """No more threads than pieces."""
    c, chunks = config, _chunks(problem)
    if not is_power_of_2(c.lanes, c.vectors, c.threads) or c.vectors > MAX_VECTORS:
        return f"lanes, vectors and threads must be powers of two, vectors at most {MAX_VECTORS}"
    if not c.lanes <= c.threads <= MAX_THREADS or c.threads < 32:
        return f"a block has 32 to {MAX_THREADS} threads, and whole stretches"
    if c.lanes * c.vectors >= 2 * chunks and c.lanes * c.vectors > 1:
        return "half of the threads would have nothing to do"
    if cdiv(chunks, c.lanes * c.vectors) > MAX_GRID_Y:
        return "too many blocks along a row"
    return None


def default(problem: Embedding, chip: Chip) -> LanesConfig:
    """Two pieces a thread in blocks of 128, one where there are too few blocks to fill the chip."""
    pieces = next_power_of_2(_chunks(problem))
    vectors = 2 if pieces >= 2 and problem.tokens * pieces // 256 >= 4 * chip.sm_count else 1
    return LanesConfig(min(128, max(1, pieces // vectors)), vectors, 128)


def space(problem: Embedding, chip: Chip) -> Iterator[LanesConfig]:
    """Stretches, pieces of a thread, and tokens of a block."""
    for vectors, lanes, threads in product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (32, 64, 128, 256, 512)):
        if lanes * vectors * 8 >= min(_chunks(problem), 64):  # shorter stretches leave the loads of a warp scattered
            yield LanesConfig(lanes, vectors, threads)


@kernel(Embedding, backend="cuda", config=LanesConfig, fits=fits, default=default, space=space)
def cuda_embedding(problem: Embedding, config: LanesConfig, chip: Chip) -> Launch:
    """CUDA C++: 16-byte copies, several under way in a thread."""
    p, c = problem, config
    defines: dict[str, str | int] = {"ELEMENT": ELEMENT[p.dtype], "VECTORS": c.vectors, "THREADS": c.threads}
    function = CudaKernel(SOURCE, "gather_rows", chip, defines)
    grid = (cdiv(p.tokens, c.threads // c.lanes), cdiv(_chunks(p), c.lanes * c.vectors), 1)
    chunk = 16 // SIZE_BYTES[p.dtype]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        weight, out = inputs["weight"], outputs["out"]
        aligned = p.width % chunk == 0 and weight.stride(0) % chunk == 0 and weight.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
        function.launch(grid, c.threads, [inputs["ids"], weight, out, p.tokens, p.width, c.lanes, int(aligned), Int64(weight.stride(0))])

    return launch
