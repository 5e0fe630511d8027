"""Torch baselines: gather the pages into contiguous keys and values, then scaled_dot_product_attention.

Torch has no attention over paged caches, so a torch user pays for the gather (every key and value is read, written and read again),
and so it is part of the time here. Pages that happen to lie in order could skip it, but only the device knows the table. Masks are
made anew in every launch, as the lengths differ in every step of a serving engine. An fp8 cache is widened as it is gathered. Sinks,
which SDPA lacks, are further keys whose values are zero and whose logits come through the mask; a soft-cap it cannot have.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES, UNIT_ROUNDOFF, torch_dtype
from klab.kernels.triton_support import cdiv

SINK_KEYS = 2


def _gather(problem: DecodeAttention, cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """[.., kv_heads, dim] of these pages' tokens: [sequences, pages] of any table gives [sequences, pages * page_size, kv_heads, dim]."""
    where = pages.flatten().clamp(min=0)
    if problem.kv_dtype:  # not every device indexes fp8
        found = cache.view(torch.uint8).index_select(0, where).view(cache.dtype).to(torch_dtype(problem.dtype))
    else:
        found = cache.index_select(0, where)
    return found.view(pages.shape[0], -1, *cache.shape[2:])


def _visible(problem: DecodeAttention, keys: int, lengths: torch.Tensor) -> torch.Tensor:
    """[sequences, q_len, keys], true where query t of a sequence of this length sees the key."""
    key = torch.arange(keys, device=lengths.device)
    last = lengths[:, None, None] - problem.q_len + torch.arange(problem.q_len, device=lengths.device)[:, None]
    seen = key <= last
    return seen & (key > last - problem.window) if problem.window else seen


def _with_sinks(problem: DecodeAttention, n: int, keys: int, visible: torch.Tensor | None, sinks: torch.Tensor) -> torch.Tensor:
    """The mask [n, q_len, heads, keys + SINK_KEYS] in the problem's dtype: 0, -inf where a key is hidden, and the sinks.

    A mask rounds a sink of 10 to bf16 by up to 0.02, and its weight by 2%. So it is given as two: one below it, and what is missing.
    """
    dtype = torch_dtype(problem.dtype)
    mask = torch.zeros((n, problem.q_len, problem.heads, keys + SINK_KEYS), dtype=dtype, device=sinks.device)
    if visible is not None:
        mask[..., :keys].masked_fill_(~visible[:, :, None], float("-inf"))
    below = (sinks - 2.0 * UNIT_ROUNDOFF[problem.dtype] * sinks.abs()).to(dtype)
    mask[..., keys] = below
    mask[..., keys + 1] = below + torch.expm1(sinks - below.float()).log()
    return mask


def _attend(
    problem: DecodeAttention, inputs: Tensors, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, rows: bool
) -> torch.Tensor:
    """[sequences, q_len, heads, dim_v]. With `rows`, the query heads of a group become rows of one matrix instead of enable_gqa."""
    n, keys, group = q.shape[0], k.shape[1], problem.heads // problem.kv_heads
    if problem.kv_dtype:
        q = (q * inputs["k_scale"].repeat_interleave(group)[:, None]).to(q.dtype)
    mask = None if visible is None else visible[:, :, None].expand(-1, -1, problem.heads, -1)
    if problem.sinks:
        mask = _with_sinks(problem, n, keys, visible, inputs["sinks"])
        k, v = (pad(x, (0, 0, 0, 0, 0, SINK_KEYS)) for x in (k, v))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if not rows:
        if mask is not None:
            mask = mask.transpose(1, 2) if problem.sinks else mask[:, :, :1].transpose(1, 2)
        out = scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=problem.scale, enable_gqa=group > 1).transpose(
            1, 2
        )
    else:
        packed = q.view(n, problem.q_len, problem.kv_heads, group, problem.head_dim).transpose(1, 2).flatten(2, 3)
        if mask is not None:
            heads = problem.kv_heads if problem.sinks else 1
            mask = mask[:, :, : heads * group].reshape(n, problem.q_len, heads, group, -1).transpose(1, 2).flatten(2, 3)
        out = scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=problem.scale)
        out = out.view(n, problem.kv_heads, problem.q_len, group, problem.dim_v).transpose(1, 2).flatten(2, 3)
    return out * inputs["v_scale"].repeat_interleave(group)[:, None] if problem.kv_dtype else out


def _padded(problem: DecodeAttention, rows: bool) -> Launch:
    alike = len(set(problem.kv_lens)) == 1
    keys = problem.max_kv_len
    masked = not alike or problem.q_len > 1 or problem.window > 0

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        k = _gather(problem, inputs["k_cache"], inputs["block_table"])[:, :keys]
        v = _gather(problem, inputs["v_cache"], inputs["block_table"])[:, :keys]
        visible = _visible(problem, keys, inputs["kv_lens"]) if masked else None
        out = outputs["out"].copy_(_attend(problem, inputs, inputs["q"], k, v, visible, rows))
        if 0 in problem.kv_lens:
            # Backends differ in what they give for a row that sees nothing.
            out.masked_fill_((inputs["kv_lens"] == 0)[:, None, None, None], 0.0)

    return launch


def _fits(problem: DecodeAttention, config: Config, chip: Chip) -> str | None:
    return "SDPA has no soft-cap for logits" if problem.softcap else None


def _fits_padded(problem: DecodeAttention, config: Config, chip: Chip) -> str | None:
    copy = problem.batch * problem.max_kv_len * problem.kv_heads * (problem.head_dim + problem.dim_v) * SIZE_BYTES[problem.dtype]
    if copy > chip.memory_bytes // 3:
        # The cache itself, the copy, and what the backend makes of it must fit together.
        return f"the padded copy of the cache takes {copy / 1e9:.0f} GB"
    return _fits(problem, config, chip)


@kernel(DecodeAttention, backend="torch", fits=_fits_padded, kinds=("cuda", "cpu"), library=True)
def torch_sdpa(problem: DecodeAttention, config: Config, chip: Chip) -> Launch:
    """torch SDPA on gathered pages: one call for the batch, padded and masked, enable_gqa."""
    return _padded(problem, rows=False)


@kernel(DecodeAttention, backend="torch", fits=_fits_padded, kinds=("cuda", "cpu"), library=True)
def torch_sdpa_rows(problem: DecodeAttention, config: Config, chip: Chip) -> Launch:
    """torch SDPA on gathered pages: one call, padded and masked, a group's heads as query rows (no backend is ruled out by GQA)."""
    return _padded(problem, rows=True)


@kernel(DecodeAttention, backend="torch", fits=_fits, kinds=("cuda", "cpu"), library=True)
def torch_sdpa_each(problem: DecodeAttention, config: Config, chip: Chip) -> Launch:
    """torch SDPA on gathered pages: one call per sequence (nothing padded, masked only where needed), a group's heads as query rows."""
    page = problem.page_size

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        for i, length in enumerate(problem.kv_lens):
            if length == 0:
                outputs["out"][i].zero_()
                continue
            # Pages wholly before the window are not read.
            span = min(length, problem.window + problem.q_len - 1) if problem.window else length
            first = (length - span) // page * page
            pages = inputs["block_table"][i : i + 1, first // page : cdiv(length, page)]
            k, v = (_gather(problem, inputs[name], pages)[:, length - span - first : length - first] for name in ("k_cache", "v_cache"))
            visible = None
            if problem.q_len > 1:
                visible = _visible(problem, span, torch.full((1,), span, device=k.device))
            outputs["out"][i : i + 1].copy_(_attend(problem, inputs, inputs["q"][i : i + 1], k, v, visible, rows=True))

    return launch
