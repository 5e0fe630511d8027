"""FlexAttention through torch.compile: what a user gets for a mask or a score change that no library knows.

Written for torch 2.13 (torch.nn.attention.flex_attention; AuxRequest since 2.9). The sequences are one row of tokens whose mask keeps them
apart; blocks without a visible pair are skipped. Sinks come from the returned logarithms of the sums: each row is scaled by
sigmoid(lse - sink).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.inductor import compiled
from klab.kernels.outside import PerDevice
from klab.kernels.prefill_attention.problem import PrefillAttention

BLOCK = 128


def fits(problem: PrefillAttention, config: Config, chip: Chip) -> str | None:
    """Packed keys in one dtype."""
    p = problem
    if lacking := p.unserved("softcap", "kv_tokens", "sinks"):
        return lacking
    if min(p.head_dim, p.dim_v) < 16:
        return "FlexAttention takes head dimensions of at least 16"
    return None


def mask_of(problem: PrefillAttention, device: torch.device) -> Any:
    """The block mask of all sequences in one row, from the Problem's lengths."""
    p = problem
    q_len = torch.tensor(p.q_lens, device=device)
    kv_len = torch.tensor(p.kv_lens, device=device)
    number = torch.arange(len(p.q_lens), device=device)
    q_doc, kv_doc = number.repeat_interleave(q_len), number.repeat_interleave(kv_len)
    q_at, kv_at = q_len.cumsum(0) - q_len, kv_len.cumsum(0) - kv_len
    q_position = torch.arange(len(q_doc), device=device) - q_at[q_doc] + (kv_len - q_len)[q_doc]
    kv_position = torch.arange(len(kv_doc), device=device) - kv_at[kv_doc]

    def visible(batch: Any, head: Any, q: Any, kv: Any) -> Any:
        shown = q_doc[q] == kv_doc[kv]
        if p.causal:
            shown = shown & (kv_position[kv] <= q_position[q])
        if p.window:
            shown = shown & (kv_position[kv] > q_position[q] - p.window)
        return shown

    return create_block_mask(visible, None, None, len(q_doc), len(kv_doc), device=device, BLOCK_SIZE=BLOCK)


@kernel(PrefillAttention, backend="torch", fits=fits, library=True)
def torch_flex(problem: PrefillAttention, config: Config, chip: Chip) -> Launch:
    """FlexAttention through torch.compile: windows, caps and sinks as score changes; its block mask is made once."""
    p = problem

    def capped(score: Any, batch: Any, head: Any, q: Any, kv: Any) -> Any:
        return p.softcap * torch.tanh(score / p.softcap)

    def attend(inputs: Tensors, outputs: Tensors) -> None:
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        score_mod = capped if p.softcap else None
        options: dict[str, Any] = {
            "score_mod": score_mod,
            "block_mask": inputs["mask"],
            "scale": p.scale,
            "enable_gqa": p.heads != p.kv_heads,
        }
        if p.sinks:
            found, aux = flex_attention(q, k, v, **options, return_aux=AuxRequest(lse=True))
            out = found * torch.sigmoid(aux.lse - inputs["sinks"][:, None])[..., None]
        else:
            out = flex_attention(q, k, v, **options)
        outputs["out"].copy_(out[0].transpose(0, 1))

    masks = PerDevice(lambda device: mask_of(p, device))
    fast = compiled(attend)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        if inputs["q"].device.type != "meta":
            heads_first = {name: inputs[name].transpose(0, 1)[None] for name in ("q", "k", "v")}
            fast({**inputs, **heads_first, "mask": masks.on(inputs["q"].device)}, outputs)

    return launch
