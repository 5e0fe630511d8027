"""DeepGEMM's bf16 matmul. Written for DeepGEMM 2.8.0 (deep_gemm.bf16_gemm_nt)."""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.matmul.problem import Matmul
from klab.kernels.outside import DEEP_GEMM, aligned


def fits(problem: Matmul, config: Config, chip: Chip) -> str | None:
    """bf16 with weights as a linear layer stores them, on Hopper and Blackwell."""
    if problem.dtype != "bfloat16" or problem.layout != "nt":
        return "DeepGEMM multiplies bf16 in layout nt"
    if chip.target not in (90, 100):
        return "DeepGEMM is for sm_90 and sm_100"
    if problem.n % 8 or problem.k % 8:
        return "DeepGEMM takes rows of a multiple of 16 bytes"
    return None


@kernel(Matmul, backend="torch", fits=fits, library=True, requires=DEEP_GEMM)
def deep_gemm_bf16(problem: Matmul, config: Config, chip: Chip) -> Launch:
    """DeepGEMM's bf16_gemm_nt, compiled at the first call, into our output."""
    import deep_gemm

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        deep_gemm.bf16_gemm_nt(aligned(inputs["x"]), aligned(inputs["w"]), outputs["out"])

    return launch
