"""PyTorch's own scaled products: cuBLASLt, CUTLASS and MSLK on a GPU, oneDNN on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import torch_dtype
from klab.kernels.scaled_matmul import _packed_scales
from klab.kernels.scaled_matmul.problem import BLOCK, MICRO, PACKED, ScaledMatmul
from klab.kernels.triton_support import cdiv

# Values of torch.nn.functional.ScalingType and SwizzleType (torch 2.10 and later), which torch._scaled_mm_v2 takes as integers.
TENSOR_WISE, BLOCKS_OF_16, BLOCKS_OF_32 = 0, 2, 3
PLAIN, SWIZZLED = 0, 1


def fits(problem: ScaledMatmul, config: Config, chip: Chip) -> str | None:
    """What cuBLASLt asks of formats, chips and sizes (aten/src/ATen/native/cuda/ScaledBlas.cpp of torch 2.11 and 2.13)."""
    p = problem
    if p.format == "int8_row":
        return "torch._scaled_mm multiplies fp8 and fp4: see torch_int_mm"
    if chip.kind == "cpu":
        return None if p.format in ("fp8_tensor", "fp8_row") else f"torch has no {p.format} on a CPU"
    if chip.target < 89:
        return "needs compute capability 8.9"
    if p.k % (32 if p.format in PACKED else 16) or p.n % 16:
        return "needs k and n in multiples of 16 bytes"
    if p.format == "fp8_block":
        if chip.target != 90:
            return "torch has 1x128 by 128x128 scales on sm_90 alone"
        if p.k % (4 * BLOCK):
            return "cuBLASLt needs whole rows of w's scales in multiples of 16 bytes: k in 512s"
    if p.format in MICRO:
        if chip.target < 100:
            return f"{p.format} needs Blackwell's tensor cores"
        if not hasattr(torch, "_scaled_mm_v2"):
            return "needs torch 2.10 or later"
        if p.format == "mxfp4" and p.dtype != "bfloat16":
            return "torch multiplies mxfp4 into bfloat16 alone"
    return None


def fits_fast(problem: ScaledMatmul, config: Config, chip: Chip) -> str | None:
    """Where fast accumulation is another computation: Hopper, without block scales."""
    if chip.kind != "cuda" or chip.target != 90 or problem.format not in ("fp8_tensor", "fp8_row"):
        return "fast accumulation is Hopper's, for fp8 without block scales"
    return fits(problem, config, chip)


def _build(problem: ScaledMatmul, fast_accum: bool) -> Launch:
    dtype = torch_dtype(problem.dtype)

    def multiply(inputs: Tensors, x_scale: torch.Tensor, w_scale: torch.Tensor, out: torch.Tensor) -> None:
        x, w = inputs["x"], inputs["w"].t()
        torch._scaled_mm(x, w, x_scale, w_scale, out_dtype=dtype, use_fast_accum=fast_accum, out=out)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        multiply(inputs, inputs["x_scale"], inputs["w_scale"].t(), outputs["out"])

    if problem.format == "fp8_block":
        # cuBLASLt reads the scales of x column by column, in whole chunks of 16 bytes: rows in 4s.
        m, rows = problem.m, cdiv(problem.m, 4) * 4
        columns = _Kept(lambda like: torch.zeros((cdiv(problem.k, BLOCK), rows), dtype=torch.float32, device=like.device))
        padded = _Kept(lambda like: torch.zeros((rows, problem.k), dtype=torch.float8_e4m3fn, device=like.device))
        results = _Kept(lambda like: torch.empty((rows, problem.n), dtype=dtype, device=like.device))

        def launch_block(inputs: Tensors, outputs: Tensors) -> None:
            x_scale, out = columns.on(inputs["x_scale"]).t(), outputs["out"]
            x_scale[:m].copy_(inputs["x_scale"])
            if rows == m:
                multiply(inputs, x_scale, inputs["w_scale"].t(), out)
                return
            x, whole = padded.on(out), results.on(out)
            x[:m].copy_(inputs["x"])
            multiply(inputs | {"x": x}, x_scale, inputs["w_scale"].t(), whole)
            out.copy_(whole[:m])

        return launch_block
    return _micro(problem) if problem.format in MICRO else launch


def _micro(problem: ScaledMatmul) -> Launch:
    """Blocks of 16 or 32: the scales are packed at each launch, as nothing here may be kept from one to the next."""
    packed_type = torch.float4_e2m1fn_x2 if problem.format in PACKED else torch.float8_e4m3fn
    scale_type = torch.float8_e4m3fn if problem.format == "nvfp4" else torch.float8_e8m0fnu
    nvidia = problem.format == "nvfp4"
    recipes = [BLOCKS_OF_16, TENSOR_WISE] if nvidia else [BLOCKS_OF_32]
    swizzles = [SWIZZLED, PLAIN] if nvidia else [SWIZZLED]
    buffers = {name: _Kept(_scale_buffers) for name in ("x", "w")}

    def scales(inputs: Tensors, name: str) -> list[torch.Tensor]:
        scale = inputs[f"{name}_scale"].view(torch.uint8)
        padded, packed = buffers[name].on(scale)
        _packed_scales.pack(scale, padded, packed)
        return [packed.view(scale_type), *([inputs[f"{name}_global"]] if nvidia else [])]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w = inputs["x"].view(packed_type), inputs["w"].view(packed_type).t()
        torch._scaled_mm_v2(
            x, w, scales(inputs, "x"), recipes, swizzles, scales(inputs, "w"), recipes, swizzles, None, torch_dtype(problem.dtype),
            out=outputs["out"],
        )  # fmt: skip

    return launch


def _scale_buffers(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high, wide = _packed_scales.tiles_of(scale)
    padded = torch.zeros((high * _packed_scales.ROWS, wide * _packed_scales.COLUMNS), dtype=torch.uint8, device=scale.device)
    return padded, torch.empty(padded.numel(), dtype=torch.uint8, device=scale.device)


class _Kept:
    """What is made at the first call on a device, and kept."""

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        self._make, self._made = make, dict[torch.device, Any]()

    def on(self, like: torch.Tensor) -> Any:
        if like.device not in self._made:
            self._made[like.device] = self._make(like)
        return self._made[like.device]


@kernel(ScaledMatmul, backend="torch", fits=fits, kinds=("cuda", "cpu"), library=True)
def torch_scaled_mm(problem: ScaledMatmul, config: Config, chip: Chip) -> Launch:
    """torch._scaled_mm: cuBLASLt with promoted sums; copies block scales into its layout at each launch, and pads x to fours of rows."""
    return _build(problem, fast_accum=False)


@kernel(ScaledMatmul, backend="torch", fits=fits_fast, library=True)
def torch_scaled_mm_fast(problem: ScaledMatmul, config: Config, chip: Chip) -> Launch:
    """torch._scaled_mm with use_fast_accum: Hopper's tensor cores keep the sums, in about 14 bits."""
    return _build(problem, fast_accum=True)
