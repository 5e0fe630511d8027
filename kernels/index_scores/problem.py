"""The lightning indexer of DeepSeek-V3.2: one score per query token and cached key, by which the keys to attend to are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.quantize import quantize_fp8


@dataclass(frozen=True)
class IndexScores(Problem):
    """scores[b, t, s] = sum over heads h of weights[b, t, h] * relu(q[b, t, h] . k[b, s]); all heads share the keys.

    The queries are the last q_len tokens of a sequence of kv_len: query t sees keys 0..kv_len - q_len + t. Hidden positions are -inf.
    With `format` "fp8", q and k are e4m3: k in rows with one scale each; the scale of a query is already part of its weight.

    inputs: q [batch, q_len, heads, head_dim] and k [batch, kv_len, head_dim], `dtype` or float8_e4m3fn; weights [batch, q_len, heads]
            float32; with "fp8" k_scale [batch, kv_len] float32. With `page_size` > 0, k is k_cache [pages, page_size, head_dim] with
            block_table [batch, ceil(kv_len / page_size)] int32 (and k_scale is [pages, page_size]); pages are scattered in memory.
    outputs: scores [batch, q_len, kv_len] float32.
    """

    operator: ClassVar[str] = "index_scores"

    batch: int
    q_len: int
    kv_len: int
    heads: int
    head_dim: int
    dtype: str = "bfloat16"
    format: str = ""
    page_size: int = 0

    def __post_init__(self) -> None:
        if min(self.batch, self.q_len, self.kv_len, self.heads, self.head_dim) < 1 or self.page_size < 0:
            raise UsageError(f"index_scores needs positive sizes: {self.to_json()}")
        if self.q_len > self.kv_len:
            raise UsageError(f"the {self.q_len} queries are tokens of the sequence, but kv_len={self.kv_len}")
        if self.format not in ("", "fp8"):
            raise UsageError(f"index_scores format is empty or fp8, not {self.format!r}")

    @property
    def operand_dtype(self) -> str:
        """The dtype of queries and keys."""
        return "float8_e4m3fn" if self.format else self.dtype

    @property
    def pages(self) -> int:
        """Pages of keys (0 where they are contiguous)."""
        return self.batch * -(-self.kv_len // self.page_size) if self.page_size else 0

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        made = self._unquantised(seed=seed, device=device, row_padding=0 if self.format else row_padding)
        if not self.format:
            return made
        import torch

        name = "k_cache" if self.page_size else "k"

        def narrow(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if device == "meta":
                return torch.empty(tensor.shape, dtype=torch_dtype(self.operand_dtype), device=device), torch.empty(
                    tensor.shape[:-1], device=device
                )
            values, scale = quantize_fp8(tensor.flatten(0, -2), (1, 0))
            return values.view(tensor.shape), scale.view(tensor.shape[:-1])

        def padded(tensor: torch.Tensor) -> torch.Tensor:
            # fp8 rows start at multiples of 16 bytes, as those of 16-bit elements do.
            wide = torch.empty((*tensor.shape[:-1], self.head_dim + 2 * row_padding), dtype=tensor.dtype, device=device)[
                ..., : self.head_dim
            ]
            return wide.copy_(tensor) if row_padding else tensor

        (q, q_scale), (k, k_scale) = narrow(made["q"]), narrow(made[name])
        return made | {"q": padded(q), name: padded(k), "k_scale": k_scale, "weights": made["weights"] * q_scale}

    def _unquantised(self, *, seed: int, device: str, row_padding: int = 0) -> Tensors:
        import torch

        def draw(i: int, *shape: int, dtype: str = self.dtype, scale: float = 1.0) -> torch.Tensor:
            return random_normal(shape, dtype, seed=seed + i, device=device, row_padding=row_padding, scale=scale)

        # Scores of order one: relu(q . k) is about sqrt(head_dim / 2) per head, and the model's weights carry (heads * head_dim)^-1/2.
        q = draw(0, self.batch, self.q_len, self.heads, self.head_dim)
        weights = draw(2, self.batch, self.q_len, self.heads, dtype="float32", scale=(self.heads * self.head_dim) ** -0.5)
        if not self.page_size:
            return {"q": q, "k": draw(1, self.batch, self.kv_len, self.head_dim), "weights": weights}
        order = torch.randperm(self.pages, generator=torch.Generator().manual_seed(seed))
        return {
            "q": q,
            "k_cache": draw(1, self.pages, self.page_size, self.head_dim),
            "block_table": order.view(self.batch, -1).int().to(device),
            "weights": weights,
        }

    @property
    def math_dtype(self) -> str:
        return self.operand_dtype

    def wide(self) -> Problem | None:
        return replace(self, format="") if self.format else None

    def wide_inputs(self, *, seed: int, device: str = "cpu") -> Tensors:
        return self._unquantised(seed=seed, device=device) if self.format else super().wide_inputs(seed=seed, device=device)

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"scores": torch.empty((self.batch, self.q_len, self.kv_len), dtype=torch.float32, device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        wide = torch.float64 if self.dtype == "float32" else torch.float32
        scores = torch.empty((self.batch, self.q_len, self.kv_len), dtype=wide, device=inputs["q"].device)
        for i in range(self.batch):
            if self.page_size:
                pages = inputs["block_table"][i].long()
                k = inputs["k_cache"][pages].flatten(0, 1)[: self.kv_len].to(wide)
                scale = inputs["k_scale"][pages].flatten()[: self.kv_len] if self.format else None
            else:
                k, scale = inputs["k"][i].to(wide), inputs["k_scale"][i] if self.format else None
            if scale is not None:
                k = k * scale[:, None].to(wide)
            # 64 tokens at a time: 64 heads of 64 x 131072 scores are 2 GB.
            for t in range(0, self.q_len, 64):
                q = inputs["q"][i, t : t + 64].to(wide)
                each = torch.einsum("thd,sd->ths", q, k).relu_()
                scores[i, t : t + 64] = torch.einsum("ths,th->ts", each, inputs["weights"][i, t : t + 64].to(wide))
        position = torch.arange(self.q_len, device=scores.device)[:, None] + self.kv_len - self.q_len
        return {"scores": scores.masked_fill_(torch.arange(self.kv_len, device=scores.device) > position, float("-inf"))}

    @property
    def visible_pairs(self) -> int:
        """(query token, key) pairs of one sequence that are not hidden."""
        return self.q_len * self.kv_len - self.q_len * (self.q_len - 1) // 2

    def flops(self) -> float:
        return 2.0 * self.batch * self.visible_pairs * self.heads * (self.head_dim + 1)

    def bytes_moved(self) -> float:
        rows = self.batch * (self.q_len * self.heads + self.kv_len) * self.head_dim * SIZE_BYTES[self.operand_dtype]
        floats = self.batch * (self.q_len * self.heads + self.q_len * self.kv_len + (self.kv_len if self.format else 0))
        return float(rows + 4 * floats)

    def tolerance(self) -> float:
        # A library rounds each head's scores to `dtype` (0.6 u, which averages over the heads) before it weighs them; sums in float32
        # are exact beside that. The tensor cores' fp8 sums keep 13 bits or more below the largest product: 1e-4.
        # Few outputs or heads do not average (measured over 40 seeds: 1.5 u at 64 outputs, 1.24 u at 130, 1.04 u at 800 of 5 heads; over
        # 150 seeds: 1.004 u at 600 of 32 heads).
        outputs = self.batch * self.q_len * self.kv_len
        few = 2.0 if outputs < 128 else 1.5 if outputs < 1024 or self.heads < 16 else 1.0
        return 2e-5 if self.dtype == "float32" else few * UNIT_ROUNDOFF[self.dtype]

    def label(self) -> str:
        page = f" page {self.page_size}" if self.page_size else ""
        return f"index scores {self.batch}x{self.q_len}x{self.kv_len} h{self.heads} d{self.head_dim}{page} {SHORT[self.operand_dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes: list[tuple[dict[str, object], tuple[str, ...]]] = [
            ({"batch": 1, "q_len": 1, "kv_len": 1, "heads": 1, "head_dim": 64}, ("float16",)),
            ({"batch": 2, "q_len": 1, "kv_len": 130, "heads": 64, "head_dim": 128, "page_size": 64}, ("float16", "bfloat16")),
            ({"batch": 1, "q_len": 70, "kv_len": 70, "heads": 8, "head_dim": 64}, ("bfloat16", "float32")),
            ({"batch": 2, "q_len": 3, "kv_len": 65, "heads": 5, "head_dim": 64, "page_size": 16}, ("float16", "float32")),
            ({"batch": 2, "q_len": 20, "kv_len": 60, "heads": 16, "head_dim": 128, "format": "fp8"}, ("float16", "bfloat16")),
            ({"batch": 1, "q_len": 2, "kv_len": 300, "heads": 32, "head_dim": 128, "format": "fp8", "page_size": 64}, ("float16",)),
        ]
        return [cls(**shape, dtype=dtype) for shape, dtypes in shapes for dtype in dtypes]  # type: ignore[arg-type]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        # DeepSeek V3.2 (64 heads of 128): a chunk of a prefill and a decode step.
        return [
            cls(1, 4096, 32768, 64, 128, format="fp8"),
            cls(64, 1, 32768, 64, 128, format="fp8", page_size=64),
            cls(1, 4096, 32768, 64, 128),
        ]
