"""What the Triton kernels on rows of activations share: how wide a tile is, and when it would spill."""

from __future__ import annotations

from klab.kernels.contract import Chip
from klab.kernels.triton_support import cdiv, next_power_of_2

MAX_WARPS = 32
# Registers for addresses, masks and sums. With them the estimate below is within 10 of what ptxas allots for sm_90, between 64 and 180.
ADDRESS_REGISTERS = 20


def is_power_of_2(*values: int) -> bool:
    """Whether all are, and at least 1."""
    return all(value >= 1 and value & (value - 1) == 0 for value in values)


def warps_for(elements: int, per_thread: int) -> int:
    """Warps with about `per_thread` elements of a tile for each thread: 1 to 32."""
    return max(1, min(MAX_WARPS, next_power_of_2(cdiv(elements, 32 * per_thread))))


def refusal(elements: int, num_warps: int, held_bytes: int = 0) -> str | None:
    """Why a tile of so many elements cannot be held by so many warps, or None.

    Each is a float32 in registers and, beside it, `held_bytes` of what was loaded and is still needed (weights, a gate).
    """
    if not is_power_of_2(num_warps) or num_warps > MAX_WARPS:
        return "num_warps must be a power of two of at most 32"
    per_thread = elements // (32 * num_warps)
    if per_thread < 1 and num_warps > 1:
        return "too many warps for the tile"
    registers = ADDRESS_REGISTERS + per_thread * (4 + held_bytes) // 4
    if registers > min(255, 65536 // (32 * num_warps)):
        return "the tile would spill registers"
    return None


def persistent_programs(tiles: int, per_sm: int, chip: Chip) -> int:
    """Programs of a grid that walks `tiles`: one per tile, or `per_sm` (if above 0) for each SM."""
    return tiles if per_sm == 0 else min(tiles, per_sm * chip.sm_count)
