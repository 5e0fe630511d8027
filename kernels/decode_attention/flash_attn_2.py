"""FlashAttention 2's decode over a paged cache.

Written for flash-attn 2.8.3 (flash_attn.flash_attn_with_kvcache). Its public function has no output argument: the output is copied.
"""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.outside import FLASH_ATTN_2

# Pages are read in multiples of this many tokens.
PAGE = 256


def fits(problem: DecodeAttention, config: Config, chip: Chip) -> str | None:
    """What flash-attn 2.8 takes."""
    p = problem
    if p.page_size % PAGE:
        return f"FlashAttention 2 takes pages of a multiple of {PAGE} tokens"
    if p.dtype == "float32" or p.kv_dtype:
        return "FlashAttention 2 takes 16-bit types"
    if p.sinks:
        return "FlashAttention 2 knows no sinks"
    if p.head_dim != p.dim_v or p.head_dim > 256 or p.head_dim % 8:
        return "FlashAttention 2 takes equal head dimensions that are multiples of 8, up to 256"
    return None


@kernel(DecodeAttention, backend="torch", fits=fits, library=True, requires=FLASH_ATTN_2)
def flash_attn_2_decode(problem: DecodeAttention, config: Config, chip: Chip) -> Launch:
    """FlashAttention 2's split decode over pages of 256 tokens; its output is copied."""
    from flash_attn import flash_attn_with_kvcache

    p = problem
    window = (p.window - 1, 0) if p.window else (-1, -1)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        found = flash_attn_with_kvcache(
            inputs["q"],
            inputs["k_cache"],
            inputs["v_cache"],
            cache_seqlens=inputs["kv_lens"],
            block_table=inputs["block_table"],
            softmax_scale=p.scale,
            causal=True,
            window_size=window,
            softcap=p.softcap,
        )
        outputs["out"].copy_(found)

    return launch
