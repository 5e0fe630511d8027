"""What a chip's evidence is made of: whose kernels are compared, and of which problems the whole space is recorded."""

from __future__ import annotations

from dataclasses import dataclass

from klab.kernels.contract import Chip, Problem
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention

# Written name@tensor_parallel, as the campaign takes them.
MODELS = {
    "cuda": ("llama-3.1-8b", "llama-3.1-70b@4", "qwen3-30b-a3b", "deepseek-v3@8"),
    "cpu": ("qwen3-0.6b",),
}


@dataclass(frozen=True)
class SpaceOf:
    """A problem whose whole space is recorded; `kernels`: bare names of those whose candidates are tried, empty for all that are tuned."""

    problem: Problem
    kernels: tuple[str, ...] = ()


def spaces(chip: Chip) -> list[SpaceOf]:
    """In the order of their worth for the seconds they take: the small spaces first, since a large one may outlast a sitting."""
    if chip.kind == "cpu":
        return [SpaceOf(Matmul(m, 512, 512, "float32")) for m in (1, 64)]
    # Attention of llama-3.1-8b, the experts of qwen3-30b-a3b, the gate projection of llama-3.1-8b.
    return [
        SpaceOf(DecodeAttention(kv_lens=(8192,) * 32, heads=32, kv_heads=8, head_dim=128)),
        SpaceOf(PrefillAttention(q_lens=(8192,), heads=32, kv_heads=8, head_dim=128)),
        SpaceOf(Matmul(16, 14336, 4096)),
        *(SpaceOf(FusedMoe(tokens, 2048, 768, 128, 8)) for tokens in (64, 1024)),
        *(SpaceOf(Matmul(m, 14336, 4096)) for m in (512, 4096)),
    ]
