"""A norm for the CPU, a few rows at a time, so that what is between two operators stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.norm.problem import Norm
from klab.kernels.row_quantize import eager as eager_rows

# Float32 copies of a block that are alive at once: the values, their squares or gates, and what quantising makes.
BUFFERS = 4


@dataclass(frozen=True)
class BlockedConfig(Config):
    """Rows of a block."""

    block_rows: int = 16


def fits(problem: Norm, config: BlockedConfig, chip: Chip) -> str | None:
    """A block is no more than the rows, and what is made of it fits the cache of last level."""
    if not 1 <= config.block_rows <= problem.rows:
        return f"block_rows is 1..{problem.rows}"
    if config.block_rows > 1 and BUFFERS * 4 * config.block_rows * problem.width > chip.l2_bytes:
        return "a block does not fit the cache"
    return None


def default(problem: Norm, chip: Chip) -> BlockedConfig:
    """An eighth of the cache, so that a block is split over several cores and each share stays in its own cache."""
    rows = chip.l2_bytes // 8 // (BUFFERS * 4 * problem.width)
    return BlockedConfig(max(1, min(problem.rows, rows)))


def space(problem: Norm, chip: Chip) -> Iterator[BlockedConfig]:
    """Powers of two."""
    rows = 1
    while rows <= problem.rows:
        yield BlockedConfig(rows)
        rows *= 2


@kernel(Norm, backend="cpu", config=BlockedConfig, space=space, default=default, fits=fits)
def cpu_blocked(problem: Norm, config: BlockedConfig, chip: Chip) -> Launch:
    """Rows in blocks of the cache's size: one pass over memory, torch's operators in place on float32 work space."""
    work: dict[str, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        if not work:
            work["h"] = torch.empty((config.block_rows, problem.width), dtype=torch.float32, device=inputs["x"].device)
            work["other"] = torch.empty_like(work["h"])
        weight = inputs["weight"].float()
        for first in range(0, problem.rows, config.block_rows):
            rows = slice(first, min(first + config.block_rows, problem.rows))
            h, other = (work[name][: rows.stop - first] for name in ("h", "other"))
            h.copy_(inputs["x"][rows])
            if problem.residual:
                h.add_(other.copy_(inputs["residual"][rows]))
                h.copy_(outputs["residual"][rows].copy_(h))
            if problem.kind == "layer":
                h.sub_(h.mean(dim=-1, keepdim=True))
            scale = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(problem.width).add_(problem.eps).rsqrt_()
            h.mul_(scale).mul_(weight)
            if problem.kind == "layer":
                h.add_(inputs["bias"])
            if problem.gated:
                h.mul_(torch.nn.functional.silu(other.copy_(inputs["gate"][rows]), inplace=True))
            eager_rows(h, problem.quantize, {name: outputs[name][rows] for name in outputs if name != "residual"})

    return launch
