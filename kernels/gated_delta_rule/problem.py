"""Linear attention by the gated delta rule: one state matrix per value head, corrected at each token (Qwen3-Next, Qwen3.5)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch

# Added to the squared norm of a query or key before the root, as the models do it (transformers, modeling_qwen3_next.py, l2norm).
NORM_EPSILON = 1e-6
# Up to so many tokens per sequence, one after the other in float32 is what everybody does: chunks of 16-bit products save nothing there.
SHORT_TOKENS = 16


@dataclass(frozen=True)
class GatedDeltaRule(Problem):
    """Per sequence and value head, token by token, in float32 (Yang et al., "Gated Delta Networks", arXiv 2412.06464):

        S <- exp(g) S;   S <- S + k (beta (v - S^T k))^T;   out = S^T q * key_dim^-0.5

    Value head h reads query and key head h // (value_heads // key_heads). With `qk_norm`, q and k are divided by the root of
    their squared norm + 1e-6 first. Sequences of length 1 everywhere are a decode step; a sequence of length 0 keeps its state.
    `decay` is the median of -g per token, which is log-normal; `key_offset` is what all queries and keys have in common, in units
    of their spread: SiLU gives real ones such a mean, and it is what makes a chunk's system of equations hard.
    Not covered by `inputs`: g near -100 on single tokens among weak ones. Triton's chunks cumulate g in float32 and then lose the last
    bits of the decays after such a token: in fp32 8e-6 with chunks of 16 and 1.6e-5 with 32, more than the tolerance; in 16 bits nothing.

    inputs: q, k [tokens, key_heads, key_dim] and v [tokens, value_heads, value_dim], packed, `dtype`; g (at most 0), beta (0 to 1)
            [tokens, value_heads] float32; initial_state [batch, value_heads, key_dim, value_dim] `state_dtype`;
            seq_offsets [batch + 1] int32.
    outputs: out [tokens, value_heads, value_dim] `dtype`; final_state, as initial_state.
    """

    operator: ClassVar[str] = "gated_delta_rule"

    seq_lens: tuple[int, ...]
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    dtype: str = "bfloat16"
    state_dtype: str = "float32"
    qk_norm: bool = True
    decay: float = 0.05
    key_offset: float = 0.5

    def __post_init__(self) -> None:
        if not self.seq_lens or min(self.seq_lens) < 0 or sum(self.seq_lens) == 0:
            raise UsageError(f"gated_delta_rule needs at least one token, not seq_lens={self.seq_lens}")
        if min(self.key_heads, self.value_heads, self.key_dim, self.value_dim) < 1 or self.value_heads % self.key_heads:
            raise UsageError(f"gated_delta_rule needs positive sizes and key heads that divide the value heads: {self.to_json()}")
        if self.decay < 0:
            raise UsageError(f"decay is 0 or more, not {self.decay}")
        if self.state_dtype not in ("float32", "bfloat16"):
            raise UsageError(f"state_dtype is float32 or bfloat16, not {self.state_dtype!r}")

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.seq_lens)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.seq_lens)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First token of each sequence, and the number of tokens at the end."""
        return tuple(accumulate(self.seq_lens, initial=0))

    @property
    def is_decode(self) -> bool:
        """At most one token per sequence."""
        return max(self.seq_lens) == 1

    @property
    def is_short(self) -> bool:
        """Few tokens per sequence (decoding, also of several drafted tokens): all arithmetic is float32, and the tolerance says so."""
        return max(self.seq_lens) <= SHORT_TOKENS

    @property
    def scale(self) -> float:
        """What the queries are multiplied by."""
        return float(self.key_dim**-0.5)

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        def draw(i: int, *shape: int, dtype: str = self.dtype, scale: float = 1.0) -> torch.Tensor:
            return random_normal(shape, dtype, seed=seed + i, device=device, row_padding=row_padding, scale=scale)

        q, k = (draw(i, self.tokens, self.key_heads, self.key_dim) for i in (0, 1))
        gates = (self.tokens, self.value_heads)
        g, beta = draw(3, *gates, dtype="float32"), draw(4, *gates, dtype="float32")
        # In place: their rows stay as far apart as they were drawn. Without the norm, keys longer than 1 would let the state grow.
        for keys in (q, k):
            keys.add_(self.key_offset)
            if not self.qk_norm:
                keys.mul_((self.key_dim * (1.0 + self.key_offset**2)) ** -0.5)
        g.exp_().mul_(-self.decay)
        beta.sigmoid_()
        return {
            "q": q,
            "k": k,
            "v": draw(2, self.tokens, self.value_heads, self.value_dim),
            "g": g,
            "beta": beta,
            # As large as a state becomes: S^T k of a unit key is about one value.
            "initial_state": draw(5, self.batch, self.value_heads, self.key_dim, self.value_dim, dtype=self.state_dtype, scale=0.5),
            "seq_offsets": torch.tensor(self.offsets, dtype=torch.int32, device=device),
        }

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        state = (self.batch, self.value_heads, self.key_dim, self.value_dim)
        return {
            "out": torch.empty((self.tokens, self.value_heads, self.value_dim), dtype=torch_dtype(self.dtype), device=device),
            "final_state": torch.empty(state, dtype=torch_dtype(self.state_dtype), device=device),
        }

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        group = self.value_heads // self.key_heads
        q, k, v, g, beta = (inputs[name].double() for name in ("q", "k", "v", "g", "beta"))
        if self.qk_norm:
            q, k = (x * (x.square().sum(-1, keepdim=True) + NORM_EPSILON).rsqrt() for x in (q, k))
        q, k = (x.repeat_interleave(group, dim=1) for x in (q * self.scale, k))
        out = torch.empty_like(v)
        final = inputs["initial_state"].double()
        for i in range(self.batch):
            state = final[i]  # [heads, key_dim, value_dim]
            for t in range(self.offsets[i], self.offsets[i + 1]):
                state = state * g[t].exp()[:, None, None]
                remembered = torch.einsum("hkv,hk->hv", state, k[t])
                correction = beta[t][:, None] * (v[t] - remembered)
                state = state + k[t][:, :, None] * correction[:, None, :]
                out[t] = torch.einsum("hkv,hk->hv", state, q[t])
            final[i] = state
        return {"out": out, "final_state": final}

    def flops(self) -> float:
        # Per element of the state: 1 to decay it, 2 to read it at k, 2 to correct it, 2 to read it at q. The chunked form does more.
        return 7.0 * self.tokens * self.value_heads * self.key_dim * self.value_dim

    def bytes_moved(self) -> float:
        states = 2.0 * SIZE_BYTES[self.state_dtype] * self.batch * self.value_heads * self.key_dim * self.value_dim
        per_token = SIZE_BYTES[self.dtype] * 2 * (self.key_heads * self.key_dim + self.value_heads * self.value_dim) + 8 * self.value_heads
        return states + float(self.tokens * per_token)

    def tolerance(self) -> float:
        # Up to 16 tokens are float32 throughout, so that only the output's rounding shows (0.6 u; fp32: sums of key_dim terms).
        # Chunks round corrections, their weights and the state to `dtype` for the tensor cores, about five roundings of 0.4 u
        # (rms) each, in quadrature, times up to 2 where v and what the state remembers of it cancel. Keys that are alike (`key_offset`)
        # cancel more: a model of these roundings gives 1.2 u with an offset of 0.5, 3.5 u with 1.5 and 5 u with 3. In fp32 the
        # difference of two cumulated decays (up to some hundreds) costs 1e-6.
        if self.dtype == "float32":
            return 5e-6 if self.is_short else 1e-5
        return (1.0 if self.is_short else 3.0 * max(1.0, self.key_offset)) * UNIT_ROUNDOFF[self.dtype]

    def tolerance_of(self, output: str) -> float:
        if output != "final_state" or (self.dtype == "float32" and self.state_dtype == "float32"):
            return self.tolerance()
        rounding = UNIT_ROUNDOFF[self.state_dtype]
        return max(5e-6, rounding) if self.is_short else max(self.tolerance(), rounding)

    def label(self) -> str:
        lens = set(self.seq_lens)
        if self.is_decode:
            tokens = f"decode {self.batch}"
        else:
            tokens = f"{self.batch}x{self.seq_lens[0]}" if len(lens) == 1 else f"{self.batch} seqs, {self.tokens} tokens"
        notes = ("" if self.state_dtype == "float32" else f" state {SHORT[self.state_dtype]}") + ("" if self.qk_norm else " no norm")
        heads = f"h{self.value_heads}/{self.key_heads} d{self.key_dim}/{self.value_dim}"
        return f"gated delta rule {tokens} {heads}{notes} decay {self.decay:g} {SHORT[self.dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes: list[dict[str, object]] = [
            {"seq_lens": (1, 1, 0), "key_heads": 1, "value_heads": 2, "key_dim": 64, "value_dim": 32},
            {"seq_lens": (1,), "key_heads": 1, "value_heads": 1, "key_dim": 128, "value_dim": 64, "state_dtype": "bfloat16"},
            {"seq_lens": (3, 1), "key_heads": 2, "value_heads": 2, "key_dim": 64, "value_dim": 32, "qk_norm": False, "decay": 0.5},
            # Weak decay: the state matters most. Keys that are nearly alike: the chunk's equations do.
            {"seq_lens": (65, 0, 131), "key_heads": 1, "value_heads": 2, "key_dim": 64, "value_dim": 32, "decay": 1e-3},
            {"seq_lens": (100,), "key_heads": 1, "value_heads": 1, "key_dim": 64, "value_dim": 32, "decay": 0.01, "key_offset": 3.0},
            # The decays of 64 tokens multiply to about exp(-500): each must be applied as a difference of logarithms. A whole chunk at the
            # end shows the decay of its last token, which padding would hide.
            {"seq_lens": (70, 64), "key_heads": 1, "value_heads": 1, "key_dim": 128, "value_dim": 64, "decay": 5.0},
        ]
        return [cls(**shape, dtype=dtype) for shape in shapes for dtype in ("float16", "float32", "bfloat16")]  # type: ignore[arg-type]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        qwen = {"key_heads": 16, "value_heads": 32, "key_dim": 128, "value_dim": 128}  # Qwen3-Next 80B-A3B
        return [cls(lens, **qwen) for lens in ((8192,), (1,) * 64, (1,), (1024,) * 16)]  # type: ignore[arg-type]
