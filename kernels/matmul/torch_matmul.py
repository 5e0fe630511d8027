"""PyTorch's own matmul: cuBLAS on a GPU, oneDNN or MKL on a CPU."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.matmul.problem import Matmul


@kernel(Matmul, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_matmul(problem: Matmul, config: Config, chip: Chip) -> Launch:
    """torch.mm: cuBLAS on a GPU, oneDNN or MKL on a CPU; sums in float32, never TF32."""
    # Process-wide switches, set to what the problem defines: no TF32 for float32, partial sums in float32 and not in the output's
    # dtype (torch's default lets cuBLAS add split-K parts up in bf16).
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    transposed = problem.layout == "nt"

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        w = inputs["w"]
        torch.mm(inputs["x"], w.t() if transposed else w, out=outputs["out"])

    return launch
