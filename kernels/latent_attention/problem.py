"""Absorbed attention over a compressed cache (MLA): every head reads the same latent, which is its key and its value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.quantize import quantize_fp8

if TYPE_CHECKING:
    import torch

# What cache slots behind a sequence's end hold: finite, as stale cache contents are. As a key it gives half of the heads a logit of
# about 100, and as a value it is far from any drawn one.
UNUSED_VALUE = 100.0


def make_heavy(cache: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, visible: torch.Tensor, rank: int, scale: float) -> None:
    """Give these rows of the cache so much weight that losing one of `visible` keys cannot pass for rounding.

    Queries have a common component of 1 in every rotary dimension. A heavy row has one number in all of them, which raises its logit by
    ln(1 + 24 sqrt(visible)) for every head, and half a latent, so that its own random logit does not undo that for some. It then counts
    about half as much as the random rest of the sum, which grows with the root of its length. (In real models first and newest tokens
    are heavy too. Larger values, as in decode_attention, would be larger keys here.)
    """
    import torch

    number = torch.log1p(24.0 * visible.to(torch.float32).sqrt()) / ((cache.shape[-1] - rank) * scale)
    cache[pages, slots, :rank] *= 0.5
    cache[pages, slots, rank:] = number[:, None].to(cache.dtype)


@dataclass(frozen=True)
class LatentAttention(Problem):
    """Softmax(q k^T * qk_dim^-0.5) v for `q_len` new tokens of each sequence; k is a cached row, v its first `kv_lora_rank` elements.

    This is the decode step of multi-head latent attention after W_UK was multiplied into the queries (DeepSeek-V2, arXiv 2405.04434):
    a cached row is the compressed latent and behind it the shared rotary key. `qk_dim` is the head dimension before compression
    (128 + 64), which sets the scale. kv_lens[i] counts all tokens of sequence i, the new ones included; query t of q_len sees keys
    0..kv_lens[i] - q_len + t. A sequence with kv_lens[i] = 0 is a padding entry of the batch: its output is zero. Token j of sequence i
    lies in page block_table[i, j // page_size], at row j % page_size. Pages are scattered in memory.

    inputs: q [batch, q_len, heads, kv_lora_rank + rope_dim] `dtype`; kv_cache [pages, page_size, kv_lora_rank + rope_dim] `dtype`, or
            `kv_dtype` (float8_e4m3fn) with kv_scale [1] float32, by which every element is multiplied;
            block_table [batch, max pages per sequence] int32 (entries behind a sequence's end hold -1); kv_lens [batch] int32.
    outputs: out [batch, q_len, heads, kv_lora_rank], `dtype`.
    """

    operator: ClassVar[str] = "latent_attention"

    kv_lens: tuple[int, ...]
    heads: int
    kv_lora_rank: int = 512
    rope_dim: int = 64
    q_len: int = 1
    page_size: int = 64
    dtype: str = "bfloat16"
    kv_dtype: str = ""
    qk_dim: int = 192

    def __post_init__(self) -> None:
        if not self.kv_lens or max(self.kv_lens) < 1 or min(self.kv_lens) < 0:
            raise UsageError(f"latent_attention needs lengths of 0 or more and one cached token, not kv_lens={self.kv_lens}")
        if min(self.heads, self.kv_lora_rank, self.rope_dim, self.q_len, self.page_size, self.qk_dim) < 1:
            raise UsageError(f"latent_attention needs positive sizes: {self.to_json()}")
        if any(0 < length < self.q_len for length in self.kv_lens):
            raise UsageError(f"every sequence holds its {self.q_len} new tokens, but kv_lens={self.kv_lens}")
        if self.kv_dtype not in ("", "float8_e4m3fn"):
            raise UsageError(f"latent_attention kv_dtype is empty (that of the queries) or float8_e4m3fn, not {self.kv_dtype!r}")

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.kv_lens)

    @property
    def dim(self) -> int:
        """Elements of a cached row: the latent and the rotary key."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def max_kv_len(self) -> int:
        """The longest sequence: a launch may size its grid by it (engines know it on the host)."""
        return max(self.kv_lens)

    @property
    def pages(self) -> int:
        """Pages in the cache."""
        return sum(-(-length // self.page_size) for length in self.kv_lens)

    @property
    def scale(self) -> float:
        """What the logits are multiplied by."""
        return float(self.qk_dim**-0.5)

    @property
    def row_bytes(self) -> int:
        """Bytes of a cached row."""
        return self.dim * SIZE_BYTES[self.kv_dtype or self.dtype]

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        made = self._unquantised(seed=seed, device=device, row_padding=row_padding)
        if not self.kv_dtype:
            return made
        import torch

        cache = made["kv_cache"]
        if device == "meta":
            narrow, scale = torch.empty(cache.shape, dtype=torch_dtype(self.kv_dtype), device=device), torch.empty(1, device=device)
        else:
            narrow, scale = quantize_fp8(cache.flatten(0, 1), (0, 0))
        if row_padding:
            # fp8 rows start at multiples of 16 bytes, as those of 16-bit elements do.
            wide = torch.empty((*cache.shape[:2], self.dim + 2 * row_padding), dtype=narrow.dtype, device=device)
            wide.view(torch.uint8)[..., : self.dim] = narrow.view(torch.uint8).view(cache.shape)
            narrow = wide[..., : self.dim]
        return made | {"kv_cache": narrow.view(cache.shape) if not row_padding else narrow, "kv_scale": scale.reshape(1)}

    def _unquantised(self, *, seed: int, device: str, row_padding: int = 0) -> Tensors:
        import torch

        # A permutation drawn on the CPU, so that every device sees the same scattered table.
        order = torch.randperm(self.pages, generator=torch.Generator().manual_seed(seed)).tolist()
        width = -(-self.max_kv_len // self.page_size)
        table = [[-1] * width for _ in self.kv_lens]
        for row, length in zip(table, self.kv_lens, strict=True):
            for j in range(-(-length // self.page_size)):
                row[j] = order.pop()
        q = random_normal((self.batch, self.q_len, self.heads, self.dim), self.dtype, seed=seed, device=device, row_padding=row_padding)
        cache = random_normal((self.pages, self.page_size, self.dim), self.dtype, seed=seed + 1, device=device, row_padding=row_padding)
        if device != "meta":
            q[..., self.kv_lora_rank :] += 1.0
            self._mark_borders(cache, table)
        return {
            "q": q,
            "kv_cache": cache,
            "block_table": torch.tensor(table, dtype=torch.int32, device=device),
            "kv_lens": torch.tensor(self.kv_lens, dtype=torch.int32, device=device),
        }

    def _mark_borders(self, cache: torch.Tensor, table: list[list[int]]) -> None:
        """Give the tokens at every border a weight in the output, and the slots behind a sequence's end one that cannot be missed."""
        import torch

        heavy: list[tuple[int, int, int]] = []
        unused: list[tuple[int, int]] = []
        for row, length in zip(table, self.kv_lens, strict=True):
            borders = {0, 1, *range(length - self.q_len - 1, length)}
            heavy += [(row[t // self.page_size], t % self.page_size, length) for t in sorted(borders) if 0 <= t < length]
            full = -(-length // self.page_size) * self.page_size
            unused += [(row[t // self.page_size], t % self.page_size) for t in range(length, full)]
        pages, slots, visible = (torch.tensor(column, device=cache.device) for column in zip(*heavy, strict=True))
        make_heavy(cache, pages, slots, visible, self.kv_lora_rank, self.scale)
        if unused:
            pages, slots = (torch.tensor(column, device=cache.device) for column in zip(*unused, strict=True))
            cache[pages, slots] = UNUSED_VALUE

    def wide(self) -> Problem | None:
        return replace(self, kv_dtype="") if self.kv_dtype else None

    def wide_inputs(self, *, seed: int, device: str = "cpu") -> Tensors:
        return self._unquantised(seed=seed, device=device) if self.kv_dtype else super().wide_inputs(seed=seed, device=device)

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        shape = (self.batch, self.q_len, self.heads, self.kv_lora_rank)
        return {"out": torch.empty(shape, dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        # 131072 float32 terms are 7e-6 off, a third of the tolerance of a float32 problem: that one is summed in float64.
        wide = torch.float64 if self.dtype == "float32" else torch.float32
        q = inputs["q"].to(wide)
        out = torch.zeros((self.batch, self.q_len, self.heads, self.kv_lora_rank), dtype=wide, device=q.device)
        for i, length in enumerate(self.kv_lens):
            if length == 0:
                continue
            pages = inputs["block_table"][i, : -(-length // self.page_size)].long()
            k = inputs["kv_cache"][pages].flatten(0, 1)[:length].to(wide)
            if self.kv_dtype:
                k = k * inputs["kv_scale"].to(wide)
            scores = torch.einsum("qhd,kd->hqk", q[i], k) * self.scale
            position = torch.arange(self.q_len, device=q.device)[:, None] + length - self.q_len
            hidden = torch.arange(length, device=q.device)[None, :] > position
            weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            out[i] = torch.einsum("hqk,kd->qhd", weights, k[:, : self.kv_lora_rank])
        return {"out": out}

    def flops(self) -> float:
        pairs = sum(self.q_len * length - self.q_len * (self.q_len - 1) // 2 for length in self.kv_lens if length)
        return 2.0 * pairs * self.heads * (self.dim + self.kv_lora_rank)

    def bytes_moved(self) -> float:
        rows = self.batch * self.q_len * self.heads
        return float(sum(self.kv_lens) * self.row_bytes + rows * (self.dim + self.kv_lora_rank) * SIZE_BYTES[self.dtype])

    def tolerance(self) -> float:
        # One rounding of the output (0.6 u) and one of the probabilities; partial results of split-KV kernels are merged in float32.
        # The fp8 cache is exact in 16 bits and its scale is applied in float32, so it loosens nothing.
        return 2e-5 if self.dtype == "float32" else 3.0 * UNIT_ROUNDOFF[self.dtype]

    def label(self) -> str:
        context = f"{self.kv_lens[0]}" if len(set(self.kv_lens)) == 1 else f"{min(self.kv_lens)}..{max(self.kv_lens)}"
        queries = "" if self.q_len == 1 else f" q{self.q_len}"
        cache = f" kv {SHORT[self.kv_dtype]}" if self.kv_dtype else ""
        shape = f"h{self.heads} d{self.kv_lora_rank}+{self.rope_dim} page {self.page_size}"
        return f"latent {self.batch}x{context}{queries} {shape}{cache} {SHORT[self.dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        small = {"kv_lora_rank": 128}
        shapes: list[tuple[dict[str, object], tuple[str, ...]]] = [
            ({"kv_lens": (1,), "heads": 1, **small}, ("float16", "bfloat16")),
            ({"kv_lens": (100, 0, 3), "heads": 16}, ("float16", "bfloat16")),
            ({"kv_lens": (15, 17), "heads": 5, "page_size": 16, **small}, ("float32",)),
            ({"kv_lens": (64, 65, 4), "heads": 10, "q_len": 4, "page_size": 16, **small}, ("float16", "bfloat16")),
            ({"kv_lens": (130, 31), "heads": 70, "page_size": 1, **small}, ("float16",)),
            ({"kv_lens": (1300, 600), "heads": 3, **small}, ("float16", "float32")),
            ({"kv_lens": (90, 8), "heads": 16, "q_len": 2, "kv_dtype": "float8_e4m3fn", **small}, ("float16", "bfloat16")),
        ]
        return [cls(**shape, dtype=dtype) for shape, dtypes in shapes for dtype in dtypes]  # type: ignore[arg-type]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        # DeepSeek V3: all heads on one GPU (data-parallel attention), and 1 of 8 tensor-parallel ranks.
        return [cls((8704,) * 32, heads=128), cls((8704,) * 64, heads=16), cls((8704,) * 64, heads=128, q_len=2, kv_dtype="float8_e4m3fn")]
