"""Attention of a prefill step: many query tokens per sequence, over their own keys, any cached prefix, or another sequence's keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.quantize import FP8_MAX, LEAST_AMAX, activations

if TYPE_CHECKING:
    import torch

FP8 = "float8_e4m3fn"
# Values in cache slots behind a sequence's end, whose keys are 0: each would weigh as much as an average key, and cannot be read unnoticed.
UNUSED_VALUE = 100.0


def offsets(lens: tuple[int, ...]) -> list[int]:
    """Start of each sequence in a packed tensor, and the total at the end: (3, 0, 2) -> [0, 3, 3, 5]."""
    out = [0]
    for length in lens:
        out.append(out[-1] + length)
    return out


@dataclass(frozen=True)
class PrefillAttention(Problem):
    """Softmax(q k^T * scale + mask) v per sequence and head, sequences packed one behind another.

    Sequence i has q_lens[i] query tokens, which are the LAST of its kv_lens[i] = prefix_lens[i] + q_lens[i] tokens; an empty
    `prefix_lens` means none. Causal: query t (counted from 0 among its queries) sees keys 0..prefix+t. With `window` > 0 it sees only
    the last `window` of those, itself included. `kv_tokens`: the kv_lens themselves, any number of them, for attention to other
    sequences' keys (not causal). Query head h reads key/value head h // (heads // kv_heads).
    scale = head_dim^-0.5 * `logit_gain` (a gain above 1 makes adversarially large logits). With `softcap` > 0 the scaled logits x become
    softcap * tanh(x / softcap). With `sinks` each head has one logit more, neither scaled nor capped, that takes part in the softmax's sum
    and has no value (gpt-oss).

    inputs: q [sum q_lens, heads, head_dim] `dtype`; q_offsets, kv_offsets [batch + 1] int32 (where each sequence begins, the total last);
            k [sum kv_lens, kv_heads, head_dim], v [sum kv_lens, kv_heads, head_dim_v], `dtype`.
            With `page_size` > 0 instead of k and v: k_cache [pages, page_size, kv_heads, head_dim], v_cache [.., head_dim_v], and
            block_table [batch, most pages of a sequence] int32: token j of sequence i is row j % page_size of page
            block_table[i, j // page_size]; entries behind a sequence's end are -1. Pages are scattered and hold the new tokens too.
            With `kv_dtype` "float8_e4m3fn" keys and values are of that type, to be multiplied by k_scale, v_scale [kv_heads] float32.
            With `sinks`: sinks [heads] float32.
    outputs: out [sum q_lens, heads, head_dim_v], `dtype`.
    """

    operator: ClassVar[str] = "prefill_attention"

    q_lens: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    prefix_lens: tuple[int, ...] = ()
    head_dim_v: int = 0
    causal: bool = True
    dtype: str = "bfloat16"
    window: int = 0
    logit_gain: float = 1.0
    sinks: bool = False
    softcap: float = 0.0
    kv_dtype: str = ""
    page_size: int = 0
    kv_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.q_lens or min(self.q_lens) < 0 or sum(self.q_lens) == 0:
            raise UsageError(f"prefill_attention needs at least one query token, not q_lens={self.q_lens}")
        for name in ("prefix_lens", "kv_tokens"):
            lens = getattr(self, name)
            if lens and len(lens) != len(self.q_lens):
                raise UsageError(f"{name} has {len(lens)} entries, q_lens {len(self.q_lens)}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UsageError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        sizes = (self.head_dim_v, self.page_size, *self.prefix_lens)
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or min(sizes) < 0 or self.logit_gain <= 0 or self.softcap < 0:
            raise UsageError(f"prefill_attention needs positive sizes and gain, and prefixes of 0 or more: {self.to_json()}")
        if self.window < 0 or (self.window and not self.causal):
            raise UsageError("a sliding window is positive and causal")
        if self.kv_dtype not in ("", FP8):
            raise UsageError(f"keys and values have the problem's dtype ('') or {FP8}, not {self.kv_dtype!r}")
        if self.kv_tokens and (self.causal or self.prefix_lens):
            raise UsageError("keys of another sequence (kv_tokens) are not causal and have no prefix")
        if self.kv_tokens and any(keys < (queries > 0) for queries, keys in zip(self.q_lens, self.kv_tokens, strict=True)):
            raise UsageError(f"every query needs a key, but kv_tokens={self.kv_tokens}")

    @property
    def dim_v(self) -> int:
        """Head dimension of the values: `head_dim` unless `head_dim_v` says otherwise."""
        return self.head_dim_v or self.head_dim

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Cached tokens per sequence, spelled out; 0 where the keys are another sequence's."""
        return self.prefix_lens or (0,) * len(self.q_lens)

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Keys per sequence."""
        return self.kv_tokens or tuple(p + q for p, q in zip(self.prefixes, self.q_lens, strict=True))

    @property
    def pages(self) -> int:
        """Pages in the cache; 0 without one."""
        return sum(-(-length // self.page_size) for length in self.kv_lens) if self.page_size else 0

    @property
    def scale(self) -> float:
        """What the logits are multiplied by."""
        return float(self.head_dim**-0.5 * self.logit_gain)

    def unserved(self, *served: str) -> str | None:
        """Why a kernel that knows, beyond plain attention, only the features `served` (names of fields) cannot run this; or None."""
        features = {
            "sinks": self.sinks and "attention sinks",
            "softcap": self.softcap and "a soft-cap of the logits",
            "kv_dtype": self.kv_dtype and f"keys and values in {SHORT.get(self.kv_dtype)}",
            "page_size": self.page_size and "keys and values in pages",
            "kv_tokens": self.kv_tokens and "keys of another sequence",
        }
        lacking = [text for name, text in features.items() if text and name not in served]
        return f"does not know {' nor '.join(lacking)}" if lacking else None

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        q, k, v = self._drawn(seed, device, row_padding)
        inputs: Tensors = {"q": q}
        for name, x in (("k", k), ("v", v)):
            if self.kv_dtype:
                x, inputs[f"{name}_scale"] = self._narrow(x, row_padding, larger=name == "v")
            inputs[f"{name}_cache" if self.page_size else name] = x
        for name, lens in (("q_offsets", self.q_lens), ("kv_offsets", self.kv_lens)):
            inputs[name] = torch.tensor(offsets(lens), dtype=torch.int32, device=device)
        if self.page_size:
            inputs["block_table"] = torch.tensor(self._table(seed), dtype=torch.int32, device=device)
        if self.sinks:
            spread = random_normal((self.heads,), "float32", seed=seed + 3, device=device)
            inputs["sinks"] = spread.add_(self._usual_sum())
        return inputs

    def _drawn(self, seed: int, device: str, row_padding: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, and k and v (packed or in pages) as they are before fp8: `dtype`, with weight on the borders."""
        rows = (self.pages, self.page_size) if self.page_size else (sum(self.kv_lens),)
        # A soft-cap changes logits of its own size only: queries are scaled so that the keys that matter lose a tenth of an e-fold to it.
        gain = max(1.0, (0.3 * self.softcap**2) ** (1 / 6) / self.logit_gain)

        def draw(i: int, *shape: int, scale: float = 1.0, outliers: bool = False) -> torch.Tensor:
            make = activations if outliers else random_normal
            return make(shape, self.dtype, seed=seed + i, device=device, row_padding=row_padding, scale=scale)

        q = draw(0, sum(self.q_lens), self.heads, self.head_dim, scale=gain)
        # What fp8 costs is judged on keys with outlier channels, as caches have them.
        k = draw(1, *rows, self.kv_heads, self.head_dim, outliers=bool(self.kv_dtype))
        v = draw(2, *rows, self.kv_heads, self.dim_v)
        if device != "meta":
            self._mark_borders(k, v, self._table(seed))
        return q, k, v

    def _narrow(self, x: torch.Tensor, row_padding: int, *, larger: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(fp8 with the padding of its rows, float32 scales [kv_heads]).

        Scales differ between heads and between keys and values (`larger`), so that none can be taken for another: a floating-point
        format does not mind using half of its range. Padding counts 16-bit elements, so that aligned rows stay aligned.
        """
        import torch

        headroom = torch.arange(self.kv_heads, device=x.device) % 4 * 0.25 + (1.5 if larger else 1.0)
        narrow = torch.empty((*x.shape[:-1], x.shape[-1] + 2 * row_padding), dtype=torch_dtype(FP8), device=x.device)[..., : x.shape[-1]]
        if x.device.type == "meta":
            return narrow, headroom
        amax = x.abs().flatten(0, -3).amax(dim=(0, 2)).float().clamp_min(LEAST_AMAX)
        scale = amax / FP8_MAX * headroom
        narrow.copy_((x.float() / scale[:, None]).to(narrow.dtype))
        return narrow, scale

    def _table(self, seed: int) -> list[list[int]]:
        """The pages of each sequence, scattered; -1 behind its end. Drawn on the CPU, so that every device sees the same."""
        import torch

        if not self.page_size:
            return []
        order = torch.randperm(self.pages, generator=torch.Generator().manual_seed(seed)).tolist()
        counts = [-(-length // self.page_size) for length in self.kv_lens]
        return [[order.pop() if j < count else -1 for j in range(max(counts))] for count in counts]

    def _usual_sum(self) -> float:
        """About the logarithm of a row's sum of exponentials, so that a sink takes about half of the weight.

        For n normal logits of deviation s it is log n + s^2 / 2, and s sqrt(2 log n), the largest of them, where that is less.
        """
        most = max(self.kv_lens)
        keys = min(most, self.window or most) / (2 if self.causal and not self.window and not self.prefix_lens else 1)
        deviation = self.logit_gain if not self.softcap else max(self.logit_gain, (0.3 * self.softcap**2) ** (1 / 6))
        deviation = min(deviation, self.softcap or deviation)
        log_keys = math.log(max(2.0, keys))
        return float(min(log_keys + deviation**2 / 2, deviation * (2 * log_keys) ** 0.5 + 0.5))

    def _mark_borders(self, k: torch.Tensor, v: torch.Tensor, table: list[list[int]]) -> None:
        """Give the keys behind a long prefix, and those at a border of what some query sees, a weight in the output.

        One lost key of n changes a row by about n^-1/2, less than bf16's tolerance behind a prefix of 8k: a causal mask that is off by one
        would pass. With larger values there it does not, and a right kernel's relative error stays what it was.
        """
        import torch

        at, gains, unused = [], [], []
        lens = zip(offsets(self.kv_lens), self.prefixes, self.q_lens, self.kv_lens, strict=False)
        for i, (start, prefix, q_len, length) in enumerate(lens):
            gain = dict.fromkeys(range(prefix, length), max(1.0, (prefix / (2 * q_len)) ** 0.5)) if prefix and q_len else {}
            loud = max(1.0, length**0.5 / 2)
            borders: set[int] = set()
            if prefix:
                borders = {0, prefix - 1}
            if not self.causal:
                borders |= {0, length - 1}
            if self.window:
                # The last key that the first, a middle and the last query do not see, and the first one that they do.
                borders |= {p - self.window + j for p in (prefix, prefix + q_len // 2, length - 1) for j in (0, 1)}
                loud = max(1.0, min(self.window, length) ** 0.5 / 2)
            gain |= dict.fromkeys((t for t in borders if 0 <= t < length and q_len), loud)
            rows: Sequence[int] = range(start, start + length)
            if self.page_size:
                rows = _slots(table[i], self.page_size, length)
                unused += _slots(table[i], self.page_size, -(-length // self.page_size) * self.page_size)[length:]
            at += [rows[t] for t in gain]
            gains += list(gain.values())
        flat_k, flat_v = (x.flatten(0, 1) if self.page_size else x for x in (k, v))
        if at:
            flat_v[torch.tensor(at, device=v.device)] *= torch.tensor(gains, device=v.device)[:, None, None].to(v.dtype)
        if unused:
            slots = torch.tensor(unused, device=v.device)
            flat_k[slots], flat_v[slots] = 0.0, UNUSED_VALUE

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        shape = (sum(self.q_lens), self.heads, self.dim_v)
        return {"out": torch.empty(shape, dtype=torch_dtype(self.dtype), device=device)}

    def packed(self, inputs: Tensors, name: str) -> torch.Tensor:
        """The keys ("k") or values ("v") as [sum kv_lens, kv_heads, dim] in float32: gathered from their pages, scales multiplied."""
        import torch

        if self.page_size:
            cache = inputs[f"{name}_cache"].float()
            rows = [cache[table[: -(-n // self.page_size)].long()].flatten(0, 1)[:n] for table, n in self._tabled(inputs["block_table"])]
            x = torch.cat(rows)
        else:
            x = inputs[name].float()
        return x * inputs[f"{name}_scale"][:, None] if self.kv_dtype else x

    def _tabled(self, block_table: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        return list(zip(block_table, self.kv_lens, strict=True))

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        q, k, v = inputs["q"].float(), self.packed(inputs, "k"), self.packed(inputs, "v")
        out = torch.empty((q.shape[0], self.heads, self.dim_v), dtype=torch.float32, device=q.device)
        q_at, kv_at = offsets(self.q_lens), offsets(self.kv_lens)
        group = self.heads // self.kv_heads
        for i, q_len in enumerate(self.q_lens):
            if q_len == 0:
                continue
            position = torch.arange(q_len, device=q.device)[:, None] + self.prefixes[i]
            key = torch.arange(self.kv_lens[i], device=q.device)[None, :]
            hidden = (key > position) if self.causal else torch.zeros_like(key > position)
            if self.window:
                hidden = hidden | (key <= position - self.window)
            # Head by head, so that 16k x 16k scores of 64 heads never exist at once (68 GB in float32).
            for head in range(self.heads):
                scores = q[q_at[i] : q_at[i + 1], head] @ k[kv_at[i] : kv_at[i + 1], head // group].T * self.scale
                if self.softcap:
                    scores = torch.tanh(scores / self.softcap) * self.softcap
                scores.masked_fill_(hidden, float("-inf"))
                if self.sinks:
                    scores = torch.cat((scores, inputs["sinks"][head].expand(q_len, 1)), dim=1)
                weights = scores.softmax(dim=-1)[:, : self.kv_lens[i]]
                out[q_at[i] : q_at[i + 1], head] = weights @ v[kv_at[i] : kv_at[i + 1], head // group]
        return {"out": out}

    def visible_pairs(self) -> int:
        """Query-key pairs that the mask lets through, summed over sequences (for one head)."""
        total = 0
        for prefix, q_len, kv_len in zip(self.prefixes, self.q_lens, self.kv_lens, strict=True):
            if not self.causal:
                total += q_len * kv_len
            else:
                pairs = q_len * prefix + q_len * (q_len + 1) // 2
                # Query at position p (0-based) loses max(0, p + 1 - window) keys to the window.
                last = prefix + q_len - self.window
                if self.window and last > 0:
                    first = max(prefix + 1 - self.window, 0)
                    pairs -= last * (last + 1) // 2 - (max(first - 1, 0)) * max(first, 0) // 2
                total += pairs
        return total

    def flops(self) -> float:
        return 2.0 * self.visible_pairs() * self.heads * (self.head_dim + self.dim_v)

    def bytes_moved(self) -> float:
        dim = self.head_dim + self.dim_v
        # Nobody reads the keys of a sequence that has no query in this step.
        lens = [(q, kv) for q, kv in zip(self.q_lens, self.kv_lens, strict=True) if q]
        kv_tokens = sum(min(kv, self.window + q - 1) if self.window else kv for q, kv in lens)
        queries = SIZE_BYTES[self.dtype] * sum(self.q_lens) * self.heads * dim
        keys = SIZE_BYTES[self.kv_dtype or self.dtype] * kv_tokens * self.kv_heads * dim
        small = 4 * (self.pages + self.heads * self.sinks + 2 * self.kv_heads * bool(self.kv_dtype))
        return float(queries + keys + small)

    def tolerance(self) -> float:
        # The output is rounded once (about 0.6 u) and the probabilities are rounded to `dtype` before the second product: each
        # averages over keys with independent errors of u, relative to an output whose own norm shrinks alike. Logits are
        # accumulated in float32; q is pre-scaled in some kernels, one more rounding of the logits, which grows with their size.
        # 3 u covers the sum; fp32 kernels are bounded by the exponential's and the sums' error, not by u.
        # Large logits (`logit_gain`) loosen nothing in 16 bits: a kernel keeps them in float32. In fp32 they cost their own round-off.
        # fp8 keys and values loosen nothing either: the reference has the same ones, and they are exact in 16 bits. (Queries rounded to
        # fp8 would be 2e-2 off, so that a product of keys and queries on fp8 tensor cores is another problem.)
        u = UNIT_ROUNDOFF[self.dtype]
        return 2e-5 * max(1.0, self.logit_gain) if self.dtype == "float32" else 3.0 * u

    def wide(self) -> Problem | None:
        return replace(self, kv_dtype="") if self.kv_dtype else None

    def wide_inputs(self, *, seed: int, device: str = "cpu") -> Tensors:
        q, k, v = self._drawn(seed, device, 0)
        inputs = self.inputs(seed=seed, device=device)
        names = ("k_cache", "v_cache") if self.page_size else ("k", "v")
        kept = {name: x for name, x in inputs.items() if name not in ("k_scale", "v_scale")}
        return kept | {"q": q, names[0]: k, names[1]: v}

    @classmethod
    def approximations(cls, wide: Problem) -> list[Problem]:
        return [replace(wide, kv_dtype=FP8)] if isinstance(wide, cls) and not wide.kv_dtype else []

    def label(self) -> str:
        lens, prefixes, keys = set(self.q_lens), set(self.prefixes), set(self.kv_tokens)
        tokens = f"{len(self.q_lens)}x{self.q_lens[0]}" if len(lens) == 1 else f"{len(self.q_lens)} seqs, {sum(self.q_lens)} tokens"
        others = [] if prefixes == {0} else [f"+{max(prefixes)} cached"]
        others += [f"over {max(keys)}"] if len(keys) == 1 else [f"over {min(keys)}..{max(keys)}"] if keys else []
        dim = f"{self.head_dim}" if self.dim_v == self.head_dim else f"{self.head_dim}/{self.dim_v}"
        mask = ("causal" if self.causal else "full") + (f" window {self.window}" if self.window else "")
        features = (
            [f"cap {self.softcap:g}"] * bool(self.softcap) + ["sinks"] * self.sinks + [f"page {self.page_size}"] * bool(self.page_size)
        )
        kinds = f"{SHORT[self.dtype]}" + (f" kv {SHORT[self.kv_dtype]}" if self.kv_dtype else "")
        return " ".join(["prefill", tokens, *others, f"h{self.heads}/{self.kv_heads} d{dim}", mask, *features, kinds])

    @classmethod
    def examples(cls) -> list[Problem]:
        two = {"heads": 2, "kv_heads": 1, "head_dim": 64}
        windowed = {"q_lens": (80, 9), "prefix_lens": (5, 60), "heads": 4, "kv_heads": 2, "head_dim": 64, "window": 17}
        half, both, brain = ("float16",), ("float16", "float32"), ("bfloat16",)
        # Each feature alone or with one other, then together. Every specialisation of a CUDA kernel costs its emulation 2 s.
        shapes: list[tuple[tuple[str, ...], dict[str, object]]] = [
            (both, {**two, "q_lens": (1,)}),
            ((*both, *brain), {"q_lens": (65, 0, 7), "heads": 2, "kv_heads": 2, "head_dim": 64}),
            (half, {**two, "q_lens": (16, 40), "prefix_lens": (19, 0), "head_dim": 128}),
            (both, {"q_lens": (5, 1), "prefix_lens": (64, 127), "heads": 3, "kv_heads": 1, "head_dim": 64}),
            (half, {**two, "q_lens": (70, 3), "causal": False}),
            (both, {**two, "q_lens": (37,), "head_dim": 256}),
            (half, {"q_lens": (37,), "heads": 2, "kv_heads": 2, "head_dim": 192, "head_dim_v": 128}),
            (both, {**two, "q_lens": (50,), "logit_gain": 40.0}),
            (brain, {**two, "q_lens": (39,), "logit_gain": 6.0}),
            (("float32", "bfloat16"), windowed),
            (half, {**windowed, "sinks": True}),
            (both, {**two, "q_lens": (36,), "softcap": 4.0, "logit_gain": 3.0, "sinks": True}),
            (half, {"q_lens": (70, 9), "kv_tokens": (19, 75), "causal": False, "heads": 2, "kv_heads": 2, "head_dim": 80}),
            (half, {"q_lens": (33, 20), "prefix_lens": (0, 40), "heads": 4, "kv_heads": 2, "head_dim": 64, "kv_dtype": FP8}),
            (half, {**two, "q_lens": (20, 5, 0), "prefix_lens": (45, 100, 0), "page_size": 16}),
            (brain, {**two, "q_lens": (17,), "prefix_lens": (60,), "page_size": 1, "softcap": 20.0}),
            (half, {**two, "q_lens": (34, 2), "prefix_lens": (70, 5), "page_size": 64, "window": 50, "sinks": True, "kv_dtype": FP8}),
            (half, {"q_lens": (40,), "heads": 1, "kv_heads": 1, "head_dim": 72, "causal": False, "page_size": 128}),
        ]
        return [cls(**shape, dtype=dtype) for dtypes, shape in shapes for dtype in dtypes]  # type: ignore[arg-type]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        llama = {"heads": 32, "kv_heads": 8, "head_dim": 128}
        gpt_oss = {"heads": 64, "kv_heads": 8, "head_dim": 64, "window": 128, "sinks": True}
        gemma = {"heads": 32, "kv_heads": 16, "head_dim": 128, "window": 4096, "softcap": 50.0}
        return [
            cls((8192,), **llama),  # type: ignore[arg-type]
            cls((2048,) * 2, **llama, prefix_lens=(30720, 14336), page_size=16),  # type: ignore[arg-type]
            cls((8192,), **gpt_oss),  # type: ignore[arg-type]
            cls((8192,), **gemma),  # type: ignore[arg-type]
            cls((8192,), 128, 128, 192, head_dim_v=128),
        ]


def _slots(pages: list[int], page_size: int, tokens: int) -> list[int]:
    """Rows of a cache, its pages one behind another, that hold a sequence's first `tokens` tokens."""
    return [pages[t // page_size] * page_size + t % page_size for t in range(tokens)]
