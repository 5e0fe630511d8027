"""Every expert applied to every row, and all but one result masked: what runs anywhere without knowing the sizes on the host."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.grouped_matmul.problem import BLOCK, GroupedMatmul
from klab.kernels.quantize import dequantize


@kernel(GroupedMatmul, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_dense(problem: GroupedMatmul, config: Config, chip: Chip) -> Launch:
    """torch.mm of all rows with each expert, masked: `experts` times the work; for fp8 after dequantising."""
    torch.set_float32_matmul_precision("highest")

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out, offsets = inputs["x"], outputs["out"], inputs["offsets"]
        row = torch.arange(problem.rows, device=x.device)
        if problem.format:
            x = dequantize(x, inputs["x_scale"], (1, BLOCK)).to(out.dtype)
        out.zero_()
        for e in range(problem.experts):
            w = inputs["w"][e]
            if problem.format:
                w = dequantize(w, inputs["w_scale"][e], (BLOCK, BLOCK)).to(out.dtype)
            mine = (row >= offsets[e]) & (row < offsets[e + 1])
            torch.where(mine[:, None], torch.mm(x, w.T), out, out=out)

    return launch
