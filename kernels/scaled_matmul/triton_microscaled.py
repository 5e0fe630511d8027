"""mxfp8, mxfp4 and nvfp4 on Blackwell's own block-scaled tensor cores (tcgen05), by tl.dot_scaled on tensor descriptors."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.errors import UsageError
from klab.kernels.scaled_matmul import _tiles
from klab.kernels.scaled_matmul._microscales import expand, pack_scales, unpack_scales
from klab.kernels.scaled_matmul.problem import MICRO, PACKED, ScaledMatmul
from klab.kernels.triton_support import INTERPRETED, cdiv, ensure_allocator, next_power_of_2, pipeline_smem_bytes, row_is_aligned

# 512-byte tiles of scales that a program of the packing kernel moves along k.
PACKED_TILES = 8


@dataclass(frozen=True)
class MicroscaledConfig(Config):
    """A CTA computes tiles of block_m x block_n, block_k at a time, and stores each in `epilogue_subtiles` slices of its columns."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 128
    group_m: int = 8
    epilogue_subtiles: int = 1
    num_warps: int = 4
    num_stages: int = 3
    warp_specialize: bool = False
    flatten: bool = True


@triton.jit
def _microscaled(
    x,
    w,
    out,
    x_packed,
    w_packed,
    x_global,
    w_global,
    m,
    n,
    k,
    stride_x,
    stride_w,
    stride_out,
    tiles_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    FORMAT: tl.constexpr,
    GLOBAL: tl.constexpr,
    GROUP_M: tl.constexpr,
    CTAS: tl.constexpr,
    SUBTILES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
    EXPAND: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    BYTES_K: tl.constexpr = BLOCK_K // PER_BYTE
    SCALES: tl.constexpr = BLOCK_K // VECTOR
    BLOCK_OUT: tl.constexpr = BLOCK_N // SUBTILES
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    high_x = tl.cdiv(m, 128)
    high_w = tl.cdiv(n, 128)
    x_tiles = tl.make_tensor_descriptor(x, shape=[m, k // PER_BYTE], strides=[stride_x, 1], block_shape=[BLOCK_M, BYTES_K])
    w_tiles = tl.make_tensor_descriptor(w, shape=[n, k // PER_BYTE], strides=[stride_w, 1], block_shape=[BLOCK_N, BYTES_K])
    x_scales = tl.make_tensor_descriptor(
        x_packed,
        shape=[1, high_x, tiles_k, 2, 256],
        strides=[high_x * tiles_k * 512, tiles_k * 512, 512, 256, 1],
        block_shape=[1, BLOCK_M // 128, SCALES // 4, 2, 256],
    )
    w_scales = tl.make_tensor_descriptor(
        w_packed,
        shape=[1, high_w, tiles_k, 2, 256],
        strides=[high_w * tiles_k * 512, tiles_k * 512, 512, 256, 1],
        block_shape=[1, BLOCK_N // 128, SCALES // 4, 2, 256],
    )
    out_tiles = tl.make_tensor_descriptor(out, shape=[m, n], strides=[stride_out, 1], block_shape=[BLOCK_M, BLOCK_OUT])
    steps = tl.cdiv(k, BLOCK_K)
    per_group = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, CTAS, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        first_m = tile // per_group * GROUP_M
        rows = min(tiles_m - first_m, GROUP_M)
        row = (first_m + tile % per_group % rows) * BLOCK_M
        column = tile % per_group // rows * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            a = x_tiles.load([row, step * BYTES_K])
            b = w_tiles.load([column, step * BYTES_K])
            a_scale = unpack_scales(x_scales.load([0, row // 128, step * (SCALES // 4), 0, 0]), BLOCK_M, SCALES)
            b_scale = unpack_scales(w_scales.load([0, column // 128, step * (SCALES // 4), 0, 0]), BLOCK_N, SCALES)
            if EXPAND:
                wide_a = expand(a, a_scale, BLOCK_M, BLOCK_K, VECTOR)
                sums = tl.dot(wide_a, expand(b, b_scale, BLOCK_N, BLOCK_K, VECTOR).T, sums, input_precision="ieee")
            else:
                sums = tl.dot_scaled(a, a_scale, FORMAT, b.T, b_scale, FORMAT, sums)
        if GLOBAL:
            sums *= tl.load(x_global) * tl.load(w_global)
        if SUBTILES == 1:
            out_tiles.store([row, column], sums.to(out.dtype.element_ty))
        else:
            left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            if SUBTILES == 2:
                out_tiles.store([row, column], left.to(out.dtype.element_ty))
                out_tiles.store([row, column + BLOCK_OUT], right.to(out.dtype.element_ty))
            else:
                first, second = tl.split(tl.permute(tl.reshape(left, (BLOCK_M, 2, BLOCK_OUT)), (0, 2, 1)))
                third, fourth = tl.split(tl.permute(tl.reshape(right, (BLOCK_M, 2, BLOCK_OUT)), (0, 2, 1)))
                out_tiles.store([row, column], first.to(out.dtype.element_ty))
                out_tiles.store([row, column + BLOCK_OUT], second.to(out.dtype.element_ty))
                out_tiles.store([row, column + 2 * BLOCK_OUT], third.to(out.dtype.element_ty))
                out_tiles.store([row, column + 3 * BLOCK_OUT], fourth.to(out.dtype.element_ty))


def fits(problem: ScaledMatmul, config: MicroscaledConfig, chip: Chip) -> str | None:
    """tcgen05 with packed scales: tiles of 128 rows and columns, aligned rows, tensor memory for two tiles of sums and the scales."""
    bm, bn, bk, size = config.block_m, config.block_n, config.block_k, SIZE_BYTES[problem.dtype]
    if problem.format not in MICRO:
        return "is for mxfp8, mxfp4 and nvfp4"
    if chip.target < 100:
        return "block-scaled tensor cores are Blackwell's: see triton_upcast"
    per_byte = 2 if problem.format in PACKED else 1
    if problem.k // per_byte % 16 or not row_is_aligned(problem.n, size):
        return "tensor descriptors need rows in multiples of 16 bytes"
    if bm not in (128, 256) or bn not in (128, 256) or bk not in (128, 256, 512):
        return "tiles are of 128 or 256 rows and columns, and 128 to 512 of k"
    if bk > max(128, next_power_of_2(problem.k)) or bk // per_byte > 256:
        return "block_k is larger than k, or than 256 bytes"
    if config.num_warps not in (4, 8) or config.group_m < 1 or config.num_stages < 1:
        return "num_warps is 4 or 8, group_m and num_stages at least 1"
    if config.epilogue_subtiles not in (1, 2, 4):
        return "the epilogue is stored in 1, 2 or 4 slices"
    alive = 2 if config.flatten or config.warp_specialize else 1
    # The scales of a step take a column per 4 of them and 32 rows... at most 64 in all for the tiles above.
    if alive * bn * cdiv(bm, 128) + 64 > 512:
        return "the sums and scales need more than 512 columns of tensor memory"
    stage_bytes = (bm + bn) * (bk // per_byte + bk // MICRO[problem.format])
    if pipeline_smem_bytes(stage_bytes, config.num_stages, bm * bn // config.epilogue_subtiles * size) > chip.smem_per_block_bytes:
        return "too much shared memory"
    # On their way out; nvfp4's last factor keeps them longer: 256 a thread spill 104 bytes (Triton 3.7.1).
    if bm * bn // (32 * config.num_warps) > (128 if problem.format == "nvfp4" else 256):
        return "the sums would spill registers"
    return None


def default(problem: ScaledMatmul, chip: Chip) -> MicroscaledConfig:
    """128x256, one tile after the other, where there are enough tiles, else 128x128; as many stages as fit, up to five."""
    bytes_k = min(128, next_power_of_2(problem.k) // (2 if problem.format in PACKED else 1))
    bk = max(128, bytes_k * (2 if problem.format in PACKED else 1))
    large = _tiles.tiles(problem, 128, 256) >= chip.sm_count
    bn, warps, flatten = (256, 8, False) if large else (128, 4, _tiles.tiles(problem, 128, 128) > chip.sm_count)
    candidates = [
        MicroscaledConfig(128, bn, bk, 8 if problem.m > 128 else 1, 2, warps, stages, False, flatten)
        for stages in range(min(5, 1 + cdiv(problem.k, bk)), 0, -1)
    ]
    return next((config for config in candidates if fits(problem, config, chip) is None), candidates[-1])


def space(problem: ScaledMatmul, chip: Chip) -> Iterator[MicroscaledConfig]:
    """All tiles that fit, with and without specialisation and slices."""
    for bm, bn, bk, group_m, subtiles, warps, stages, specialize, flatten in product(
        (128, 256), (128, 256), (128, 256, 512), (1, 8, 16), (1, 2, 4), (4, 8), (2, 3, 4, 5, 6), (False, True), (False, True)
    ):
        tiles_m, tiles = cdiv(problem.m, bm), _tiles.tiles(problem, bm, bn)
        if (bm > 128 and problem.m <= 128) or (group_m > 1 and group_m > tiles_m) or stages - 1 > cdiv(problem.k, bk):
            continue
        if specialize and not flatten:
            continue  # every Triton compiles the flattened ones
        if flatten and not specialize and tiles <= chip.sm_count:
            continue  # one tile per CTA leaves nothing to flatten
        yield MicroscaledConfig(bm, bn, bk, group_m, subtiles, warps, stages, specialize, flatten)


@kernel(ScaledMatmul, backend="triton", config=MicroscaledConfig, space=space, default=default, fits=fits)
def triton_microscaled(problem: ScaledMatmul, config: MicroscaledConfig, chip: Chip) -> Launch:
    """Triton's dot_scaled on tcgen05 with scales in the packed layout; packs those of x and w at each launch."""
    m, n, k, size, vector = problem.m, problem.n, problem.k, SIZE_BYTES[problem.dtype], MICRO[problem.format]
    ctas = min(chip.sm_count, _tiles.tiles(problem, config.block_m, config.block_n))
    tiles_x, tiles_w, tiles_k = cdiv(m, 128), cdiv(n, 128), cdiv(k // vector, 4)
    kept: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        x_scale, w_scale = inputs["x_scale"], inputs["w_scale"]
        for name, tensor, bytes_each in (("x", x, 1), ("w", w, 1), ("out", out, size)):
            if tensor.stride(1) != 1 or tensor.stride(0) * bytes_each % 16 or tensor.data_ptr() % 16:
                raise UsageError(f"triton_microscaled needs {name} with dense rows that start at multiples of 16 bytes")
        if out.device not in kept:
            kept[out.device] = (
                torch.empty(tiles_x * tiles_k * 512, dtype=x_scale.dtype, device=out.device),
                torch.empty(tiles_w * tiles_k * 512, dtype=w_scale.dtype, device=out.device),
            )
        x_packed, w_packed = kept[out.device]
        scales = [tensor.view(torch.uint8) for tensor in (x_scale, w_scale, x_packed, w_packed)]
        strides = (x_scale.stride(0), w_scale.stride(0))
        pack_scales[(tiles_x + tiles_w, cdiv(tiles_k, PACKED_TILES))](
            *scales, m, n, k // vector, *strides, tiles_x, tiles_k, TILES=PACKED_TILES, num_warps=4
        )
        ensure_allocator(x.device)
        _microscaled[(ctas,)](
            x,
            w,
            out,
            x_packed,
            w_packed,
            inputs.get("x_global", x_scale),
            inputs.get("w_global", w_scale),
            m,
            n,
            k,
            x.stride(0),
            w.stride(0),
            out.stride(0),
            tiles_k,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            VECTOR=vector,
            FORMAT="e2m1" if problem.format in PACKED else "e4m3",
            GLOBAL=problem.format == "nvfp4",
            GROUP_M=config.group_m,
            CTAS=ctas,
            SUBTILES=config.epilogue_subtiles,
            WARP_SPECIALIZE=config.warp_specialize,
            FLATTEN=config.flatten,
            # Triton 3.7's interpreter has no dot_scaled: there the same product is spelled out.
            EXPAND=INTERPRETED,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    return launch
