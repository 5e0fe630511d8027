"""Matrix multiplication of quantised activations by quantised weights, scaled back in the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels import quantize
from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

if TYPE_CHECKING:
    import torch

BLOCK = 128
# (rows, columns) that share one float32 scale, of x and of w; 0 is the whole dimension.
BLOCKS = {
    "fp8_tensor": ((0, 0), (0, 0)),
    "fp8_row": ((1, 0), (1, 0)),
    "fp8_block": ((1, BLOCK), (BLOCK, BLOCK)),
    "int8_row": ((1, 0), (1, 0)),
}
MICRO = {"mxfp8": quantize.MX_BLOCK, "mxfp4": quantize.MX_BLOCK, "nvfp4": quantize.NVFP4_BLOCK}
PACKED = ("mxfp4", "nvfp4")
FORMATS = (*BLOCKS, *MICRO)
MAX_INT8_K = 2**31 // 127**2
# The logarithm (base 2) of a weight row's size varies by this much, as that of trained output channels does: blocks then have scales
# that differ, and a kernel that takes its neighbour's is found out.
CHANNEL_SPREAD = 0.5


@dataclass(frozen=True)
class ScaledMatmul(Problem):
    """out[m, n] = dequantised x [m, k] @ dequantised w [n, k]^T, summed in float32, rounded once to `dtype`.

    format          x, w                      scales (value = element * scale)
    fp8_tensor      e4m3fn                    float32 x_scale, w_scale [1, 1]
    fp8_row         e4m3fn                    float32 x_scale [m, 1], w_scale [n, 1]
    fp8_block       e4m3fn                    float32 x_scale [m, k / 128], w_scale [n / 128, k / 128], rounded up
    int8_row        int8                      as fp8_row
    mxfp8           e4m3fn                    uint8 x_scale [m, k / 32], w_scale [n, k / 32], each 2^(e - 127); k a multiple of 32
    mxfp4           uint8 [., k / 2] packed   as mxfp8
    nvfp4           uint8 [., k / 2] packed   e4m3fn x_scale [m, k / 16], w_scale [n, k / 16], and float32 x_global, w_global [1]

    outputs: out [m, n], `dtype`. Scales are dense; `row_padding` is in elements of `dtype` also for the narrower x and w, so that it keeps
    or breaks alignment as it does for the unquantised operands.
    """

    operator: ClassVar[str] = "scaled_matmul"

    m: int
    n: int
    k: int
    dtype: str = "bfloat16"
    format: str = "fp8_block"

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.k) < 1:
            raise UsageError(f"scaled_matmul needs m, n, k of at least 1, not {self.m}, {self.n}, {self.k}")
        if self.format not in FORMATS:
            raise UsageError(f"scaled_matmul's format is one of {', '.join(FORMATS)}, not {self.format!r}")
        block = MICRO.get(self.format, 1)
        if self.k % block:
            raise UsageError(f"{self.format} needs k in multiples of {block}, not {self.k}")
        if self.format == "int8_row" and self.k > MAX_INT8_K:
            raise UsageError(f"int8_row needs k of at most {MAX_INT8_K}, so that no sum of products passes 2^31")

    @property
    def math_dtype(self) -> str:
        return "int8" if self.format == "int8_row" else "float4_e2m1" if self.format in PACKED else "float8_e4m3fn"

    def wide(self) -> Problem:
        return Matmul(self.m, self.n, self.k, self.dtype)

    def wide_inputs(self, *, seed: int, device: str = "cpu") -> Tensors:
        w = random_normal((self.n, self.k), "float32", seed=seed + 1, device=device, scale=self.k**-0.5)
        if device != "meta":
            w *= random_normal((self.n, 1), "float32", seed=seed + 2, device=device, scale=CHANNEL_SPREAD).exp2()
        x = quantize.activations((self.m, self.k), self.dtype, seed=seed, device=device)
        return {"x": x, "w": w.to(torch_dtype(self.dtype))}

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        """Those of `wide_inputs`, quantised."""
        inputs: Tensors = {}
        for index, (name, tensor) in enumerate(self.wide_inputs(seed=seed, device=device).items()):
            narrow, scales = self._quantised(tensor, index)
            inputs[name] = _apart(narrow, row_padding * SIZE_BYTES[self.dtype])
            inputs |= {f"{name}_{kind}": scale for kind, scale in scales.items()}
        return inputs

    def _quantised(self, tensor: torch.Tensor, index: int) -> tuple[torch.Tensor, Tensors]:
        """x (index 0) or w (1) in this format, with its scales."""
        if self.format == "nvfp4":
            narrow, scale, whole = quantize.quantize_nvfp4(tensor)
            return narrow, {"scale": scale, "global": whole}
        if self.format in MICRO:
            narrow, scale = quantize.quantize_mx(tensor, "e4m3" if self.format == "mxfp8" else "e2m1")
        elif self.format == "int8_row":
            narrow, scale = quantize.quantize_int8(tensor, BLOCKS[self.format][index])
        else:
            narrow, scale = quantize.quantize_fp8(tensor, BLOCKS[self.format][index])
        return narrow, {"scale": scale}

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"out": torch.empty((self.m, self.n), dtype=torch_dtype(self.dtype), device=device)}

    def values(self, inputs: Tensors, name: str) -> torch.Tensor:
        """What the quantised x or w stands for, exactly, in float32 [rows, k]."""
        narrow, scale = inputs[name], inputs[f"{name}_scale"]
        if self.format in BLOCKS:
            return quantize.dequantize(narrow, scale, BLOCKS[self.format][0 if name == "x" else 1])
        elements = quantize.fp4_values(quantize.unpack4(narrow)) if self.format in PACKED else narrow.float()
        spread = (scale.float() if self.format == "nvfp4" else quantize.mx_scales(scale)).repeat_interleave(MICRO[self.format], dim=-1)
        return elements * spread * (inputs[f"{name}_global"] if self.format == "nvfp4" else 1.0)

    def reference(self, inputs: Tensors) -> Tensors:
        return {"out": self.values(inputs, "x").double() @ self.values(inputs, "w").double().T}

    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    def scale_bytes(self, rows: int, index: int) -> float:
        """Bytes of the scales of x (index 0) or w (1), which has so many rows."""
        if self.format in MICRO:
            return rows * self.k / MICRO[self.format] + (4.0 if self.format == "nvfp4" else 0.0)
        high, wide = BLOCKS[self.format][index]
        return 4.0 * -(-rows // (high or rows)) * -(-self.k // (wide or self.k))

    def bytes_moved(self) -> float:
        element = 0.5 if self.format in PACKED else 1.0
        operands = element * self.k * (self.m + self.n) + self.scale_bytes(self.m, 0) + self.scale_bytes(self.n, 1)
        return operands + SIZE_BYTES[self.dtype] * self.m * self.n

    def tolerance(self) -> float:
        # Rounding the output once, as in Matmul (which explains the numbers): one unit, for float32 the order of the sums.
        u = UNIT_ROUNDOFF[self.dtype] * (2.0 if self.m * self.n < 64 else 1.0)
        rounding = 4.0 * u * max(self.k, 64) ** 0.5 if self.dtype == "float32" else u
        if self.format == "int8_row":
            return rounding  # sums in int32 are exact
        # Hopper's tensor cores keep about 14 bits of a sum of fp8 products (DeepSeek-V3, arXiv 2412.19437, section 3.3.2): each of the
        # k / 32 steps drops up to 2^-13 of the sum so far. Modelled, that makes 0.4 x 2^-14 of the result per step (0.013 for k = 16384)
        # besides what is lost within a step. Formats with one scale for the whole of k are commonly summed so from end to end; with scales
        # per block the sums of a block are added up in float32.
        steps = 32 if self.format not in ("fp8_tensor", "fp8_row") else max(32, -(-self.k // 32))
        return rounding + steps * 2.0**-15

    def label(self) -> str:
        return f"scaled_matmul {self.m}x{self.n}x{self.k} {self.format} {SHORT[self.dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        # No multiples of tiles, one row, one step of k, a last block of 16 columns, sizes that TMA and 16-byte copies cannot take; few
        # rows with a k long enough for the defaults to split it.
        return [
            cls(1, 17, 33, "float32", "fp8_row"),
            cls(130, 136, 160, "float16", "fp8_row"),
            cls(3, 48, 48, "float16", "fp8_tensor"),
            cls(1, 264, 1168, "float16", "fp8_block"),
            cls(70, 144, 272, "float32", "fp8_block"),
            cls(130, 264, 400, "bfloat16", "fp8_block"),
            cls(33, 48, 80, "bfloat16", "int8_row"),
            cls(20, 136, 1040, "float16", "int8_row"),
            cls(17, 48, 96, "float32", "mxfp8"),
            cls(130, 144, 384, "bfloat16", "mxfp8"),
            cls(16, 40, 1056, "float16", "mxfp4"),
            cls(130, 136, 512, "bfloat16", "mxfp4"),
            cls(9, 64, 96, "float32", "nvfp4"),
            cls(136, 144, 256, "bfloat16", "nvfp4"),
        ]

    @classmethod
    def approximations(cls, wide: Problem) -> list[Problem]:
        if not isinstance(wide, Matmul) or wide.layout != "nt" or wide.dtype == "float32":
            return []
        # Only whole blocks: what hardware scales has no ragged edge.
        formats = [name for name in FORMATS if wide.k % MICRO.get(name, 1) == 0 and (name != "int8_row" or wide.k <= MAX_INT8_K)]
        return [cls(wide.m, wide.n, wide.k, wide.dtype, name) for name in formats]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [
            cls(4096, 7168, 16384),  # DeepSeek V3: attention's output projection
            cls(32, 7168, 16384),
            cls(4096, 28672, 8192, format="fp8_row"),  # Llama 3.1 70B: half of gate and up
            cls(4096, 28672, 8192, format="nvfp4"),
            cls(4096, 28672, 8192, format="mxfp8"),
            cls(32, 28672, 8192, format="int8_row"),
        ]


def _apart(tensor: torch.Tensor, padding_bytes: int) -> torch.Tensor:
    """The rows of a matrix of one-byte elements, lying `padding_bytes` further apart; NaN (in e4m3) between them."""
    import torch

    if not padding_bytes:
        return tensor
    buffer = torch.full((tensor.shape[0], tensor.shape[1] + padding_bytes), 0x7F, dtype=torch.uint8, device=tensor.device)
    view = buffer.view(tensor.dtype)[:, : tensor.shape[1]]
    return view.copy_(tensor) if tensor.device.type != "meta" else view
