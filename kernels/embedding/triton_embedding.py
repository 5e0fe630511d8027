"""An embedding gather in Triton: a program copies a stretch of some tokens' rows."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.embedding.problem import Embedding
from klab.kernels.row_tiles import is_power_of_2, refusal, warps_for
from klab.kernels.triton_support import cdiv, next_power_of_2

MAX_GRID_Y = 65535


@dataclass(frozen=True)
class GatherConfig(Config):
    """Tokens and columns that a program copies."""

    tokens: int = 1
    columns: int = 1024
    num_warps: int = 4


@triton.jit
def _gather(ids_ptr, weight_ptr, out_ptr, tokens, width, weight_stride, out_stride, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    ids = tl.load(ids_ptr + token, mask=token < tokens, other=0).to(tl.int64)
    here = (token[:, None] < tokens) & (columns < width)
    # The table is larger than any cache, the output is read next.
    row = tl.load(weight_ptr + ids[:, None] * weight_stride + columns, mask=here, eviction_policy="evict_first")
    tl.store(out_ptr + token.to(tl.int64)[:, None] * out_stride + columns, row, mask=here)


def fits(problem: Embedding, config: GatherConfig, chip: Chip) -> str | None:
    """A tile is held in registers."""
    c = config
    if not is_power_of_2(c.tokens, c.columns):
        return "tokens and columns must be powers of two"
    if (c.tokens > 1 and c.tokens >= 2 * problem.tokens) or c.columns > next_power_of_2(problem.width):
        return "a tile is larger than the problem"
    if cdiv(problem.width, c.columns) > MAX_GRID_Y:
        return "too many columns of tiles"
    return refusal(c.tokens * c.columns, c.num_warps)


def default(problem: Embedding, chip: Chip) -> GatherConfig:
    """16 elements a thread, two 16-byte loads; narrower where there are too few programs to fill the chip."""
    columns, tokens = min(next_power_of_2(problem.width), 4096), 1
    while columns > 512 and problem.tokens * cdiv(problem.width, columns) < 8 * chip.sm_count:
        columns //= 2
    while tokens * columns < 1024 and 2 * tokens <= problem.tokens and cdiv(problem.tokens, tokens) >= 8 * chip.sm_count:
        tokens *= 2
    return GatherConfig(tokens, columns, warps_for(tokens * columns, 16))


def space(problem: Embedding, chip: Chip) -> Iterator[GatherConfig]:
    """Tiles with 4 to 64 elements a thread."""
    for tokens, columns, warps in product((1, 2, 4, 8), (64, 128, 256, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16)):
        if 128 * warps <= tokens * columns <= 16384:
            yield GatherConfig(tokens, columns, warps)


@kernel(Embedding, backend="triton", config=GatherConfig, space=space, default=default, fits=fits)
def triton_embedding(problem: Embedding, config: GatherConfig, chip: Chip) -> Launch:
    """Triton: a stretch of columns of a few tokens per program."""
    p, c = problem, config
    grid = (cdiv(p.tokens, c.tokens), cdiv(p.width, c.columns))

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        weight, out = inputs["weight"], outputs["out"]
        _gather[grid](
            inputs["ids"], weight, out, p.tokens, p.width, weight.stride(0), out.stride(0), TOKENS=c.tokens, COLUMNS=c.columns,
            num_warps=c.num_warps,
        )  # fmt: skip

    return launch
