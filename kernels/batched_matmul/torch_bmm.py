"""PyTorch's batched matmul on views whose heads are strided: cuBLAS on a GPU, oneDNN or MKL on a CPU."""

from __future__ import annotations

import torch

from klab.kernels.batched_matmul.problem import BatchedMatmul
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel


def _exact_sums() -> None:
    """No TF32 and no partial sums in the output's dtype: process-wide switches, set to what the problem defines."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@kernel(BatchedMatmul, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_bmm(problem: BatchedMatmul, config: Config, chip: Chip) -> Launch:
    """torch.bmm on transposed views of x, w and out: no copy where BLAS takes the strides, which cuBLAS does."""
    _exact_sums()

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        torch.bmm(inputs["x"].transpose(0, 1), inputs["w"].transpose(1, 2), out=outputs["out"].transpose(0, 1))

    return launch


@kernel(BatchedMatmul, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_bmm_dense(problem: BatchedMatmul, config: Config, chip: Chip) -> Launch:
    """torch.bmm on a dense copy of x by heads, into a dense result that is copied to the output's order: both copies are timed."""
    _exact_sums()
    results: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = inputs["x"].transpose(0, 1).contiguous(), outputs["out"]
        if out.device not in results:
            results[out.device] = torch.empty((problem.batch, problem.m, problem.n), dtype=out.dtype, device=out.device)
        out.transpose(0, 1).copy_(torch.bmm(x, inputs["w"].transpose(1, 2), out=results[out.device]))

    return launch


@kernel(BatchedMatmul, backend="torch", kinds=("cpu",))
def torch_per_head(problem: BatchedMatmul, config: Config, chip: Chip) -> Launch:
    """One torch.mm per head on strided views: BLAS threads share one head at a time instead of having a head each."""
    _exact_sums()

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        for head in range(problem.batch):
            torch.mm(inputs["x"][:, head], inputs["w"][head].t(), out=outputs["out"][:, head])

    return launch
