"""What the kernels that call other people's packages share: the packages, and plans made on the host from the Problem alone.

Several libraries want the pages of a paged cache as one flat list (compressed sparse rows) and lengths on the host. Lengths are the
Problem's; the list's values change with every block table, so that a launch gathers them on the device, into a buffer that the library
was given once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Generic, TypeVar

from klab.kernels.contract import Package

if TYPE_CHECKING:
    import torch

CUDA_TILE = Package("cuda.tile", "pip install cuda-tile[tileiras]", ("cuda-tile",))
DEEP_GEMM = Package("deep_gemm", "pip install --no-build-isolation git+https://github.com/deepseek-ai/DeepGEMM", ("deep_gemm", "deep-gemm"))
FLASH_ATTN_2 = Package("flash_attn_2_cuda", "pip install --no-build-isolation flash-attn", ("flash-attn",))
FLASH_ATTN_3 = Package(
    "flash_attn_3",
    "pip install --no-build-isolation git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper",
    ("flash-attn-3", "flash_attn_3"),
)
FLASH_ATTN_4 = Package("flash_attn.cute", "pip install --pre flash-attn-4", ("flash-attn-4",))
FLASHINFER = Package("flashinfer", "pip install flashinfer-python", ("flashinfer-python",))
QUACK = Package("quack", "pip install quack-kernels", ("quack-kernels",))
SGL_KERNEL = Package("sgl_kernel", "pip install sglang-kernel", ("sglang-kernel", "sgl-kernel"))
TILELANG = Package("tilelang", "pip install tilelang")
VLLM = Package("vllm", "pip install vllm")
XFORMERS = Package("xformers", "pip install xformers")

T = TypeVar("T")


class PerDevice(Generic[T]):
    """What is made at the first call on a device, and kept: plans, workspaces."""

    def __init__(self, make: Callable[[torch.device], T]) -> None:
        self._make = make
        self._made: dict[torch.device, T] = {}

    def on(self, device: torch.device) -> T:
        """The one of this device."""
        if device not in self._made:
            self._made[device] = self._make(device)
        return self._made[device]


@dataclass(frozen=True)
class Pages:
    """Where each sequence's pages lie in a flat list: sequence i has indptr[i]..indptr[i + 1], its last page holds last_page_lens[i]
    tokens; `places` are their places in the flattened block table [batch, width].
    """

    indptr: tuple[int, ...]
    last_page_lens: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, kv_lens: tuple[int, ...], page_size: int) -> Pages:
        """From the sequences' lengths in tokens; the block table is as wide as the longest."""
        counts = [-(-length // page_size) for length in kv_lens]
        width = max(counts)
        return cls(
            tuple(accumulate(counts, initial=0)),
            tuple(length - (count - 1) * page_size if count else 0 for length, count in zip(kv_lens, counts, strict=True)),
            tuple(i * width + j for i, count in enumerate(counts) for j in range(count)),
        )


class PageList:
    """A device buffer for the flat list of pages, filled from a block table at each launch."""

    def __init__(self, pages: Pages, device: torch.device) -> None:
        import torch

        self._places = torch.tensor(pages.places, dtype=torch.int64, device=device)
        self.indices = torch.zeros(len(pages.places), dtype=torch.int32, device=device)

    def fill(self, block_table: torch.Tensor) -> None:
        """Gather the pages that are in use."""
        import torch

        torch.index_select(block_table.reshape(-1), 0, self._places, out=self.indices)


def host(values: tuple[int, ...]) -> torch.Tensor:
    """int32 in the host's memory: libraries that plan on the host copy from there without waiting for the device."""
    import torch

    return torch.tensor(values, dtype=torch.int32)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x itself where all its rows begin at multiples of 16 bytes, as TMA wants them; else a copy (as some checks' padded rows are)."""
    size = x.element_size()
    return x if all(stride * size % 16 == 0 for stride in x.stride()[:-1]) else x.contiguous()
