"""A convolution in Triton as a sum of matrix products, one per tap, whose rows are frames of x shifted by that tap."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.conv1d.problem import Conv1d
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.triton_support import cdiv, next_power_of_2, pipeline_smem_bytes

# One thread holds block_t * block_o / (32 num_warps) float32 sums; 128 leaves half of its 255 registers for pointers and operands.
MAX_SUMS_PER_THREAD = 128
# float32 has no tensor cores under IEEE rules: every multiply-add is an unrolled instruction, and its operands are registers too.
MAX_SUMS_PER_THREAD_FP32 = 64
MAX_FMAS_PER_STEP_FP32 = 4096
# Elements of x and w that a thread brings per step, eight to a pointer: with 256 some configurations of two warps spill.
MAX_LOADS_PER_THREAD = 192


@dataclass(frozen=True)
class ImplicitConfig(Config):
    """A CTA computes block_t frames of block_o channels, block_c input channels of one tap at a time."""

    block_t: int = 128
    block_o: int = 128
    block_c: int = 64
    num_warps: int = 8
    num_stages: int = 3


@triton.jit
def _conv_tile(
    x,
    w,
    out,
    frames,
    frames_out,
    channels_in,
    channels_out,
    stride_xb,
    stride_xt,
    stride_wo,
    stride_wj,
    stride_ob,
    stride_ot,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN_O: tl.constexpr,
    EVEN_C: tl.constexpr,
):
    # Channels first: CTAs that run together share the frames in L2.
    tiles_o = tl.cdiv(channels_out, BLOCK_O)
    tile_o = tl.program_id(0) % tiles_o
    tile_t = tl.program_id(0) // tiles_o
    sequence = tl.program_id(1).to(tl.int64)
    x += sequence * stride_xb
    w += (tile_o * BLOCK_O).to(tl.int64) * stride_wo
    times = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    outs = tl.arange(0, BLOCK_O)[:, None]
    channels = tl.arange(0, BLOCK_C)[None, :]
    # Of the first tap; a frame may lie before x.
    first_frames = times * STRIDE - PADDING
    inside_o = tile_o * BLOCK_O + outs < channels_out
    steps_c = tl.cdiv(channels_in, BLOCK_C)
    sums = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for step in range(WIDTH * steps_c):
        tap = step // steps_c
        start_c = step % steps_c * BLOCK_C
        frame = first_frames + tap
        inside_x = (frame >= 0) & (frame < frames) & (times < frames_out)
        x_here = x + frame * stride_xt + start_c + channels
        w_here = w + tap * stride_wj + start_c + outs * stride_wo + channels
        if EVEN_C:
            a = tl.load(x_here, mask=inside_x, other=0.0)
            b = tl.load(w_here) if EVEN_O else tl.load(w_here, mask=inside_o, other=0.0)
        else:
            inside_c = start_c + channels < channels_in
            a = tl.load(x_here, mask=inside_x & inside_c, other=0.0)
            b = tl.load(w_here, mask=inside_o & inside_c, other=0.0)
        sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")

    columns = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    out += sequence * stride_ob
    tl.store(out + times * stride_ot + columns, sums.to(out.dtype.element_ty), mask=(times < frames_out) & (columns < channels_out))


def fits(problem: Conv1d, config: ImplicitConfig, chip: Chip) -> str | None:
    """Tiles are powers of two no larger than the padded problem; stages fit shared memory and sums fit registers."""
    bt, bo, bc, warps = config.block_t, config.block_o, config.block_c, config.num_warps
    if problem.batch > 65535:
        return f"a grid has no {problem.batch} sequences"
    if any(value < 1 or value & (value - 1) for value in (bt, bo, bc, warps)):
        return "tiles and warps must be powers of two"
    if min(bt, bo, bc) < 16:
        return "tl.dot needs tiles of at least 16"
    if config.num_stages < 1:
        return "num_stages must be at least 1"
    for block, size, name in ((bt, problem.frames_out, "t"), (bo, problem.channels_out, "o"), (bc, problem.channels_in, "c")):
        if block > max(16, next_power_of_2(size)):
            return f"block_{name} is larger than the problem"
    if (
        max(problem.frames + bt * problem.stride, problem.frames_out + bt, problem.width * bo)
        * max(problem.channels_in, problem.channels_out)
        >= 2**31
    ):
        return "a sequence is too long for 32-bit offsets"
    threads = 32 * warps
    if warps > 16 or (bt // 16) * (bo // 8) < warps:
        return "too many warps for the tile"
    fp32 = problem.dtype == "float32"
    if (bt + bo) * bc // threads > MAX_LOADS_PER_THREAD:
        return "the pointers of one step would spill registers"
    if bt * bo // threads > (MAX_SUMS_PER_THREAD_FP32 if fp32 else MAX_SUMS_PER_THREAD):
        return "the sums would spill registers"
    if fp32 and bt * bo * bc // threads > MAX_FMAS_PER_STEP_FP32:
        return "one step would unroll too many multiply-adds"
    if pipeline_smem_bytes((bt + bo) * bc * SIZE_BYTES[problem.dtype], config.num_stages) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def default(problem: Conv1d, chip: Chip) -> ImplicitConfig:
    """128x128 tiles, 128x256 where they fill the chip, and the step that wastes least of the input channels."""
    # Triton learns alignment only of sizes that 16 divides. Rows of others are loaded element by element, which takes one pointer each.
    small = problem.dtype == "float32" or problem.channels_in % 16 != 0
    padded_t, padded_o = (max(16, next_power_of_2(s)) for s in (problem.frames_out, problem.channels_out))
    bt = min(padded_t, 64 if small else 128)
    wide = bt == 128 and problem.batch * cdiv(problem.frames_out, 128) * cdiv(problem.channels_out, 256) >= 2 * chip.sm_count
    bo = min(padded_o, 256 if wide else 128 if bt == 128 else 64)
    # The largest step of which at most a quarter is wasted on channels that are not there: 32 for 80 channels.
    bc = next((c for c in ((32,) if small else (64, 32)) if cdiv(problem.channels_in, c) * c <= 1.25 * problem.channels_in), 16)
    warps = 4 if bt <= 64 else 8
    while (bt // 16) * (bo // 8) < warps:
        warps //= 2
    return ImplicitConfig(bt, bo, bc, warps, 3 if bc == 64 else 4)


def space(problem: Conv1d, chip: Chip) -> Iterator[ImplicitConfig]:
    """All tiles that are not hopeless for the shape."""
    fp32 = problem.dtype == "float32"
    steps = (16, 32) if fp32 else (16, 32, 64, 128)
    for bt, bo, bc, warps, stages in product((16, 32, 64, 128, 256), (16, 32, 64, 128, 256), steps, (2, 4, 8), (2, 3, 4, 5, 6)):
        if bt > max(16, next_power_of_2(problem.frames_out)) or (bt < 64 and problem.frames_out >= 8 * bt):
            continue  # rows for nothing, or weights read from L2 too often
        if bt * bo >= 512 * warps and stages <= max(2, problem.width * cdiv(problem.channels_in, bc)):
            yield ImplicitConfig(bt, bo, bc, warps, stages)


@kernel(Conv1d, backend="triton", config=ImplicitConfig, space=space, default=default, fits=fits)
def triton_implicit_gemm(problem: Conv1d, config: ImplicitConfig, chip: Chip) -> Launch:
    """Triton with pointers: frames are read shifted by each tap, masked where there are none; nothing is laid out before."""
    p = problem
    grid = (cdiv(p.frames_out, config.block_t) * cdiv(p.channels_out, config.block_o), p.batch)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        _conv_tile[grid](
            x,
            w,
            out,
            p.frames,
            p.frames_out,
            p.channels_in,
            p.channels_out,
            x.stride(0),
            x.stride(1),
            w.stride(0),
            w.stride(1),
            out.stride(0),
            out.stride(1),
            WIDTH=p.width,
            STRIDE=p.stride,
            PADDING=p.padding,
            BLOCK_T=config.block_t,
            BLOCK_O=config.block_o,
            BLOCK_C=config.block_c,
            EVEN_O=p.channels_out % config.block_o == 0,
            EVEN_C=p.channels_in % config.block_c == 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    return launch
