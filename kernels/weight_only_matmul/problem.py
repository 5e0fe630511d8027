"""Matrix multiplication whose weights alone are narrow (w4a16, w8a16): decoding reads a quarter or half of the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

if TYPE_CHECKING:
    import torch

FORMATS = ("int4", "fp8")


@dataclass(frozen=True)
class WeightOnlyMatmul(Problem):
    """out[m, n] = x[m, k] @ (w * scale)[n, k]^T, accumulated in float32, rounded once to `dtype`.

    inputs: x [m, k] of `dtype`; w, packed along k: "int4" uint8 [n, k / 2], two's complement -7..7, the even k in the low half of a byte
    (quantize.pack4), "fp8" float8_e4m3fn [n, k]; scale [n, groups]: one per row and `group` columns of k, or per row with group 0, of
    `dtype` for int4 (as compressed-tensors and GPTQ checkpoints hold them) and float32 for fp8. The last group may be short.
    outputs: out [m, n], `dtype`.
    """

    operator: ClassVar[str] = "weight_only_matmul"

    m: int
    n: int
    k: int
    dtype: str = "bfloat16"
    format: str = "int4"
    group: int = 128

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.k) < 1:
            raise UsageError(f"weight_only_matmul needs m, n, k of at least 1, not {self.m}, {self.n}, {self.k}")
        if self.format not in FORMATS:
            raise UsageError(f"weight_only_matmul knows {' and '.join(FORMATS)}, not {self.format!r}")
        if self.format == "int4" and self.k % 2:
            raise UsageError(f"int4 packs two columns per byte: k is even, not {self.k}")
        if self.group < 0 or self.group % 16:
            raise UsageError(f"group is 0 (one scale per row) or a multiple of 16, not {self.group}")

    @property
    def groups(self) -> int:
        """Scales per row."""
        return -(-self.k // self.group) if self.group else 1

    @property
    def packed_k(self) -> int:
        """Bytes of one row of weights."""
        return self.k // 2 if self.format == "int4" else self.k

    @property
    def scale_dtype(self) -> str:
        """The name of the scales' dtype."""
        return self.dtype if self.format == "int4" else "float32"

    def _wide(self, seed: int, device: str, row_padding: int = 0) -> Tensors:
        from klab.kernels.quantize import activations

        return {
            "x": activations((self.m, self.k), self.dtype, seed=seed, device=device, row_padding=row_padding),
            # 1/sqrt(k) keeps outputs of order one, as trained weights do, so fp16 cannot overflow at any k.
            "w": random_normal((self.n, self.k), self.dtype, seed=seed + 1, device=device, scale=self.k**-0.5),
        }

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        from klab.kernels.quantize import quantize_fp8, quantize_int4

        w_dtype, scale_dtype = torch.uint8 if self.format == "int4" else torch.float8_e4m3fn, torch_dtype(self.scale_dtype)
        wide = self._wide(seed, device, row_padding)
        # Packed rows lie as many bytes further apart as rows of 16-bit floats do.
        w_padding = 2 * row_padding if self.format == "int4" else row_padding
        w = torch.empty((self.n, self.packed_k + w_padding), dtype=w_dtype, device=device)[:, : self.packed_k]
        scale = torch.empty((self.n, self.groups + row_padding), dtype=scale_dtype, device=device)[:, : self.groups]
        if device != "meta":
            quantize = quantize_int4 if self.format == "int4" else lambda x, group: quantize_fp8(x, (1, group))
            for rows in range(0, self.n, 4096):  # float32 copies of a whole layer would take gigabytes
                some_w, some_scale = quantize(wide["w"][rows : rows + 4096], self.group)
                w[rows : rows + 4096].copy_(some_w)
                scale[rows : rows + 4096].copy_(some_scale)
        return {"x": wide["x"], "w": w, "scale": scale}

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"out": torch.empty((self.m, self.n), dtype=torch_dtype(self.dtype), device=device)}

    def _dequantized(self, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """float64 [rows, k] of packed rows and their scales: the products are exact."""
        from klab.kernels.quantize import int4_values

        values = int4_values(w) if self.format == "int4" else w.float()
        return values.double() * scale.double().repeat_interleave(self.group or self.k, dim=1)[:, : self.k]

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        x, parts = inputs["x"].double(), []
        for rows in range(0, self.n, 4096):
            parts.append(x @ self._dequantized(inputs["w"][rows : rows + 4096], inputs["scale"][rows : rows + 4096]).T)
        return {"out": torch.cat(parts, dim=1)}

    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    def bytes_moved(self) -> float:
        activations = SIZE_BYTES[self.dtype] * (self.m * self.k + self.m * self.n)
        return float(activations + self.n * self.packed_k + SIZE_BYTES[self.scale_dtype] * self.n * self.groups)

    def tolerance(self) -> float:
        # Rounding the output costs about 0.5 u relative in Frobenius norm, and as much again for a kernel whose scaled weights are
        # rounded to `dtype` before the product: together 0.7 u, twice that is accepted. A handful of outputs does not average, and a
        # single one may be a sum that cancels (of 150 seeds three beyond 3 u). In float32 the order of accumulation dominates: sqrt(k) u,
        # times 4.
        u = UNIT_ROUNDOFF[self.dtype] * (8.0 if self.m * self.n < 8 else 2.0 if self.m * self.n < 64 else 1.0)
        return 4.0 * u * max(self.k, 64) ** 0.5 if self.dtype == "float32" else 1.5 * u

    def wide(self) -> Problem:
        return Matmul(self.m, self.n, self.k, self.dtype)

    def wide_inputs(self, *, seed: int, device: str = "cpu") -> Tensors:
        return self._wide(seed, device)

    def label(self) -> str:
        group = f"g{self.group}" if self.group else ""
        return f"weight_only_matmul {self.m}x{self.n}x{self.k} {self.format}{group} {SHORT[self.dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes = [
            (1, 1, 2, "int4", 128, ("bfloat16", "float32")), (1, 33, 67, "fp8", 0, ("float16", "float32")),
            (3, 33, 130, "int4", 128, ("float16",)), (2, 80, 384, "int4", 128, ("bfloat16",)), (17, 40, 520, "int4", 128, ("float16",)),
            (3, 24, 2080, "int4", 128, ("float16",)), (33, 48, 256, "int4", 0, ("bfloat16", "float32")),
            (4, 96, 320, "fp8", 0, ("float16",)), (40, 72, 208, "fp8", 64, ("bfloat16",)),
            (5, 40, 160, "int4", 32, ("float16", "float32")), (64, 136, 320, "int4", 64, ("float16", "bfloat16")),
        ]  # fmt: skip
        return [cls(m, n, k, dtype, form, group) for m, n, k, form, group, dtypes in shapes for dtype in dtypes]

    @property
    def quantization(self) -> str:
        """The format's name in a plan, where int4 and fp8 alone would not say that the activations stay wide."""
        return {"int4": "w4a16", "fp8": "w8a16"}[self.format]

    @classmethod
    def approximations(cls, wide: Problem) -> list[Problem]:
        if not isinstance(wide, Matmul) or wide.layout != "nt" or wide.dtype == "float32":
            return []
        int4 = [cls(wide.m, wide.n, wide.k, wide.dtype)] if wide.k % 2 == 0 else []
        return [*int4, cls(wide.m, wide.n, wide.k, wide.dtype, "fp8", 0)]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        """Llama 3.1 8B's gate and up for decode batches."""
        return [cls(16, 28672, 4096), cls(1, 28672, 4096), cls(64, 28672, 4096), cls(16, 28672, 4096, format="fp8", group=0)]
