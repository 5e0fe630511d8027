"""DeepGEMM's grouped matmul with contiguous groups.

Written for DeepGEMM 2.8.0 (m_grouped_fp8_gemm_nt_contiguous, m_grouped_bf16_gemm_nt_contiguous). Its groups begin at multiples of 128
rows, which engines arrange when they permute tokens to experts. Rows that lie dense, as here, are moved there and back: both moves are
timed, and read and write as much again as x and out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.grouped_matmul.problem import BLOCK, GroupedMatmul
from klab.kernels.outside import DEEP_GEMM, PerDevice, aligned

# Rows of a group are padded to a multiple of this (get_m_alignment_for_contiguous_layout on sm_90 and sm_100).
ALIGNMENT = 128


def fits(problem: GroupedMatmul, config: Config, chip: Chip) -> str | None:
    """bf16, or fp8 with block scales on Hopper."""
    p = problem
    if p.dtype != "bfloat16":
        return "DeepGEMM multiplies into bf16"
    if chip.target not in (90, 100):
        return "DeepGEMM is for sm_90 and sm_100"
    if p.format and chip.target != 90:
        return "on chips other than sm_90 DeepGEMM's scales are powers of two"
    if p.format and (p.n % 64 or p.k % BLOCK):
        return f"takes n in multiples of 64 and k in multiples of {BLOCK}"
    if p.n % 8 or p.k % 8:
        return "takes rows of a multiple of 16 bytes"
    return None


class Moved:
    """Rows at the places that DeepGEMM wants, in buffers large enough for any routing."""

    def __init__(self, problem: GroupedMatmul, device: torch.device) -> None:
        p = problem
        self.capacity = (p.rows + p.experts * (ALIGNMENT - 1) + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        self._experts = p.experts
        self._row = torch.arange(p.rows, device=device)
        # Zeros once: rows between the groups are multiplied too, where a tile has some of the group, and must not be NaN.
        operand = torch.float8_e4m3fn if p.format else torch.bfloat16
        self.x = torch.zeros((self.capacity, p.k), dtype=operand, device=device)
        self.x_scale = torch.zeros((self.capacity, -(-p.k // BLOCK)), dtype=torch.float32, device=device)
        self.out = torch.zeros((self.capacity, p.n), dtype=torch.bfloat16, device=device)
        self.expert_of = torch.empty(self.capacity, dtype=torch.int32, device=device)

    def places(self, offsets: torch.Tensor) -> torch.Tensor:
        """Where each row goes, int64 [rows]; `expert_of` becomes the expert of every place, -1 where no tile of 128 has a row."""
        ends = offsets[1:].long()
        padded = (offsets.diff().long() + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        padded_ends = padded.cumsum(0)
        expert = torch.searchsorted(ends, self._row, right=True)
        place = torch.arange(self.capacity, device=offsets.device)
        of = torch.searchsorted(padded_ends, place, right=True)
        self.expert_of.copy_(torch.where(of < self._experts, of, -1))
        return self._row - offsets.long()[expert] + (padded_ends - padded)[expert]


@kernel(GroupedMatmul, backend="torch", fits=fits, library=True, requires=DEEP_GEMM)
def deep_gemm_grouped(problem: GroupedMatmul, config: Config, chip: Chip) -> Launch:
    """DeepGEMM's grouped bf16 or fp8 matmul; rows are moved to groups of 128 and back, which is timed."""
    import deep_gemm

    p = problem
    buffers = PerDevice(lambda device: Moved(p, device))
    bits: Callable[[torch.Tensor], torch.Tensor] = (lambda x: x.view(torch.uint8)) if p.format else (lambda x: x)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        moved, w = buffers.on(inputs["x"].device), aligned(inputs["w"])
        places = moved.places(inputs["offsets"])
        # As bytes: not every device copies fp8 by index.
        bits(moved.x).index_copy_(0, places, bits(inputs["x"]))
        if p.format:
            moved.x_scale.index_copy_(0, places, inputs["x_scale"])
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
                (moved.x, moved.x_scale), (w, inputs["w_scale"].contiguous()), moved.out, moved.expert_of, disable_ue8m0_cast=True
            )
        else:
            deep_gemm.m_grouped_bf16_gemm_nt_contiguous(moved.x, w, moved.out, moved.expert_of)
        torch.index_select(moved.out, 0, places, out=outputs["out"])

    return launch
