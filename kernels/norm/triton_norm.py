"""Norms in Triton with a row in registers: what is read is read once; several short rows per program."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.norm.problem import Norm
from klab.kernels.quantize import LEAST_AMAX
from klab.kernels.row_quantize import GROUP, scales_per_row
from klab.kernels.row_tiles import is_power_of_2, persistent_programs, refusal, warps_for
from klab.kernels.triton_fp8 import FP8_MAX, to_fp8
from klab.kernels.triton_support import cdiv, next_power_of_2

# Programs per SM (0: one per tile, no walk) and stages.
WALKS = ((0, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (2, 4), (4, 1), (4, 2), (4, 3), (8, 1), (8, 2))


@dataclass(frozen=True)
class RowConfig(Config):
    """A program norms `rows` rows at once; per_sm > 0: so many programs per SM walk all rows, `num_stages` steps under way."""

    rows: int = 1
    num_warps: int = 4
    per_sm: int = 0
    num_stages: int = 1


@triton.jit
def _row_sum(x):
    return tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _norm_rows(
    x_ptr,
    residual_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    scale_ptr,
    sum_ptr,
    rows,
    width,
    x_stride,
    residual_stride,
    gate_stride,
    out_stride,
    sum_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    LAYER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
    LEAST_AMAX: tl.constexpr,
    STAGES: tl.constexpr,
):
    # A row is groups of COLUMNS, each with a scale of its own: laid out so from the start, no value moves to another thread.
    columns = tl.arange(0, BLOCK // COLUMNS)[None, :, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if LAYER:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        # Rows in 64 bits: 256k rows of 16384 are more than 2^31 elements.
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None, None]).to(tl.int64)
        here = inside if EVEN_ROWS else inside & (row < rows)
        h = tl.load(x_ptr + row * x_stride + columns, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if RESIDUAL:
            h += tl.load(residual_ptr + row * residual_stride + columns, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
            rounded = h.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * sum_stride + columns, rounded, mask=here)
            h = rounded.to(tl.float32)
        if GATED:
            gate = tl.load(gate_ptr + row * gate_stride + columns, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if LAYER:
            h = tl.where(inside, h - _row_sum(h) / width, 0.0)
        y = h * tl.rsqrt(_row_sum(h * h) / width + eps) * weight.to(tl.float32)
        if LAYER:
            y += bias.to(tl.float32)
        if GATED:
            y = y * gate / (1.0 + tl.exp2(gate * -1.4426950408889634))
        if GROUPS:
            largest = tl.maximum(tl.max(tl.abs(y), axis=2, keep_dims=True), LEAST_AMAX)
            tl.store(out_ptr + row * out_stride + columns, to_fp8(y * (FP8_MAX / largest)), mask=here)
            group = tl.arange(0, BLOCK // COLUMNS)[None, :, None]
            # The padding has groups too.
            tl.store(scale_ptr + row * GROUPS + group, largest * (1.0 / FP8_MAX), mask=(group < GROUPS) & (row < rows))
        else:
            tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=here)


def block_of(problem: Norm) -> int:
    """Columns of a tile: a whole row, and whole groups of it."""
    return max(next_power_of_2(problem.width), GROUP if problem.quantize == "fp8_group" else 1)


def held_bytes(problem: Norm) -> int:
    """Bytes per element that are alive beside the float32 value: what is read of a row, and the weights."""
    return SIZE_BYTES[problem.dtype] * (2 + (problem.kind == "layer") + problem.gated)


def fits(problem: Norm, config: RowConfig, chip: Chip) -> str | None:
    """A tile is held in registers."""
    c, elements = config, config.rows * block_of(problem)
    if not is_power_of_2(c.rows):
        return "rows must be a power of two"
    if c.rows > 1 and (c.rows >= 2 * problem.rows or elements > 16384):
        return "a tile of several rows is larger than the problem or than 16384 elements"
    if c.per_sm < 0 or c.num_stages < 1 or (c.num_stages > 1 and c.per_sm == 0):
        return "stages need programs that walk: per_sm above 0"
    if c.num_stages > 1:
        read = (1 + problem.residual + problem.gated) * SIZE_BYTES[problem.dtype] * elements
        if c.num_stages * read * c.per_sm > chip.smem_per_sm_bytes - 4096 * c.per_sm:
            return "the stages need too much shared memory"
    return refusal(elements, c.num_warps, held_bytes(problem))


def default(problem: Norm, chip: Chip) -> RowConfig:
    """16 elements a thread: four 16-byte loads of two tensors under way; tiles of at least 2048 elements where rows are short and many."""
    block, rows = block_of(problem), 1
    while rows * block < 2048 and 2 * rows <= problem.rows and cdiv(problem.rows, rows) >= 8 * chip.sm_count:
        rows *= 2
    return RowConfig(rows, warps_for(rows * block, 16))


def space(problem: Norm, chip: Chip) -> Iterator[RowConfig]:
    """Rows per program, warps, and programs that walk with loads under way."""
    block = block_of(problem)
    for rows, warps, (per_sm, stages) in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16, 32), WALKS):
        if 32 * warps * 4 > rows * block and warps > 1:
            continue  # fewer than four elements a thread leave loads narrow
        tiles = cdiv(problem.rows, rows)
        if per_sm and tiles < 2 * per_sm * chip.sm_count:
            continue  # a program would have no second tile to fetch ahead
        yield RowConfig(rows, warps, per_sm, stages)


@kernel(Norm, backend="triton", config=RowConfig, space=space, default=default, fits=fits)
def triton_norm(problem: Norm, config: RowConfig, chip: Chip) -> Launch:
    """Triton, one pass with the rows in registers; sum, gate and fp8 fused."""
    p, c = problem, config
    block = block_of(p)
    grid = (persistent_programs(cdiv(p.rows, c.rows), c.per_sm, chip),)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = inputs["x"], outputs["out"]
        residual, gate, added = inputs.get("residual", x), inputs.get("gate", x), outputs.get("residual", out)
        _norm_rows[grid](
            x,
            residual,
            gate,
            inputs["weight"],
            inputs.get("bias", x),
            out,
            outputs.get("scale", out),
            added,
            p.rows,
            p.width,
            x.stride(0),
            residual.stride(0),
            gate.stride(0),
            out.stride(0),
            added.stride(0),
            p.eps,
            ROWS=c.rows,
            BLOCK=block,
            EVEN_ROWS=p.rows % c.rows == 0,
            LAYER=p.kind == "layer",
            RESIDUAL=p.residual,
            GATED=p.gated,
            COLUMNS=GROUP if p.quantize == "fp8_group" else block,
            GROUPS=scales_per_row(p.width, p.quantize),
            LEAST_AMAX=LEAST_AMAX,
            STAGES=c.num_stages,
            num_warps=c.num_warps,
        )

    return launch
