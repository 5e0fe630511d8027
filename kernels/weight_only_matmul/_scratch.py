"""Unpacking with torch's own operators, into buffers that are made once."""

from __future__ import annotations

import torch

from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul


class Scratch:
    """Buffers of one launch, made at its first call on a device and kept."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], torch.Tensor] = {}

    def get(self, name: str, rows: int, columns: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A dense [rows, columns] view of the buffer `name`, whose first request is its largest."""
        key = (name, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(rows * columns, dtype=dtype, device=like.device)
        return self._buffers[key][: rows * columns].view(rows, columns)


def dequantize_rows(problem: WeightOnlyMatmul, w: torch.Tensor, scale: torch.Tensor, scratch: Scratch, dtype: torch.dtype) -> torch.Tensor:
    """[rows, k] of `dtype` in the scratch: element times scale, rounded once. Integers and fp8 are exact in every `dtype`."""
    rows = w.shape[0]
    wide = scratch.get("wide", rows, problem.k, like=w, dtype=dtype)
    if problem.format == "int4":
        signed = w.view(torch.int8)
        halves = wide.view(rows, problem.k // 2, 2)
        # An arithmetic shift to the right keeps the sign: of the high half as it is, of the low one moved up first.
        low = scratch.get("low", rows, problem.k // 2, like=w, dtype=torch.int8)
        torch.bitwise_left_shift(signed, 4, out=low)
        halves[..., 0].copy_(low.bitwise_right_shift_(4))
        torch.bitwise_right_shift(signed, 4, out=low)
        halves[..., 1].copy_(low)
    else:
        wide.copy_(w)
    # The last group may be short: the whole groups first, then what is left.
    group = problem.group or problem.k
    whole = problem.k // group
    if whole:
        wide[:, : whole * group].view(rows, whole, group).mul_(scale[:, :whole, None])
    if whole * group < problem.k:
        wide[:, whole * group :].mul_(scale[:, whole:])
    return wide
