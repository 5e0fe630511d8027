"""PyTorch's int8 product: cuBLASLt on a GPU, oneDNN on a CPU; the scales are applied by a second pass."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.scaled_matmul.problem import ScaledMatmul

# On a GPU torch._int_mm takes more than 16 rows.
LEAST_ROWS = 32


def fits(problem: ScaledMatmul, config: Config, chip: Chip) -> str | None:
    """int8; on a GPU k and n in multiples of 8 (a check of torch._int_mm)."""
    if problem.format != "int8_row":
        return "is for int8_row"
    if chip.kind == "cuda" and (problem.k % 8 or problem.n % 8):
        return "torch._int_mm needs k and n in multiples of 8"
    return None


@kernel(ScaledMatmul, backend="torch", fits=fits, kinds=("cuda", "cpu"), library=True)
def torch_int_mm(problem: ScaledMatmul, config: Config, chip: Chip) -> Launch:
    """torch._int_mm into int32, then scaled in two more passes; on a GPU 16 rows and fewer are first copied among zeros to 32."""
    m, rows = problem.m, LEAST_ROWS if chip.kind == "cuda" and problem.m <= 16 else problem.m
    sums: dict[torch.device, torch.Tensor] = {}
    padded: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = inputs["x"], outputs["out"]
        if out.device not in sums:
            sums[out.device] = torch.empty((2, rows, problem.n), dtype=torch.int32, device=out.device)
            padded[out.device] = torch.zeros((rows if rows > m else 0, problem.k), dtype=torch.int8, device=out.device)
        products, scaled = sums[out.device]
        if rows > m:
            padded[out.device][:m].copy_(x)
            x = padded[out.device]
        torch._int_mm(x, inputs["w"].t(), out=products)
        # In float32 between the two, so that the output is rounded once.
        floats = scaled.view(torch.float32)[:m]
        torch.mul(products[:m], inputs["x_scale"], out=floats)
        torch.mul(floats, inputs["w_scale"].t(), out=out)

    return launch
