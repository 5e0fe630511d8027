"""One matrix product per expert, on rows that lie sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.expert_routing import draw_experts, experts_hit, need_choices, with_rows_apart
from klab.kernels.quantize import activations, dequantize, quantize_fp8

if TYPE_CHECKING:
    import torch

BLOCK = 128  # DeepSeek's: weights share a scale per 128x128, activations per 1x128


@dataclass(frozen=True)
class GroupedMatmul(Problem):
    """out[r] = x[r] @ w[e]^T for offsets[e] <= r < offsets[e + 1], accumulated in float32.

    inputs: x [rows, k], w [experts, n, k], offsets int32 [experts + 1] (0 first, rows = tokens * top_k last; a step of 0 is an expert
    that nobody visits). With format "fp8_block", x and w are float8_e4m3fn with float32 x_scale [rows, k / 128] and w_scale
    [experts, n / 128, k / 128] (rounded up). outputs: out [rows, n], `dtype`. `skew` is the Zipf exponent of the experts' popularity.
    """

    operator: ClassVar[str] = "grouped_matmul"

    tokens: int
    experts: int
    top_k: int
    n: int
    k: int
    dtype: str = "bfloat16"
    format: str = ""
    skew: float = 0.0

    def __post_init__(self) -> None:
        if min(self.tokens, self.n, self.k) < 1:
            raise UsageError(f"grouped_matmul needs tokens, n, k of at least 1, not {self.tokens}, {self.n}, {self.k}")
        need_choices("grouped_matmul", self.experts, self.top_k)
        if self.format not in ("", "fp8_block"):
            raise UsageError(f"grouped_matmul format is '' or fp8_block, not {self.format!r}")

    @property
    def rows(self) -> int:
        """Visits of tokens to experts."""
        return self.tokens * self.top_k

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        if device == "meta":
            return self._shapes(row_padding)
        wide = self._wide(seed, device)
        if self.format:
            pairs = [quantize_fp8(w, (BLOCK, BLOCK)) for w in wide["w"]]
            x, x_scale = quantize_fp8(wide["x"], (1, BLOCK))
            floating = {"x": x, "x_scale": x_scale, "w": torch.stack([w for w, _ in pairs]), "w_scale": torch.stack([s for _, s in pairs])}
        else:
            floating = {"x": wide["x"], "w": wide["w"]}
        return {"offsets": wide["offsets"]} | {name: with_rows_apart(tensor, row_padding) for name, tensor in floating.items()}

    def _wide(self, seed: int, device: str) -> Tensors:
        """Unquantised inputs."""
        import torch

        ids = draw_experts(self.tokens, self.experts, self.top_k, self.skew, seed=seed + 3, device=device)
        offsets = torch.zeros(self.experts + 1, dtype=torch.int32, device=device)
        offsets[1:] = torch.bincount(ids.flatten().long(), minlength=self.experts).cumsum(0)
        make = activations if self.format else random_normal
        # One expert at a time, because float32 normals of all at once may not fit. 1/sqrt(k) keeps outputs of order one.
        every = [
            random_normal((self.n, self.k), self.dtype, seed=seed + 1000 + e, device=device, scale=self.k**-0.5)
            for e in range(self.experts)
        ]
        return {"x": make((self.rows, self.k), self.dtype, seed=seed, device=device), "w": torch.stack(every), "offsets": offsets}

    def _shapes(self, row_padding: int) -> Tensors:
        import torch

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return with_rows_apart(torch.empty(shape, dtype=dtype, device="meta"), row_padding)

        operand, blocks_k = torch.float8_e4m3fn if self.format else torch_dtype(self.dtype), -(-self.k // BLOCK)
        made = {
            "x": empty(self.rows, self.k, dtype=operand),
            "w": empty(self.experts, self.n, self.k, dtype=operand),
            "offsets": torch.empty(self.experts + 1, dtype=torch.int32, device="meta"),
        }
        if self.format:
            made["x_scale"] = empty(self.rows, blocks_k, dtype=torch.float32)
            made["w_scale"] = empty(self.experts, -(-self.n // BLOCK), blocks_k, dtype=torch.float32)
        return made

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"out": torch.empty((self.rows, self.n), dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        x, w = inputs["x"], inputs["w"]
        out = torch.zeros((self.rows, self.n), dtype=torch.float64, device=x.device)
        bounds = inputs["offsets"].tolist()
        for e, (first, end) in enumerate(pairwise(bounds)):
            if first == end:
                continue
            rows, weight = x[first:end], w[e]
            if self.format:
                rows = dequantize(rows, inputs["x_scale"][first:end], (1, BLOCK))
                weight = dequantize(weight, inputs["w_scale"][e], (BLOCK, BLOCK))
            out[first:end] = rows.double() @ weight.double().T
        return {"out": out}

    def flops(self) -> float:
        return 2.0 * self.rows * self.n * self.k

    def bytes_moved(self) -> float:
        # The weights of visited experts: their expected number, since each seed draws another routing.
        size = SIZE_BYTES["float8_e4m3fn" if self.format else self.dtype]
        blocks_k = -(-self.k // BLOCK)
        scale_bytes = 4.0 * blocks_k if self.format else 0.0
        weight = self.n * self.k * size + -(-self.n // BLOCK) * scale_bytes
        row = self.k * size + scale_bytes + self.n * SIZE_BYTES[self.dtype]
        return experts_hit(self.tokens, self.experts, self.top_k, self.skew) * weight + self.rows * row + 4.0 * (self.experts + 1)

    def tolerance(self) -> float:
        # As matmul's: one rounding of the output; float32 accumulation dominates for fp32. Hopper's fp8 tensor cores keep about 14
        # bits of a partial sum of 128 products, 3e-4 of the result where scales are applied in float32 every 128.
        u = UNIT_ROUNDOFF[self.dtype] * (2.0 if self.rows * self.n < 64 else 1.0)
        plain = 4.0 * u * max(self.k, 64) ** 0.5 if self.dtype == "float32" else u
        return max(plain, 2e-3) if self.format else plain

    @property
    def math_dtype(self) -> str:
        return "float8_e4m3fn" if self.format else self.dtype

    def wide(self) -> GroupedMatmul | None:
        return replace(self, format="") if self.format else None

    def wide_inputs(self, *, seed: int, device: str = "cpu") -> Tensors:
        return self._wide(seed, device) if self.format else super().wide_inputs(seed=seed, device=device)

    def label(self) -> str:
        more = [self.format.replace("_", " ")] if self.format else []
        more += [f"skew {self.skew:g}"] if self.skew else []
        shape = f"{self.tokens}x{self.n}x{self.k} {self.top_k}/{self.experts} experts"
        return " ".join(["grouped_matmul", shape, SHORT[self.dtype], *more])

    @classmethod
    def examples(cls) -> list[Problem]:
        made = [
            cls(1, 6, 2, 48, 64, "float16"),
            cls(40, 3, 2, 72, 40, "float16", skew=1.0),
            cls(13, 5, 3, 33, 17, "float32"),
            cls(50, 2, 1, 136, 96, "float16"),
            cls(11, 4, 2, 160, 200, "float16", "fp8_block"),
            cls(40, 3, 2, 128, 384, "float32", "fp8_block"),
        ]
        return [*made, replace(made[1], dtype="bfloat16"), replace(made[3], dtype="bfloat16"), replace(made[4], dtype="bfloat16")]

    @classmethod
    def approximations(cls, wide: Problem) -> list[Problem]:
        return [replace(wide, format="fp8_block")] if isinstance(wide, cls) and not wide.format and wide.dtype != "float32" else []

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [
            cls(4096, 128, 8, 1536, 2048),  # gate and up of Qwen3-30B-A3B
            cls(4096, 32, 2, 4096, 7168, format="fp8_block"),  # gate and up of DeepSeek V3, 32 experts of one expert-parallel rank
            cls(32, 128, 8, 1536, 2048),
        ]
