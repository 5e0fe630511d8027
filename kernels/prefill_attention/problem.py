"""Attention of a prefill step: many query tokens per sequence, over their own keys and any cached prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch


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
    the last `window` of those, itself included. Query head h reads key/value head h // (heads // kv_heads).
    scale = head_dim^-0.5 * `logit_gain` (a gain above 1 makes adversarially large logits).

    inputs: q [sum q_lens, heads, head_dim], k [sum kv_lens, kv_heads, head_dim], v [sum kv_lens, kv_heads, head_dim_v], all `dtype`;
            q_offsets, kv_offsets [batch + 1] int32 (offsets of each sequence in the packed tensors).
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

    def __post_init__(self) -> None:
        if not self.q_lens or min(self.q_lens) < 0 or sum(self.q_lens) == 0:
            raise UsageError(f"prefill_attention needs at least one query token, not q_lens={self.q_lens}")
        if self.prefix_lens and len(self.prefix_lens) != len(self.q_lens):
            raise UsageError(f"prefix_lens has {len(self.prefix_lens)} entries, q_lens {len(self.q_lens)}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UsageError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if min(self.heads, self.kv_heads, self.head_dim) < 1 or min(self.head_dim_v, *self.prefixes) < 0 or self.logit_gain <= 0:
            raise UsageError(f"prefill_attention needs positive sizes and gain, and prefixes of 0 or more: {self.to_json()}")
        if self.window < 0 or (self.window and not self.causal):
            raise UsageError("a sliding window is positive and causal")

    @property
    def dim_v(self) -> int:
        """Head dimension of the values: `head_dim` unless `head_dim_v` says otherwise."""
        return self.head_dim_v or self.head_dim

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Cached tokens per sequence, spelled out."""
        return self.prefix_lens or (0,) * len(self.q_lens)

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Keys per sequence."""
        return tuple(p + q for p, q in zip(self.prefixes, self.q_lens, strict=True))

    @property
    def scale(self) -> float:
        """What the logits are multiplied by."""
        return float(self.head_dim**-0.5 * self.logit_gain)

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        q_tokens, kv_tokens = sum(self.q_lens), sum(self.kv_lens)

        def draw(i: int, tokens: int, heads: int, dim: int) -> torch.Tensor:
            shape = (tokens, heads, dim)
            return random_normal(shape, self.dtype, seed=seed + i, device=device, row_padding=row_padding)

        def ints(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        v = draw(2, kv_tokens, self.kv_heads, self.dim_v)
        if device != "meta":
            self._mark_borders(v)
        return {
            "q": draw(0, q_tokens, self.heads, self.head_dim),
            "k": draw(1, kv_tokens, self.kv_heads, self.head_dim),
            "v": v,
            "q_offsets": ints(offsets(self.q_lens)),
            "kv_offsets": ints(offsets(self.kv_lens)),
        }

    def _mark_borders(self, v: torch.Tensor) -> None:
        """Give the keys behind a long prefix, its ends and the ends of the sequence a weight in the output.

        One lost key of n changes a row by about n^-1/2, less than bf16's tolerance behind a prefix of 8k: a causal mask that is off by one
        would pass. With larger values there it does not, and a right kernel's relative error stays what it was.
        """
        for start, prefix, q_len in zip(offsets(self.kv_lens), self.prefixes, self.q_lens, strict=False):
            if not q_len:
                continue
            length = prefix + q_len
            v[start + prefix : start + length] *= max(1.0, (prefix / (2 * q_len)) ** 0.5)
            for token in {0, length - 1, prefix - 1} & set(range(length)) if prefix else set():
                v[start + token] *= max(1.0, length**0.5 / 2 if token < prefix else 1.0)

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        shape = (sum(self.q_lens), self.heads, self.dim_v)
        return {"out": torch.empty(shape, dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        q, k, v = (inputs[name].float() for name in ("q", "k", "v"))
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
                weights = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
                out[q_at[i] : q_at[i + 1], head] = weights @ v[kv_at[i] : kv_at[i + 1], head // group]
        return {"out": out}

    def visible_pairs(self) -> int:
        """Query-key pairs that the mask lets through, summed over sequences (for one head)."""
        total = 0
        for prefix, q_len in zip(self.prefixes, self.q_lens, strict=True):
            if not self.causal:
                total += q_len * (prefix + q_len)
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
        q_tokens = sum(self.q_lens)
        kv_tokens = sum(min(kv, self.window + q - 1) if self.window else kv for q, kv in zip(self.q_lens, self.kv_lens, strict=True))
        elements = (q_tokens * self.heads + kv_tokens * self.kv_heads) * (self.head_dim + self.dim_v)
        return float(SIZE_BYTES[self.dtype] * elements)

    def tolerance(self) -> float:
        # The output is rounded once (about 0.6 u) and the probabilities are rounded to `dtype` before the second product: each
        # averages over keys with independent errors of u, relative to an output whose own norm shrinks alike. Logits are
        # accumulated in float32; q is pre-scaled in some kernels, one more rounding of the logits, which grows with their size.
        # 3 u covers the sum; fp32 kernels are bounded by the exponential's and the sums' error, not by u.
        # Large logits (`logit_gain`) loosen nothing in 16 bits: a kernel keeps them in float32. In fp32 they cost their own round-off.
        u = UNIT_ROUNDOFF[self.dtype]
        return 2e-5 * max(1.0, self.logit_gain) if self.dtype == "float32" else 3.0 * u

    def label(self) -> str:
        lens, prefixes = set(self.q_lens), set(self.prefixes)
        tokens = f"{len(self.q_lens)}x{self.q_lens[0]}" if len(lens) == 1 else f"{len(self.q_lens)} seqs, {sum(self.q_lens)} tokens"
        prefix = "" if prefixes == {0} else f" +{max(prefixes)} cached"
        dim = f"{self.head_dim}" if self.dim_v == self.head_dim else f"{self.head_dim}/{self.dim_v}"
        mask = ("causal" if self.causal else "full") + (f" window {self.window}" if self.window else "")
        return f"prefill {tokens}{prefix} h{self.heads}/{self.kv_heads} d{dim} {mask} {SHORT[self.dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes: list[dict[str, object]] = [
            {"q_lens": (1,), "heads": 2, "kv_heads": 1, "head_dim": 64},
            {"q_lens": (33,), "heads": 4, "kv_heads": 2, "head_dim": 64},
            {"q_lens": (65, 0, 7), "heads": 2, "kv_heads": 2, "head_dim": 64},
            {"q_lens": (16, 40), "prefix_lens": (19, 0), "heads": 2, "kv_heads": 1, "head_dim": 128},
            {"q_lens": (5, 1), "prefix_lens": (64, 127), "heads": 3, "kv_heads": 1, "head_dim": 64},
            {"q_lens": (70, 3), "heads": 2, "kv_heads": 1, "head_dim": 64, "causal": False},
            {"q_lens": (37,), "heads": 2, "kv_heads": 1, "head_dim": 256},
            {"q_lens": (37,), "heads": 2, "kv_heads": 2, "head_dim": 192, "head_dim_v": 128},
            {"q_lens": (50,), "heads": 2, "kv_heads": 1, "head_dim": 64, "logit_gain": 40.0},
            {"q_lens": (39,), "heads": 2, "kv_heads": 1, "head_dim": 64, "logit_gain": 6.0},
            {"q_lens": (80, 9), "prefix_lens": (5, 60), "heads": 2, "kv_heads": 1, "head_dim": 64, "window": 17},
        ]
        return [cls(**shape, dtype=dtype) for shape in shapes for dtype in ("float16", "float32", "bfloat16")]  # type: ignore[arg-type]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        llama = {"heads": 32, "kv_heads": 8, "head_dim": 128}
        flux = {"heads": 24, "kv_heads": 24, "head_dim": 128, "causal": False}
        return [cls((8192,), **llama), cls((4608,), **flux)]  # type: ignore[arg-type]
