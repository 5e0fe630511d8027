"""FlashInfer's RMS norms. Written for flashinfer-python 0.7.2 (flashinfer.norm)."""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.norm._outside_rms import fits, launch_of
from klab.kernels.norm.problem import Norm
from klab.kernels.outside import FLASHINFER


@kernel(Norm, backend="torch", fits=fits, library=True, requires=FLASHINFER)
def flashinfer_rmsnorm(problem: Norm, config: Config, chip: Chip) -> Launch:
    """FlashInfer's rmsnorm; fused_add_rmsnorm works in place, so that x and residual are copied first, which is timed."""
    from flashinfer.norm import fused_add_rmsnorm, rmsnorm

    return launch_of(problem, lambda out, x, weight, eps: rmsnorm(x, weight, eps=eps, out=out), fused_add_rmsnorm)
