"""Limits that the attention kernels on `attention.cuh` share: which problems they take, and what a block may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch

    from klab.kernels.decode_attention.problem import DecodeAttention
    from klab.kernels.prefill_attention.problem import PrefillAttention

REGISTERS_PER_THREAD = 255
REGISTERS_PER_SM = 65536
MAX_HEAD_DIM = 256
MAX_GRID_YZ = 65535


def row_bytes(dim: int, size: int = 2) -> int:
    """Bytes of a row of `dim` elements in shared memory, padded to whole lines of 32 banks (128 bytes) for the swizzle."""
    return -(-size * dim // 128) * 128


def refusal(problem: PrefillAttention | DecodeAttention, chip: Chip, *, multiple: int = 16) -> str | None:
    """Why no configuration can run, or None. Head dims must be multiples of `multiple`."""
    if problem.dtype not in ("float16", "bfloat16"):
        return f"tensor cores multiply fp16 and bf16 here, not {problem.dtype}"
    if chip.compute_capability < (8, 0):
        return f"needs cp.async and bf16 tensor cores (compute capability 8.0), {chip.name} has {chip.compute_capability}"
    if any(dim % multiple or not 16 <= dim <= MAX_HEAD_DIM for dim in (problem.head_dim, problem.dim_v)):
        return f"head dims are multiples of {multiple} up to {MAX_HEAD_DIM}, not {problem.head_dim}/{problem.dim_v}"
    return None


def over_budget(smem_bytes: int, registers: int, warps: int, chip: Chip) -> str | None:
    """Why a block of `warps` warps with this shared memory and an estimated `registers` per thread cannot run well, or None."""
    if smem_bytes > chip.smem_per_block_bytes:
        return f"needs {smem_bytes} B of shared memory, {chip.name} has {chip.smem_per_block_bytes}"
    available = min(REGISTERS_PER_THREAD, REGISTERS_PER_SM // (32 * warps))
    if registers > available:
        return f"would spill: about {registers} registers per thread of {available}"
    return None


def row_strides(kernel: str, name: str, tensor: torch.Tensor) -> list[int]:
    """Elements from one index to the next, for all dimensions but the last; UsageError unless rows are dense and start at 16 bytes."""
    *outer, dim = tensor.stride()
    if dim != 1 or any(stride * tensor.element_size() % 16 for stride in outer) or tensor.data_ptr() % 16:
        raise UsageError(f"{kernel} copies 16 bytes at a time: make rows of {name} dense and 16-byte aligned (strides {tensor.stride()})")
    return outer
