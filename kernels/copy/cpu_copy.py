"""A copy in blocks that stay in the cache while they are on their way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.copy.problem import Copy


@dataclass(frozen=True)
class BlockConfig(Config):
    """Rows that are copied at once."""

    rows: int = 256


def fits(problem: Copy, config: BlockConfig, chip: Chip) -> str | None:
    """At least a row, at most all."""
    return None if 1 <= config.rows <= max(problem.rows, BlockConfig().rows) else "rows is 1 or more, and no more than there are"


def space(problem: Copy, chip: Chip) -> Iterator[BlockConfig]:
    """Powers of two."""
    for power in range(0, 17, 2):
        yield BlockConfig(1 << power)


@kernel(Copy, backend="cpu", config=BlockConfig, fits=fits, space=space)
def cpu_copy(problem: Copy, config: BlockConfig, chip: Chip) -> Launch:
    """torch's copy, some rows at a time."""

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        for to, source in zip(torch.split(outputs["out"], config.rows), torch.split(inputs["x"], config.rows), strict=True):
            to.copy_(source)

    return launch
