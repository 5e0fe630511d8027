"""SGLang's CUTLASS kernels for fp8 and int8, which allocate their output.

Written for the sgl-kernel of SGLang's repository in 2026 (sgl_kernel.gemm).
"""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import torch_dtype
from klab.kernels.outside import SGL_KERNEL
from klab.kernels.scaled_matmul import _outside_scales
from klab.kernels.scaled_matmul.problem import ScaledMatmul


def fits(problem: ScaledMatmul, config: Config, chip: Chip) -> str | None:
    """As vLLM's, but every row has its own scale."""
    if problem.format == "fp8_tensor":
        return "sgl-kernel wants one scale per row"
    return _outside_scales.fits(problem, config, chip)


@kernel(ScaledMatmul, backend="torch", fits=fits, library=True, requires=SGL_KERNEL)
def sgl_cutlass(problem: ScaledMatmul, config: Config, chip: Chip) -> Launch:
    """sgl-kernel's fp8_scaled_mm, fp8_blockwise_scaled_mm and int8_scaled_mm; the output is copied, block scales into columns too."""
    import sgl_kernel

    names = {"fp8_row": "fp8_scaled_mm", "fp8_block": "fp8_blockwise_scaled_mm", "int8_row": "int8_scaled_mm"}
    multiply = getattr(sgl_kernel, names[problem.format])
    dtype = torch_dtype(problem.dtype)
    columns = _outside_scales.ColumnScales(problem) if problem.format == "fp8_block" else None

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x_scale, w_scale = inputs["x_scale"], inputs["w_scale"]
        if columns is not None:
            x_scale, w_scale = columns.of(x_scale), w_scale.t()
        outputs["out"].copy_(multiply(inputs["x"], inputs["w"].t(), x_scale, w_scale, dtype))

    return launch
