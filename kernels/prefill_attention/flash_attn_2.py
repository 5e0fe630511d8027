"""FlashAttention 2's variable-length prefill.

Written for flash-attn 2.8.3 (flash_attn.flash_attn_varlen_func). Its public function has no output argument, and the private one's
arguments change between versions, so that the output is copied once. Without the copy it is what torch_sdpa_flash calls on a GPU.
"""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.outside import FLASH_ATTN_2
from klab.kernels.prefill_attention.problem import PrefillAttention

# Pages are read in multiples of this many tokens.
PAGE = 256


def fits(problem: PrefillAttention, config: Config, chip: Chip) -> str | None:
    """What flash-attn 2.8 takes."""
    p = problem
    if lacking := p.unserved("softcap", "page_size", "kv_tokens"):
        return lacking
    if p.dtype == "float32":
        return "FlashAttention takes 16-bit types"
    if p.head_dim != p.dim_v or p.head_dim > 256 or p.head_dim % 8:
        return "FlashAttention 2 takes equal head dimensions that are multiples of 8, up to 256"
    if p.page_size % PAGE:
        return f"FlashAttention 2 takes pages of a multiple of {PAGE} tokens"
    return None


@kernel(PrefillAttention, backend="torch", fits=fits, library=True, requires=FLASH_ATTN_2)
def flash_attn_2(problem: PrefillAttention, config: Config, chip: Chip) -> Launch:
    """FlashAttention 2: one variable-length call, over pages of 256 tokens too; its output is copied."""
    from flash_attn import flash_attn_varlen_func

    p = problem
    options = {
        "max_seqlen_q": max(p.q_lens),
        "max_seqlen_k": max(p.kv_lens),
        "softmax_scale": p.scale,
        "causal": p.causal,
        "window_size": (p.window - 1, 0) if p.window else (-1, -1),
        "softcap": p.softcap,
    }

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        k, v = (inputs["k_cache"], inputs["v_cache"]) if p.page_size else (inputs["k"], inputs["v"])
        found = flash_attn_varlen_func(
            inputs["q"],
            k,
            v,
            cu_seqlens_q=inputs["q_offsets"],
            cu_seqlens_k=inputs["kv_offsets"],
            block_table=inputs.get("block_table"),
            **options,
        )
        outputs["out"].copy_(found)

    return launch
