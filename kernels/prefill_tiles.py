"""How a prefill step is cut into blocks of query rows, on the host: the Problem knows every length, so no tensor is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.kernels.prefill_attention.problem import PrefillAttention, offsets
from klab.kernels.triton_support import next_power_of_2

if TYPE_CHECKING:
    import torch

Tile = tuple[int, int, int, int, int, int]
"""First query token, query tokens, first key, keys (all of the tile's sequence), number of the row block in it, the sequence."""


def key_span(problem: PrefillAttention, sequence: int, first: int, last: int) -> tuple[int, int]:
    """Keys [begin, end) that at least one of this sequence's query tokens first..last (inclusive) sees."""
    prefix, keys = problem.prefixes[sequence], problem.kv_lens[sequence]
    if not problem.causal:
        return 0, keys
    begin = max(0, prefix + first + 1 - problem.window) if problem.window else 0
    return begin, min(keys, prefix + last + 1)


class Tiles:
    """The blocks of `block_m` query rows of all sequences, those with most keys first, so that the last wave is made of small ones.

    With `rows_per_token` = r, each query token gives r rows (the query heads that share one key head, packed into the rows).
    """

    def __init__(self, problem: PrefillAttention, block_m: int, rows_per_token: int = 1) -> None:
        found: list[tuple[int, Tile]] = []
        q_at, kv_at = offsets(problem.q_lens), offsets(problem.kv_lens)
        for i, (q_len, kv_len) in enumerate(zip(problem.q_lens, problem.kv_lens, strict=True)):
            for block in range(-(-q_len * rows_per_token // block_m)):
                first = block * block_m // rows_per_token
                last = min(q_len - 1, ((block + 1) * block_m - 1) // rows_per_token)
                begin, end = key_span(problem, i, first, last)
                found.append((end - begin, (q_at[i], q_len, kv_at[i], kv_len, block, i)))
        found.sort(key=lambda tile: -tile[0])
        self.rows: list[Tile] = [tile for _, tile in found]
        self._on: dict[torch.device, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def on(self, device: torch.device) -> torch.Tensor:
        """The tiles as [tiles, 6] int32 on `device`; made at the first call there (before any graph capture) and kept."""
        if device not in self._on:
            import torch

            self._on[device] = torch.tensor(self.rows, dtype=torch.int32, device=device)
        return self._on[device]


def padded(dim: int) -> int:
    """The width of a block that holds `dim` columns: a power of two, at least 16 (the least a matrix instruction takes)."""
    return max(16, next_power_of_2(dim))


def split_dim(dim: int) -> tuple[int, int]:
    """A head dimension as a power of two and a rest rounded up to one (0: none): 128 -> (128, 0), 192 -> (128, 64), 80 -> (64, 16).

    Two products of 128 and 64 columns cost a quarter less than one of 192 padded to 256.
    """
    head = padded(dim)
    if head <= max(dim, 16):
        return head, 0
    return head // 2, padded(dim - head // 2)
