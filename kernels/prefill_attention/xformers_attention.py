"""xformers' memory-efficient attention with its block-diagonal masks.

Written for xformers 0.0.35 (xformers.ops.fmha), which chooses among its own kernels, FlashAttention 2 and 3.
"""

from __future__ import annotations

from typing import Any

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.outside import XFORMERS, PerDevice
from klab.kernels.prefill_attention.problem import PrefillAttention


def fits(problem: PrefillAttention, config: Config, chip: Chip) -> str | None:
    """Packed keys; rows of 16 bytes."""
    p = problem
    if lacking := p.unserved("kv_tokens"):
        return lacking
    if any(dim * SIZE_BYTES[p.dtype] % 16 for dim in (p.head_dim, p.dim_v)):
        return "xformers takes heads of a multiple of 16 bytes"
    if p.head_dim != p.dim_v:
        return "xformers' flash kernels take values of the same head dimension only"
    if not min(p.q_lens):
        return "xformers' masks are of sequences with queries"
    return None


@kernel(PrefillAttention, backend="torch", fits=fits, library=True, requires=XFORMERS)
def xformers_attention(problem: PrefillAttention, config: Config, chip: Chip) -> Launch:
    """xformers' memory_efficient_attention_forward with a block-diagonal mask made once; its output is copied."""
    from xformers.ops import fmha

    p = problem
    group = p.heads // p.kv_heads
    masks = fmha.attn_bias

    def mask_of(device: torch.device) -> Any:
        of = masks.BlockDiagonalCausalFromBottomRightMask if p.causal and not p.window else masks.BlockDiagonalMask
        mask = of.from_seqlens(list(p.q_lens), list(p.kv_lens), device=device)
        # A window counts the query's own key.
        return mask.make_local_attention_from_bottomright(p.window) if p.window else mask

    made = PerDevice(mask_of)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        if group > 1:
            # [1, tokens, key heads, heads of a group, dim], keys without a copy.
            q = q.view(q.shape[0], p.kv_heads, group, p.head_dim)
            k, v = (x[:, :, None].expand(-1, -1, group, -1) for x in (k, v))
        found = fmha.memory_efficient_attention_forward(q[None], k[None], v[None], attn_bias=made.on(q.device), scale=p.scale)
        outputs["out"].copy_(found.view(outputs["out"].shape))

    return launch
