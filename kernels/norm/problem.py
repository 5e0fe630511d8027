"""Normalisation of rows: RMS and layer norm, with what engines fuse around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from klab.kernels import row_quantize
from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError

KINDS = ("rms", "layer")
# Sizes of rows vary by this much from the smallest to the largest, so that one row's statistics do not pass for another's.
ROW_GAINS = 4.0


@dataclass(frozen=True)
class Norm(Problem):
    """Per row and in float32: x * weight / sqrt(mean(x^2) + eps), or of kind "layer" (x - mean) * weight / sqrt(variance + eps) + bias.

    residual: x + residual, rounded to `dtype`, is what is normalised and is an output too. gated: the normed row is multiplied by
    silu(gate) (Qwen3-Next). quantize: "", "fp8_row" or "fp8_group" (see row_quantize). A norm of heads has tokens * heads rows.

    inputs: x [rows, width], weight [width]; bias [width] for kind "layer"; residual, gate [rows, width] if asked for; all `dtype`.
    outputs: out [rows, width], `dtype` or float8_e4m3fn; when quantised scale [rows, 1 or ceil(width / 128)] float32;
             residual [rows, width], `dtype`.
    """

    operator: ClassVar[str] = "norm"

    rows: int
    width: int
    kind: str = "rms"
    residual: bool = False
    quantize: str = ""
    gated: bool = False
    dtype: str = "bfloat16"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.rows, self.width) < 1 or self.eps < 0:
            raise UsageError(f"norm needs at least one row and column and eps of 0 or more: {self.to_json()}")
        if self.kind not in KINDS:
            raise UsageError(f"norm is of kind rms or layer, not {self.kind!r}")
        row_quantize.check_format(self.operator, self.quantize)

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        def draw(i: int, *shape: int) -> torch.Tensor:
            return random_normal(shape, self.dtype, seed=seed + i, device=device, row_padding=row_padding)

        found = {"x": draw(0, self.rows, self.width), "weight": draw(1, self.width)}
        if self.kind == "layer":
            found["bias"] = draw(2, self.width)
        if self.residual:
            found["residual"] = draw(3, self.rows, self.width)
        if self.gated:
            found["gate"] = draw(4, self.rows, self.width)
        if device != "meta" and self.width > 1:  # a single column stays as it was drawn, so that it differs with the seed
            self._mark(found["x"])
        return found

    def _mark(self, x: torch.Tensor) -> None:  # type: ignore[name-defined]  # noqa: F821
        """Rows of different size and mean, each with one loud column: the first, the last, or one between.

        One lost column of 4096 changes a row's norm by 1e-4, which bf16 would hide; a loud one has a fifth of the row's sum of squares.
        """
        import torch

        row = torch.arange(self.rows, device=x.device)
        gain = ROW_GAINS ** ((row * 5 % 7).float() / 6 - 0.5)
        x.mul_(gain[:, None].to(x.dtype)).add_((0.5 * gain)[:, None].to(x.dtype))
        between = (row * 7919 + 3) % self.width
        column = torch.where(row % 3 == 0, torch.full_like(row, self.width - 1), torch.where(row % 3 == 1, torch.zeros_like(row), between))
        x[row, column] = (gain * max(2.0, self.width**0.5 / 2)).to(x.dtype)

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        found = row_quantize.outputs(self.rows, self.width, self.quantize, self.dtype, device)
        if self.residual:
            found["residual"] = torch.empty((self.rows, self.width), dtype=torch_dtype(self.dtype), device=device)
        return found

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        h = inputs["x"].double()
        if self.residual:
            h = (h + inputs["residual"].double()).to(torch_dtype(self.dtype)).double()
        centred = h - h.mean(dim=-1, keepdim=True) if self.kind == "layer" else h
        normed = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + self.eps) * inputs["weight"].double()
        if self.kind == "layer":
            normed = normed + inputs["bias"].double()
        if self.gated:
            normed = normed * torch.nn.functional.silu(inputs["gate"].double())
        found = row_quantize.reference(normed.float(), self.quantize)
        return {**found, "residual": h.float()} if self.residual else found

    def flops(self) -> float:
        per_element = 4 + 2 * (self.kind == "layer") + self.residual + 5 * self.gated + 3 * bool(self.quantize)
        return float(per_element) * self.rows * self.width

    def bytes_moved(self) -> float:
        size = SIZE_BYTES[self.dtype]
        vectors = 2 if self.kind == "layer" else 1
        wholes = 1 + 2 * self.residual + self.gated
        read = size * self.width * (self.rows * wholes + vectors)
        return float(read + row_quantize.output_bytes(self.rows, self.width, self.quantize, self.dtype))

    def tolerance(self) -> float:
        # Everything is float32 until the output is rounded once (0.3 u on average, 1 u at most for few elements); in float32 the
        # order of a sum of 16384 squares costs 1e-6, and a large mean taken off a row three times that.
        return max(UNIT_ROUNDOFF[self.dtype], 1e-5)

    def tolerance_of(self, output: str) -> float:
        if output == "residual":  # one addition, rounded: nothing is left to choose but ties that float32 hides
            return max(UNIT_ROUNDOFF[self.dtype] / 8, 1e-7)
        if output == "scale":
            return row_quantize.scale_tolerance(self.dtype)
        return row_quantize.fp8_tolerance(self.rows * self.width, self.dtype) if self.quantize else self.tolerance()

    def label(self) -> str:
        parts = [self.kind, "norm", f"{self.rows}x{self.width}", "+residual" * self.residual, "gated" * self.gated, self.quantize]
        return " ".join([*filter(None, parts), SHORT[self.dtype]])

    @classmethod
    def examples(cls) -> list[Problem]:
        made: list[Problem] = []
        for dtype in ("float16", "float32"):
            made += [
                cls(37, 128, dtype=dtype),
                cls(3, 200, "layer", dtype=dtype),
                cls(5, 1032, residual=True, dtype=dtype),
                cls(2, 1184, quantize="fp8_group", residual=True, dtype=dtype),
            ]
        return [
            *made,
            cls(1, 1, dtype="float16"),
            cls(2, 33, dtype="float16", eps=0.5),  # a row's own size hides the usual 1e-6
            cls(7, 96, gated=True, dtype="float16"),
            cls(2, 1400, "layer", residual=True, gated=True, dtype="float16"),
            cls(3, 640, quantize="fp8_row", residual=True, dtype="float16"),
            cls(2, 16421, "layer", residual=True, quantize="fp8_row", dtype="float16"),
            cls(1, 9000, quantize="fp8_group", gated=True, dtype="float16"),
            cls(5, 1032, residual=True),
            cls(4, 256, quantize="fp8_group", gated=True),
        ]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [  # Llama 3.1 8B in prefill and decode, its queries' heads normed one by one (Qwen 3), DeepSeek V3 before an fp8 matmul
            cls(8192, 4096, residual=True),
            cls(64, 4096, residual=True),
            cls(8192 * 32, 128),
            cls(4096, 7168, residual=True, quantize="fp8_group"),
        ]
