"""Matrix multiplication as inference uses it: activations times weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class Matmul(Problem):
    """out[m, n] = x[m, k] @ W, accumulated in float32, rounded once to `dtype`.

    inputs: x [m, k] and w, which is [n, k] in layout "nt" (out = x @ w^T, how a linear layer stores it) or [k, n] in "nn"; both `dtype`.
    outputs: out [m, n], `dtype`.
    """

    operator: ClassVar[str] = "matmul"

    m: int
    n: int
    k: int
    dtype: str = "bfloat16"
    layout: str = "nt"

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.k) < 1:
            raise UsageError(f"matmul needs m, n, k of at least 1, not {self.m}, {self.n}, {self.k}")
        if self.layout not in ("nt", "nn"):
            raise UsageError(f"matmul layout is nt or nn, not {self.layout!r}")

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        w_shape = (self.n, self.k) if self.layout == "nt" else (self.k, self.n)
        return {
            "x": random_normal((self.m, self.k), self.dtype, seed=seed, device=device, row_padding=row_padding),
            # 1/sqrt(k) keeps outputs of order one, as trained weights do, so fp16 cannot overflow at any k.
            "w": random_normal(w_shape, self.dtype, seed=seed + 1, device=device, row_padding=row_padding, scale=self.k**-0.5),
        }

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"out": torch.empty((self.m, self.n), dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        x, w = inputs["x"].double(), inputs["w"].double()
        return {"out": x @ (w.T if self.layout == "nt" else w)}

    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    def bytes_moved(self) -> float:
        return float(SIZE_BYTES[self.dtype]) * (self.m * self.k + self.n * self.k + self.m * self.n)

    def tolerance(self) -> float:
        # Rounding the output once costs about u/sqrt(3) relative in Frobenius norm (u/2 at the median); products are exact in
        # float32 and accumulation there adds about 1e-7*sqrt(k). 1.0 u leaves a factor of two for split-K partial sums kept in
        # float32. For fp32 the accumulation order dominates: sqrt(k) u, times 4; TF32 (u = 2^-11) must fail.
        # A handful of outputs does not average: one alone may be off by a whole u, before its sum's own error.
        u = UNIT_ROUNDOFF[self.dtype] * (2.0 if self.m * self.n < 64 else 1.0)
        return 4.0 * u * max(self.k, 64) ** 0.5 if self.dtype == "float32" else u

    def label(self) -> str:
        return f"matmul {self.m}x{self.n}x{self.k} {SHORT[self.dtype]}{'' if self.layout == 'nt' else ' nn'}"

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes = [
            (1, 1, 1), (1, 96, 160), (3, 17, 33), (16, 64, 32), (17, 129, 65), (64, 48, 256), (100, 72, 40), (130, 136, 72), (8, 256, 520),
        ]  # fmt: skip
        return [
            Matmul(m, n, k, dtype, layout) for m, n, k in shapes for dtype in ("float16", "float32", "bfloat16") for layout in ("nt", "nn")
        ]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [cls(8192, 14336, 4096), cls(32, 14336, 4096), cls(1, 14336, 4096)]  # Llama 3.1 8B: half of gate and up
