"""quack's RMS and layer norms, in CuTe DSL. For quack-kernels 0.6.5 (quack.rmsnorm._rmsnorm_fwd, which writes into given outputs)."""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.norm.problem import Norm
from klab.kernels.outside import QUACK


def fits(problem: Norm, config: Config, chip: Chip) -> str | None:
    """No gate, no quantisation; whole 16-byte vectors."""
    if problem.gated or problem.quantize:
        return "quack's norms neither gate nor quantise"
    if problem.width % 8:
        return "takes rows of a multiple of 8 elements"
    return None


@kernel(Norm, backend="torch", fits=fits, library=True, requires=QUACK)
def quack_rmsnorm(problem: Norm, config: Config, chip: Chip) -> Launch:
    """quack's rmsnorm and layernorm with the addition fused, into our outputs; compiled by CuTe DSL at the first call."""
    from quack.rmsnorm import _rmsnorm_fwd

    layer = problem.kind == "layer"

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        _rmsnorm_fwd(
            inputs["x"],
            inputs["weight"],
            outputs["out"],
            bias=inputs.get("bias"),
            residual=inputs.get("residual"),
            residual_out=outputs.get("residual"),
            eps=problem.eps,
            is_layernorm=layer,
        )

    return launch
