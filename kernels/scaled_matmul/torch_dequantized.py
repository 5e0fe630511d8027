"""Dequantise, then multiply with torch.mm: what a chip without narrow tensor cores is left with."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import torch_dtype
from klab.kernels.scaled_matmul.problem import ScaledMatmul


@kernel(ScaledMatmul, backend="torch", kinds=("cuda", "cpu"))
def torch_dequantized(problem: ScaledMatmul, config: Config, chip: Chip) -> Launch:
    """Emulated: dequantises x and w to float32 in memory at each launch, then torch.mm; no narrow arithmetic at all."""
    torch.set_float32_matmul_precision("highest")
    dtype = torch_dtype(problem.dtype)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w = problem.values(inputs, "x"), problem.values(inputs, "w")
        if dtype == torch.float32:
            torch.mm(x, w.t(), out=outputs["out"])
        else:
            outputs["out"].copy_(torch.mm(x, w.t()))

    return launch
