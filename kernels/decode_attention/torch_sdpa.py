"""Torch baselines: gather the pages into contiguous keys and values, then scaled_dot_product_attention.

Torch has no attention over paged caches, so a torch user pays for the gather (every key and value is read, written and read again),
and so it is part of the time here. Pages that happen to lie in order could skip it, but only the device knows the table. Masks are
made anew in every launch, as the lengths differ in every step of a serving engine.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.triton_support import cdiv


def _gather(cache: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """[.., kv_heads, dim] of these pages' tokens: [sequences, pages] of any table gives [sequences, pages * page_size, kv_heads, dim]."""
    found = cache.index_select(0, pages.flatten().clamp(min=0))
    return found.view(pages.shape[0], -1, *cache.shape[2:])


def _visible(problem: DecodeAttention, keys: int, lengths: torch.Tensor) -> torch.Tensor:
    """[sequences, q_len, keys], true where query t of a sequence of this length sees the key."""
    key = torch.arange(keys, device=lengths.device)
    last = lengths[:, None, None] - problem.q_len + torch.arange(problem.q_len, device=lengths.device)[:, None]
    seen = key <= last
    return seen & (key > last - problem.window) if problem.window else seen


def _attend(
    problem: DecodeAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, rows: bool
) -> torch.Tensor:
    """[sequences, q_len, heads, dim_v]. With `rows`, the query heads of a group become rows of one matrix instead of enable_gqa."""
    n, group = q.shape[0], problem.heads // problem.kv_heads
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if not rows:
        mask = None if visible is None else visible[:, None]
        out = scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=problem.scale, enable_gqa=group > 1)
        return out.transpose(1, 2)
    packed = q.view(n, problem.q_len, problem.kv_heads, group, problem.head_dim).transpose(1, 2).flatten(2, 3)
    mask = None if visible is None else visible.repeat_interleave(group, dim=1)[:, None]
    out = scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=problem.scale)
    return out.view(n, problem.kv_heads, problem.q_len, group, problem.dim_v).transpose(1, 2).flatten(2, 3)


def _padded(problem: DecodeAttention, rows: bool) -> Launch:
    alike = len(set(problem.kv_lens)) == 1
    keys = problem.max_kv_len
    masked = not alike or problem.q_len > 1 or problem.window > 0

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        k = _gather(inputs["k_cache"], inputs["block_table"])[:, :keys]
        v = _gather(inputs["v_cache"], inputs["block_table"])[:, :keys]
        visible = _visible(problem, keys, inputs["kv_lens"]) if masked else None
        out = outputs["out"].copy_(_attend(problem, inputs["q"], k, v, visible, rows))
        if 0 in problem.kv_lens:
            # Backends differ in what they give for a row that sees nothing.
            out.masked_fill_((inputs["kv_lens"] == 0)[:, None, None, None], 0.0)

    return launch


def _fits(problem: DecodeAttention, config: Config, chip: Chip) -> str | None:
    if problem.sinks or problem.softcap or problem.kv_dtype:
        return "sinks, a soft-cap and fp8 caches are not supported"
    return None


def _fits_padded(problem: DecodeAttention, config: Config, chip: Chip) -> str | None:
    if _fits(problem, config, chip):
        return _fits(problem, config, chip)
    copy = problem.batch * problem.max_kv_len * problem.kv_heads * (problem.head_dim + problem.dim_v) * SIZE_BYTES[problem.dtype]
    # The cache itself, the copy, and what the backend makes of it must fit together.
    return f"the padded copy of the cache takes {copy / 1e9:.0f} GB" if copy > chip.memory_bytes // 3 else None


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
    """torch SDPA on gathered pages: one call per sequence (nothing padded, masked only if q_len > 1), a group's heads as query rows."""
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
            k, v = (_gather(inputs[name], pages)[:, length - span - first : length - first] for name in ("k_cache", "v_cache"))
            visible = None
            if problem.q_len > 1:
                visible = _visible(problem, span, torch.full((1,), span, device=k.device))
            outputs["out"][i : i + 1].copy_(_attend(problem, inputs["q"][i : i + 1], k, v, visible, rows=True))

    return launch
