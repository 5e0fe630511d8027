"""DeepGEMM's block-scaled fp8 matmul, the one that DeepSeek's own serving uses.

Written for DeepGEMM 2.8.0 (deep_gemm.fp8_gemm_nt). On sm_90 scales stay float32; on sm_100 it rounds them up to powers of two, another
format than this problem's, and is refused.
"""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.outside import DEEP_GEMM
from klab.kernels.scaled_matmul.problem import BLOCK, ScaledMatmul


def fits(problem: ScaledMatmul, config: Config, chip: Chip) -> str | None:
    """1x128 by 128x128 scales into bf16, on Hopper."""
    p = problem
    if p.format != "fp8_block" or p.dtype != "bfloat16":
        return "DeepGEMM multiplies fp8_block into bf16"
    if chip.target != 90:
        return "on chips other than sm_90 DeepGEMM's scales are powers of two"
    if p.n % 64 or p.k % BLOCK:
        return f"takes n in multiples of 64 and k in multiples of {BLOCK}"
    return None


@kernel(ScaledMatmul, backend="torch", fits=fits, library=True, requires=DEEP_GEMM)
def deep_gemm_fp8(problem: ScaledMatmul, config: Config, chip: Chip) -> Launch:
    """DeepGEMM's fp8_gemm_nt into our output; it transposes the scales of x itself, at each launch."""
    import deep_gemm

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        deep_gemm.fp8_gemm_nt((inputs["x"], inputs["x_scale"]), (inputs["w"], inputs["w_scale"]), outputs["out"], disable_ue8m0_cast=True)

    return launch
