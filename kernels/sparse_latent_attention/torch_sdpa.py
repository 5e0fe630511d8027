"""Torch baseline: copy the listed rows of a chunk of tokens, then scaled_dot_product_attention with the heads as query rows.

Torch has no attention over listed slots, so the copy (every listed row is read, written and read again) is part of the time. The values
are a view of the copied rows. Head dimension 576 rules out the flash backend.
"""

from __future__ import annotations

from torch.nn.functional import scaled_dot_product_attention

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.sparse_latent_attention.problem import SparseLatentAttention

CHUNK_BYTES = 1 << 30  # of copied rows: far more than the L2 cache, far less than the memory


@kernel(SparseLatentAttention, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_sdpa(problem: SparseLatentAttention, config: Config, chip: Chip) -> Launch:
    """torch SDPA on copied rows: chunks of tokens, each with its listed rows gathered and its holes masked, all heads as query rows."""
    copied = problem.topk * problem.dim * SIZE_BYTES[problem.dtype]
    chunk = max(1, min(problem.tokens, CHUNK_BYTES // copied))

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        # [pages, page_size, dim] with rows at equal distances is one matrix of slots; otherwise this copies it.
        cache = inputs["kv_cache"].flatten(0, 1)
        for at in range(0, problem.tokens, chunk):
            listed = inputs["indices"][at : at + chunk]
            rows = cache.index_select(0, listed.flatten().clamp(min=0)).view(len(listed), 1, problem.topk, problem.dim)
            seen = (listed >= 0)[:, None, None, :]
            q = inputs["q"][at : at + chunk, None]
            out = scaled_dot_product_attention(q, rows, rows[..., : problem.kv_lora_rank], attn_mask=seen, scale=problem.scale)
            # Backends differ in what they give for a row that sees nothing.
            empty = (listed < 0).all(dim=1)[:, None, None]
            outputs["out"][at : at + chunk].copy_(out[:, 0].masked_fill(empty, 0.0))

    return launch
