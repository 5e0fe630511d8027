"""What the CUDA C++ kernels of this folder ask of the tensors they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.kernels.cuda_module import Int64
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch


def row_strides(kernel: str, name: str, tensor: torch.Tensor) -> list[Int64]:
    """Elements from one index to the next, for all dimensions but the last; UsageError unless rows are dense and start at 16 bytes."""
    *outer, dense = tensor.stride()
    if dense != 1 or any(stride * tensor.element_size() % 16 for stride in outer) or tensor.data_ptr() % 16:
        raise UsageError(f"{kernel} loads 16 bytes at a time: make rows of {name} dense and 16-byte aligned (strides {tensor.stride()})")
    return [Int64(stride) for stride in outer]
