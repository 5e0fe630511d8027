"""PyTorch without a fused kernel: the weights become a whole matrix of `dtype` in every launch, which is then multiplied.

torch's fused kernels (_weight_int4pack_mm and its CPU twin) do not compete: they read weights only in layouts of their own, with zero
points, and rearranging them in every launch would cost more than this.
"""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import torch_dtype
from klab.kernels.weight_only_matmul._scratch import Scratch, dequantize_rows
from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul


@kernel(WeightOnlyMatmul, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_dequantize_mm(problem: WeightOnlyMatmul, config: Config, chip: Chip) -> Launch:
    """Unpack and scale all weights to `dtype` (written and read again), then torch.mm: what serving without a fused kernel costs."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    scratch = Scratch()

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        w = dequantize_rows(problem, inputs["w"], inputs["scale"], scratch, torch_dtype(problem.dtype))
        torch.mm(inputs["x"], w.t(), out=outputs["out"])

    return launch
