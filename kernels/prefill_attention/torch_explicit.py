"""Attention written out in torch operations: two products and a softmax with every feature, for what no library of torch's serves."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.prefill_attention._torch_cache import Cache
from klab.kernels.prefill_attention.problem import PrefillAttention, offsets
from klab.kernels.prefill_tiles import key_span

# Query tokens at once: 64 heads over 128k keys are 34 GB of scores in float32, their weights half as much.
TOKENS = 1024


@kernel(PrefillAttention, backend="torch", library=True, kinds=("cuda", "cpu"))
def torch_explicit(problem: PrefillAttention, config: Config, chip: Chip) -> Launch:
    """Products by torch's BLAS and a softmax in float32, 1024 query tokens at a time; pages and fp8 are copied to packed 16 bits first."""
    cache = Cache(problem)
    q_at, kv_at = offsets(problem.q_lens), offsets(problem.kv_lens)
    group = problem.heads // problem.kv_heads

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        keys, values = cache.packed(inputs)
        for i, q_len in enumerate(problem.q_lens):
            for first in range(0, q_len, TOKENS):
                tokens = min(TOKENS, q_len - first)
                begin, end = key_span(problem, i, first, first + tokens - 1)
                rows = slice(q_at[i] + first, q_at[i] + first + tokens)
                span = slice(kv_at[i] + begin, kv_at[i] + end)
                # [key heads, group * tokens, dim] against [key heads, keys, dim].
                q = inputs["q"][rows].view(tokens, problem.kv_heads, group, -1).permute(1, 2, 0, 3).flatten(1, 2)
                scores = _product(q, keys[span].permute(1, 2, 0)).mul_(problem.scale).view(problem.heads, tokens, -1)
                if problem.softcap:
                    scores.div_(problem.softcap).tanh_().mul_(problem.softcap)
                if problem.causal:
                    scores.masked_fill_(_hidden(problem, i, first, tokens, begin, end, scores.device), float("-inf"))
                if problem.sinks:
                    scores = torch.cat((scores, inputs["sinks"][:, None, None].expand(-1, tokens, 1)), dim=-1)
                weights = scores.softmax(dim=-1)[..., : end - begin].to(values.dtype)
                out = torch.bmm(weights.view(problem.kv_heads, group * tokens, -1), values[span].transpose(0, 1))
                outputs["out"][rows].copy_(out.view(problem.heads, tokens, -1).transpose(0, 1))

    return launch


def _product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q @ k in float32: 16-bit logits would be 2^-9 of a large logit off."""
    if q.dtype == torch.float32 or q.device.type == "cpu":
        return torch.bmm(q.float(), k.float())
    return torch.bmm(q, k, out_dtype=torch.float32)


def _hidden(problem: PrefillAttention, i: int, first: int, tokens: int, begin: int, end: int, device: torch.device) -> torch.Tensor:
    """[tokens, keys]: True where a query does not see a key."""
    position = torch.arange(problem.prefixes[i] + first, problem.prefixes[i] + first + tokens, device=device)[:, None]
    key = torch.arange(begin, end, device=device)[None, :]
    hidden = key > position
    return hidden | (key <= position - problem.window) if problem.window else hidden
