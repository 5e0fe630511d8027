"""Rotation and cache write by torch: operator by operator, and by torch.compile."""

from __future__ import annotations

import functools

from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.inductor import compiled
from klab.kernels.rope_cache._eager import rope_cache
from klab.kernels.rope_cache.problem import RopeCache


@kernel(RopeCache, backend="torch", library=True, kinds=("cuda", "cpu"))
def torch_rope(problem: RopeCache, config: Config, chip: Chip) -> Launch:
    """torch's operators, about twenty launches, with float32 copies between them."""
    return functools.partial(rope_cache, problem)


@kernel(RopeCache, backend="torch", library=True)
def torch_compiled(problem: RopeCache, config: Config, chip: Chip) -> Launch:
    """torch.compile (Inductor) of rotation and cache write in torch's operators."""
    return compiled(functools.partial(rope_cache, problem))
