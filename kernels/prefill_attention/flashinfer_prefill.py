"""FlashInfer's prefill over packed (ragged) and over paged keys and values.

Written for flashinfer-python 0.7.2 (flashinfer.prefill). The plan is made at the first call from the Problem's lengths, as an engine makes
it once per step for all layers: it is not timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import torch_dtype
from klab.kernels.outside import FLASHINFER, PageList, Pages, PerDevice, host
from klab.kernels.prefill_attention.problem import PrefillAttention, offsets

WORKSPACE_BYTES = 384 << 20
HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))


@dataclass(frozen=True)
class FlashInferPrefillConfig(Config):
    """backend: FlashInfer's own name of its kernels. fa2 runs on every chip, fa3 on Hopper."""

    backend: str = "fa2"


def default(problem: PrefillAttention, chip: Chip) -> FlashInferPrefillConfig:
    """Hopper's own kernels on Hopper."""
    return FlashInferPrefillConfig("fa3" if chip.target == 90 else "fa2")


def space(problem: PrefillAttention, chip: Chip) -> Iterator[FlashInferPrefillConfig]:
    """Both backends."""
    yield FlashInferPrefillConfig("fa3")
    yield FlashInferPrefillConfig("fa2")


def fits(problem: PrefillAttention, config: FlashInferPrefillConfig, chip: Chip) -> str | None:
    """What flashinfer-python 0.7 takes."""
    p = problem
    if lacking := p.unserved("softcap", "page_size", "kv_tokens"):
        return lacking
    if p.dtype == "float32":
        return "FlashInfer takes 16-bit types"
    if (p.head_dim, p.dim_v) not in HEAD_DIMS:
        return "FlashInfer's prefill takes head dimensions of 64, 128 and 256, and 192 with 128 for the values"
    if config.backend not in ("fa2", "fa3"):
        return f"the backends are fa2 and fa3, not {config.backend!r}"
    if config.backend == "fa3" and chip.target != 90:
        return "the backend fa3 is Hopper's"
    return None


@kernel(
    PrefillAttention, backend="torch", config=FlashInferPrefillConfig, default=default, space=space, fits=fits, library=True,
    requires=FLASHINFER,
)  # fmt: skip
def flashinfer_prefill(problem: PrefillAttention, config: FlashInferPrefillConfig, chip: Chip) -> Launch:
    """FlashInfer's ragged or paged prefill (fa2, fa3), planned once; a paged one gathers its list of pages at each launch."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper

    p = problem
    q_indptr = host(tuple(offsets(p.q_lens)))
    common = {
        "head_dim_vo": p.dim_v,
        "causal": p.causal,
        # Inclusive: the keys to the left of the query's own.
        "window_left": p.window - 1 if p.window else -1,
        "logits_soft_cap": p.softcap or None,
        "sm_scale": p.scale,
        "q_data_type": torch_dtype(p.dtype),
        "kv_data_type": torch_dtype(p.dtype),
    }

    def workspace(device: torch.device) -> torch.Tensor:
        return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def plan_ragged(device: torch.device) -> Any:
        wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace(device), "NHD", backend=config.backend)
        wrapper.plan(q_indptr, host(tuple(offsets(p.kv_lens))), p.heads, p.kv_heads, p.head_dim, **common)
        return wrapper

    def plan_paged(device: torch.device) -> tuple[Any, PageList]:
        pages = Pages.of(p.kv_lens, p.page_size)
        listed = PageList(pages, device)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace(device), "NHD", backend=config.backend)
        # The list is on the device already: the wrapper keeps this very tensor, which each launch fills.
        wrapper.plan(
            q_indptr, host(pages.indptr), listed.indices, host(pages.last_page_lens), p.heads, p.kv_heads, p.head_dim, p.page_size, **common
        )
        return wrapper, listed

    ragged, paged = PerDevice(plan_ragged), PerDevice(plan_paged)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        ragged.on(inputs["q"].device).run(inputs["q"], inputs["k"], inputs["v"], out=outputs["out"])

    def launch_paged(inputs: Tensors, outputs: Tensors) -> None:
        wrapper, listed = paged.on(inputs["q"].device)
        listed.fill(inputs["block_table"])
        wrapper.run(inputs["q"], (inputs["k_cache"], inputs["v_cache"]), out=outputs["out"])

    return launch_paged if p.page_size else launch
