"""How packed sequences are cut into chunks, on the host: the Problem knows every length, so no tensor is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.kernels.gated_delta_rule.problem import GatedDeltaRule
from klab.kernels.triton_support import cdiv

if TYPE_CHECKING:
    import torch


def count_chunks(problem: GatedDeltaRule, size: int) -> int:
    """How many chunks of `size` tokens the sequences have."""
    return sum(cdiv(length, size) for length in problem.seq_lens)


class Chunks:
    """The chunks of `size` tokens of all sequences, in order; the last of a sequence may be shorter, an empty sequence has none."""

    def __init__(self, problem: GatedDeltaRule, size: int) -> None:
        self.rows: list[tuple[int, int]] = []  # first token, tokens
        self.sequences: list[tuple[int, int, int, int]] = []  # first chunk, chunks, first token, tokens
        for first, length in zip(problem.offsets, problem.seq_lens, strict=False):
            self.sequences.append((len(self.rows), cdiv(length, size), first, length))
            self.rows += [(first + at, min(size, length - at)) for at in range(0, length, size)]
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`rows` [chunks, 2] and `sequences` [batch, 4] as int32 on `device`; made at the first call there and kept."""
        if device not in self._on:
            import torch

            self._on[device] = (
                torch.tensor(self.rows, dtype=torch.int32, device=device),
                torch.tensor(self.sequences, dtype=torch.int32, device=device),
            )
        return self._on[device]


class Workspace:
    """What the stages of the chunked form pass on, made at the first call on a device and kept.

    corrections [chunks, heads, size, value_dim], keys [.., size, key_dim]: T beta v and T beta exp(b) k, with T the inverse of a chunk's
    equations and b the decay cumulated from the chunk's beginning. The scan turns corrections into beta (v - S^T k) in place.
    gates [chunks, heads, 2, size] float32: b in units of log2, and the reciprocal norm of each key.
    weights [.., size, size]: what a query takes of each correction. states [.., key_dim, value_dim]: the state before each chunk.
    """

    def __init__(self, problem: GatedDeltaRule, chunks: int, size: int, *, weights: bool, states: bool) -> None:
        each = (chunks, problem.value_heads)
        self.dtype = problem.dtype
        self.shapes = {
            "corrections": (*each, size, problem.value_dim),
            "keys": (*each, size, problem.key_dim),
            "gates": (*each, 2, size),
            "weights": (*each, size, size) if weights else (1,),
            "states": (*each, problem.key_dim, problem.value_dim) if states else (1,),
        }
        self._on: dict[torch.device, dict[str, torch.Tensor]] = {}

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors by name; one that is not needed has one element."""
        if device not in self._on:
            import torch

            from klab.kernels.dtypes import torch_dtype

            self._on[device] = {
                name: torch.empty(shape, dtype=torch.float32 if name == "gates" else torch_dtype(self.dtype), device=device)
                for name, shape in self.shapes.items()
            }
        return self._on[device]


def workspace_bytes(problem: GatedDeltaRule, chunks: int, size: int, itemsize: int, *, weights: bool, states: bool) -> int:
    """Bytes of a Workspace."""
    key_dim, value_dim = problem.key_dim, problem.value_dim
    elements = size * (key_dim + value_dim) + weights * size * size + states * key_dim * value_dim
    return chunks * problem.value_heads * (elements * itemsize + 8 * size)
