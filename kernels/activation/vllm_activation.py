"""vLLM's gated activations. Written for vllm 0.19 (operators of torch.ops._C, which `vllm._custom_ops` registers)."""

from __future__ import annotations

import torch

from klab.kernels.activation._outside_gated import NAMES, fits, launch_of
from klab.kernels.activation.problem import Activation
from klab.kernels.contract import Chip, Config, Launch, kernel
from klab.kernels.outside import VLLM


@kernel(Activation, backend="torch", fits=fits, library=True, requires=VLLM)
def vllm_activation(problem: Activation, config: Config, chip: Chip) -> Launch:
    """vLLM's silu_and_mul, gelu_and_mul and gelu_tanh_and_mul; padded rows are copied first."""
    import vllm._custom_ops  # noqa: F401  registers torch.ops._C

    return launch_of(getattr(torch.ops._C, NAMES[problem.kind]))
