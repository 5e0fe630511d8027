"""FlashInfer's paged decode: the library that engines' decode steps run on most.

Written for flashinfer-python 0.7.2 (flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper). The plan is made at the first call from the
Problem's lengths, as an engine makes it once per step for all layers: it is not timed. Of the backends only fa2 is named: it takes its
pages from the list that each launch fills, where others build their own table when they plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import torch_dtype
from klab.kernels.outside import FLASHINFER, PageList, Pages, PerDevice, host

WORKSPACE_BYTES = 256 << 20
HEAD_DIMS = (64, 128, 256)
# Query heads per key/value head that the kernel without tensor cores is compiled for (DISPATCH_GQA_GROUP_SIZE).
GROUPS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class FlashInferDecodeConfig(Config):
    """tensor_cores: through the prefill kernels, which treat the heads of a group as rows of one tile."""

    tensor_cores: bool = True


def space(problem: DecodeAttention, chip: Chip) -> Iterator[FlashInferDecodeConfig]:
    """Both kernels."""
    yield FlashInferDecodeConfig(True)
    yield FlashInferDecodeConfig(False)


def fits(problem: DecodeAttention, config: FlashInferDecodeConfig, chip: Chip) -> str | None:
    """What flashinfer-python 0.7 takes with the backend fa2."""
    p = problem
    if p.dtype == "float32":
        return "FlashInfer takes 16-bit types"
    if p.kv_dtype:
        return "FlashInfer scales an fp8 cache by one number of the host, not per head"
    if p.sinks:
        return "FlashInfer's fa2 decode knows no sinks"
    if p.dim_v != p.head_dim or p.head_dim not in HEAD_DIMS:
        return f"FlashInfer's decode takes equal head dimensions of {', '.join(map(str, HEAD_DIMS))}"
    if not min(p.kv_lens):
        return "FlashInfer's decode is given sequences with keys only"
    if not config.tensor_cores and p.q_len > 1:
        return "several query tokens need the tensor-core kernel"
    if not config.tensor_cores and p.heads // p.kv_heads not in GROUPS:
        return f"without tensor cores groups are of {', '.join(map(str, GROUPS))} heads"
    return None


@kernel(
    DecodeAttention, backend="torch", config=FlashInferDecodeConfig, space=space, fits=fits, library=True, requires=FLASHINFER,
)  # fmt: skip
def flashinfer_decode(problem: DecodeAttention, config: FlashInferDecodeConfig, chip: Chip) -> Launch:
    """FlashInfer's paged decode (fa2), planned once; the list of pages is gathered from the block table at each launch."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    p = problem
    pages = Pages.of(p.kv_lens, p.page_size)
    dtype = torch_dtype(p.dtype)

    def plan(device: torch.device) -> tuple[Any, PageList]:
        listed = PageList(pages, device)
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=config.tensor_cores,
            paged_kv_indptr_buffer=torch.zeros(p.batch + 1, dtype=torch.int32, device=device),
            paged_kv_indices_buffer=listed.indices,
            paged_kv_last_page_len_buffer=torch.zeros(p.batch, dtype=torch.int32, device=device),
            backend="fa2",
        )
        several = {"q_len_per_req": p.q_len} if p.q_len > 1 else {}
        wrapper.plan(
            host(pages.indptr),
            listed.indices,
            host(pages.last_page_lens),
            p.heads,
            p.kv_heads,
            p.head_dim,
            p.page_size,
            # Inclusive: the keys to the left of the query's own.
            window_left=p.window - 1 if p.window else -1,
            logits_soft_cap=p.softcap or None,
            q_data_type=dtype,
            kv_data_type=dtype,
            sm_scale=p.scale,
            **several,
        )
        return wrapper, listed

    plans = PerDevice(plan)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q = inputs["q"]
        wrapper, listed = plans.on(q.device)
        listed.fill(inputs["block_table"])
        wrapper.run(q.flatten(0, 1), (inputs["k_cache"], inputs["v_cache"]), out=outputs["out"].flatten(0, 1))

    return launch
