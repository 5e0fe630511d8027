"""Torch baseline: one matrix product per sequence and chunk of tokens for all heads, ReLU, and a batched product with the weights.

Scores of every head are written to memory in the problem's dtype and read again; fp8 operands become 16-bit copies first, and paged keys
contiguous ones. Products of e4m3 values (up to 448) overflow float16: the queries' copies are scaled down by a power of two there, which
loses nothing, and the weights and keys' scales up by as much. torch._scaled_mm would multiply fp8 as it is, but only with row counts that
are multiples of 16.
"""

from __future__ import annotations

import math

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES, torch_dtype
from klab.kernels.index_scores.problem import IndexScores

CHUNK_BYTES = 1 << 30  # of scores per head: far more than the L2 cache, far less than the memory
E4M3_MAX = 448.0


def powers_of_two(problem: IndexScores) -> tuple[float, float, float]:
    """What queries, weights and scales are multiplied by, 1 in all: no sum of products, however large, exceeds half of float16's range."""
    if not problem.format or problem.dtype != "float16":
        return 1.0, 1.0, 1.0
    down = max(0, math.ceil(math.log2(E4M3_MAX * E4M3_MAX * problem.head_dim)) - 15)
    return 2.0**-down, 2.0 ** (down // 2), 2.0 ** (down - down // 2)


@kernel(IndexScores, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_matmul(problem: IndexScores, config: Config, chip: Chip) -> Launch:
    """torch matmul for all heads, ReLU, batched matmul with the weights; chunks of tokens, 16-bit copies of fp8, gathered pages."""
    dtype, heads, keys = torch_dtype(problem.dtype), problem.heads, problem.kv_len
    chunk = max(1, min(problem.q_len, CHUNK_BYTES // (heads * keys * SIZE_BYTES[problem.dtype])))

    of_queries, of_weights, of_scales = powers_of_two(problem)

    def times(factor: float, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if factor == 1.0 else tensor * factor

    def paged(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        # torch selects no fp8 rows on every device: bytes are moved.
        raw = cache.view(torch.uint8) if problem.format and cache.dim() == 3 else cache
        return raw.index_select(0, table).flatten(0, 1)[:keys].view(cache.dtype)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        position = torch.arange(problem.q_len, device=inputs["q"].device)[:, None] + keys - problem.q_len
        hidden = torch.arange(keys, device=position.device) > position
        for i in range(problem.batch):
            k = paged(inputs["k_cache"], inputs["block_table"][i]) if problem.page_size else inputs["k"][i]
            k = k.to(dtype)
            for t in range(0, problem.q_len, chunk):
                q = times(of_queries, inputs["q"][i, t : t + chunk].to(dtype))
                each = (q.flatten(0, 1) @ k.T).relu_().view(len(q), heads, keys)
                weights = times(of_weights, inputs["weights"][i, t : t + chunk, None]).to(dtype)
                outputs["scores"][i, t : t + chunk] = torch.bmm(weights, each)[:, 0]
            if problem.format:
                scale = inputs["k_scale"]
                scale = paged(scale, inputs["block_table"][i]) if problem.page_size else scale[i]
                outputs["scores"][i] *= times(of_scales, scale)
            outputs["scores"][i].masked_fill_(hidden, -torch.inf)

    return launch
