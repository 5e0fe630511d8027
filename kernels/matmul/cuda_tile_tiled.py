"""klab's own tiled matmul in cuTile Python, a contestant in another toolkit: what a short kernel of that language reaches.

Written for cuda-tile 1.7.0, whose compiler tileiras needs CUDA 13.1 or later. The compiler chooses layouts, copies, the pipeline and the
matrix instructions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.matmul.problem import Matmul
from klab.kernels.outside import CUDA_TILE
from klab.kernels.triton_support import cdiv


@dataclass(frozen=True)
class CudaTileConfig(Config):
    """Tile sizes, powers of two: there is nothing else to choose."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64


def default(problem: Matmul, chip: Chip) -> CudaTileConfig:
    """Tiles no higher than the rows there are."""
    return CudaTileConfig(64, 128, 64) if problem.m <= 64 else CudaTileConfig(128, 256 if chip.target >= 100 else 128, 64)


def space(problem: Matmul, chip: Chip) -> Iterator[CudaTileConfig]:
    """Tiles that the matrix units like."""
    for block_m, block_n, block_k in product((64, 128, 256), (64, 128, 256), (32, 64, 128)):
        yield CudaTileConfig(block_m, block_n, block_k)


def fits(problem: Matmul, config: CudaTileConfig, chip: Chip) -> str | None:
    """16-bit types, and tiles of at most 256 by 256 in sum."""
    if problem.dtype == "float32":
        return "is for 16-bit types"
    if config.block_m * config.block_n > 256 * 128:
        return "the sums would not fit"
    if any(size & (size - 1) or size < 16 for size in (config.block_m, config.block_n, config.block_k)):
        return "tiles are powers of two"
    return None


@kernel(
    Matmul, backend="torch", config=CudaTileConfig, default=default, space=space, fits=fits, requires=CUDA_TILE,
)  # fmt: skip
def cuda_tile_tiled(problem: Matmul, config: CudaTileConfig, chip: Chip) -> Launch:
    """A tiled matmul in cuTile Python, compiled at the first call."""
    import cuda.tile as ct

    from klab.kernels.matmul._cuda_tile_source import tiled

    c = config
    grid = (cdiv(problem.m, c.block_m) * cdiv(problem.n, c.block_n), 1, 1)
    nt = problem.layout == "nt"

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        arguments = (inputs["x"], inputs["w"], outputs["out"], nt, c.block_m, c.block_n, c.block_k)
        ct.launch(torch.cuda.current_stream(), grid, tiled, arguments)

    return launch
