"""Dequantise, then multiply with torch.mm: what a chip without narrow tensor cores is left with."""

from __future__ import annotations

import torch

from klab.kernels import quantize
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import torch_dtype
from klab.kernels.scaled_matmul.problem import BLOCKS, MICRO, PACKED, ScaledMatmul
from klab.kernels.triton_support import cdiv


@kernel(ScaledMatmul, backend="torch", kinds=("cuda", "cpu"))
def torch_dequantized(problem: ScaledMatmul, config: Config, chip: Chip) -> Launch:
    """Emulated: dequantises x and w to float32 in memory at each launch, then torch.mm; no narrow arithmetic at all."""
    torch.set_float32_matmul_precision("highest")
    dtype = torch_dtype(problem.dtype)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w = problem.values(inputs, "x"), problem.values(inputs, "w")
        if dtype == torch.float32:
            torch.mm(x, w.t(), out=outputs["out"])
        else:
            outputs["out"].copy_(torch.mm(x, w.t()))

    return launch


def fits_bf16(problem: ScaledMatmul, config: Config, chip: Chip) -> str | None:
    """bfloat16 outputs: torch.mm rounds its sums to the type of its operands."""
    return None if problem.dtype == "bfloat16" else "torch.mm makes bfloat16 of bfloat16: any other output would be rounded twice"


@kernel(ScaledMatmul, backend="torch", fits=fits_bf16, kinds=("cuda", "cpu"), library=True)
def torch_dequantized_bf16(problem: ScaledMatmul, config: Config, chip: Chip) -> Launch:
    """Emulated: dequantises x and w to bfloat16 in memory at each launch (mx exactly, the others rounded to 8 bits), then torch.mm."""
    kept: dict[torch.device, dict[str, torch.Tensor]] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        out = outputs["out"]
        if out.device not in kept:
            sizes = {name: _whole_blocks(problem, rows, name) for name, rows in (("x", problem.m), ("w", problem.n))}
            kept[out.device] = {name: torch.zeros(size, dtype=torch.bfloat16, device=out.device) for name, size in sizes.items()}
        wide = {name: _widen(problem, inputs, name, kept[out.device][name]) for name in ("x", "w")}
        torch.mm(wide["x"], wide["w"].t(), out=out)

    return launch


def _block(problem: ScaledMatmul, name: str) -> tuple[int, int]:
    """Rows and columns of x or w that share a scale; 0: all."""
    return (1, MICRO[problem.format]) if problem.format in MICRO else BLOCKS[problem.format][name == "w"]


def _whole_blocks(problem: ScaledMatmul, rows: int, name: str) -> tuple[int, int]:
    """Rows and columns of x or w, rounded up to whole blocks of scales."""
    high, wide = _block(problem, name)
    return cdiv(rows, high or rows) * (high or rows), cdiv(problem.k, wide or problem.k) * (wide or problem.k)


def _widen(problem: ScaledMatmul, inputs: Tensors, name: str, whole: torch.Tensor) -> torch.Tensor:
    """x or w in bfloat16, in `whole`: whole blocks, zero beyond the matrix. Elements fit exactly, and are multiplied in float32."""
    narrow = quantize.fp4_values(quantize.unpack4(inputs[name])) if problem.format in PACKED else inputs[name]
    scale = inputs[f"{name}_scale"]
    scale = quantize.mx_scales(scale) if scale.dtype == torch.uint8 else scale.float()
    if problem.format == "nvfp4":
        scale = scale * inputs[f"{name}_global"]
    inside = whole[: narrow.shape[0], : problem.k]
    inside.copy_(narrow)
    high, wide = _block(problem, name)
    blocks = whole.view(-1, high or whole.shape[0], scale.shape[1], wide or whole.shape[1])
    blocks.mul_(scale[:, None, :, None])
    return inside
