"""Keys and values for what cannot read a paged or narrow cache: packed and widened by torch, which takes its time and is timed."""

from __future__ import annotations

import torch

from klab.kernels.contract import Tensors
from klab.kernels.dtypes import torch_dtype
from klab.kernels.prefill_attention.problem import PrefillAttention


class Cache:
    """The keys and values of one problem as [sum kv_lens, kv_heads, dim] in its dtype; what is packed and wide already is not copied."""

    def __init__(self, problem: PrefillAttention) -> None:
        self.problem = problem
        self._tokens: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def packed(self, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values). Scales of narrow ones are multiplied in float32 and the product is rounded once."""
        problem, found = self.problem, []
        slots = self._slots(inputs["block_table"]) if problem.page_size else None
        for name in ("k", "v"):
            x = inputs[name] if slots is None else inputs[f"{name}_cache"].flatten(0, 1).view(_bits(problem)).index_select(0, slots)
            if problem.kv_dtype:
                x = (x.view(torch_dtype(problem.kv_dtype)).float() * inputs[f"{name}_scale"][:, None]).to(torch_dtype(problem.dtype))
            found.append(x)
        return found[0], found[1]

    def _slots(self, table: torch.Tensor) -> torch.Tensor:
        """The row of each packed token in a cache whose pages lie one behind another; what the lengths alone decide is kept."""
        if table.device not in self._tokens:
            lens = torch.tensor(self.problem.kv_lens, device=table.device)
            sequence = torch.arange(len(self.problem.kv_lens), device=table.device).repeat_interleave(
                lens, output_size=sum(self.problem.kv_lens)
            )
            token = torch.arange(sequence.numel(), device=table.device) - (lens.cumsum(0) - lens)[sequence]
            self._tokens[table.device] = (sequence, token // self.problem.page_size, token % self.problem.page_size)
        sequence, page, row = self._tokens[table.device]
        return table[sequence, page] * self.problem.page_size + row


def _bits(problem: PrefillAttention) -> torch.dtype:
    """The type to move elements by: torch's index operations take no fp8."""
    return torch.uint8 if problem.kv_dtype else torch_dtype(problem.dtype)
