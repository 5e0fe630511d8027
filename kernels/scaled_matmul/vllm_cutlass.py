"""vLLM's CUTLASS kernels for fp8 and int8.

Written for vllm 0.19: the operator torch.ops._C.cutlass_scaled_mm, which `vllm._custom_ops` registers and whose schema takes an
output.
"""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.outside import VLLM
from klab.kernels.scaled_matmul._outside_scales import ColumnScales, fits
from klab.kernels.scaled_matmul.problem import ScaledMatmul


@kernel(ScaledMatmul, backend="torch", fits=fits, library=True, requires=VLLM)
def vllm_cutlass(problem: ScaledMatmul, config: Config, chip: Chip) -> Launch:
    """vLLM's cutlass_scaled_mm into our output; block scales are copied into columns at each launch."""
    import vllm._custom_ops  # noqa: F401  registers torch.ops._C

    multiply = torch.ops._C.cutlass_scaled_mm
    columns = ColumnScales(problem) if problem.format == "fp8_block" else None

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x_scale, w_scale = inputs["x_scale"], inputs["w_scale"]
        if columns is not None:
            x_scale = columns.of(x_scale)
        multiply(outputs["out"], inputs["x"], inputs["w"].t(), x_scale, w_scale.t(), None)

    return launch
