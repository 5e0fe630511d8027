"""Absorbed latent attention in which every query token reads only the cache slots of its own list (DeepSeek-V3.2's sparse attention)."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.latent_attention.problem import UNUSED_VALUE, make_heavy

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SparseLatentAttention(Problem):
    """Softmax(q k^T * qk_dim^-0.5) v over the cached rows that `indices` lists for each token; v is a row's first `kv_lora_rank` elements.

    The last tokens / sequences tokens of each of `sequences` sequences, every one with kv_len cached rows, are the queries (a decode step:
    sequences = tokens; a prefill: sequences = 1). A slot is page * page_size + row. A list holds `topk` distinct slots in any order; -1
    stands for none, where a token sees fewer, and a token whose list is empty has an output of zero. Page 0 belongs to nobody.
    The cache has the queries' dtype: unlike latent_attention, this operator has no kv_dtype, so that a plan's `kv_dtype` fp8 does not
    reach it and its problems measure a 16-bit cache.

    inputs: q [tokens, heads, kv_lora_rank + rope_dim]; kv_cache [1 + sequences * ceil(kv_len / page_size), page_size, kv_lora_rank +
            rope_dim], both `dtype`; indices [tokens, topk] int32.
    outputs: out [tokens, heads, kv_lora_rank], `dtype`.
    """

    operator: ClassVar[str] = "sparse_latent_attention"

    tokens: int
    kv_len: int
    topk: int
    heads: int
    kv_lora_rank: int = 512
    rope_dim: int = 64
    qk_dim: int = 192
    page_size: int = 64
    dtype: str = "bfloat16"
    sequences: int = 1

    def __post_init__(self) -> None:
        sizes = (self.tokens, self.kv_len, self.topk, self.heads, self.kv_lora_rank, self.rope_dim, self.qk_dim, self.page_size)
        if min(*sizes, self.sequences) < 1:
            raise UsageError(f"sparse_latent_attention needs positive sizes: {self.to_json()}")
        if self.tokens % self.sequences:
            raise UsageError(f"tokens={self.tokens} is not a multiple of sequences={self.sequences}")

    @property
    def dim(self) -> int:
        """Elements of a cached row: the latent and the rotary key."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def scale(self) -> float:
        """What the logits are multiplied by."""
        return float(self.qk_dim**-0.5)

    @property
    def q_len(self) -> int:
        """Query tokens of each sequence."""
        return self.tokens // self.sequences

    @property
    def pages_per_sequence(self) -> int:
        """Pages of one sequence."""
        return -(-self.kv_len // self.page_size)

    def visible(self, token: int) -> int:
        """Cached rows that this token may see: those up to its own. Tokens before a sequence's beginning are padding and see none."""
        return max(0, self.kv_len - self.q_len + token % self.q_len + 1)

    def listed(self, token: int) -> int:
        """Slots in the list of this token."""
        return min(self.topk, self.visible(token))

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        pages = 1 + self.sequences * self.pages_per_sequence
        q = random_normal((self.tokens, self.heads, self.dim), self.dtype, seed=seed, device=device, row_padding=row_padding)
        cache = random_normal((pages, self.page_size, self.dim), self.dtype, seed=seed + 1, device=device, row_padding=row_padding)
        if device == "meta":
            return {"q": q, "kv_cache": cache, "indices": torch.empty((self.tokens, self.topk), dtype=torch.int32, device=device)}
        # Drawn on the CPU, so that every device sees the same lists.
        generator = torch.Generator().manual_seed(seed)
        order = 1 + torch.randperm(pages - 1, generator=generator).view(self.sequences, -1)
        at = torch.arange(self.kv_len)
        slots = order[:, at // self.page_size] * self.page_size + at % self.page_size
        indices = torch.full((self.tokens, self.topk), -1, dtype=torch.int32)
        for token in range(self.tokens):
            rows = self._rows_of(token, int(torch.randint(1 << 30, (), generator=generator)))
            indices[token, : len(rows)] = slots[token // self.q_len, rows].int()
            # Not every list begins at its beginning: the holes of short ones come anywhere.
            if token % 2:
                indices[token] = indices[token].roll(token % 5)
        q[..., self.kv_lora_rank :] += 1.0
        heavy = slots[:, : min(2, self.kv_len)].flatten().to(device)
        visible = torch.full_like(heavy, min(self.topk, self.kv_len))
        make_heavy(cache, heavy // self.page_size, heavy % self.page_size, visible, self.kv_lora_rank, self.scale)
        unused = torch.ones(pages * self.page_size, dtype=torch.bool)
        unused[slots.flatten()] = False
        cache[unused.view(pages, self.page_size).to(device)] = UNUSED_VALUE
        return {"q": q, "kv_cache": cache, "indices": indices.to(device)}

    def _rows_of(self, token: int, draw: int) -> torch.Tensor:
        """The cached rows of one list: the heavy rows 0 and 1 (see `make_heavy`) at its ends, others once around at a random stride."""
        import torch

        seen, count = self.visible(token), self.listed(token)
        if count <= 2:
            return torch.arange(count)
        others = seen - 2
        # A stride without a common divisor visits every row once.
        stride = next(n for n in itertools.count(1 + draw % others) if math.gcd(n, others) == 1)
        middle = 2 + (draw // others + stride * torch.arange(count - 2)) % others
        return torch.cat((torch.tensor([0]), middle, torch.tensor([1])))

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"out": torch.empty((self.tokens, self.heads, self.kv_lora_rank), dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        wide = torch.float64 if self.dtype == "float32" else torch.float32
        cache = inputs["kv_cache"].flatten(0, 1)
        out = torch.zeros((self.tokens, self.heads, self.kv_lora_rank), dtype=wide, device=cache.device)
        for token in range(self.tokens):
            listed = inputs["indices"][token].long()
            k = cache[listed[listed >= 0]].to(wide)
            weights = (inputs["q"][token].to(wide) @ k.T * self.scale).softmax(dim=-1)
            out[token] = weights @ k[:, : self.kv_lora_rank]
        return {"out": out}

    def flops(self) -> float:
        return 2.0 * sum(map(self.listed, range(self.tokens))) * self.heads * (self.dim + self.kv_lora_rank)

    def bytes_moved(self) -> float:
        # Lists overlap: a row that n tokens may see is in none of their lists with the product of (1 - listed / visible).
        rows, missed = 0.0, 1.0
        for token in reversed(range(self.q_len)):
            seen = self.visible(token)
            if not seen:
                break
            missed *= 1.0 - self.listed(token) / seen
            rows += (seen - (self.visible(token - 1) if token else 0)) * (1.0 - missed)
        own = self.tokens * self.heads * (self.dim + self.kv_lora_rank)
        return float((self.sequences * rows * self.dim + own) * SIZE_BYTES[self.dtype] + 4 * self.tokens * self.topk)

    def tolerance(self) -> float:
        # As for latent_attention: one rounding of the output and one of the probabilities.
        return 2e-5 if self.dtype == "float32" else 3.0 * UNIT_ROUNDOFF[self.dtype]

    def label(self) -> str:
        of = f"{self.sequences}x{self.kv_len}" if self.sequences > 1 else f"{self.kv_len}"
        return (
            f"sparse latent {self.tokens} tokens {self.topk} of {of} h{self.heads} d{self.kv_lora_rank}+{self.rope_dim} {SHORT[self.dtype]}"
        )

    @classmethod
    def examples(cls) -> list[Problem]:
        small = {"kv_lora_rank": 128}
        shapes: list[tuple[dict[str, object], tuple[str, ...]]] = [
            ({"tokens": 1, "kv_len": 1, "topk": 1, "heads": 1, **small}, ("float16", "bfloat16")),
            ({"tokens": 2, "kv_len": 100, "topk": 70, "heads": 16, "sequences": 2}, ("float16", "bfloat16")),
            ({"tokens": 5, "kv_len": 3, "topk": 40, "heads": 5, "page_size": 16, **small}, ("float32", "bfloat16")),
            ({"tokens": 3, "kv_len": 150, "topk": 33, "heads": 70, "page_size": 1, **small}, ("float16", "float32")),
            ({"tokens": 1, "kv_len": 2500, "topk": 1100, "heads": 3, **small}, ("float16", "float32")),
        ]
        return [cls(**shape, dtype=dtype) for shape, dtypes in shapes for dtype in dtypes]  # type: ignore[arg-type]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        # DeepSeek V3.2: a decode step with all heads on one GPU, one of 8 tensor-parallel ranks, and a chunk of a prefill.
        return [
            cls(tokens=64, kv_len=32768, topk=2048, heads=128, sequences=64),
            cls(tokens=64, kv_len=32768, topk=2048, heads=16, sequences=64),
            cls(tokens=4096, kv_len=32768, topk=2048, heads=128),
        ]
