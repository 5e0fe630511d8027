"""torch's own norms, and torch.compile's."""

from __future__ import annotations

import functools

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.inductor import compiled
from klab.kernels.norm._eager import norm
from klab.kernels.norm.problem import Norm
from klab.kernels.row_quantize import eager as eager_rows


@kernel(Norm, backend="torch", library=True, kinds=("cuda", "cpu"))
def torch_norm(problem: Norm, config: Config, chip: Chip) -> Launch:
    """torch.nn.functional.rms_norm or layer_norm, which has no out= and is copied; sum, gate and fp8 are operators of their own."""
    functional = torch.nn.functional
    shape = [problem.width]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x = inputs["x"]
        if problem.residual:
            x = torch.add(x, inputs["residual"], out=outputs["residual"])
        if problem.kind == "layer":
            normed = functional.layer_norm(x, shape, inputs["weight"], inputs["bias"], problem.eps)
        else:
            normed = functional.rms_norm(x, shape, inputs["weight"], problem.eps)
        if problem.gated:
            # In float32, or three roundings to 16 bits would add up to more than one.
            normed = normed.float() * functional.silu(inputs["gate"].float())
        eager_rows(normed, problem.quantize, outputs)

    return launch


@kernel(Norm, backend="torch", library=True)
def torch_compiled(problem: Norm, config: Config, chip: Chip) -> Launch:
    """torch.compile (Inductor) of the norm written in torch's operators."""
    return compiled(functools.partial(norm, problem))
