"""Attention of a decode step: one or a few query tokens per sequence over a long paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch


# Values in cache slots behind a sequence's end: finite, as stale cache contents are, and far from any drawn value. Their keys are 0, so
# that each would weigh as much as an average key whatever the query, and cannot be read unnoticed.
UNUSED_VALUE = 100.0


@dataclass(frozen=True)
class DecodeAttention(Problem):
    """Softmax(q k^T * scale) v for `q_len` new tokens of each sequence, keys and values in pages of `page_size` tokens.

    kv_lens[i] counts all tokens of sequence i, the new ones included; query t of q_len sees keys 0..kv_lens[i] - q_len + t (and, with
    `window` > 0, only the last `window` of those). A sequence with kv_lens[i] = 0 is a padding entry of the batch: its output is zero.
    Token j of sequence i lies in page block_table[i, j // page_size], at row j % page_size. Pages are scattered in memory.
    Query head h reads key/value head h // (heads // kv_heads). scale = head_dim^-0.5 * `logit_gain`.

    inputs: q [batch, q_len, heads, head_dim]; k_cache [pages, page_size, kv_heads, head_dim]; v_cache [.., head_dim_v], all `dtype`;
            block_table [batch, max pages per sequence] int32 (entries behind a sequence's end hold -1); kv_lens [batch] int32.
    outputs: out [batch, q_len, heads, head_dim_v], `dtype`.
    """

    operator: ClassVar[str] = "decode_attention"

    kv_lens: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int = 0
    q_len: int = 1
    page_size: int = 16
    dtype: str = "bfloat16"
    window: int = 0
    logit_gain: float = 1.0

    def __post_init__(self) -> None:
        if not self.kv_lens or max(self.kv_lens) < 1 or min(self.kv_lens) < 0:
            raise UsageError(f"decode_attention needs lengths of 0 or more and one cached token, not kv_lens={self.kv_lens}")
        sizes = (self.heads, self.kv_heads, self.head_dim, self.q_len, self.page_size)
        if min(sizes) < 1 or min(self.window, self.head_dim_v) < 0 or self.logit_gain <= 0:
            raise UsageError(f"decode_attention needs positive sizes and gain, and a window of 0 or more: {self.to_json()}")
        if any(0 < length < self.q_len for length in self.kv_lens):
            raise UsageError(f"every sequence holds its {self.q_len} new tokens, but kv_lens={self.kv_lens}")
        if self.heads % self.kv_heads:
            raise UsageError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.kv_lens)

    @property
    def dim_v(self) -> int:
        """Head dimension of the values: `head_dim` unless `head_dim_v` says otherwise."""
        return self.head_dim_v or self.head_dim

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
        return float(self.head_dim**-0.5 * self.logit_gain)

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        def draw(i: int, *shape: int) -> torch.Tensor:
            return random_normal(shape, self.dtype, seed=seed + i, device=device, row_padding=row_padding)

        # A permutation drawn on the CPU, so that every device sees the same scattered table.
        order = torch.randperm(self.pages, generator=torch.Generator().manual_seed(seed)).tolist()
        width = -(-self.max_kv_len // self.page_size)
        table = [[-1] * width for _ in self.kv_lens]
        for row, length in zip(table, self.kv_lens, strict=True):
            for j in range(-(-length // self.page_size)):
                row[j] = order.pop()
        k_cache = draw(1, self.pages, self.page_size, self.kv_heads, self.head_dim)
        v_cache = draw(2, self.pages, self.page_size, self.kv_heads, self.dim_v)
        if device != "meta":
            self._mark_borders(k_cache, v_cache, table)
        return {
            "q": draw(0, self.batch, self.q_len, self.heads, self.head_dim),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_table": torch.tensor(table, dtype=torch.int32, device=device),
            "kv_lens": torch.tensor(self.kv_lens, dtype=torch.int32, device=device),
        }

    def _mark_borders(self, k_cache: torch.Tensor, v_cache: torch.Tensor, table: list[list[int]]) -> None:
        """Give the tokens at every border a weight in the output, and the slots behind a sequence's end one that cannot be missed.

        One lost key of n changes the output by about n^-1/2, less than bf16's tolerance from 8k keys on: a kernel that never saw its newest
        token would pass. With values sqrt(n)/2 times larger there, it is off by a third, and a right kernel's error stays what it was.
        """
        import torch

        loud: list[tuple[int, int, float]] = []
        unused: list[tuple[int, int]] = []
        for row, length in zip(table, self.kv_lens, strict=True):
            borders = {0, 1, *range(length - self.q_len - 1, length)}
            if self.window:
                edge = length - self.q_len - self.window
                borders |= set(range(edge, edge + self.q_len + 1))
            gain = max(1.0, length**0.5 / 2)
            loud += [(row[t // self.page_size], t % self.page_size, gain) for t in sorted(borders) if 0 <= t < length]
            full = -(-length // self.page_size) * self.page_size
            unused += [(row[t // self.page_size], t % self.page_size) for t in range(length, full)]
        pages, slots, gains = (torch.tensor(column, device=v_cache.device) for column in zip(*loud, strict=True))
        v_cache[pages, slots] *= gains[:, None, None].to(v_cache.dtype)
        if unused:
            pages, slots = (torch.tensor(column, device=v_cache.device) for column in zip(*unused, strict=True))
            k_cache[pages, slots], v_cache[pages, slots] = 0.0, UNUSED_VALUE

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        shape = (self.batch, self.q_len, self.heads, self.dim_v)
        return {"out": torch.empty(shape, dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        # 131072 float32 terms are 7e-6 off, a third of the tolerance of a float32 problem: that one is summed in float64.
        wide = torch.float64 if self.dtype == "float32" else torch.float32
        q = inputs["q"].to(wide)
        out = torch.zeros((self.batch, self.q_len, self.heads, self.dim_v), dtype=wide, device=q.device)
        group = self.heads // self.kv_heads
        for i, length in enumerate(self.kv_lens):
            if length == 0:
                continue
            rows = inputs["block_table"][i, : -(-length // self.page_size)].long()
            k = inputs["k_cache"][rows].flatten(0, 1)[:length].to(wide).repeat_interleave(group, dim=1)
            v = inputs["v_cache"][rows].flatten(0, 1)[:length].to(wide).repeat_interleave(group, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q[i], k) * self.scale
            position = torch.arange(self.q_len, device=q.device)[:, None] + length - self.q_len
            key = torch.arange(length, device=q.device)[None, :]
            hidden = key > position
            if self.window:
                hidden = hidden | (key <= position - self.window)
            out[i] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(dim=-1), v)
        return {"out": out}

    def _visible(self, length: int) -> tuple[int, int]:
        """(query-key pairs, keys read) of one sequence of this length, for one head."""
        if length == 0:
            return 0, 0
        first = length - self.q_len + 1
        counts = [min(n, self.window) if self.window else n for n in range(first, length + 1)]
        return sum(counts), min(length, self.window + self.q_len - 1) if self.window else length

    def flops(self) -> float:
        pairs = sum(self._visible(length)[0] for length in self.kv_lens)
        return 2.0 * pairs * self.heads * (self.head_dim + self.dim_v)

    def bytes_moved(self) -> float:
        keys = sum(self._visible(length)[1] for length in self.kv_lens)
        tokens = self.batch * self.q_len
        elements = (keys * self.kv_heads + tokens * self.heads) * (self.head_dim + self.dim_v)
        return float(SIZE_BYTES[self.dtype] * elements)

    def tolerance(self) -> float:
        # As for prefill: one rounding of the output (0.6 u) and one of the probabilities. Partial results of split-KV kernels are
        # merged in float32. Long contexts average v towards zero while each rounding of p stays independent, so 3 u holds at 128k too.
        # Large logits (`logit_gain`) loosen nothing in 16 bits: a kernel keeps them in float32. In fp32 they cost their own round-off.
        u = UNIT_ROUNDOFF[self.dtype]
        return 2e-5 * max(1.0, self.logit_gain) if self.dtype == "float32" else 3.0 * u

    def label(self) -> str:
        lens = set(self.kv_lens)
        context = f"{self.kv_lens[0]}" if len(lens) == 1 else f"{min(lens)}..{max(lens)}"
        dim = f"{self.head_dim}" if self.dim_v == self.head_dim else f"{self.head_dim}/{self.dim_v}"
        queries = "" if self.q_len == 1 else f" q{self.q_len}"
        window = f" window {self.window}" if self.window else ""
        return (
            f"decode {self.batch}x{context}{queries} h{self.heads}/{self.kv_heads} d{dim} page {self.page_size}{window} {SHORT[self.dtype]}"
        )

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes: list[dict[str, object]] = [
            {"kv_lens": (1,), "heads": 2, "kv_heads": 1, "head_dim": 64},
            {"kv_lens": (15, 16, 17), "heads": 4, "kv_heads": 2, "head_dim": 64},
            {"kv_lens": (100, 0, 3), "heads": 8, "kv_heads": 1, "head_dim": 128},
            {"kv_lens": (257, 31), "heads": 2, "kv_heads": 2, "head_dim": 128, "page_size": 1},
            {"kv_lens": (130, 64), "heads": 6, "kv_heads": 2, "head_dim": 64, "page_size": 64},
            {"kv_lens": (40, 4, 129), "q_len": 4, "heads": 4, "kv_heads": 1, "head_dim": 64},
            {"kv_lens": (77,), "heads": 5, "kv_heads": 1, "head_dim": 256},
            {"kv_lens": (90, 33), "heads": 2, "kv_heads": 1, "head_dim": 64, "logit_gain": 40.0},
            {"kv_lens": (61,), "heads": 2, "kv_heads": 1, "head_dim": 64, "logit_gain": 6.0, "page_size": 128},
            {"kv_lens": (2100, 700), "heads": 4, "kv_heads": 1, "head_dim": 64},
            {"kv_lens": (200, 9), "q_len": 2, "heads": 2, "kv_heads": 1, "head_dim": 64, "window": 50},
        ]
        return [cls(**shape, dtype=dtype) for shape in shapes for dtype in ("float16", "float32", "bfloat16")]  # type: ignore[arg-type]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [cls((8704,) * 32, heads=32, kv_heads=8, head_dim=128)]  # Llama 3.1 8B
