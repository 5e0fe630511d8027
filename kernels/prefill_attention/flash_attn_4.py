"""FlashAttention 4 (CuTe DSL): Blackwell's, and Hopper's too.

Written for flash-attn-4 4.0.0b36 (flash_attn.cute.interface._flash_attn_fwd: the public functions have no output argument).
"""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.outside import FLASH_ATTN_4
from klab.kernels.prefill_attention.problem import PrefillAttention


def fits(problem: PrefillAttention, config: Config, chip: Chip) -> str | None:
    """What flash-attn-4 4.0.0b36 takes (_validate_head_dims)."""
    p = problem
    if lacking := p.unserved("softcap", "page_size", "kv_tokens", "sinks"):
        return lacking
    if p.dtype == "float32":
        return "FlashAttention takes 16-bit types"
    if chip.target < 90:
        return "needs Hopper or Blackwell"
    dims = (p.head_dim, p.dim_v)
    if any(dim % 8 for dim in dims):
        return "FlashAttention 4 takes head dimensions that are multiples of 8"
    if max(dims) > (256 if chip.target < 100 else 128) and dims not in ((192, 128), (256, 256)):
        return "FlashAttention 4 takes head dimensions up to 256 on Hopper; up to 128, 192 with 128, and 256 on Blackwell"
    return None


@kernel(PrefillAttention, backend="torch", fits=fits, library=True, requires=FLASH_ATTN_4)
def flash_attn_4(problem: PrefillAttention, config: Config, chip: Chip) -> Launch:
    """FlashAttention 4 (CuTe DSL): one variable-length call, over packed or paged keys, with sinks, into our output."""
    from flash_attn.cute.interface import _flash_attn_fwd

    p = problem
    window = {"window_size_left": p.window - 1, "window_size_right": 0} if p.window else {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        if p.page_size:
            k, v = inputs["k_cache"], inputs["v_cache"]
            # With pages it wants the lengths, not where sequences begin: one subtraction of batch numbers.
            keys = {"page_table": inputs["block_table"], "seqused_k": inputs["kv_offsets"].diff()}
        else:
            k, v = inputs["k"], inputs["v"]
            keys = {"cu_seqlens_k": inputs["kv_offsets"]}
        _flash_attn_fwd(
            inputs["q"],
            k,
            v,
            cu_seqlens_q=inputs["q_offsets"],
            max_seqlen_q=max(p.q_lens),
            max_seqlen_k=max(p.kv_lens),
            softmax_scale=p.scale,
            causal=p.causal,
            softcap=p.softcap or None,
            learnable_sink=inputs.get("sinks"),
            out=outputs["out"],
            **keys,
            **window,
        )

    return launch
