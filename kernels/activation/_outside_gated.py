"""Gated activations of other people's packages: what FlashInfer, sgl-kernel and vLLM have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch

from klab.kernels.activation.problem import Activation
from klab.kernels.contract import Chip, Config, Launch, Tensors

Gated = Callable[[torch.Tensor, torch.Tensor], object]
"""(out, x)"""
NAMES = {"silu": "silu_and_mul", "gelu": "gelu_and_mul", "gelu_tanh": "gelu_tanh_and_mul"}


def fits(problem: Activation, config: Config, chip: Chip) -> str | None:
    """silu and gelu of dense 16-bit rows."""
    if problem.kind not in NAMES or not problem.gated or problem.quantize:
        return "is silu, gelu or gelu_tanh of one half times the other, without quantisation"
    if problem.dtype == "float32":
        return "takes 16-bit types"
    if problem.width % 8:
        return "takes rows of a multiple of 16 bytes"
    return None


def launch_of(apply: Gated) -> Launch:
    """The launch of one package. They take rows that lie one behind another: others are copied first."""

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        apply(outputs["out"], inputs["x"].contiguous())

    return launch
