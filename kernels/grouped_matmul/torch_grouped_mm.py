"""PyTorch's own grouped matmul: CUTLASS on a GPU, a loop over the groups on a CPU."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.errors import UsageError
from klab.kernels.grouped_matmul.problem import BLOCK, GroupedMatmul
from klab.kernels.quantize import dequantize


def fits(problem: GroupedMatmul, config: Config, chip: Chip) -> str | None:
    """torch._grouped_mm wants rows in multiples of 16 bytes, and bf16 on a GPU."""
    if not hasattr(torch, "_grouped_mm"):
        return "needs torch._grouped_mm (torch 2.8 or newer)"
    if chip.kind == "cuda" and problem.dtype != "bfloat16":
        return "torch._grouped_mm is for bfloat16 on a GPU"
    if problem.k * SIZE_BYTES[problem.dtype] % 16:
        return "torch._grouped_mm needs rows in multiples of 16 bytes"
    return None


@kernel(GroupedMatmul, backend="torch", kinds=("cuda", "cpu"), library=True, fits=fits)
def torch_grouped_mm(problem: GroupedMatmul, config: Config, chip: Chip) -> Launch:
    """torch._grouped_mm (no fp8 blocks: those are dequantised to bf16 first); writes a tensor of its own, then copies."""

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w = inputs["x"], inputs["w"]
        if problem.format:
            dtype = outputs["out"].dtype
            x = dequantize(x, inputs["x_scale"], (1, BLOCK)).to(dtype)
            w = dequantize(w, inputs["w_scale"], (BLOCK, BLOCK)).to(dtype)
        elif any(stride * x.element_size() % 16 for stride in (x.stride(0), w.stride(1))):
            raise UsageError("torch._grouped_mm needs rows at multiples of 16 bytes")
        outputs["out"].copy_(torch._grouped_mm(x, w.transpose(-2, -1), offs=inputs["offsets"][1:]))

    return launch
