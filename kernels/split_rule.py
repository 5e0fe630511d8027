"""Into how many pieces a decode kernel cuts the keys of a sequence, so that a small batch still fills the chip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

# In units of one tile's time, for tiles of about 64 keys (32 KiB at head dim 128, about 1.8 us when every SM of an H200 streams):
# starting a program and filling its pipeline costs 2 to 3 us, the second launch that merges costs as much once, and reading one
# more partial result of 0.5 KiB per row costs about a twentieth of a tile.
OVERHEAD_TILES = 1.5
COMBINE_TILES = 1.5
MERGE_TILES = 0.05
MAX_SPLITS = 512


def tiles_per_split(longest_tiles: int, splits: int) -> int:
    """Tiles of one piece when the longest sequence is cut into at most `splits` pieces: at least 1. Every sequence uses this size."""
    return max(1, -(-longest_tiles // max(1, splits)))


def choose_splits(
    tiles_per_sequence: Sequence[int],
    programs_without_split: int,
    slots: int,
    *,
    overhead_tiles: float = OVERHEAD_TILES,
    merge_tiles: float = MERGE_TILES,
    combine_tiles: float = COMBINE_TILES,
    max_splits: int = MAX_SPLITS,
) -> int:
    """Pieces for the longest sequence that minimise the estimated time; 1 means no split and no merging launch.

    `tiles_per_sequence`: tiles of keys of each sequence (0 for a padding entry, which still costs a program).
    `programs_without_split`: programs of the whole launch when nothing is split (sequences x key/value heads x row tiles).
    `slots`: programs that run at once on the chip (SMs x programs per SM).
    All sequences are cut into pieces of the same size, `tiles_per_split(longest, splits)`, so a short one has fewer of them.

    The estimate is the wave rule of flashinfer's pull request 4904, ceil(waves) * (tiles of a piece + overhead) + merging, bounded
    by Graham's bound for list scheduling (all work / slots + the longest piece), which is far lower when lengths differ.
    """
    longest = max(tiles_per_sequence, default=0)
    per_sequence = programs_without_split / max(1, len(tiles_per_sequence))
    counts = Counter(tiles_per_sequence)
    best, best_cost, last_piece = 1, float("inf"), 0
    for splits in range(1, max(1, min(longest, max_splits)) + 1):
        piece = tiles_per_split(longest, splits)
        if piece == last_piece:
            continue
        last_piece = piece
        programs = per_sequence * sum(n * max(1, -(-tiles // piece)) for tiles, n in counts.items())
        work = per_sequence * sum(n * tiles for tiles, n in counts.items()) + programs * overhead_tiles
        waves = -(-programs // slots)
        cost = min(waves * (piece + overhead_tiles), work / slots + piece + overhead_tiles)
        if splits > 1:
            cost += combine_tiles + merge_tiles * splits
        if cost < best_cost:
            best, best_cost = splits, cost
    return best
