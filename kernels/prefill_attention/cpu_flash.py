"""Flash attention on a CPU in torch operations: blocks of queries against blocks of keys, with an online softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import torch_dtype
from klab.kernels.prefill_attention._torch_cache import Cache
from klab.kernels.prefill_attention.problem import PrefillAttention, offsets
from klab.kernels.prefill_tiles import key_span


@dataclass(frozen=True)
class CpuConfig(Config):
    """Tokens and keys per step, and how the heads are worked through.

    `all_heads`: one batched product for all key heads, else one head after the other (a smaller working set). `upcast`: products
    in float32 (keys and values are converted once), else in the problem's own dtype, which pays where the CPU multiplies it.
    """

    block_q: int = 128
    block_kv: int = 256
    all_heads: bool = True
    upcast: bool = True


def space(problem: PrefillAttention, chip: Chip) -> Iterator[CpuConfig]:
    """Blocks from 32x64 to 256x1024."""
    for block_q, block_kv, all_heads, upcast in product((32, 64, 128, 256), (64, 128, 256, 512, 1024), (True, False), (True, False)):
        yield CpuConfig(block_q, block_kv, all_heads, upcast)


def fits(problem: PrefillAttention, config: CpuConfig, chip: Chip) -> str | None:
    """Knobs that change nothing for this problem make no candidate."""
    if problem.dtype == "float32" and not config.upcast:
        return "float32 is multiplied in float32 anyway"
    if problem.dtype == "float16" and not config.upcast:
        return "a block's weighted sum of values would overflow float16"
    if (problem.logit_gain > 4 or problem.softcap) and not config.upcast:
        return "logits this large must not be rounded to 16 bits"
    if problem.kv_heads == 1 and not config.all_heads:
        return "there is one key head only"
    return None


@kernel(PrefillAttention, backend="cpu", config=CpuConfig, space=space, fits=fits, kinds=("cpu",))
def cpu_flash(problem: PrefillAttention, config: CpuConfig, chip: Chip) -> Launch:
    """Flash attention in torch operations: online softmax, hidden blocks skipped, the query heads of a key head in one product."""
    compute = torch.float32 if config.upcast else torch_dtype(problem.dtype)
    heads_at_once = problem.kv_heads if config.all_heads else 1
    q_at, kv_at = offsets(problem.q_lens), offsets(problem.kv_lens)
    cache = Cache(problem)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        keys, values = cache.packed(inputs)
        for i, q_len in enumerate(problem.q_lens):
            q = inputs["q"][q_at[i] : q_at[i + 1]]
            # [key heads, keys, dim]; a copy in float32, or the packed tensor seen otherwise.
            k, v = (x[kv_at[i] : kv_at[i + 1]].to(compute).transpose(0, 1) for x in (keys, values))
            out = outputs["out"][q_at[i] : q_at[i + 1]]
            for first in range(0, q_len, config.block_q):
                last = min(q_len, first + config.block_q) - 1
                for head in range(0, problem.kv_heads, heads_at_once):
                    heads = slice(head, head + heads_at_once)
                    _block(problem, config, i, first, last, heads, q, k[heads], v[heads], inputs.get("sinks"), out)

    return launch


def _block(
    problem: PrefillAttention,
    config: CpuConfig,
    sequence: int,
    first: int,
    last: int,
    heads: slice,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Attention of query tokens first..last over all keys they see, for these key heads; writes into `out`."""
    tokens, group = last + 1 - first, problem.heads // problem.kv_heads
    compute = k.dtype
    # Rows are token x query head of the group: [key heads, tokens * group, dim].
    rows = q[first : last + 1].view(tokens, problem.kv_heads, group, problem.head_dim)[:, heads].transpose(0, 1)
    rows = rows.float().mul(problem.scale).to(compute).reshape(k.shape[0], tokens * group, problem.head_dim)
    position = torch.arange(first, last + 1).repeat_interleave(group)[:, None] + problem.prefixes[sequence]

    acc = torch.zeros(k.shape[0], tokens * group, problem.dim_v)
    total = torch.zeros(k.shape[0], tokens * group, 1)
    # Finite, below any logit: a row whose window begins after the first block would otherwise take -inf from -inf.
    top = torch.full((k.shape[0], tokens * group, 1), -1e30)
    if sinks is not None:  # a key before all others, without a value
        total.fill_(1.0)
        of_rows = sinks.view(problem.kv_heads, 1, group)[heads].expand(-1, tokens, -1)
        top.copy_(of_rows.reshape(top.shape))
    begin, end = key_span(problem, sequence, first, last)
    for start in range(begin, end, config.block_kv):
        stop = min(end, start + config.block_kv)
        weights = torch.bmm(rows, k[:, start:stop].transpose(1, 2)).float()
        if problem.softcap:
            weights.div_(problem.softcap).tanh_().mul_(problem.softcap)
        hides_later = problem.causal and stop - 1 > problem.prefixes[sequence] + first
        hides_earlier = problem.window and start <= problem.prefixes[sequence] + last - problem.window
        if hides_later or hides_earlier:
            key = torch.arange(start, stop)[None, :]
            hidden = key > position
            if hides_earlier:
                hidden |= key <= position - problem.window
            weights.masked_fill_(hidden, float("-inf"))
        new_top = torch.maximum(top, weights.amax(-1, keepdim=True))
        weights.sub_(new_top).exp_()
        decay = top.sub_(new_top).exp_()
        total.mul_(decay).add_(weights.sum(-1, keepdim=True))
        acc.mul_(decay)
        if config.upcast:
            acc.baddbmm_(weights, v[:, start:stop])
        else:
            acc.add_(torch.bmm(weights.to(compute), v[:, start:stop]))
        top = new_top
    result = acc.div_(total).view(k.shape[0], tokens, group, problem.dim_v).transpose(0, 1)
    out[first : last + 1].view(tokens, problem.kv_heads, group, problem.dim_v)[:, heads].copy_(result)
