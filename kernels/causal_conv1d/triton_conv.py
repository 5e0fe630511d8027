"""The short causal convolution in Triton: tiles of tokens and channels, each read `width` times, from memory once and then from L1."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.causal_conv1d._tiles import Tiles, count_tiles
from klab.kernels.causal_conv1d.problem import CausalConv1d
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.triton_support import cdiv, next_power_of_2

# Inputs of one shift that a thread holds, as 32-bit registers; `width` shifts are under way together.
MAX_REGISTERS_PER_SHIFT = 32


@dataclass(frozen=True)
class ConvConfig(Config):
    """A program takes block_t tokens of one sequence and block_c channels."""

    block_t: int = 16
    block_c: int = 256
    num_warps: int = 4


@triton.jit
def _conv(
    x,
    weight,
    conv_state,
    runs,
    out,
    final_state,
    channels,
    x_token,
    weight_row,
    state_sequence,
    state_row,
    channel_blocks,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN_C: tl.constexpr,
):
    run = runs + tl.program_id(0) // channel_blocks * 4
    sequence = tl.load(run).to(tl.int64)
    first = tl.load(run + 1).to(tl.int64)
    place = tl.load(run + 2)
    length = tl.load(run + 3)
    offs_c = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_t = tl.arange(0, BLOCK_T)
    is_channel = offs_c < channels
    exists = (place + offs_t < length)[:, None]
    if not EVEN_C:
        exists = exists & is_channel[None, :]
    x += first * x_token + offs_c
    conv_state += sequence * state_sequence + offs_c
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for j in tl.static_range(WIDTH):
        # Counted from the sequence's first token; what is before it stands at the end of the state.
        at = (place + offs_t + (j - WIDTH + 1))[:, None]
        inputs = tl.load(x + (offs_t + (j - WIDTH + 1))[:, None] * x_token, mask=exists & (at >= 0), other=0.0).to(tl.float32)
        if BLOCK_T < WIDTH - 1 or j < WIDTH - 1:
            inputs += tl.load(conv_state + (WIDTH - 1 + at) * state_row, mask=exists & (at < 0), other=0.0).to(tl.float32)
        factor = tl.load(weight + offs_c * weight_row + j, mask=is_channel, other=0.0).to(tl.float32)
        total += inputs * factor[None, :]
    if SILU:
        total *= tl.sigmoid(total)
    to = out + (first + offs_t)[:, None] * channels + offs_c[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=exists)

    if place + BLOCK_T >= length:
        for j in tl.static_range(WIDTH - 1):
            source = length + j - (WIDTH - 1)
            if source >= 0:
                kept = tl.load(x + (source - place).to(tl.int64) * x_token, mask=is_channel)
            else:
                kept = tl.load(conv_state + (WIDTH - 1 + source) * state_row, mask=is_channel)
            tl.store(final_state + (sequence * (WIDTH - 1) + j) * channels + offs_c, kept, mask=is_channel)


def fits(problem: CausalConv1d, config: ConvConfig, chip: Chip) -> str | None:
    """Tiles are powers of two no larger than the padded problem, with 16 bytes for every thread, and fit the registers."""
    t, c, warps = config.block_t, config.block_c, config.num_warps
    if any(value < 1 or value & (value - 1) for value in (t, c, warps)) or warps > 16:
        return "tiles and warps must be powers of two, warps at most 16"
    if t > next_power_of_2(max(problem.seq_lens)):
        return "block_t is larger than the longest sequence"
    if c > max(32, next_power_of_2(problem.channels)):
        return "block_c is larger than the channels"
    bytes_per_thread = t * c * SIZE_BYTES[problem.dtype] // (32 * warps)
    if bytes_per_thread > 4 * MAX_REGISTERS_PER_SHIFT:
        return "the tile would spill registers"
    if bytes_per_thread < 16 and warps > 1:
        return "less than 16 bytes for each thread"
    if count_tiles(problem, t) * cdiv(problem.channels, c) >= 2**31 or c * problem.width >= 2**20:
        return "too many programs"
    return None


def default(problem: CausalConv1d, chip: Chip) -> ConvConfig:
    """16 tokens of 512 bytes of channels; one token and one warp for decoding."""
    block_c = min(512 // SIZE_BYTES[problem.dtype], max(32, next_power_of_2(problem.channels)))
    block_t = min(16, next_power_of_2(max(problem.seq_lens)))
    warps = 4
    while warps > 1 and block_t * block_c * SIZE_BYTES[problem.dtype] // (32 * warps) < 16:
        warps //= 2
    return ConvConfig(block_t, block_c, warps)


def space(problem: CausalConv1d, chip: Chip) -> Iterator[ConvConfig]:
    """1 to 64 tokens, 64 to 2048 channels, 1 to 8 warps."""
    for t, c, warps in product((16, 8, 4, 2, 1, 32, 64), (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8)):
        yield ConvConfig(t, c, warps)


@kernel(CausalConv1d, backend="triton", config=ConvConfig, space=space, default=default, fits=fits)
def triton_conv(problem: CausalConv1d, config: ConvConfig, chip: Chip) -> Launch:
    """Triton tiles of tokens and channels; the tile at a sequence's end also writes its state."""
    p, c = problem, config
    tiles = Tiles(p, c.block_t)
    channel_blocks = cdiv(p.channels, c.block_c)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, weight, state = inputs["x"], inputs["weight"], inputs["conv_state"]
        _conv[(len(tiles) * channel_blocks,)](
            x,
            weight,
            state,
            tiles.on(x.device),
            outputs["out"],
            outputs["final_state"],
            p.channels,
            x.stride(0),
            weight.stride(0),
            *state.stride()[:2],
            channel_blocks,
            WIDTH=p.width,
            SILU=p.activation == "silu",
            BLOCK_T=c.block_t,
            BLOCK_C=c.block_c,
            EVEN_C=p.channels % c.block_c == 0,
            num_warps=c.num_warps,
        )

    return launch
