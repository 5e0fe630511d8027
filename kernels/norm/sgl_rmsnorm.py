"""SGLang's RMS norms. Written for the sgl-kernel of SGLang's repository in 2026 (sgl_kernel.elementwise)."""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.norm._outside_rms import fits, launch_of
from klab.kernels.norm.problem import Norm
from klab.kernels.outside import SGL_KERNEL


@kernel(Norm, backend="torch", fits=fits, library=True, requires=SGL_KERNEL)
def sgl_rmsnorm(problem: Norm, config: Config, chip: Chip) -> Launch:
    """sgl-kernel's rmsnorm; fused_add_rmsnorm works in place, so that x and residual are copied first, which is timed."""
    from sgl_kernel import fused_add_rmsnorm, rmsnorm

    return launch_of(problem, lambda out, x, weight, eps: rmsnorm(x, weight, eps=eps, out=out), fused_add_rmsnorm)
