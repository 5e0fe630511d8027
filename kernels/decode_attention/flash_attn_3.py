"""FlashAttention 3's decode over a paged cache, on Hopper.

Written for the flash_attn_3::fwd operator of Dao-AILab/flash-attention's hopper folder, whose schema takes an output.
"""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.outside import FLASH_ATTN_3


def fits(problem: DecodeAttention, config: Config, chip: Chip) -> str | None:
    """What FlashAttention 3 takes."""
    p = problem
    if p.dtype == "float32":
        return "FlashAttention takes 16-bit types"
    if p.kv_dtype:
        return "FlashAttention 3 reads an fp8 cache with fp8 queries only"
    if p.sinks:
        return "FlashAttention 3 knows no sinks"
    if chip.target != 90:
        return "FlashAttention 3 is Hopper's"
    if p.head_dim > 256 or p.head_dim % 8 or p.dim_v != p.head_dim:
        return "FlashAttention 3's decode takes equal head dimensions that are multiples of 8, up to 256"
    return None


@kernel(DecodeAttention, backend="torch", fits=fits, library=True, requires=FLASH_ATTN_3)
def flash_attn_3_decode(problem: DecodeAttention, config: Config, chip: Chip) -> Launch:
    """FlashAttention 3's paged decode with its own split rule, into our output."""
    import flash_attn_3._C  # noqa: F401  registers the operator

    p = problem
    forward = torch.ops.flash_attn_3.fwd
    window = {"window_size_left": p.window - 1, "window_size_right": 0} if p.window else {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        forward(
            inputs["q"],
            inputs["k_cache"],
            inputs["v_cache"],
            out=outputs["out"],
            seqused_k=inputs["kv_lens"],
            page_table=inputs["block_table"],
            softmax_scale=p.scale,
            is_causal=True,
            softcap=p.softcap,
            num_splits=0,
            **window,
        )

    return launch
