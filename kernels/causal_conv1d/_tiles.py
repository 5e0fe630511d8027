"""How packed sequences are cut into runs of tokens, on the host: the Problem knows every length, so no tensor is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.kernels.causal_conv1d.problem import CausalConv1d

if TYPE_CHECKING:
    import torch


def count_tiles(problem: CausalConv1d, size: int) -> int:
    """How many runs `Tiles` has."""
    return sum(max(1, -(-length // size)) for length in problem.seq_lens)


class Tiles:
    """Runs of up to `size` tokens, none across a sequence's end; a sequence of no tokens has one run of none, for its state."""

    def __init__(self, problem: CausalConv1d, size: int) -> None:
        self.rows: list[
            tuple[int, int, int, int]
        ] = []  # sequence, first token of the run, its place in the sequence, the sequence's length
        for i, (first, length) in enumerate(zip(problem.offsets, problem.seq_lens, strict=False)):
            self.rows += [(i, first + at, at, length) for at in range(0, max(length, 1), size)]
        self._on: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def on(self, device: torch.device) -> torch.Tensor:
        """The runs as [runs, 4] int32 on `device`; made at the first call there (before any graph capture) and kept."""
        if device not in self._on:
            import torch

            self._on[device] = torch.tensor(self.rows, dtype=torch.int32, device=device)
        return self._on[device]
