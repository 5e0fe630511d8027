"""An activation for the CPU, a few rows at a time, so that what is between two operators stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from klab.kernels.activation._eager import act
from klab.kernels.activation.problem import Activation
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.row_quantize import eager as eager_rows


@dataclass(frozen=True)
class BlockedConfig(Config):
    """Rows of a block."""

    block_rows: int = 16


def _bytes_per_row(problem: Activation) -> int:
    """float32: the input, what is activated, the product, and what quantising makes."""
    return 4 * (problem.width_in + 3 * problem.width)


def fits(problem: Activation, config: BlockedConfig, chip: Chip) -> str | None:
    """A block is no more than the rows, and what is made of it fits the cache of last level."""
    if not 1 <= config.block_rows <= problem.rows:
        return f"block_rows is 1..{problem.rows}"
    if config.block_rows > 1 and config.block_rows * _bytes_per_row(problem) > chip.l2_bytes:
        return "a block does not fit the cache"
    return None


def default(problem: Activation, chip: Chip) -> BlockedConfig:
    """An eighth of the cache, so that each core's share of a block stays in its own cache."""
    return BlockedConfig(max(1, min(problem.rows, chip.l2_bytes // 8 // _bytes_per_row(problem))))


def space(problem: Activation, chip: Chip) -> Iterator[BlockedConfig]:
    """Powers of two."""
    rows = 1
    while rows <= problem.rows:
        yield BlockedConfig(rows)
        rows *= 2


@kernel(Activation, backend="cpu", config=BlockedConfig, space=space, default=default, fits=fits)
def cpu_blocked(problem: Activation, config: BlockedConfig, chip: Chip) -> Launch:
    """Rows in blocks of the cache's size: one pass over memory, torch's operators on float32 work space."""
    work: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x = inputs["x"]
        if x.device not in work:
            work[x.device] = torch.empty((config.block_rows, problem.width_in), dtype=torch.float32, device=x.device)
        for first in range(0, problem.rows, config.block_rows):
            rows = slice(first, min(first + config.block_rows, problem.rows))
            block = work[x.device][: rows.stop - first].copy_(x[rows])
            eager_rows(act(problem, block), problem.quantize, {name: output[rows] for name, output in outputs.items()})

    return launch
