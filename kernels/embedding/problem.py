"""Token embedding: gather rows of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, random_normal, torch_dtype
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class Embedding(Problem):
    """out[t] = weight[ids[t]].

    inputs: ids [tokens] int32 in 0..vocab - 1; weight [vocab, width], `dtype`. outputs: out [tokens, width], `dtype`.
    """

    operator: ClassVar[str] = "embedding"

    tokens: int
    vocab: int
    width: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.tokens, self.vocab, self.width) < 1:
            raise UsageError(f"embedding needs at least one token, entry and column: {self.to_json()}")

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        weight = random_normal((self.vocab, self.width), self.dtype, seed=seed, device=device, row_padding=row_padding)
        if device == "meta":
            return {"ids": torch.empty(self.tokens, dtype=torch.int32, device=device), "weight": weight}
        # Drawn on the CPU, so that every device gathers the same rows; the table's ends are among them.
        ids = torch.randint(self.vocab, (self.tokens,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        ids[0] = self.vocab - 1
        ids[-1:] = 0 if self.tokens > 1 else self.vocab - 1
        return {"ids": ids.to(device), "weight": weight}

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"out": torch.empty((self.tokens, self.width), dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        return {"out": inputs["weight"][inputs["ids"].long()].float()}

    def flops(self) -> float:
        return 0.0

    def bytes_moved(self) -> float:
        rows = self.tokens + min(self.tokens, self.vocab)
        return float(SIZE_BYTES[self.dtype] * rows * self.width + 4 * self.tokens)

    def tolerance(self) -> float:
        # A copy is exact.
        return 1e-9

    def label(self) -> str:
        return f"embedding {self.tokens} of {self.vocab}x{self.width} {SHORT[self.dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes = [(1, 1, 1), (5, 40, 33), (67, 30, 96), (3, 9, 2056)]
        return [*(cls(*shape, "float16") for shape in shapes), cls(9, 7, 8), cls(5, 40, 33, "float32"), cls(3, 9, 2056, "float32")]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [cls(8192, 128256, 4096), cls(64, 128256, 4096)]  # Llama 3.1 8B in prefill and decode
