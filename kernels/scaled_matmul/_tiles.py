"""What the Triton kernels of this operator share: strides of scales, and whether a tile suits a problem and a chip."""

from __future__ import annotations

from klab.kernels.contract import Chip, Tensors
from klab.kernels.scaled_matmul.problem import BLOCK, BLOCKS, ScaledMatmul
from klab.kernels.triton_support import cdiv, next_power_of_2, row_is_aligned

# Sums that a thread can hold in its 255 registers beside addresses and operands (Triton 3.7.1, sm_90: 128 make 155 to 204, 256 spill).
MAX_SUMS_PER_THREAD = 128
# Block scales, and promotion, need the sums of a step and those of all steps at once: 64 make 165 to 185 registers, 128 spill.
MAX_PROMOTED_SUMS_PER_THREAD = 64


def row_strides(problem: ScaledMatmul, inputs: Tensors) -> tuple[int, int]:
    """Elements from the scale of one row (or block of rows) to the next one's, of x and w; 0 where one serves the whole matrix."""
    if problem.format == "fp8_tensor":
        return 0, 0
    return inputs["x_scale"].stride(0), inputs["w_scale"].stride(0)


def scale_block(problem: ScaledMatmul) -> int:
    """How many k share a scale, and rows of w too; 0 where all k do."""
    return BLOCK if problem.format == "fp8_block" else 0


def refused_format(problem: ScaledMatmul) -> str | None:
    """Why these kernels do not take this format, or None."""
    return None if problem.format in BLOCKS else f"{problem.format} has scales that follow its blocks of 16 or 32: see triton_microscaled"


def refused_tile(problem: ScaledMatmul, bm: int, bn: int, bk: int, warps: int, *, least_m: int) -> str | None:
    """Why a tile of these sizes (elements) and warps does not suit the problem, or None. Tiles of `least_m` rows are always let pass."""
    if any(value < 1 or value & (value - 1) for value in (bm, bn, bk, warps)):
        return "tiles and warps must be powers of two"
    if min(bm, bn) < 16 or bk < 32:
        return "tl.dot needs tiles of at least 16 rows and columns, and 32 of k for elements of 8 bits"
    if max(bm, bn, bk) > 256:
        return "tiles are at most 256"
    for block, length, name in ((bm, max(problem.m, least_m), "m"), (bn, max(problem.n, 16), "n"), (bk, max(problem.k, 32), "k")):
        if block > next_power_of_2(length):
            return f"block_{name} is larger than {name}"
    if problem.format == "fp8_block" and bk > BLOCK:
        return "a step along k must lie within one block of scales"
    if warps > 16 or (bm // 16) * (bn // 8) < warps:
        return "too many warps for the tile"
    return None


def refused_promotion(problem: ScaledMatmul, promote: int, bk: int, chip: Chip) -> str | None:
    """Why sums cannot be promoted to float32 every `promote` of k, or None."""
    if promote and (promote < 32 or promote > bk or bk % promote):
        return "promote is 0, or at least 32 and a divisor of block_k"
    if promote and (problem.format not in ("fp8_tensor", "fp8_row") or chip.target != 90):
        return "promotion is for fp8 without block scales on sm_90: elsewhere it changes nothing"
    return None


def is_promoted(problem: ScaledMatmul, promote: int) -> bool:
    """Whether a step's sums and the running ones are two sets of registers."""
    return promote > 0 or problem.format == "fp8_block"


def is_aligned(problem: ScaledMatmul, size: int) -> bool:
    """Whether rows of x, w and an output of `size` bytes an element are whole 16-byte chunks."""
    return problem.k % 16 == 0 and row_is_aligned(problem.n, size)


def tiles(problem: ScaledMatmul, bm: int, bn: int) -> int:
    """Output tiles of the whole problem."""
    return cdiv(problem.m, bm) * cdiv(problem.n, bn)
