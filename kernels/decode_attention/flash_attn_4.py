"""FlashAttention 4 (CuTe DSL) over a paged cache.

Written for flash-attn-4 4.0.0b36 (flash_attn.cute.interface._flash_attn_fwd: the public functions have no output argument).
"""

from __future__ import annotations

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.outside import FLASH_ATTN_4


def fits(problem: DecodeAttention, config: Config, chip: Chip) -> str | None:
    """What flash-attn-4 4.0.0b36 takes (_validate_head_dims)."""
    p = problem
    if p.dtype == "float32" or p.kv_dtype:
        return "FlashAttention 4 takes 16-bit queries, keys and values"
    if chip.target < 90:
        return "needs Hopper or Blackwell"
    dims = (p.head_dim, p.dim_v)
    if any(dim % 8 for dim in dims):
        return "FlashAttention 4 takes head dimensions that are multiples of 8"
    if max(dims) > (256 if chip.target < 100 else 128) and dims not in ((192, 128), (256, 256)):
        return "FlashAttention 4 takes head dimensions up to 256 on Hopper; up to 128, 192 with 128, and 256 on Blackwell"
    return None


@kernel(DecodeAttention, backend="torch", fits=fits, library=True, requires=FLASH_ATTN_4)
def flash_attn_4_decode(problem: DecodeAttention, config: Config, chip: Chip) -> Launch:
    """FlashAttention 4 (CuTe DSL) over pages, with sinks and its own split rule, into our output."""
    from flash_attn.cute.interface import _flash_attn_fwd

    p = problem
    window = {"window_size_left": p.window - 1, "window_size_right": 0} if p.window else {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        _flash_attn_fwd(
            inputs["q"],
            inputs["k_cache"],
            inputs["v_cache"],
            seqused_k=inputs["kv_lens"],
            max_seqlen_k=p.max_kv_len,
            page_table=inputs["block_table"],
            softmax_scale=p.scale,
            causal=True,
            softcap=p.softcap or None,
            learnable_sink=inputs.get("sinks"),
            # Below 1: its own rule.
            num_splits=0,
            out=outputs["out"],
            **window,
        )

    return launch
