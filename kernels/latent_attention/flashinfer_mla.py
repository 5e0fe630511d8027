"""FlashInfer's absorbed MLA decode.

Written for flashinfer-python 0.7.2 (flashinfer.mla.BatchMLAPagedAttentionWrapper), with the flat arguments that it shares with earlier
versions. The plan is made at the first call from the Problem's lengths and is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import torch_dtype
from klab.kernels.latent_attention.problem import LatentAttention
from klab.kernels.outside import FLASHINFER, PageList, Pages, PerDevice, host

WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True)
class FlashInferMlaConfig(Config):
    """backend: FlashInfer's own name of its kernels. fa2 runs on every chip, fa3 on Hopper."""

    backend: str = "fa2"


def default(problem: LatentAttention, chip: Chip) -> FlashInferMlaConfig:
    """Hopper's own kernel on Hopper."""
    return FlashInferMlaConfig("fa3" if chip.target == 90 else "fa2")


def space(problem: LatentAttention, chip: Chip) -> Iterator[FlashInferMlaConfig]:
    """Both backends."""
    yield FlashInferMlaConfig("fa3")
    yield FlashInferMlaConfig("fa2")


def fits(problem: LatentAttention, config: FlashInferMlaConfig, chip: Chip) -> str | None:
    """What flashinfer-python 0.7 takes."""
    p = problem
    if p.dtype == "float32" or p.kv_dtype:
        return "FlashInfer's MLA takes 16-bit queries and caches"
    if (p.kv_lora_rank, p.rope_dim) != (512, 64):
        return "FlashInfer's MLA takes 512 + 64 dimensions"
    if not min(p.kv_lens):
        return "FlashInfer's MLA is given sequences with keys only"
    if config.backend not in ("fa2", "fa3"):
        return f"the backends are fa2 and fa3, not {config.backend!r}"
    if config.backend == "fa3" and chip.target != 90:
        return "the backend fa3 is Hopper's"
    return None


@kernel(
    LatentAttention,
    backend="torch",
    config=FlashInferMlaConfig,
    default=default,
    space=space,
    fits=fits,
    library=True,
    requires=FLASHINFER,
)
def flashinfer_mla(problem: LatentAttention, config: FlashInferMlaConfig, chip: Chip) -> Launch:
    """FlashInfer's absorbed MLA (fa2, fa3), planned once; the list of pages is gathered from the block table at each launch."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    p = problem
    pages = Pages.of(p.kv_lens, p.page_size)
    q_indptr = tuple(i * p.q_len for i in range(p.batch + 1))

    def plan(device: torch.device) -> tuple[Any, PageList]:
        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        listed = PageList(pages, device)
        wrapper = BatchMLAPagedAttentionWrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            use_cuda_graph=True,
            qo_indptr=buffer(p.batch + 1),
            kv_indptr=buffer(p.batch + 1),
            kv_indices=listed.indices,
            kv_len_arr=buffer(p.batch),
            backend=config.backend,
        )
        wrapper.plan(
            qo_indptr=host(q_indptr),
            kv_indptr=host(pages.indptr),
            kv_indices=listed.indices,
            kv_len_arr=host(p.kv_lens),
            num_heads=p.heads,
            head_dim_ckv=p.kv_lora_rank,
            head_dim_kpe=p.rope_dim,
            page_size=p.page_size,
            causal=True,
            sm_scale=p.scale,
            q_data_type=torch_dtype(p.dtype),
            kv_data_type=torch_dtype(p.dtype),
        )
        return wrapper, listed

    plans = PerDevice(plan)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, cache, rank = inputs["q"].flatten(0, 1), inputs["kv_cache"], p.kv_lora_rank
        wrapper, listed = plans.on(q.device)
        listed.fill(inputs["block_table"])
        wrapper.run(
            q_nope=q[..., :rank],
            q_pe=q[..., rank:],
            ckv_cache=cache[..., :rank],
            kpe_cache=cache[..., rank:],
            out=outputs["out"].flatten(0, 1),
        )

    return launch
