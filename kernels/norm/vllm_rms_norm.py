"""vLLM's RMS norms. Written for vllm 0.19 (vllm._custom_ops)."""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.norm._outside_rms import fits, launch_of
from klab.kernels.norm.problem import Norm
from klab.kernels.outside import VLLM


@kernel(Norm, backend="torch", fits=fits, library=True, requires=VLLM)
def vllm_rms_norm(problem: Norm, config: Config, chip: Chip) -> Launch:
    """vLLM's rms_norm; fused_add_rms_norm works in place, so that x and residual are copied first, which is timed."""
    from vllm import _custom_ops as ops

    return launch_of(problem, ops.rms_norm, ops.fused_add_rms_norm)
