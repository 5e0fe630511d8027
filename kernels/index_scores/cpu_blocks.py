"""Indexer scores on a CPU in torch operations: blocks of keys in float32, whose scores of all heads stay in the cache until summed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.index_scores.problem import IndexScores
from klab.kernels.triton_support import cdiv


@dataclass(frozen=True)
class CpuBlocksConfig(Config):
    """A step takes `tokens` tokens and about `block_n` keys (whole pages)."""

    tokens: int = 1
    block_n: int = 1024


def fits(problem: IndexScores, config: CpuBlocksConfig, chip: Chip) -> str | None:
    """Steps within the problem."""
    if not 1 <= config.tokens <= problem.q_len or not 1 <= config.block_n <= max(64, problem.kv_len):
        return "tokens and block_n are at least 1 and at most what there is"
    return None


def default(problem: IndexScores, chip: Chip) -> CpuBlocksConfig:
    """64 heads by 1024 keys are 256 KB of scores in float32."""
    return CpuBlocksConfig(1, min(1024, max(64, problem.kv_len)))


def space(problem: IndexScores, chip: Chip) -> Iterator[CpuBlocksConfig]:
    """1 to 64 tokens, 64 to 16384 keys."""
    for tokens, block_n in product((1, 2, 4, 8, 16, 32, 64), (64, 128, 256, 512, 1024, 2048, 4096, 16384)):
        yield CpuBlocksConfig(tokens, block_n)


@kernel(IndexScores, backend="cpu", config=CpuBlocksConfig, space=space, default=default, fits=fits, kinds=("cpu",))
def cpu_blocks(problem: IndexScores, config: CpuBlocksConfig, chip: Chip) -> Launch:
    """CPU indexer in torch: float32 products of a few tokens and a block of keys; hidden blocks are not multiplied."""
    page = max(1, problem.page_size)
    block = cdiv(config.block_n, page) * page

    def keys_of(inputs: Tensors, i: int, at: int, end: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not problem.page_size:
            return inputs["k"][i, at:end].float(), inputs["k_scale"][i, at:end] if problem.format else None
        pages = inputs["block_table"][i, at // page : cdiv(end, page)].long()
        keys = inputs["k_cache"][pages].flatten(0, 1)[: end - at].float()
        return keys, inputs["k_scale"][pages].flatten()[: end - at] if problem.format else None

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        first = problem.kv_len - problem.q_len
        for i in range(problem.batch):
            for at in range(0, problem.kv_len, block):
                end = min(at + block, problem.kv_len)
                keys, scale = keys_of(inputs, i, at, end)
                for t in range(0, problem.q_len, config.tokens):
                    to = outputs["scores"][i, t : t + config.tokens, at:end]
                    if at > first + t + len(to) - 1:
                        to.fill_(-torch.inf)
                        continue
                    each = (inputs["q"][i, t : t + config.tokens].float() @ keys.T).relu_()
                    found = torch.bmm(inputs["weights"][i, t : t + config.tokens, None], each)[:, 0]
                    if scale is not None:
                        found *= scale
                    position = first + t + torch.arange(len(to), device=to.device)[:, None]
                    to.copy_(found.masked_fill_(torch.arange(at, end, device=to.device) > position, -torch.inf))

    return launch
