"""A copy from memory to memory: what the bandwidth of a chip is measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, random_normal, torch_dtype
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class Copy(Problem):
    """out = x. No model has it as a row of its own: it is the anchor that memory-bound kernels are held against.

    inputs: x [rows, width], `dtype`. outputs: out [rows, width], `dtype`.
    """

    operator: ClassVar[str] = "copy"

    rows: int
    width: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.rows, self.width) < 1:
            raise UsageError(f"copy needs at least one row and column: {self.to_json()}")

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        return {"x": random_normal((self.rows, self.width), self.dtype, seed=seed, device=device, row_padding=row_padding)}

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"out": torch.empty((self.rows, self.width), dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        return {"out": inputs["x"].float()}

    def flops(self) -> float:
        return 0.0

    def bytes_moved(self) -> float:
        return 2.0 * SIZE_BYTES[self.dtype] * self.rows * self.width

    def tolerance(self) -> float:
        # A copy is exact.
        return 1e-9

    def label(self) -> str:
        return f"copy {self.rows}x{self.width} {SHORT[self.dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes = [(1, 1), (3, 33), (130, 96), (2, 4104)]
        return [*(cls(*shape, "float16") for shape in shapes), cls(5, 40), cls(2, 4104, "float32")]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [cls(65536, 8192), cls(64, 8192)]  # 2 GB there and back, as an H200 streams best; 1 MB each way
