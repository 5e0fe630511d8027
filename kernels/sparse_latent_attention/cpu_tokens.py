"""Sparse latent attention on a CPU in torch operations: a few tokens at a time, whose gathered rows stay in the cache between products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.sparse_latent_attention.problem import SparseLatentAttention


@dataclass(frozen=True)
class CpuTokensConfig(Config):
    """A step takes `tokens` tokens as one batch; `narrow_values` multiplies weights and values in the problem's dtype, not in float32."""

    tokens: int = 1
    narrow_values: bool = False


def fits(problem: SparseLatentAttention, config: CpuTokensConfig, chip: Chip) -> str | None:
    """No more tokens than there are; only 16-bit problems have a choice of products."""
    if not 1 <= config.tokens <= problem.tokens:
        return "more tokens at a time than there are"
    return "float32 is multiplied in float32 either way" if config.narrow_values and problem.dtype == "float32" else None


def space(problem: SparseLatentAttention, chip: Chip) -> Iterator[CpuTokensConfig]:
    """1 to 64 tokens, both kinds of products."""
    for tokens, narrow in product((1, 2, 4, 8, 16, 32, 64), (False, True)):
        yield CpuTokensConfig(tokens, narrow)


@kernel(SparseLatentAttention, backend="cpu", config=CpuTokensConfig, space=space, fits=fits, kinds=("cpu",))
def cpu_tokens(problem: SparseLatentAttention, config: CpuTokensConfig, chip: Chip) -> Launch:
    """CPU attention over listed slots in torch: rows gathered for a few tokens at a time, logits in float32."""

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        cache, page = inputs["kv_cache"], problem.page_size
        for at in range(0, problem.tokens, config.tokens):
            listed = inputs["indices"][at : at + config.tokens].long()
            slots = listed.clamp(min=0)
            rows = cache[slots // page, slots % page]
            values = rows[..., : problem.kv_lora_rank]
            wide = rows.float()
            scores = inputs["q"][at : at + config.tokens].float() @ wide.transpose(1, 2)
            hidden = (listed < 0)[:, None, :]
            weights = scores.mul_(problem.scale).masked_fill_(hidden, -torch.inf).softmax(dim=-1)
            narrow = config.narrow_values
            out = weights.to(values.dtype) @ values if narrow else weights @ wide[..., : problem.kv_lora_rank]
            outputs["out"][at : at + config.tokens].copy_(out.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0))

    return launch
