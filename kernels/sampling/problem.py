"""Sampling: from the logits of a step to one token per sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, random_normal
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch

# How far the draw may lie outside a token's interval of the cumulative distribution, and how far top_p may be missed: float32 sums of
# 256k weights, each off by 2e-6 for the rounding of (logit - max) / temperature * log2(e) at 30.
CUMULATIVE_SLACK = 2e-5
# Of a trained network's logits a few dozen tokens hold nearly all the probability: these many stand out of the normal body.
HOT_TOKENS = 48
BODY_SIGMA = 2.0


@dataclass(frozen=True)
class Sampling(Problem):
    """Where the draw falls in the cumulative distribution of softmax(logits / temperature) over the tokens kept; greedy at temperature 0.

    top_k > 0 keeps every token whose logit is at least the k-th largest (equal logits stay together, as in vLLM and FlashInfer). Of those,
    top_p < 1 keeps every token whose logit is at least the largest value whose tokens and all above hold top_p of what top_k left. The
    token is the first, by index, at which the running sum of the kept probabilities exceeds draw * their total. Greedy: a largest logit.

    `flat` drops the tokens that stand out: then thousands are kept, as with a high temperature.

    inputs: logits [rows, vocab], `dtype` (-inf marks a token that a grammar forbids; no NaN, no +inf), draw [rows] float32 in [0, 1).
    outputs: token [rows] int32.
    """

    operator: ClassVar[str] = "sampling"

    rows: int
    vocab: int
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    dtype: str = "float32"
    flat: bool = False

    def __post_init__(self) -> None:
        if min(self.rows, self.vocab) < 1 or min(self.top_k, self.temperature) < 0 or not 0 < self.top_p <= 1:
            raise UsageError(f"sampling needs rows, a vocabulary, top_k and temperature of 0 or more and top_p in (0, 1]: {self.to_json()}")

    @property
    def greedy(self) -> bool:
        """Whether the draw plays no part."""
        return self.temperature == 0 or self.top_k == 1

    @property
    def filtered(self) -> bool:
        """Whether top_k or top_p may drop tokens."""
        return not self.greedy and (0 < self.top_k < self.vocab or self.top_p < 1)

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        logits = random_normal((self.rows, self.vocab), self.dtype, seed=seed, device=device, row_padding=row_padding, scale=BODY_SIGMA)
        if device == "meta":
            return {"logits": logits, "draw": torch.empty(self.rows, dtype=torch.float32, device=device)}
        generator = torch.Generator().manual_seed(seed)
        row = torch.arange(self.rows)
        if not self.flat:
            # The body's logarithm of the sum of exponentials, so that it is left with about a hundredth of the probability.
            height = math.log(self.vocab) + BODY_SIGMA**2 / 2
            count = min(HOT_TOKENS, self.vocab)
            hot = torch.randint(self.vocab, (self.rows, count), generator=generator)
            hot[:, 0], hot[:, -1] = torch.where(row % 2 == 0, self.vocab - 1, 0), torch.where(row % 3 == 0, 0, self.vocab - 1)
            values = height + 2.0 * torch.randn((self.rows, count), generator=generator)
            logits[row[:, None].to(device), hot.to(device)] = values.to(device, logits.dtype)
        # Every fourth row has forbidden tokens, the first ones among them.
        forbidden = torch.randint(self.vocab, (self.rows // 4, self.vocab // 16), generator=generator)
        logits[row[3::4, None].to(device), forbidden.to(device)] = float("-inf")
        draw = torch.rand(self.rows, generator=generator)
        draw[row % 8 == 1], draw[row % 8 == 2] = 0.0, 1.0 - 2.0**-24
        return {"logits": logits, "draw": draw.to(device)}

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"token": torch.empty(self.rows, dtype=torch.int32, device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        """token [rows] int32; beside it what `mismatch` tells by.

        kept, cumulative [1 or 2, rows, vocab]: tokens that are kept and the running sum of their probabilities (float64), when top_p is
        missed by the slack in either direction (the two differ only where a threshold hangs on rounding).
        """
        import torch

        logits = inputs["logits"].double()
        if self.greedy:
            return {"token": logits.argmax(dim=-1).to(torch.int32), "kept": (logits == logits.amax(dim=-1, keepdim=True))[None]}
        weight = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).exp()
        kept = torch.ones_like(logits, dtype=torch.bool)
        if 0 < self.top_k < self.vocab:
            kept = logits >= logits.topk(self.top_k, dim=-1).values[:, -1:]
        weight = weight * kept
        sets = [kept & (weight > 0)]
        if self.top_p < 1:
            sets = [self._nucleus(weight, self.top_p + slack) for slack in (-CUMULATIVE_SLACK, CUMULATIVE_SLACK)]
            if bool((sets[0] == sets[1]).all()):
                sets = sets[:1]
        kept = torch.stack(sets)
        running = (weight * kept).cumsum(dim=-1)
        cumulative = running / running[..., -1:]
        chosen = torch.searchsorted(cumulative[0], inputs["draw"].double()[:, None], right=True)[:, 0]
        token = chosen.clamp_max(self.vocab - 1).to(torch.int32)
        return {"token": token, "kept": kept, "cumulative": cumulative, "draw": inputs["draw"].double()}

    @staticmethod
    def _nucleus(weight: torch.Tensor, top_p: float) -> torch.Tensor:
        """The tokens of at least the largest weight for which they hold top_p of all; [rows, vocab] bool."""
        import torch

        descending = weight.sort(dim=-1, descending=True).values
        running = descending.cumsum(dim=-1)
        last = torch.searchsorted(running, min(top_p, 1.0) * running[:, -1:] * (1 - 1e-12)).clamp_max(weight.shape[-1] - 1)
        return (weight >= descending.gather(-1, last)) & (weight > 0)

    def mismatch(self, output: str, got: torch.Tensor, reference: Tensors) -> str:
        """A token is right when it is kept and the draw lies in its interval of the cumulative distribution, give or take the slack."""
        at = got.long()
        if bool(((at < 0) | (at >= self.vocab)).any()):
            return f"{int(((at < 0) | (at >= self.vocab)).sum())} of {self.rows} tokens are none of the vocabulary"
        kept = reference["kept"]
        index = at.expand(kept.shape[0], -1)[..., None]
        right = kept.gather(-1, index)[..., 0]
        if not self.greedy:
            cumulative, draw = reference["cumulative"], reference["draw"]
            high = cumulative.gather(-1, index)[..., 0]
            low = cumulative.gather(-1, (index - 1).clamp_min(0))[..., 0] * (at > 0)
            right = right & (low - CUMULATIVE_SLACK <= draw) & (draw <= high + CUMULATIVE_SLACK)
        wrong = int((~right.any(dim=0)).sum())
        return f"{wrong} of {self.rows} tokens are not where the draw falls" if wrong else ""

    def flops(self) -> float:
        return float((1 if self.greedy else 4) * self.rows * self.vocab)

    def bytes_moved(self) -> float:
        return float(SIZE_BYTES[self.dtype] * self.rows * self.vocab + 8 * self.rows)

    def tolerance(self) -> float:
        # The output is an integer: `mismatch` judges it.
        return 1.0

    def label(self) -> str:
        parts = ["greedy" if self.greedy else "sample", f"{self.rows}x{self.vocab}"]
        if not self.greedy:
            parts += [f"k{self.top_k}" if self.top_k else "", f"p{self.top_p:g}" if self.top_p < 1 else "", f"t{self.temperature:g}"]
        return " ".join([*filter(None, parts), "flat" * self.flat, SHORT[self.dtype]]).replace("  ", " ")

    @classmethod
    def examples(cls) -> list[Problem]:
        return [
            cls(5, 3001, dtype="float16"),
            cls(5, 3001, dtype="bfloat16"),
            # With 23 groups of 128 their maxima bound the 20th logit; with 11 they do not, and every logit stays a candidate.
            cls(4, 2900, top_k=20, top_p=0.9, temperature=0.7, dtype="float16"),
            cls(4, 1300, top_k=20, top_p=0.9, temperature=0.7, dtype="bfloat16"),
            cls(1, 1, dtype="float16"),
            cls(5, 1500, temperature=0.0, dtype="float16"),
            cls(1, 2048, top_p=0.95, temperature=1.5, dtype="float16", flat=True),
            cls(2, 700, top_k=40, dtype="float16"),
            cls(5, 1301),
            cls(1, 3000, top_k=1500, top_p=0.8, flat=True),
            cls(2, 40, top_k=64, top_p=0.5),
        ]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [  # Llama 3.1's vocabulary, a full batch and one sequence; Qwen 3's with its recommended settings; greedy
            cls(128, 128256, top_p=0.95),
            cls(1, 128256, top_p=0.9, temperature=0.7),
            cls(32, 151936, top_k=20, top_p=0.95, temperature=0.6),
            cls(64, 151936, temperature=0.0),
        ]
