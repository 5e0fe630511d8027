"""torch's activations, one operator after the other, and torch.compile's."""

from __future__ import annotations

import functools

import torch

from klab.kernels.activation._eager import activation
from klab.kernels.activation.problem import Activation
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.inductor import compiled


def eager_fits(problem: Activation, config: Config, chip: Chip) -> str | None:
    """float32 copies of input and output exist at once."""
    needed = 4 * problem.rows * (problem.width_in + 3 * problem.width)
    return f"the float32 copies need {needed >> 20} MiB" if needed > chip.memory_bytes // 2 else None


@kernel(Activation, backend="torch", library=True, kinds=("cuda", "cpu"), fits=eager_fits)
def torch_activation(problem: Activation, config: Config, chip: Chip) -> Launch:
    """torch's operators, one launch each; silu, gelu, relu2 and sigmoid in 16 bits multiply into the output, the others pass float32."""
    functional, kind = torch.nn.functional, problem.kind
    if problem.quantize or kind == "swiglu_clamped" or problem.dtype == "float32":
        return lambda inputs, outputs: activation(problem, inputs, outputs)

    def acted(x: torch.Tensor) -> torch.Tensor:
        if kind == "silu":
            return functional.silu(x)
        if kind == "sigmoid":
            return torch.sigmoid(x)
        if kind == "relu2":
            return functional.relu(x).square_()
        return functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x = inputs["x"]
        if problem.gated:
            torch.mul(acted(x[:, : problem.width]), x[:, problem.width :], out=outputs["out"])
        else:
            outputs["out"].copy_(acted(x))

    return launch


@kernel(Activation, backend="torch", library=True)
def torch_compiled(problem: Activation, config: Config, chip: Chip) -> Launch:
    """torch.compile (Inductor) of the activation written in torch's operators."""
    return compiled(functools.partial(activation, problem))
