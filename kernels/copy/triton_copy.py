"""A copy in Triton: a program moves one stretch of a row."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.copy.problem import Copy
from klab.kernels.row_tiles import is_power_of_2, refusal, warps_for
from klab.kernels.triton_support import cdiv, next_power_of_2

MAX_GRID_Y = 65535


@dataclass(frozen=True)
class StretchConfig(Config):
    """Columns of a row that a program copies."""

    columns: int = 4096
    num_warps: int = 8


@triton.jit
def _copy(x, out, width, x_stride, out_stride, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = columns < width
    # Nothing of either is used again before it has left the cache.
    values = tl.load(x + row * x_stride + columns, mask=here, eviction_policy="evict_first")
    tl.store(out + row * out_stride + columns, values, mask=here, cache_modifier=".cs")


def fits(problem: Copy, config: StretchConfig, chip: Chip) -> str | None:
    """A stretch is held in registers."""
    if not is_power_of_2(config.columns) or config.columns > next_power_of_2(problem.width):
        return "columns must be a power of two no larger than the row"
    if cdiv(problem.width, config.columns) > MAX_GRID_Y:
        return "too many programs along a row"
    return refusal(config.columns, config.num_warps)


def default(problem: Copy, chip: Chip) -> StretchConfig:
    """32 bytes a thread in stretches of at most 8 KiB."""
    columns = min(next_power_of_2(problem.width), 4096)
    return StretchConfig(columns, warps_for(columns, 16))


def space(problem: Copy, chip: Chip) -> Iterator[StretchConfig]:
    """Stretches with 4 to 64 elements a thread."""
    for columns, warps in product((512, 1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8, 16)):
        if 128 * warps <= columns <= 2048 * warps:
            yield StretchConfig(columns, warps)


@kernel(Copy, backend="triton", config=StretchConfig, space=space, default=default, fits=fits)
def triton_copy(problem: Copy, config: StretchConfig, chip: Chip) -> Launch:
    """Triton: a stretch of a row per program, streamed past the caches."""
    grid = (problem.rows, cdiv(problem.width, config.columns))

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = inputs["x"], outputs["out"]
        _copy[grid](x, out, problem.width, x.stride(0), out.stride(0), COLUMNS=config.columns, num_warps=config.num_warps)

    return launch
