"""Split-KV decoding over the latent cache in CUDA C++ (`latent.cuh`)."""

from __future__ import annotations

from collections.abc import Iterator

import cupy  # noqa: F401  absent CuPy makes this file "unavailable" when it is found, not when it is launched

from klab.kernels import latent_cuda as shared
from klab.kernels.contract import Chip, Launch, kernel
from klab.kernels.latent_attention.problem import LatentAttention
from klab.kernels.latent_cuda import MmaLatentConfig
from klab.kernels.latent_tiles import shape_of


def fits(problem: LatentAttention, config: MmaLatentConfig, chip: Chip) -> str | None:
    """See `latent_cuda.fits`."""
    return shared.fits(shape_of(problem), config, chip)


def default(problem: LatentAttention, chip: Chip) -> MmaLatentConfig:
    """See `latent_cuda.default`."""
    return shared.default(shape_of(problem), chip)


def space(problem: LatentAttention, chip: Chip) -> Iterator[MmaLatentConfig]:
    """See `latent_cuda.space`."""
    return shared.space(shape_of(problem), chip)


@kernel(LatentAttention, backend="cuda", config=MmaLatentConfig, space=space, default=default, fits=fits)
def cuda_latent(problem: LatentAttention, config: MmaLatentConfig, chip: Chip) -> Launch:
    """CUDA C++ MLA decoding (mma.sync, cp.async pages): a tile of cached rows is key and value of all heads; warps share columns."""
    return shared.mma_launch("cuda_latent", shape_of(problem), config, chip)
