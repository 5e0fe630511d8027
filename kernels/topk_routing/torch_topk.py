"""The router in PyTorch's own operations, as model code writes it."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.topk_routing.problem import TopkRouting


@kernel(TopkRouting, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_topk(problem: TopkRouting, config: Config, chip: Chip) -> Launch:
    """torch.softmax or sigmoid, torch.topk, gather: 3 to 12 launches with a tensor between each."""
    p = problem

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        logits = inputs["logits"].float()
        score = logits.softmax(dim=1) if p.scoring == "softmax" else logits.sigmoid()
        choice = score + inputs["bias"] if p.bias else score
        if p.topk_groups < p.groups:
            members = choice.view(p.tokens, p.groups, p.group_size)
            group = members.topk(2, dim=2).values.sum(dim=2) if p.bias else members.amax(dim=2)
            best = group.topk(p.topk_groups, dim=1, sorted=False).indices
            kept = torch.zeros_like(group, dtype=torch.bool).scatter_(1, best, True)
            choice = members.masked_fill(~kept[:, :, None], float("-inf")).view(p.tokens, p.experts)
        ids = choice.topk(p.top_k, dim=1).indices
        weights = score.gather(1, ids)
        if p.renormalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        outputs["ids"].copy_(ids)
        torch.mul(weights, p.scale, out=outputs["weights"])

    return launch
