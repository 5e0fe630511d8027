"""What the Triton kernels of every operator share. It imports without triton and torch, like the rest of this folder."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true", "y", "yes")
"""True when @triton.jit functions run in the interpreter on the CPU: Triton reads the same variable when it decorates."""

KIB = 1024


@functools.cache
def triton_version() -> tuple[int, int]:
    """(major, minor) of the installed Triton, for instance (3, 7); (0, 0) where there is none."""
    try:
        import triton
    except ModuleNotFoundError:
        return (0, 0)
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def ensure_allocator(device: torch.device | str) -> None:
    """Give Triton the allocator that descriptors made inside a kernel need; call it in every launch of such a kernel.

    Triton keeps the allocator in a context variable, so each thread has its own: setting it once at import is not enough. Setting
    it costs 0.1 us. The scratch comes from torch's caching allocator, which is safe on the current stream and in a CUDA graph.
    """
    import triton

    triton.set_allocator(_allocator_on(str(device)))


@functools.cache
def _allocator_on(device: str) -> object:
    import torch

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        # torch aligns to 512 bytes on a GPU; descriptors need 128.
        return torch.empty(size, dtype=torch.int8, device=device)

    return allocate


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(value: int) -> int:
    """The least power of two that is at least `value` (1 for 0 and below)."""
    return 1 << max(0, value - 1).bit_length()


def pipeline_smem_bytes(stage_bytes: int, num_stages: int, epilogue_bytes: int = 0) -> int:
    """Shared memory of a software-pipelined loop: `num_stages` copies of what one step loads, plus an epilogue tile and 1 KiB of barriers.

    An upper bound: Triton may reuse a stage for the epilogue, never the other way round.
    """
    return num_stages * stage_bytes + epilogue_bytes + KIB


def row_is_aligned(elements: int, itemsize: int, alignment: int = 16) -> bool:
    """Whether rows of this many elements start at multiples of `alignment` bytes, as tensor descriptors (TMA) need."""
    return elements * itemsize % alignment == 0
