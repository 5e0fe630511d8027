"""Torch baselines: gather the pages into contiguous rows, then scaled_dot_product_attention with all heads as query rows of one head.

Torch has no attention over paged caches, so the gather (every row is read, written and read again) is part of the time, and so is the
conversion of an fp8 cache. The values are a view of the keys. Head dimension 576 rules out the flash backend: the memory-efficient one
or plain matrix products remain.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES, torch_dtype
from klab.kernels.latent_attention.problem import LatentAttention
from klab.kernels.triton_support import cdiv


def _gather(problem: LatentAttention, inputs: Tensors, pages: torch.Tensor) -> torch.Tensor:
    """[sequences, pages * page_size, dim] of these pages' rows, in the dtype of the queries, without the scale of an fp8 cache."""
    cache = inputs["kv_cache"]
    if problem.kv_dtype:  # torch selects no fp8 rows on every device: bytes are moved, then read as fp8
        rows = cache.view(torch.uint8).index_select(0, pages.flatten().clamp(min=0)).view(torch_dtype(problem.kv_dtype))
        rows = rows.to(torch_dtype(problem.dtype))
    else:
        rows = cache.index_select(0, pages.flatten().clamp(min=0))
    return rows.view(pages.shape[0], -1, problem.dim)


def _visible(problem: LatentAttention, keys: int, lengths: torch.Tensor) -> torch.Tensor:
    """[sequences, 1, q_len * heads, keys], true where the row's token sees the key."""
    key = torch.arange(keys, device=lengths.device)
    last = lengths[:, None, None] - problem.q_len + torch.arange(problem.q_len, device=lengths.device)[:, None]
    return (key <= last).repeat_interleave(problem.heads, dim=1)[:, None]


def _attend(problem: LatentAttention, inputs: Tensors, q: torch.Tensor, rows: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """[sequences, q_len, heads, kv_lora_rank] of queries [sequences, q_len, heads, dim] and cached rows [sequences, keys, dim]."""
    if problem.kv_dtype:
        # The scale of keys and values goes to the queries and the output: two small products instead of one of the whole copy.
        q = (q.float() * inputs["kv_scale"]).to(q.dtype)
    keys, values = rows[:, None], rows[:, None, :, : problem.kv_lora_rank]
    out = scaled_dot_product_attention(q.flatten(1, 2)[:, None], keys, values, attn_mask=visible, scale=problem.scale)
    out = out.view(q.shape[0], problem.q_len, problem.heads, problem.kv_lora_rank)
    return out * inputs["kv_scale"] if problem.kv_dtype else out


def _fits_padded(problem: LatentAttention, config: Config, chip: Chip) -> str | None:
    copy = problem.batch * problem.max_kv_len * problem.dim * SIZE_BYTES[problem.dtype]
    return f"the padded copy of the cache takes {copy / 1e9:.0f} GB" if copy > chip.memory_bytes // 3 else None


@kernel(LatentAttention, backend="torch", fits=_fits_padded, kinds=("cuda", "cpu"), library=True)
def torch_sdpa(problem: LatentAttention, config: Config, chip: Chip) -> Launch:
    """torch SDPA on gathered pages: one call for the batch, padded and masked, all heads as query rows."""
    alike, keys = len(set(problem.kv_lens)) == 1, problem.max_kv_len

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        rows = _gather(problem, inputs, inputs["block_table"])[:, :keys]
        visible = None if alike and problem.q_len == 1 else _visible(problem, keys, inputs["kv_lens"])
        out = outputs["out"].copy_(_attend(problem, inputs, inputs["q"], rows, visible))
        if 0 in problem.kv_lens:
            # Backends differ in what they give for a row that sees nothing.
            out.masked_fill_((inputs["kv_lens"] == 0)[:, None, None, None], 0.0)

    return launch


@kernel(LatentAttention, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_sdpa_each(problem: LatentAttention, config: Config, chip: Chip) -> Launch:
    """torch SDPA on gathered pages: one call per sequence (nothing padded, masked only if q_len > 1), all heads as query rows."""

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        for i, length in enumerate(problem.kv_lens):
            if length == 0:
                outputs["out"][i].zero_()
                continue
            pages = inputs["block_table"][i : i + 1, : cdiv(length, problem.page_size)]
            rows = _gather(problem, inputs, pages)[:, :length]
            visible = None
            if problem.q_len > 1:
                visible = _visible(problem, length, torch.full((1,), length, device=rows.device))
            outputs["out"][i : i + 1].copy_(_attend(problem, inputs, inputs["q"][i : i + 1], rows, visible))

    return launch
