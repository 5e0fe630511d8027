"""Activations in Triton: tiles of rows and columns, or whole rows where one scale is to be found for each."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.activation.problem import SWIGLU_LIMIT, SWIGLU_SLOPE, Activation
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.quantize import LEAST_AMAX
from klab.kernels.row_quantize import GROUP, scales_per_row
from klab.kernels.row_tiles import is_power_of_2, refusal, warps_for
from klab.kernels.triton_fp8 import FP8_MAX, to_fp8
from klab.kernels.triton_support import cdiv, next_power_of_2

# A grid has at most this many programs along y.
MAX_GRID_Y = 65535


@dataclass(frozen=True)
class TileConfig(Config):
    """A program does `rows` x `columns` outputs; with quantize "fp8_row", columns cover a row."""

    rows: int = 1
    columns: int = 1024
    num_warps: int = 4


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit
def _tanh(x):
    return 2.0 * _sigmoid(2.0 * x) - 1.0


@triton.jit
def _act(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x * _sigmoid(x)
    if KIND == "sigmoid":
        return _sigmoid(x)
    if KIND == "relu2":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    if KIND == "gelu_tanh":
        # x (1 + tanh u) / 2 is x sigmoid(2 u), which keeps its relative precision where tanh is near -1.
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activate(
    x_ptr,
    out_ptr,
    scale_ptr,
    rows,
    width,
    x_stride,
    out_stride,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    SLOPE: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    LEAST_AMAX: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    # Groups of COLUMNS with a scale each; x and its other half lie `width` apart.
    columns = first + tl.arange(0, BLOCK // COLUMNS)[None, :, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    here = columns < width
    if not EVEN_ROWS:
        here = here & (row < rows)
    at = x_ptr + row * x_stride + columns
    x = tl.load(at, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if GATED:
        up = tl.load(at + width, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if KIND == "swiglu_clamped":
        x = tl.minimum(x, LIMIT)
        y = x * _sigmoid(SLOPE * x) * (tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0)
    else:
        y = _act(x, KIND)
        if GATED:
            y = y * up
    if GROUPS:
        y = tl.where(here, y, 0.0)
        largest = tl.maximum(tl.max(tl.abs(y), axis=2, keep_dims=True), LEAST_AMAX)
        tl.store(out_ptr + row * out_stride + columns, to_fp8(y * (FP8_MAX / largest)), mask=here)
        group = first // COLUMNS + tl.arange(0, BLOCK // COLUMNS)[None, :, None]
        tl.store(scale_ptr + row * GROUPS + group, largest * (1.0 / FP8_MAX), mask=(group < GROUPS) & (row < rows))
    else:
        tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=here)


def _least_columns(problem: Activation) -> int:
    """A whole row, or whole groups, where a scale is to be found."""
    return {"": 1, "fp8_row": next_power_of_2(problem.width), "fp8_group": GROUP}[problem.quantize]


def fits(problem: Activation, config: TileConfig, chip: Chip) -> str | None:
    """A tile is held in registers."""
    c, least = config, _least_columns(problem)
    if not is_power_of_2(c.rows, c.columns):
        return "rows and columns must be powers of two"
    if c.columns < least or (c.columns > least and problem.quantize == "fp8_row"):
        return f"columns are {least}{' or more' if problem.quantize != 'fp8_row' else ''}"
    if (c.rows > 1 and c.rows >= 2 * problem.rows) or c.columns > max(least, next_power_of_2(problem.width)):
        return "a tile is larger than the problem"
    if cdiv(problem.width, c.columns) > MAX_GRID_Y:
        return "too many columns of tiles"
    return refusal(c.rows * c.columns, c.num_warps)


def default(problem: Activation, chip: Chip) -> TileConfig:
    """8 outputs a thread (a 16-byte load of each half), smaller tiles where there are too few to fill the chip; a whole row for fp8_row."""
    widest, least = next_power_of_2(problem.width), _least_columns(problem)
    columns, rows = min(widest, max(least, 2048)), 1
    columns = max(columns, least)
    while columns > max(least, 512) and problem.rows * cdiv(problem.width, columns) < 8 * chip.sm_count:
        columns //= 2
    while (
        rows * columns < 1024 and 2 * rows <= problem.rows and cdiv(problem.rows, rows) * cdiv(problem.width, columns) >= 8 * chip.sm_count
    ):
        rows *= 2
    return TileConfig(rows, columns, warps_for(rows * columns, 8 if rows * columns <= 8192 else 16))


def space(problem: Activation, chip: Chip) -> Iterator[TileConfig]:
    """Tiles from 256 elements on, with 4 to 64 outputs a thread."""
    for rows, columns, warps in product((1, 2, 4, 8, 16), (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16, 32)):
        if rows * columns < 256 or 128 * warps > rows * columns or (rows > 1 and rows * columns > 8192):
            continue
        yield TileConfig(rows, columns, warps)


@kernel(Activation, backend="triton", config=TileConfig, space=space, default=default, fits=fits)
def triton_activation(problem: Activation, config: TileConfig, chip: Chip) -> Launch:
    """Triton, one pass: activation, product and fp8 in registers."""
    p, c = problem, config
    grid = (cdiv(p.rows, c.rows), cdiv(p.width, c.columns))

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = inputs["x"], outputs["out"]
        _activate[grid](
            x,
            out,
            outputs.get("scale", out),
            p.rows,
            p.width,
            x.stride(0),
            out.stride(0),
            KIND=p.kind,
            GATED=p.gated,
            SLOPE=SWIGLU_SLOPE,
            LIMIT=SWIGLU_LIMIT,
            ROWS=c.rows,
            BLOCK=c.columns,
            COLUMNS=GROUP if p.quantize == "fp8_group" else c.columns,
            GROUPS=scales_per_row(p.width, p.quantize),
            EVEN_ROWS=p.rows % c.rows == 0,
            LEAST_AMAX=LEAST_AMAX,
            num_warps=c.num_warps,
        )

    return launch
