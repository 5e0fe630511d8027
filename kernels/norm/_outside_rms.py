"""RMS norms of other people's packages: what FlashInfer, sgl-kernel and vLLM have in common.

Their fused addition works in place, on the two rows that come in; here inputs stay what they are, so that both are copied first, in the
timed launch: the copies read and write as much again as the norm does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors
from klab.kernels.norm.problem import Norm

Plain = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], object]
"""(out, x, weight, eps)"""
InPlace = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], object]
"""(x, residual, weight, eps): x becomes the normed sum, residual the sum."""


def fits(problem: Norm, config: Config, chip: Chip) -> str | None:
    """RMS norms of whole 16-byte vectors in 16 bits, with or without an addition."""
    if problem.kind != "rms" or problem.gated or problem.quantize:
        return "is an RMS norm without gate or quantisation"
    if problem.dtype == "float32":
        return "takes 16-bit types"
    if problem.width % 8:
        return "takes rows of a multiple of 16 bytes"
    return None


def launch_of(problem: Norm, plain: Plain, in_place: InPlace) -> Launch:
    """The launch of one package."""

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        plain(outputs["out"], inputs["x"], inputs["weight"], problem.eps)

    def launch_sum(inputs: Tensors, outputs: Tensors) -> None:
        out, residual = outputs["out"], outputs["residual"]
        out.copy_(inputs["x"])
        residual.copy_(inputs["residual"])
        in_place(out, residual, inputs["weight"], problem.eps)

    return launch_sum if problem.residual else launch
