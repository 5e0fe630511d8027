"""FlashAttention 3's variable-length prefill, on Hopper.

Written for the flash_attn_3::fwd operator of Dao-AILab/flash-attention's hopper folder, whose schema takes an output (arXiv 2407.08608).
"""

from __future__ import annotations

from typing import Any

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.outside import FLASH_ATTN_3
from klab.kernels.prefill_attention.problem import PrefillAttention


def fits(problem: PrefillAttention, config: Config, chip: Chip) -> str | None:
    """What FlashAttention 3 takes."""
    p = problem
    if lacking := p.unserved("softcap", "page_size", "kv_tokens"):
        return lacking
    if p.dtype == "float32":
        return "FlashAttention takes 16-bit types"
    if chip.target != 90:
        return "FlashAttention 3 is Hopper's"
    if p.head_dim > 256 or p.head_dim % 8 or (p.dim_v != p.head_dim and (p.head_dim, p.dim_v) != (192, 128)):
        return "FlashAttention 3 takes head dimensions that are multiples of 8, up to 256, and 192 with 128 for the values"
    return None


@kernel(PrefillAttention, backend="torch", fits=fits, library=True, requires=FLASH_ATTN_3)
def flash_attn_3(problem: PrefillAttention, config: Config, chip: Chip) -> Launch:
    """FlashAttention 3: one variable-length call, over packed or paged keys, into our output."""
    import flash_attn_3._C  # noqa: F401  registers the operator

    p = problem
    forward = torch.ops.flash_attn_3.fwd
    window = {"window_size_left": p.window - 1, "window_size_right": 0} if p.window else {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        keys: dict[str, Any]
        if p.page_size:
            k, v = inputs["k_cache"], inputs["v_cache"]
            # With pages it wants the lengths, not where sequences begin: one subtraction of batch numbers.
            keys = {"page_table": inputs["block_table"], "seqused_k": inputs["kv_offsets"].diff()}
        else:
            k, v = inputs["k"], inputs["v"]
            keys = {"cu_seqlens_k": inputs["kv_offsets"], "max_seqlen_k": max(p.kv_lens)}
        forward(
            inputs["q"],
            k,
            v,
            out=outputs["out"],
            cu_seqlens_q=inputs["q_offsets"],
            max_seqlen_q=max(p.q_lens),
            softmax_scale=p.scale,
            is_causal=p.causal,
            softcap=p.softcap,
            num_splits=0,
            **keys,
            **window,
        )

    return launch
