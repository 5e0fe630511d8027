"""The activation between the two matrices of a feed-forward block, mostly gated: act(gate) * up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels import row_quantize
from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch

KINDS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_clamped", "sigmoid")
# gpt-oss: sigmoid(1.702 x) approximates the normal distribution function, and both halves are clamped at 7.
SWIGLU_SLOPE = 1.702
SWIGLU_LIMIT = 7.0


@dataclass(frozen=True)
class Activation(Problem):
    """out = act(x), or gated: act(gate) * up with gate = x[:, :width], up = x[:, width:]; in float32, rounded once.

    silu: x sigmoid(x). gelu: x Phi(x). gelu_tanh: its approximation by tanh. relu2: max(x, 0)^2. sigmoid.
    swiglu_clamped (gpt-oss, only gated): g = min(gate, 7), out = g sigmoid(1.702 g) (clamp(up, -7, 7) + 1).
    quantize: "", "fp8_row" or "fp8_group" (see klab.kernels.row_quantize).

    inputs: x [rows, 2 * width if gated else width], `dtype`.
    outputs: out [rows, width], `dtype` or float8_e4m3fn; scale [rows, 1 or ceil(width / 128)] float32 when quantised.
    """

    operator: ClassVar[str] = "activation"

    rows: int
    width: int
    kind: str = "silu"
    gated: bool = True
    quantize: str = ""
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.rows, self.width) < 1:
            raise UsageError(f"activation needs at least one row and column: {self.to_json()}")
        if self.kind not in KINDS:
            raise UsageError(f"activation is one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.kind == "swiglu_clamped" and not self.gated:
            raise UsageError("swiglu_clamped is gated")
        row_quantize.check_format(self.operator, self.quantize)

    @property
    def width_in(self) -> int:
        """Columns of x."""
        return self.width * (2 if self.gated else 1)

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        # Three times the normal: what the clamp at 7 cuts off, and tails where the approximations of gelu differ, are met.
        x = random_normal((self.rows, self.width_in), self.dtype, seed=seed, device=device, row_padding=row_padding, scale=3.0)
        if device != "meta" and self.quantize:
            # The largest value of a row is the first, the last, or one between, so that no maximum may leave one out.
            row = torch.arange(self.rows, device=x.device)
            column = torch.where(row % 3 == 0, self.width - 1, torch.where(row % 3 == 1, 0, (row * 7919 + 3) % self.width))
            for half in range(self.width_in // self.width):
                x[row, column + half * self.width] = 12.0
        return {"x": x}

    def outputs(self, *, device: str = "cpu") -> Tensors:
        return row_quantize.outputs(self.rows, self.width, self.quantize, self.dtype, device)

    def reference(self, inputs: Tensors) -> Tensors:
        x = inputs["x"].double()
        gate, up = (x[:, : self.width], x[:, self.width :]) if self.gated else (x, None)
        return row_quantize.reference(self._apply(gate, up).float(), self.quantize)

    def _apply(self, x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        import torch

        if self.kind == "swiglu_clamped":
            assert up is not None
            x = x.clamp(max=SWIGLU_LIMIT)
            return x * torch.sigmoid(SWIGLU_SLOPE * x) * (up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1.0)
        if self.kind == "relu2":
            acted = x.clamp_min(0.0).square()
        elif self.kind == "sigmoid":
            acted = torch.sigmoid(x)
        elif self.kind == "silu":
            acted = torch.nn.functional.silu(x)
        else:
            acted = torch.nn.functional.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        return acted if up is None else acted * up

    def flops(self) -> float:
        per_element = {"relu2": 2, "sigmoid": 3, "silu": 4, "gelu": 10, "gelu_tanh": 10, "swiglu_clamped": 8}[self.kind]
        return float(per_element + self.gated + 3 * bool(self.quantize)) * self.rows * self.width

    def bytes_moved(self) -> float:
        read = SIZE_BYTES[self.dtype] * self.rows * self.width_in
        return float(read + row_quantize.output_bytes(self.rows, self.width, self.quantize, self.dtype))

    def tolerance(self) -> float:
        # One rounding of the output, 0.3 u on average and 1 u for few elements; a library rounds before it multiplies too, which only few
        # elements show. In float32 the functions' own error: 2 ulp of the hardware's exponential, and sigmoid in the tail keeps only its
        # relative one.
        return max(UNIT_ROUNDOFF[self.dtype] * (2.0 if self.rows * self.width < 16 else 1.0), 5e-6)

    def tolerance_of(self, output: str) -> float:
        if output == "scale":
            return row_quantize.scale_tolerance(self.dtype)
        return row_quantize.fp8_tolerance(self.rows * self.width, self.dtype) if self.quantize else self.tolerance()

    def label(self) -> str:
        parts = [self.kind, "and mul" if self.gated else "", f"{self.rows}x{self.width}", self.quantize]
        return " ".join([*filter(None, parts), SHORT[self.dtype]])

    @classmethod
    def examples(cls) -> list[Problem]:
        made: list[Problem] = []
        for dtype in ("float16", "float32"):
            made += [
                cls(3, 1032, dtype=dtype),
                cls(5, 200, "gelu_tanh", dtype=dtype),
                cls(2, 1184, quantize="fp8_group", dtype=dtype),
            ]
        return [
            *made,
            cls(1, 1, dtype="float16"),
            # In float32, because 16 bits cannot tell gelu from its approximation by tanh, nor a slope of 1.7 from 1.702.
            cls(2, 72, "gelu", False, dtype="float32"),
            cls(3, 33, "relu2", False, dtype="float16"),
            cls(4, 88, "swiglu_clamped", dtype="float32"),
            cls(3, 136, "sigmoid", dtype="float16"),
            cls(3, 640, quantize="fp8_row", dtype="float16"),
            cls(70, 16, dtype="float16"),
            cls(3, 1032),
            cls(3, 640, quantize="fp8_row"),
        ]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [  # Llama 3.1 8B in prefill and decode; DeepSeek V3's dense layers before an fp8 matmul
            cls(8192, 14336),
            cls(64, 14336),
            cls(4096, 18432, quantize="fp8_group"),
        ]
