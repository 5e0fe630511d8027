"""Top-k on a CPU in torch operations: blocks of the row first, then the best of the blocks' best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.topk_select.problem import TopkSelect


@dataclass(frozen=True)
class CpuSelectConfig(Config):
    """The row is cut into `blocks` blocks, whose best are found first: threads share blocks where there are few rows."""

    blocks: int = 4


def fits(problem: TopkSelect, config: CpuSelectConfig, chip: Chip) -> str | None:
    """Whole blocks, of at least one score."""
    return None if 1 <= config.blocks <= problem.width else "more blocks than scores"


def default(problem: TopkSelect, chip: Chip) -> CpuSelectConfig:
    """Blocks of at least four times what is wanted."""
    return CpuSelectConfig(max(1, min(4, problem.width // (4 * problem.top_k))))


def space(problem: TopkSelect, chip: Chip) -> Iterator[CpuSelectConfig]:
    """1 to 64 blocks."""
    for blocks in (1, 2, 4, 8, 16, 32, 64):
        yield CpuSelectConfig(blocks)


@kernel(TopkSelect, backend="cpu", config=CpuSelectConfig, space=space, default=default, fits=fits, kinds=("cpu",))
def cpu_select(problem: TopkSelect, config: CpuSelectConfig, chip: Chip) -> Launch:
    """CPU top-k in two rounds of torch.topk: blocks of a row, then their winners; what does not fill a block joins the second round."""
    blocks, width, count = config.blocks, problem.width, min(problem.top_k, problem.width)
    block = width // blocks
    of_block = min(problem.top_k, block)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        scores = inputs["scores"]
        first = scores[:, : blocks * block].view(problem.rows, blocks, block).topk(of_block, dim=2, sorted=False)
        base = torch.arange(0, blocks * block, block, device=scores.device)[:, None]
        columns = (first.indices + base).flatten(1)
        rest = torch.arange(blocks * block, width, device=scores.device).expand(problem.rows, -1)
        columns = torch.cat((columns, rest), dim=1)
        values = torch.cat((first.values.flatten(1), scores[:, blocks * block :]), dim=1)
        best = values.topk(count, dim=1, sorted=False)
        outputs["indices"][:, :count] = columns.gather(1, best.indices).masked_fill_(best.values.isneginf(), -1)
        outputs["indices"][:, count:] = -1

    return launch
