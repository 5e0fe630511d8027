"""Sparse latent attention in Triton: the slots of a token's list are gathered 16 bytes at a time, as keys and as values of all heads."""

from __future__ import annotations

from collections.abc import Iterator

from klab.kernels.contract import Chip, Launch, kernel
from klab.kernels.latent_tiles import LatentConfig, per_split, shape_of, triton_default, triton_fits, triton_space, triton_splits
from klab.kernels.latent_triton import latents_launch
from klab.kernels.sparse_latent_attention.problem import SparseLatentAttention


def fits(problem: SparseLatentAttention, config: LatentConfig, chip: Chip) -> str | None:
    """See `triton_fits`."""
    return triton_fits(shape_of(problem), config, chip)


def default(problem: SparseLatentAttention, chip: Chip) -> LatentConfig:
    """See `triton_default`."""
    return triton_default(shape_of(problem), chip)


def space(problem: SparseLatentAttention, chip: Chip) -> Iterator[LatentConfig]:
    """See `triton_space`."""
    return triton_space(shape_of(problem), chip)


@kernel(SparseLatentAttention, backend="triton", config=LatentConfig, space=space, default=default, fits=fits)
def triton_listed_latent(problem: SparseLatentAttention, config: LatentConfig, chip: Chip) -> Launch:
    """Triton attention over listed slots: a token's heads are rows of one tile, a gathered row is key and value, lists split and merged."""
    shape = shape_of(problem)
    splits = triton_splits(shape, config, chip)
    return latents_launch(shape, splits=splits, blocks_per_split=per_split(shape, config.block_n, splits), config=config)
