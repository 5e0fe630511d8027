"""A copy in CUDA C++: 16 bytes at a time, several under way in a thread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.copy.problem import Copy
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.triton_support import cdiv

SOURCE = r"""
#include "rows.cuh"
using namespace klab;

constexpr int CHUNK = chunk_of<ELEMENT>();

// A block copies VECTORS * THREADS chunks of a row; consecutive threads take consecutive chunks.
KLAB_KERNEL(copy_rows, THREADS)(const ELEMENT* __restrict__ x, ELEMENT* __restrict__ out, int width, int aligned, int64_t x_stride,
                                int64_t out_stride) {
    const int first = (block_idx_y() * VECTORS * THREADS + thread_idx()) * CHUNK;
    const ELEMENT* from = x + block_idx_x() * x_stride;
    ELEMENT* to = out + block_idx_x() * out_stride;
    Vec16 copied[VECTORS];
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int column = first + v * THREADS * CHUNK;
        copied[v] = load_chunk(from + column, width - column, aligned);
    }
    KLAB_UNROLL
    for (int v = 0; v < VECTORS; ++v) {
        const int column = first + v * THREADS * CHUNK;
        store_chunk(to + column, copied[v], width - column, aligned);
    }
}
"""
MAX_GRID_Y = 65535


@dataclass(frozen=True)
class VectorConfig(Config):
    """`vectors` times 16 bytes a thread, `threads` a block."""

    vectors: int = 2
    threads: int = 256


def _chunks(problem: Copy) -> int:
    """16-byte pieces of a row."""
    return cdiv(problem.width * SIZE_BYTES[problem.dtype], 16)


def fits(problem: Copy, config: VectorConfig, chip: Chip) -> str | None:
    """No more threads than pieces, but for the smallest block."""
    c, chunks = config, _chunks(problem)
    if c.vectors not in (1, 2, 4, 8) or c.threads not in (32, 64, 128, 256, 512, 1024):
        return "1 to 8 vectors and 32 to 1024 threads, powers of two"
    if c.threads > 32 and (c.threads * c.vectors) // 2 >= chunks:
        return "half of the threads would have nothing to do"
    return "too many blocks along a row" if cdiv(chunks, c.threads * c.vectors) > MAX_GRID_Y else None


def default(problem: Copy, chip: Chip) -> VectorConfig:
    """Two pieces a thread in blocks of at most 256."""
    threads = 256
    while threads > 32 and threads >= _chunks(problem):
        threads //= 2
    return VectorConfig(1 if threads == 32 else 2, threads)


def space(problem: Copy, chip: Chip) -> Iterator[VectorConfig]:
    """Every block."""
    for vectors, threads in product((1, 2, 4, 8), (32, 64, 128, 256, 512, 1024)):
        yield VectorConfig(vectors, threads)


@kernel(Copy, backend="cuda", config=VectorConfig, fits=fits, default=default, space=space)
def cuda_copy(problem: Copy, config: VectorConfig, chip: Chip) -> Launch:
    """CUDA C++: 16-byte copies, several under way in a thread."""
    p, c = problem, config
    defines: dict[str, str | int] = {"ELEMENT": ELEMENT[p.dtype], "VECTORS": c.vectors, "THREADS": c.threads}
    function = CudaKernel(SOURCE, "copy_rows", chip, defines)
    grid = (p.rows, cdiv(_chunks(p), c.threads * c.vectors), 1)
    chunk = 16 // SIZE_BYTES[p.dtype]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = inputs["x"], outputs["out"]
        strides = (x.stride(0), out.stride(0))
        aligned = p.width % chunk == 0 and not any(s % chunk for s in strides) and not any(t.data_ptr() % 16 for t in (x, out))
        function.launch(grid, c.threads, [x, out, p.width, int(aligned), *map(Int64, strides)])

    return launch
