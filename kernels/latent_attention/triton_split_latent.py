"""Split-KV decoding over the latent cache in Triton: a tile of cached rows is loaded once, as keys and as values of all heads."""

from __future__ import annotations

from collections.abc import Iterator

from klab.kernels.contract import Chip, Launch, kernel
from klab.kernels.latent_attention.problem import LatentAttention
from klab.kernels.latent_tiles import LatentConfig, per_split, shape_of, triton_default, triton_fits, triton_space, triton_splits
from klab.kernels.latent_triton import latents_launch


def fits(problem: LatentAttention, config: LatentConfig, chip: Chip) -> str | None:
    """See `triton_fits`."""
    return triton_fits(shape_of(problem), config, chip)


def default(problem: LatentAttention, chip: Chip) -> LatentConfig:
    """See `triton_default`."""
    return triton_default(shape_of(problem), chip)


def space(problem: LatentAttention, chip: Chip) -> Iterator[LatentConfig]:
    """See `triton_space`."""
    return triton_space(shape_of(problem), chip)


@kernel(LatentAttention, backend="triton", config=LatentConfig, space=space, default=default, fits=fits)
def triton_split_latent(problem: LatentAttention, config: LatentConfig, chip: Chip) -> Launch:
    """Triton MLA decoding over pages: all heads are rows of one tile, a cached row is key and value, long contexts split and merged."""
    shape = shape_of(problem)
    splits = triton_splits(shape, config, chip)
    return latents_launch(shape, splits=splits, blocks_per_split=per_split(shape, config.block_n, splits), config=config)
