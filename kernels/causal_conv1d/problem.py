"""The short causal convolution before linear attention: each channel over its own last few inputs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CausalConv1d(Problem):
    """out[t, c] = act(sum over j < width of weight[c, j] * x[t - width + 1 + j, c]) within each sequence, summed in float32.

    What lies before a sequence's first token is its conv_state, whose last row is the newest input. Sequences of length 1 everywhere are
    a decode step; one of length 0 keeps its state. `activation` is "silu" or "" (none).

    inputs: x [tokens, channels], packed; weight [channels, width]; conv_state [batch, width - 1, channels], all `dtype`;
            seq_offsets [batch + 1] int32.
    outputs: out [tokens, channels]; final_state, as conv_state: the last width - 1 inputs of each sequence.
    """

    operator: ClassVar[str] = "causal_conv1d"

    seq_lens: tuple[int, ...]
    channels: int
    width: int = 4
    activation: str = "silu"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if not self.seq_lens or min(self.seq_lens) < 0 or sum(self.seq_lens) == 0:
            raise UsageError(f"causal_conv1d needs at least one token, not seq_lens={self.seq_lens}")
        if self.channels < 1 or self.width < 2:
            raise UsageError(f"causal_conv1d needs channels and a width of 2 or more, not {self.channels}, {self.width}")
        if self.activation not in ("silu", ""):
            raise UsageError(f"activation is silu or empty, not {self.activation!r}")

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

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        def draw(i: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
            return random_normal(shape, self.dtype, seed=seed + i, device=device, row_padding=row_padding, scale=scale)

        return {
            "x": draw(0, self.tokens, self.channels),
            "weight": draw(1, self.channels, self.width, scale=self.width**-0.5),
            "conv_state": draw(2, self.batch, self.width - 1, self.channels),
            "seq_offsets": torch.tensor(self.offsets, dtype=torch.int32, device=device),
        }

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        dtype = torch_dtype(self.dtype)
        return {
            "out": torch.empty((self.tokens, self.channels), dtype=dtype, device=device),
            "final_state": torch.empty((self.batch, self.width - 1, self.channels), dtype=dtype, device=device),
        }

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        x, weight, state = (inputs[name].double() for name in ("x", "weight", "conv_state"))
        out, final = torch.empty_like(x), torch.empty_like(state)
        for i, length in enumerate(self.seq_lens):
            first = self.offsets[i]
            seen = torch.cat([state[i], x[first : first + length]])  # [width - 1 + length, channels]
            final[i] = seen[length:]
            terms = [seen[j : j + length] * weight[:, j] for j in range(self.width)]
            total = torch.stack(terms).sum(0)
            out[first : first + length] = torch.nn.functional.silu(total) if self.activation else total
        return {"out": out, "final_state": final}

    def flops(self) -> float:
        return float(self.tokens * self.channels * (2 * self.width + (4 if self.activation else 0)))

    def bytes_moved(self) -> float:
        elements = self.channels * (2 * self.tokens + 2 * self.batch * (self.width - 1) + self.width)
        return float(SIZE_BYTES[self.dtype] * elements)

    def tolerance(self) -> float:
        # Products of 16-bit numbers are exact in float32 and few: only the output's rounding shows (0.6 u). A library may round the sum
        # once more before the activation, which SiLU amplifies by at most 1.1: 0.9 u. A few hundred outputs scatter by half of that.
        return 2e-6 if self.dtype == "float32" else 1.5 * UNIT_ROUNDOFF[self.dtype]

    def tolerance_of(self, output: str) -> float:
        # The state is copied: any difference is a mistake, and the tolerance must only be above 0.
        return 1e-9 if output == "final_state" else self.tolerance()

    def label(self) -> str:
        lens = set(self.seq_lens)
        if self.is_decode:
            tokens = f"decode {self.batch}"
        else:
            tokens = f"{self.batch}x{self.seq_lens[0]}" if len(lens) == 1 else f"{self.batch} seqs, {self.tokens} tokens"
        return (
            f"causal conv1d {tokens} c{self.channels} w{self.width}{' ' + self.activation if self.activation else ''} {SHORT[self.dtype]}"
        )

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes: list[dict[str, object]] = [
            {"seq_lens": (1, 0, 1), "channels": 64},
            {"seq_lens": (2, 5, 0, 3), "channels": 136},
            {"seq_lens": (37, 1), "channels": 520},
        ]
        made: list[Problem] = [
            cls(**shape, dtype=dtype)  # type: ignore[arg-type]
            for shape in shapes
            for dtype in ("float16", "float32", "bfloat16")
        ]
        return [*made, cls((9, 4), 24, width=3, activation="", dtype="float32"), cls((6,), 19, dtype="float16"), cls((1, 1), 19)]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        channels = 2 * 16 * 128 + 32 * 128  # Qwen3-Next 80B-A3B: queries, keys and values
        return [cls((8192,), channels), cls((1,) * 64, channels)]
