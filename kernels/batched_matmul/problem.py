"""Matrix multiplication per head: what absorbs MLA's up-projections into the queries and takes them out of the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class BatchedMatmul(Problem):
    """out[m, batch, n] = x[m, batch, k] @ w[batch, n, k]^T for each of `batch` heads, summed in float32, rounded once to `dtype`.

    inputs: x [m, batch, k] and w [batch, n, k]; outputs: out [m, batch, n]; all `dtype`. m is the number of tokens: the heads of a token
    lie together, as the layers before and after have them.
    """

    operator: ClassVar[str] = "batched_matmul"

    batch: int
    m: int
    n: int
    k: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.batch, self.m, self.n, self.k) < 1:
            raise UsageError(f"batched_matmul needs batch, m, n, k of at least 1, not {self.batch}, {self.m}, {self.n}, {self.k}")

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        return {
            "x": random_normal((self.m, self.batch, self.k), self.dtype, seed=seed, device=device, row_padding=row_padding),
            # 1/sqrt(k) keeps outputs of order one, as trained weights do.
            "w": random_normal(
                (self.batch, self.n, self.k), self.dtype, seed=seed + 1, device=device, row_padding=row_padding, scale=self.k**-0.5
            ),
        }

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"out": torch.empty((self.m, self.batch, self.n), dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        return {"out": torch.einsum("mbk,bnk->mbn", inputs["x"].double(), inputs["w"].double())}

    def flops(self) -> float:
        return 2.0 * self.batch * self.m * self.n * self.k

    def bytes_moved(self) -> float:
        return float(SIZE_BYTES[self.dtype]) * self.batch * (self.m * self.k + self.n * self.k + self.m * self.n)

    def tolerance(self) -> float:
        # As for matmul: one rounding costs about u/2, float32 accumulation 1e-7 sqrt(k); in float32 the order of accumulation
        # dominates, and TF32 (u = 2^-11) must fail.
        u = UNIT_ROUNDOFF[self.dtype] * (2.0 if self.batch * self.m * self.n < 64 else 1.0)
        return 4.0 * u * max(self.k, 64) ** 0.5 if self.dtype == "float32" else u

    def label(self) -> str:
        return f"batched_matmul {self.batch}x{self.m}x{self.n}x{self.k} {SHORT[self.dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes = [
            (1, 1, 1, 1, ("float16", "float32", "bfloat16")), (5, 1, 40, 72, ("float16", "bfloat16")),
            (3, 17, 33, 19, ("float16", "float32")), (2, 3, 128, 264, ("bfloat16",)), (3, 70, 72, 136, ("float16", "float32")),
        ]  # fmt: skip
        return [cls(batch, m, n, k, dtype) for batch, m, n, k, dtypes in shapes for dtype in dtypes]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        """DeepSeek V3's 128 heads: the queries into the latent space (512 from 128) for few and many tokens, and out of it."""
        return [cls(128, 32, 512, 128), cls(128, 256, 128, 512), cls(128, 1, 128, 512)]
