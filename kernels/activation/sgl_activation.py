"""SGLang's gated activations. Written for the sgl-kernel of SGLang's repository in 2026 (sgl_kernel.elementwise)."""

from __future__ import annotations

from klab.kernels.activation._outside_gated import NAMES, fits, launch_of
from klab.kernels.activation.problem import Activation
from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.outside import SGL_KERNEL


@kernel(Activation, backend="torch", fits=fits, library=True, requires=SGL_KERNEL)
def sgl_activation(problem: Activation, config: Config, chip: Chip) -> Launch:
    """sgl-kernel's silu_and_mul, gelu_and_mul and gelu_tanh_and_mul; padded rows are copied first."""
    import sgl_kernel

    apply = getattr(sgl_kernel, NAMES[problem.kind])
    return launch_of(lambda out, x: apply(x, out=out))
