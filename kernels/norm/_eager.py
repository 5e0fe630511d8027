"""The norm in torch's operators, one after the other: what Inductor is given to fuse."""

from __future__ import annotations

import torch

from klab.kernels.contract import Tensors
from klab.kernels.norm.problem import Norm
from klab.kernels.row_quantize import eager as eager_rows


def norm(problem: Norm, inputs: Tensors, outputs: Tensors) -> None:
    """In float32 from the first operator to the last."""
    h = inputs["x"].float()
    if problem.residual:
        rounded = (h + inputs["residual"].float()).to(outputs["residual"].dtype)
        outputs["residual"].copy_(rounded)
        h = rounded.float()
    if problem.kind == "layer":
        h = h - h.mean(dim=-1, keepdim=True)
    normed = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + problem.eps) * inputs["weight"].float()
    if problem.kind == "layer":
        normed = normed + inputs["bias"].float()
    if problem.gated:
        normed = normed * torch.nn.functional.silu(inputs["gate"].float())
    eager_rows(normed, problem.quantize, outputs)
