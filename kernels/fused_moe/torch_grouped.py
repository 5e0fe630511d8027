"""PyTorch's grouped matmul around sorted tokens: what a model in plain PyTorch can do without asking the host for the sizes."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.fused_moe.problem import BLOCK, FusedMoe
from klab.kernels.quantize import dequantize, quantize_fp8


def fits(problem: FusedMoe, config: Config, chip: Chip) -> str | None:
    """torch._grouped_mm wants rows in multiples of 16 bytes, and bf16 on a GPU."""
    if not hasattr(torch, "_grouped_mm"):
        return "needs torch._grouped_mm (torch 2.8 or newer)"
    if chip.kind == "cuda" and problem.dtype != "bfloat16":
        return "torch._grouped_mm is for bfloat16 on a GPU"
    if any(k * SIZE_BYTES[problem.dtype] % 16 for k in (problem.hidden, problem.intermediate)):
        return "torch._grouped_mm needs rows in multiples of 16 bytes"
    return None


@kernel(FusedMoe, backend="torch", kinds=("cuda", "cpu"), library=True, fits=fits)
def torch_grouped(problem: FusedMoe, config: Config, chip: Chip) -> Launch:
    """Sort, torch._grouped_mm twice, weighted sum, in about 15 launches; fp8 weights are dequantised to 16 bits first."""
    p = problem

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        ids, out = inputs["topk_ids"].flatten(), outputs["out"]

        def rounded(rows: torch.Tensor) -> torch.Tensor:
            return dequantize(*quantize_fp8(rows, (1, BLOCK)), (1, BLOCK)).to(out.dtype) if p.format else rows

        def weight(name: str) -> torch.Tensor:
            w = inputs[name]
            return (dequantize(w, inputs[f"{name}_scale"], (BLOCK, BLOCK)).to(out.dtype) if p.format else w).transpose(-2, -1)

        by_expert, order = ids.sort(stable=True)
        ends = torch.searchsorted(by_expert, torch.arange(p.local, device=ids.device, dtype=ids.dtype), right=True).int()
        x = rounded(inputs["x"])[order // p.top_k]
        up = torch._grouped_mm(x, weight("w_gate_up"), offs=ends)
        active = rounded(p.activate(up.float()).to(out.dtype))
        down = torch._grouped_mm(active, weight("w_down"), offs=ends)
        # Rows behind the last local expert were never written.
        rows = torch.where((by_expert < p.local)[:, None], down.float(), 0.0) * inputs["topk_weights"].flatten()[order][:, None]
        choices = torch.empty_like(rows)
        choices[order] = rows
        out.copy_(choices.view(p.tokens, p.top_k, p.hidden).sum(dim=1))

    return launch
