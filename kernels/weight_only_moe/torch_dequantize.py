"""Each expert's weights unpacked to 16 bits, then multiplied with every token: what plain PyTorch can do."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.weight_only_moe.problem import WeightOnlyMoe


@kernel(WeightOnlyMoe, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_dequantize(problem: WeightOnlyMoe, config: Config, chip: Chip) -> Launch:
    """torch.mm of all tokens with each expert after unpacking it: experts / top_k times the work, and the weights travel three times."""
    torch.set_float32_matmul_precision("highest")
    p = problem

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, ids, out = inputs["x"], inputs["topk_ids"], outputs["out"]
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for e in range(p.local):
            up = x @ p.unpacked(inputs, "w_gate_up", e).to(out.dtype).T
            active = p.activate(up.float()).to(out.dtype)
            share = torch.where(ids == e, inputs["topk_weights"], 0.0).sum(dim=1, keepdim=True)
            total += (active @ p.unpacked(inputs, "w_down", e).to(out.dtype).T).float() * share
        out.copy_(total)

    return launch
