"""Latent attention on a CPU in torch operations: blocks of rows are gathered once and serve as keys and values of all heads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.latent_attention.problem import LatentAttention
from klab.kernels.triton_support import cdiv

LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class CpuBlocksConfig(Config):
    """A step takes about `block_n` cached rows (whole pages); `narrow_values` multiplies weights and values in the problem's dtype.

    Logits are always products in float32: bf16 results of 8 and more would be off by 0.03, and so would the weights.
    """

    block_n: int = 512
    narrow_values: bool = False


def fits(problem: LatentAttention, config: CpuBlocksConfig, chip: Chip) -> str | None:
    """Blocks no longer than the context; only 16-bit problems have a choice of products."""
    if not 1 <= config.block_n <= max(64, problem.max_kv_len):
        return "block_n is 1 up to the context"
    if config.narrow_values and problem.dtype == "float32":
        return "float32 is multiplied in float32 either way"
    return None


def default(problem: LatentAttention, chip: Chip) -> CpuBlocksConfig:
    """512 rows of 576 are 1.2 MB in float32, which stay in the L2 cache between the two products."""
    return CpuBlocksConfig(min(512, max(64, problem.max_kv_len)))


def space(problem: LatentAttention, chip: Chip) -> Iterator[CpuBlocksConfig]:
    """Blocks of 64 to 8192 rows, both kinds of products."""
    for block_n, narrow in product((64, 128, 256, 512, 1024, 2048, 4096, 8192), (False, True)):
        yield CpuBlocksConfig(block_n, narrow)


@kernel(LatentAttention, backend="cpu", config=CpuBlocksConfig, space=space, default=default, fits=fits, kinds=("cpu",))
def cpu_blocks(problem: LatentAttention, config: CpuBlocksConfig, chip: Chip) -> Launch:
    """CPU flash decoding over the latent cache in torch: gathered blocks of pages, online softmax in float32."""
    page, rank, rows = problem.page_size, problem.kv_lora_rank, problem.q_len * problem.heads
    block = cdiv(config.block_n, page) * page

    def attend(inputs: Tensors, i: int, length: int) -> torch.Tensor:
        q = inputs["q"][i].reshape(rows, problem.dim)
        scale = inputs["kv_scale"] if problem.kv_dtype else None
        # Logits are kept in units of log 2.
        factor = problem.scale / math.log(2.0)
        narrow = q.dtype if config.narrow_values else torch.float32
        q = q.float()
        position = (length - problem.q_len + torch.arange(problem.q_len, device=q.device)).repeat_interleave(problem.heads)[:, None]
        largest = q.new_full((rows, 1), -math.inf, dtype=torch.float32)
        total, values = largest.new_zeros((rows, 1)), largest.new_zeros((rows, rank))
        for at in range(0, length, block):
            keys = min(block, length - at)
            pages = inputs["block_table"][i, at // page : cdiv(at + keys, page)]
            found = inputs["kv_cache"][pages.long()].flatten(0, 1)[:keys].to(narrow)
            scores = q @ found.float().T
            scores.mul_(factor if scale is None else factor * scale)
            if at + keys > length - problem.q_len + 1:
                scores.masked_fill_(torch.arange(at, at + keys, device=q.device) > position, -math.inf)
            larger = torch.maximum(largest, scores.amax(dim=1, keepdim=True))
            shift = larger.clamp(min=LEAST)  # a row that has seen nothing: -inf - -inf would be NaN
            decay, weights = (largest - shift).exp2_(), scores.sub_(shift).exp2_()
            total = total * decay + weights.sum(dim=1, keepdim=True)
            values = values * decay + (weights.to(narrow) @ found[:, :rank]).float()
            largest = larger
        values /= total
        if scale is not None:
            values *= scale
        return values.view(problem.q_len, problem.heads, rank)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        for i, length in enumerate(problem.kv_lens):
            if length:
                outputs["out"][i].copy_(attend(inputs, i, length))
            else:
                outputs["out"][i].zero_()

    return launch
