"""Attention of a decode step: one or a few query tokens per sequence over a long paged KV cache."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.quantize import FP8_MAX, LEAST_AMAX, activations

if TYPE_CHECKING:
    import torch

FP8 = "float8_e4m3fn"
# Values in cache slots behind a sequence's end: finite, as stale cache contents are, and far from any drawn value (in fp8 the largest
# that the scale allows). Their keys are 0, so that each would weigh as much as an average key whatever the query, and cannot be read
# unnoticed.
UNUSED_VALUE = 100.0
# With a soft-cap, every fourth query row is so large that its logits spread over half the cap, where it bends them: in the other rows
# it changes nothing that a check would see, and they are the ones that show a lost key.
BENT_ROWS = 4
GOLDEN = 0.618034


@dataclass(frozen=True)
class DecodeAttention(Problem):
    """Softmax(q k^T * scale) v for `q_len` new tokens of each sequence, keys and values in pages of `page_size` tokens.

    kv_lens[i] counts all tokens of sequence i, the new ones included; query t of q_len sees keys 0..kv_lens[i] - q_len + t (and, with
    `window` > 0, only the last `window` of those). A sequence with kv_lens[i] = 0 is a padding entry of the batch: its output is zero.
    Token j of sequence i lies in page block_table[i, j // page_size], at row j % page_size. Pages are scattered in memory.
    Query head h reads key/value head h // (heads // kv_heads). scale = head_dim^-0.5 * `logit_gain`.

    `softcap` > 0: a logit x becomes softcap * tanh(x / softcap), after the scale. `sinks`: each head has one further logit, which is not
    capped and takes part in the softmax's sum only (gpt-oss). `kv_dtype` "float8_e4m3fn": key = k_cache * k_scale of its head, value
    likewise. The first `shared_prefix` tokens (whole pages) of every sequence are the same pages: a common system prompt.

    inputs: q [batch, q_len, heads, head_dim] `dtype`; k_cache [pages, page_size, kv_heads, head_dim] and v_cache [.., head_dim_v],
            `kv_dtype` or `dtype`; block_table [batch, max pages per sequence] int32 (entries behind a sequence's end hold -1);
            kv_lens [batch] int32; with `kv_dtype` k_scale and v_scale [kv_heads] float32; with `sinks` sinks [heads] float32.
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
    sinks: bool = False
    softcap: float = 0.0
    kv_dtype: str = ""
    shared_prefix: int = 0

    def __post_init__(self) -> None:
        if not self.kv_lens or max(self.kv_lens) < 1 or min(self.kv_lens) < 0:
            raise UsageError(f"decode_attention needs lengths of 0 or more and one cached token, not kv_lens={self.kv_lens}")
        sizes = (self.heads, self.kv_heads, self.head_dim, self.q_len, self.page_size)
        if min(sizes) < 1 or min(self.window, self.head_dim_v, self.softcap, self.shared_prefix) < 0 or self.logit_gain <= 0:
            raise UsageError(f"decode_attention needs positive sizes and gain, window, cap and prefix of 0 or more: {self.to_json()}")
        if self.shared_prefix % self.page_size:
            raise UsageError(f"a shared prefix is whole pages of {self.page_size} tokens, not {self.shared_prefix} tokens")
        if any(0 < length < self.shared_prefix + self.q_len for length in self.kv_lens):
            raise UsageError(f"every sequence holds the prefix and its {self.q_len} new tokens, but kv_lens={self.kv_lens}")
        if self.heads % self.kv_heads:
            raise UsageError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.kv_dtype not in ("", FP8):
            raise UsageError(f"kv_dtype is '' or {FP8!r}, not {self.kv_dtype!r}")

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.kv_lens)

    @property
    def dim_v(self) -> int:
        """Head dimension of the values: `head_dim` unless `head_dim_v` says otherwise."""
        return self.head_dim_v or self.head_dim

    @property
    def cache_dtype(self) -> str:
        """The dtype of keys and values in the cache."""
        return self.kv_dtype or self.dtype

    @property
    def max_kv_len(self) -> int:
        """The longest sequence: a launch may size its grid by it (engines know it on the host)."""
        return max(self.kv_lens)

    @property
    def pages(self) -> int:
        """Pages in the cache; those of a shared prefix count once."""
        return sum(-(-length // self.page_size) for length in self._own_lens) + self.shared_prefix // self.page_size

    @property
    def scale(self) -> float:
        """What the logits are multiplied by."""
        return float(self.head_dim**-0.5 * self.logit_gain)

    @property
    def _own_lens(self) -> list[int]:
        """Tokens of each sequence behind the shared prefix."""
        return [max(0, length - self.shared_prefix) for length in self.kv_lens]

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        wide = self._wide_inputs(seed, device, row_padding)
        return self._quantized(wide, seed, row_padding) if self.kv_dtype else wide

    def wide(self) -> DecodeAttention | None:
        return dataclasses.replace(self, kv_dtype="") if self.kv_dtype else None

    def wide_inputs(self, *, seed: int, device: str = "cpu") -> Tensors:
        return self._wide_inputs(seed, device, 0)

    def _wide_inputs(self, seed: int, device: str, row_padding: int) -> Tensors:
        """The inputs with caches in `dtype`. Keys that are quantised later have outlier channels, as those of trained models do."""
        import torch

        cache = (self.pages, self.page_size, self.kv_heads)
        rows = {"seed": seed + 1, "device": device, "row_padding": row_padding}
        k_cache = (activations if self.kv_dtype else random_normal)((*cache, self.head_dim), self.dtype, **rows)  # type: ignore[arg-type]
        v_cache = random_normal((*cache, self.dim_v), self.dtype, seed=seed + 2, device=device, row_padding=row_padding)
        q_shape = (self.batch, self.q_len, self.heads, self.head_dim)
        q = random_normal(q_shape, self.dtype, seed=seed, device=device, row_padding=row_padding)
        table = self._table(seed)
        if device != "meta":
            self._mark_borders(k_cache, v_cache, table)
            if self.softcap:
                bent = torch.arange(self.batch * self.q_len * self.heads, device=device).view(q_shape[:-1]) % BENT_ROWS == 0
                q[bent] *= max(1.0, self.softcap / (2 * self.logit_gain))
        found = {
            "q": q,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_table": torch.tensor(table, dtype=torch.int32, device=device),
            "kv_lens": torch.tensor(self.kv_lens, dtype=torch.int32, device=device),
        }
        if self.sinks:
            # About as heavy as all keys together: the sum of their weights grows with the context.
            spans = [math.log(self._visible(length)[1]) for length in self.kv_lens if length]
            found["sinks"] = random_normal((self.heads,), "float32", seed=seed + 3, device=device) + sum(spans) / len(spans)
        return found

    def _table(self, seed: int) -> list[list[int]]:
        """The page of each page of tokens of each sequence; -1 behind its end."""
        import torch

        # A permutation drawn on the CPU, so that every device sees the same scattered table.
        order = torch.randperm(self.pages, generator=torch.Generator().manual_seed(seed)).tolist()
        shared = [order.pop() for _ in range(self.shared_prefix // self.page_size)]
        width = -(-self.max_kv_len // self.page_size)
        table = []
        for length, own in zip(self.kv_lens, self._own_lens, strict=True):
            row = (shared if length else []) + [order.pop() for _ in range(-(-own // self.page_size))]
            table.append(row + [-1] * (width - len(row)))
        return table

    def _mark_borders(self, k_cache: torch.Tensor, v_cache: torch.Tensor, table: list[list[int]]) -> None:
        """Give the tokens at every border a weight in the output, and the slots behind a sequence's end one that cannot be missed.

        One lost key of n changes the output by about n^-1/2, less than bf16's tolerance from 8k keys on: a kernel that never saw its newest
        token would pass. With values sqrt(n)/2 times larger there, it is off by a third, and a right kernel's error stays what it was.
        """
        import torch

        loud: dict[tuple[int, int], float] = {}
        unused: list[tuple[int, int]] = []
        for row, length in zip(table, self.kv_lens, strict=True):
            borders = {0, 1, *range(length - self.q_len - 1, length)}
            if self.window:
                edge = length - self.q_len - self.window
                borders |= set(range(edge, edge + self.q_len + 1))
            if self.shared_prefix:
                borders |= {self.shared_prefix - 1, self.shared_prefix}
            gain = max(1.0, length**0.5 / 2)
            for t in sorted(borders):
                if 0 <= t < length:
                    slot = row[t // self.page_size], t % self.page_size
                    loud[slot] = max(gain, loud.get(slot, 0.0))
            full = -(-length // self.page_size) * self.page_size
            unused += [(row[t // self.page_size], t % self.page_size) for t in range(length, full)]
        pages, slots = (torch.tensor(column, device=v_cache.device) for column in zip(*loud, strict=True))
        gains = torch.tensor(list(loud.values()), device=v_cache.device)
        v_cache[pages, slots] *= gains[:, None, None].to(v_cache.dtype)
        if unused:
            pages, slots = (torch.tensor(column, device=v_cache.device) for column in zip(*unused, strict=True))
            k_cache[pages, slots], v_cache[pages, slots] = 0.0, UNUSED_VALUE

    def _quantized(self, inputs: Tensors, seed: int, row_padding: int) -> Tensors:
        """The same inputs with fp8 caches and their scales. Scales differ between neighbouring heads and between keys and values."""
        import torch

        found = dict(inputs)
        heads = torch.arange(1, self.kv_heads + 1)
        for i, name in enumerate(("k", "v")):
            wide = inputs[f"{name}_cache"]
            # Rows padded by as many bytes as those of a 16-bit cache: engines keep them 16-byte aligned in every dtype.
            shape = (*wide.shape[:-1], wide.shape[-1] + 2 * row_padding)
            narrow = torch.empty(shape, dtype=torch.uint8, device=wide.device).view(torch.float8_e4m3fn)[..., : wide.shape[-1]]
            scale = torch.empty(self.kv_heads, dtype=torch.float32, device=wide.device)
            if not wide.is_meta:
                # Up to twice what the largest needs, as calibrated scales are.
                slack = (1.0 + (GOLDEN * heads + 0.37 * i + 0.1 * (seed % 10)) % 1.0).to(wide.device)
                scale = wide.abs().amax(dim=(0, 1, 3)).float().clamp_min(LEAST_AMAX) / FP8_MAX * slack
                narrow.copy_((wide / scale[:, None]).clamp_(-FP8_MAX, FP8_MAX))
            found |= {f"{name}_cache": narrow, f"{name}_scale": scale}
        return found

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

        def read(name: str, rows: torch.Tensor, length: int) -> torch.Tensor:
            # Gathered as bytes: not every device indexes fp8.
            cache = inputs[f"{name}_cache"]
            found = cache.view(torch.uint8)[rows].view(cache.dtype) if self.kv_dtype else cache[rows]
            found = found.flatten(0, 1)[:length].to(wide)
            if self.kv_dtype:
                found = found * inputs[f"{name}_scale"].to(wide)[:, None]
            return found.repeat_interleave(group, dim=1)

        for i, length in enumerate(self.kv_lens):
            if length == 0:
                continue
            rows = inputs["block_table"][i, : -(-length // self.page_size)].long()
            k, v = read("k", rows, length), read("v", rows, length)
            scores = torch.einsum("qhd,khd->hqk", q[i], k) * self.scale
            if self.softcap:
                scores = torch.tanh(scores / self.softcap) * self.softcap
            position = torch.arange(self.q_len, device=q.device)[:, None] + length - self.q_len
            key = torch.arange(length, device=q.device)[None, :]
            hidden = key > position
            if self.window:
                hidden = hidden | (key <= position - self.window)
            scores = scores.masked_fill(hidden, float("-inf"))
            if self.sinks:
                sink = inputs["sinks"].to(wide)[:, None, None].expand(-1, self.q_len, 1)
                scores = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
            else:
                scores = scores.softmax(dim=-1)
            out[i] = torch.einsum("hqk,khd->qhd", scores, v)
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
        # A sequence reads its last keys: of the shared prefix the batch reads as much as the one that reaches back furthest.
        read = [self._visible(length)[1] for length in self.kv_lens]
        prefix = [max(0, keys - own) for keys, own in zip(read, self._own_lens, strict=True)]
        keys = sum(read) - sum(prefix) + max(prefix)
        dims, rows = self.head_dim + self.dim_v, self.batch * self.q_len * self.heads
        parameters = 4 * (2 * self.kv_heads * bool(self.kv_dtype) + self.heads * self.sinks)
        return float(SIZE_BYTES[self.cache_dtype] * keys * self.kv_heads * dims + SIZE_BYTES[self.dtype] * rows * dims + parameters)

    def tolerance(self) -> float:
        # As for prefill: one rounding of the output (0.6 u) and one of the probabilities. Partial results of split-KV kernels are
        # merged in float32. Long contexts average v towards zero while each rounding of p stays independent, so 3 u holds at 128k too.
        # Large logits (`logit_gain`, `softcap`) loosen nothing in 16 bits: a kernel keeps them in float32. In fp32 they cost their own
        # round-off. An fp8 cache loosens nothing either: e4m3 is exact in fp16 and bf16, and the scales are factored out of the sums.
        u = UNIT_ROUNDOFF[self.dtype]
        return 2e-5 * max(1.0, self.logit_gain, self.softcap / 2) if self.dtype == "float32" else 3.0 * u

    def label(self) -> str:
        lens = set(self.kv_lens)
        context = f"{self.kv_lens[0]}" if len(lens) == 1 else f"{min(lens)}..{max(lens)}"
        dim = f"{self.head_dim}" if self.dim_v == self.head_dim else f"{self.head_dim}/{self.dim_v}"
        further = [
            f"window {self.window}" if self.window else "",
            "sinks" if self.sinks else "",
            f"cap {self.softcap:g}" if self.softcap else "",
            f"prefix {self.shared_prefix}" if self.shared_prefix else "",
            SHORT[self.dtype],
            f"kv {SHORT[self.kv_dtype]}" if self.kv_dtype else "",
        ]
        queries = "" if self.q_len == 1 else f" q{self.q_len}"
        shape = f"decode {self.batch}x{context}{queries} h{self.heads}/{self.kv_heads} d{dim} page {self.page_size}"
        return " ".join([shape, *filter(None, further)])

    @classmethod
    def examples(cls) -> list[Problem]:
        half, single, brain = "float16", "float32", "bfloat16"
        shapes: list[tuple[dict[str, object], tuple[str, ...]]] = [
            ({"kv_lens": (1,), "heads": 2, "kv_heads": 1, "head_dim": 64}, (half, single, brain)),
            ({"kv_lens": (15, 16, 17), "heads": 4, "kv_heads": 2, "head_dim": 64}, (half, single)),
            ({"kv_lens": (100, 0, 3), "heads": 8, "kv_heads": 1, "head_dim": 128}, (half, brain)),
            ({"kv_lens": (257, 31), "heads": 2, "kv_heads": 2, "head_dim": 128, "page_size": 1}, (half, brain)),
            ({"kv_lens": (130, 64), "heads": 6, "kv_heads": 2, "head_dim": 64, "page_size": 64}, (half,)),
            ({"kv_lens": (40, 4, 129), "q_len": 4, "heads": 4, "kv_heads": 1, "head_dim": 64}, (half, single)),
            ({"kv_lens": (77,), "heads": 5, "kv_heads": 1, "head_dim": 256}, (half, brain)),
            ({"kv_lens": (90, 33), "heads": 2, "kv_heads": 1, "head_dim": 64, "logit_gain": 40.0}, (half, single)),
            ({"kv_lens": (61,), "heads": 2, "kv_heads": 1, "head_dim": 64, "logit_gain": 6.0, "page_size": 128}, (half, brain)),
            ({"kv_lens": (900, 300), "heads": 4, "kv_heads": 1, "head_dim": 64}, (half,)),
            ({"kv_lens": (200, 9), "q_len": 2, "heads": 2, "kv_heads": 1, "head_dim": 64, "window": 50}, (half, single)),
            ({"kv_lens": (300, 0, 20), "heads": 8, "kv_heads": 2, "head_dim": 64, "sinks": True, "window": 128}, (half, brain)),
            ({"kv_lens": (150, 33), "heads": 4, "kv_heads": 2, "head_dim": 64, "softcap": 30.0, "sinks": True}, (half, single)),
            ({"kv_lens": (70, 280), "heads": 6, "kv_heads": 2, "head_dim": 64, "q_len": 2, "kv_dtype": FP8}, (half, brain)),
            ({"kv_lens": (200, 0, 97, 130), "heads": 4, "kv_heads": 2, "head_dim": 64, "shared_prefix": 96}, (half, brain)),
        ]
        return [cls(**shape, dtype=dtype) for shape, dtypes in shapes for dtype in dtypes]  # type: ignore[arg-type]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [
            cls((8704,) * 32, heads=32, kv_heads=8, head_dim=128),  # Llama 3.1 8B
            cls((8704,) * 64, heads=32, kv_heads=8, head_dim=128, kv_dtype=FP8),
            cls((8704,) * 64, heads=64, kv_heads=8, head_dim=64, window=128, sinks=True),  # gpt-oss, every other layer
            cls((8704,) * 64, heads=32, kv_heads=8, head_dim=128, shared_prefix=8192),
            cls((8704,) * 32, heads=64, kv_heads=8, head_dim=128, q_len=4),  # Llama 3.1 70B verifies three guesses
        ]
