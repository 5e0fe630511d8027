"""The activation in torch's operators: what Inductor is given to fuse, and what the CPU does block by block."""

from __future__ import annotations

import torch

from klab.kernels.activation.problem import SWIGLU_LIMIT, SWIGLU_SLOPE, Activation
from klab.kernels.contract import Tensors
from klab.kernels.row_quantize import eager as eager_rows


def act(problem: Activation, x: torch.Tensor) -> torch.Tensor:
    """The activated and multiplied values of float32 `x` [rows, width_in]."""
    gate, up = (x[:, : problem.width], x[:, problem.width :]) if problem.gated else (x, None)
    functional = torch.nn.functional
    if problem.kind == "swiglu_clamped":
        assert up is not None
        gate = gate.clamp(max=SWIGLU_LIMIT)
        return gate * torch.sigmoid(gate * SWIGLU_SLOPE) * (up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1.0)
    if problem.kind == "silu":
        acted = functional.silu(gate)
    elif problem.kind == "sigmoid":
        acted = torch.sigmoid(gate)
    elif problem.kind == "relu2":
        acted = functional.relu(gate).square()
    else:
        acted = functional.gelu(gate, approximate="tanh" if problem.kind == "gelu_tanh" else "none")
    return acted if up is None else acted * up


def activation(problem: Activation, inputs: Tensors, outputs: Tensors) -> None:
    """In float32 from the first operator to the last."""
    eager_rows(act(problem, inputs["x"].float()), problem.quantize, outputs)
