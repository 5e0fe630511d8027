"""Scales of 1x128 blocks as CUTLASS kernels read them: the scales of one column of blocks lie one behind another."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config
from klab.kernels.outside import PerDevice
from klab.kernels.scaled_matmul.problem import BLOCK, ScaledMatmul
from klab.kernels.triton_support import cdiv

FORMATS = ("fp8_tensor", "fp8_row", "fp8_block", "int8_row")


def fits(problem: ScaledMatmul, config: Config, chip: Chip) -> str | None:
    """What the CUTLASS kernels of vLLM and SGLang take alike."""
    p = problem
    if p.format not in FORMATS:
        return f"is for {', '.join(FORMATS)}"
    if p.dtype == "float32":
        return "writes 16-bit outputs"
    if chip.target not in (90, 100):
        return "is for sm_90 and sm_100"
    if p.format == "int8_row" and chip.target != 90:
        return "int8 tensor cores are Hopper's"
    if p.k % 16 or p.n % 16:
        return "takes k and n in multiples of 16"
    if p.format == "fp8_block":
        if p.k % BLOCK or p.n % BLOCK:
            return f"takes whole blocks of {BLOCK}"
        if p.m % 4:
            return "takes block scales for rows in multiples of 4"
    return None


class ColumnScales:
    """x_scale [m, k / 128] in a buffer of which it is the transpose; one copy at each launch."""

    def __init__(self, problem: ScaledMatmul) -> None:
        shape = (cdiv(problem.k, BLOCK), problem.m)
        self._buffers = PerDevice(lambda device: torch.empty(shape, dtype=torch.float32, device=device))

    def of(self, x_scale: torch.Tensor) -> torch.Tensor:
        """The same numbers, columns dense."""
        return self._buffers.on(x_scale.device).t().copy_(x_scale)
