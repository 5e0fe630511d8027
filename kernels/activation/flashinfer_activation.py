"""FlashInfer's gated activations. Written for flashinfer-python 0.7.2 (flashinfer.activation)."""

from __future__ import annotations

from klab.kernels.activation._outside_gated import NAMES, fits, launch_of
from klab.kernels.activation.problem import Activation
from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.outside import FLASHINFER


@kernel(Activation, backend="torch", fits=fits, library=True, requires=FLASHINFER)
def flashinfer_activation(problem: Activation, config: Config, chip: Chip) -> Launch:
    """FlashInfer's silu_and_mul, gelu_and_mul and gelu_tanh_and_mul; padded rows are copied first."""
    from flashinfer import activation

    apply = getattr(activation, NAMES[problem.kind])
    return launch_of(lambda out, x: apply(x, out=out))
