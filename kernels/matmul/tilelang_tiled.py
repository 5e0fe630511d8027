"""klab's own tiled matmul in TileLang, a contestant in another toolkit: what a short kernel of that language reaches.

Written for tilelang 0.1.15. TileLang chooses the layouts, the copies (TMA on Hopper) and the matrix instructions: wgmma with a
warp that only copies on Hopper; mma.sync on Blackwell, as its tensor memory would have to be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.matmul.problem import Matmul
from klab.kernels.outside import TILELANG


@dataclass(frozen=True)
class TileLangConfig(Config):
    """Tile sizes, stages of the copy pipeline and threads of a block."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    num_stages: int = 3
    threads: int = 256


def default(problem: Matmul, chip: Chip) -> TileLangConfig:
    """Tiles no higher than the rows there are; a warpgroup per 64 rows on Hopper."""
    if problem.m <= 64:
        return TileLangConfig(64, 64 if problem.n < 8192 else 128, 64, 4, 128)
    return TileLangConfig()


def space(problem: Matmul, chip: Chip) -> Iterator[TileLangConfig]:
    """Tiles that the matrix units like."""
    for block_m, block_n, block_k, stages, threads in product((64, 128), (64, 128, 256), (32, 64, 128), (2, 3, 4), (128, 256)):
        yield TileLangConfig(block_m, block_n, block_k, stages, threads)


def fits(problem: Matmul, config: TileLangConfig, chip: Chip) -> str | None:
    """16-bit rows of 16 bytes, shared memory, and a warpgroup's share of the tile."""
    c, size = config, SIZE_BYTES[problem.dtype]
    if size != 2:
        return "is for 16-bit types"
    if problem.n % 8 or problem.k % 8:
        return "takes rows of a multiple of 16 bytes"
    if c.threads % 128 or c.block_m * 2 < c.threads:
        return "wants 64 rows for every 128 threads"
    # In float32, 128 registers a thread for the sums leave room for the rest.
    if c.block_m * c.block_n > 128 * c.threads:
        return "the sums would not fit the registers"
    shared = c.num_stages * c.block_k * (c.block_m + c.block_n) * size
    if shared > chip.smem_per_block_bytes:
        return f"needs {shared >> 10} KiB of shared memory"
    return None


def make(problem: Matmul, config: TileLangConfig, x_row: int, w_row: int) -> Any:
    """The kernel as TileLang's program, for rows of x and w that lie so many elements apart."""
    import tilelang.language as T

    p, c = problem, config
    m, n, k, dtype = p.m, p.n, p.k, p.dtype
    block_m, block_n, block_k = c.block_m, c.block_n, c.block_k
    transposed = p.layout == "nt"
    w_shape, w_tile = ((n, k), (block_n, block_k)) if transposed else ((k, n), (block_k, block_n))

    # TileLang reads these annotations as values.
    def tiled(x, w, out):  # type: ignore[no-untyped-def]
        with T.Kernel(T.ceildiv(n, block_n), T.ceildiv(m, block_m), threads=c.threads) as (column, row):
            x_shared = T.alloc_shared((block_m, block_k), dtype)
            w_shared = T.alloc_shared(w_tile, dtype)
            sums = T.alloc_fragment((block_m, block_n), "float32")
            # Neighbouring blocks share columns of w in the second-level cache.
            T.use_swizzle(10)
            T.clear(sums)
            for step in T.Pipelined(T.ceildiv(k, block_k), num_stages=c.num_stages):
                T.copy(x[row * block_m, step * block_k], x_shared)
                if transposed:
                    T.copy(w[column * block_n, step * block_k], w_shared)
                else:
                    T.copy(w[step * block_k, column * block_n], w_shared)
                T.gemm(x_shared, w_shared, sums, transpose_B=transposed)
            T.copy(sums, out[row * block_m, column * block_n])

    tiled.__annotations__ = {
        "x": T.StridedTensor((m, k), (x_row, 1), dtype),
        "w": T.StridedTensor(w_shape, (w_row, 1), dtype),
        "out": T.Tensor((m, n), dtype),
    }
    return T.prim_func(tiled)


@kernel(
    Matmul, backend="torch", config=TileLangConfig, default=default, space=space, fits=fits, requires=TILELANG,
)  # fmt: skip
def tilelang_tiled(problem: Matmul, config: TileLangConfig, chip: Chip) -> Launch:
    """A pipelined tiled matmul in TileLang, compiled at the first call."""
    import tilelang

    compiled: dict[tuple[int, int], Callable[..., None]] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w = inputs["x"], inputs["w"]
        rows = x.stride(0), w.stride(0)
        if rows not in compiled:
            compiled[rows] = tilelang.compile(make(problem, config, *rows), target={"kind": "cuda", "arch": chip.arch})
        compiled[rows](x, w, outputs["out"])

    return launch
