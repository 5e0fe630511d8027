"""Every expert applied to every token, weighted by zero where it was not chosen: no sizes to be known on the host."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.fused_moe.problem import BLOCK, FusedMoe
from klab.kernels.quantize import dequantize, quantize_fp8


@kernel(FusedMoe, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_dense(problem: FusedMoe, config: Config, chip: Chip) -> Launch:
    """torch.mm of all tokens with each expert: experts / top_k times the work; for fp8 after dequantising."""
    torch.set_float32_matmul_precision("highest")
    p = problem

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, ids, out = inputs["x"], inputs["topk_ids"], outputs["out"]

        def rounded(rows: torch.Tensor) -> torch.Tensor:
            return dequantize(*quantize_fp8(rows, (1, BLOCK)), (1, BLOCK)).to(out.dtype) if p.format else rows

        def weight(name: str, expert: int) -> torch.Tensor:
            w = inputs[name][expert]
            return (dequantize(w, inputs[f"{name}_scale"][expert], (BLOCK, BLOCK)).to(out.dtype) if p.format else w).T

        x = rounded(x)
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for e in range(p.local):
            active = rounded(p.activate((x @ weight("w_gate_up", e)).float()).to(out.dtype))
            share = torch.where(ids == e, inputs["topk_weights"], 0.0).sum(dim=1, keepdim=True)
            total += (active @ weight("w_down", e)).float() * share
        out.copy_(total)

    return launch
