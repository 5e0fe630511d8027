"""The library's answer: torch.topk, whose values are sorted though nobody asks for it."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.topk_select.problem import TopkSelect


@kernel(TopkSelect, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_topk(problem: TopkSelect, config: Config, chip: Chip) -> Launch:
    """torch.topk without sorting, then the hidden columns become -1."""
    count = min(problem.top_k, problem.width)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        found = torch.topk(inputs["scores"], count, dim=1, sorted=False)
        outputs["indices"][:, :count] = found.indices.masked_fill(found.values.isneginf(), -1)
        outputs["indices"][:, count:] = -1

    return launch
