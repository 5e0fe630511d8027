"""Sparse latent attention in CUDA C++ (`latent.cuh`): the rows of a token's list are gathered by cp.async."""

from __future__ import annotations

from collections.abc import Iterator

import cupy  # noqa: F401  absent CuPy makes this file "unavailable" when it is found, not when it is launched

from klab.kernels import latent_cuda as shared
from klab.kernels.contract import Chip, Launch, kernel
from klab.kernels.latent_cuda import MmaLatentConfig
from klab.kernels.latent_tiles import shape_of
from klab.kernels.sparse_latent_attention.problem import SparseLatentAttention


def fits(problem: SparseLatentAttention, config: MmaLatentConfig, chip: Chip) -> str | None:
    """See `latent_cuda.fits`."""
    return shared.fits(shape_of(problem), config, chip)


def default(problem: SparseLatentAttention, chip: Chip) -> MmaLatentConfig:
    """See `latent_cuda.default`."""
    return shared.default(shape_of(problem), chip)


def space(problem: SparseLatentAttention, chip: Chip) -> Iterator[MmaLatentConfig]:
    """See `latent_cuda.space`."""
    return shared.space(shape_of(problem), chip)


@kernel(SparseLatentAttention, backend="cuda", config=MmaLatentConfig, space=space, default=default, fits=fits)
def cuda_listed_latent(problem: SparseLatentAttention, config: MmaLatentConfig, chip: Chip) -> Launch:
    """CUDA C++ attention over listed slots (mma.sync, cp.async gather): a row is key and value of all heads; warps share columns."""
    return shared.mma_launch("cuda_listed_latent", shape_of(problem), config, chip)
