"""A persistent scaled product on tensor descriptors (TMA): CTAs walk the tiles, with or without warp specialisation."""

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
from klab.kernels.errors import UsageError
from klab.kernels.scaled_matmul import _tiles
from klab.kernels.scaled_matmul.problem import ScaledMatmul
from klab.kernels.triton_support import cdiv, ensure_allocator, next_power_of_2, pipeline_smem_bytes, triton_version


@dataclass(frozen=True)
class PersistentConfig(Config):
    """A CTA computes tiles of block_m x block_n, block_k at a time, and stores each in `epilogue_subtiles` slices of its columns.

    `ctas_per_sm` of them share an SM, so that one has the tensor cores while another scales or stores. `promote` as in triton_tiled.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 128
    group_m: int = 8
    epilogue_subtiles: int = 1
    promote: int = 0
    ctas_per_sm: int = 1
    num_warps: int = 8
    num_stages: int = 3
    warp_specialize: bool = False
    flatten: bool = True


@triton.jit
def _persistent(
    x,
    w,
    out,
    x_scale,
    w_scale,
    m,
    n,
    k,
    stride_x,
    stride_w,
    stride_out,
    stride_xs,
    stride_ws,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CTAS: tl.constexpr,
    SUBTILES: tl.constexpr,
    PROMOTE: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    INTEGERS: tl.constexpr = x.dtype.element_ty == tl.int8
    BLOCK_OUT: tl.constexpr = BLOCK_N // SUBTILES
    PER_BLOCK: tl.constexpr = SCALE_BLOCK // BLOCK_K if SCALE_BLOCK else 1  # steps that share a scale
    x_tiles = tl.make_tensor_descriptor(x, shape=[m, k], strides=[stride_x, 1], block_shape=[BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(w, shape=[n, k], strides=[stride_w, 1], block_shape=[BLOCK_N, BLOCK_K])
    out_tiles = tl.make_tensor_descriptor(out, shape=[m, n], strides=[stride_out, 1], block_shape=[BLOCK_M, BLOCK_OUT])

    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    steps = tl.cdiv(k, BLOCK_K)
    per_group = GROUP_M * tiles_n
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, CTAS, flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        first_m = tile // per_group * GROUP_M
        rows = min(tiles_m - first_m, GROUP_M)
        row = (first_m + tile % per_group % rows) * BLOCK_M
        column = tile % per_group // rows * BLOCK_N
        offs_m = row + tl.arange(0, BLOCK_M)
        inside_m = offs_m < m
        x_scales = x_scale + offs_m.to(tl.int64) * stride_xs
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGERS else tl.float32)
        # Beyond an edge a descriptor reads zeros and writes nothing.
        if SCALE_BLOCK == 0:
            for step in range(steps):
                a = x_tiles.load([row, step * BLOCK_K])
                b = w_tiles.load([column, step * BLOCK_K]).T
                if INTEGERS:
                    sums = tl.dot(a, b, sums, out_dtype=tl.int32)
                elif PROMOTE == 0:
                    sums = tl.dot(a, b, sums)
                else:
                    sums = tl.dot(a, b, sums, max_num_imprecise_acc=PROMOTE)
            offs_n = column + tl.arange(0, BLOCK_N)
            total = sums.to(tl.float32) * tl.load(x_scales, mask=inside_m, other=0.0)[:, None]
            total *= tl.load(w_scale + offs_n.to(tl.int64) * stride_ws, mask=offs_n < n, other=0.0)[None, :]
        else:
            # The scale of a step is loaded a step ahead: it comes from L2, while the product of this step runs.
            w_scales = w_scale + (column // SCALE_BLOCK).to(tl.int64) * stride_ws
            scale = tl.load(x_scales, mask=inside_m, other=0.0) * tl.load(w_scales)
            for step in range(steps):
                a = x_tiles.load([row, step * BLOCK_K])
                b = w_tiles.load([column, step * BLOCK_K]).T
                later = min(step + 1, steps - 1) // PER_BLOCK
                following = tl.load(x_scales + later, mask=inside_m, other=0.0) * tl.load(w_scales + later)
                sums += tl.dot(a, b) * scale[:, None]
                scale = following
            total = sums
        if SUBTILES == 1:
            out_tiles.store([row, column], total.to(out.dtype.element_ty))
        else:
            # The staging buffer of a slice is a fraction of the tile's, which leaves shared memory for another stage.
            left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
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


def fits(problem: ScaledMatmul, config: PersistentConfig, chip: Chip) -> str | None:
    """Rows must be aligned for TMA; stages, sums and tensor memory must fit; warp specialisation must be real on this chip."""
    bm, bn, bk, warps, size = config.block_m, config.block_n, config.block_k, config.num_warps, SIZE_BYTES[problem.dtype]
    if chip.target < 90:
        return "tensor descriptors need Hopper or newer"
    if not _tiles.is_aligned(problem, size):
        return "tensor descriptors need k and n in multiples of 16 bytes"
    # Rows beyond the edge are not read, so a tile of 64 rows (what wgmma and tcgen05 need) costs no bandwidth at m = 1.
    why = _tiles.refused_format(problem) or _tiles.refused_tile(problem, bm, bn, bk, warps, least_m=64)
    why = why or _tiles.refused_promotion(problem, config.promote, bk, chip)
    if why is not None:
        return why
    if problem.format == "fp8_block" and bn > 128:
        return "the columns of a tile must share one block of scales"
    if min(config.group_m, config.num_stages) < 1 or config.ctas_per_sm not in (1, 2, 3, 4):
        return "group_m and num_stages must be at least 1, and an SM has 1 to 4 CTAs"
    if config.epilogue_subtiles not in (1, 2, 4) or bn // config.epilogue_subtiles < 16:
        return "the epilogue is stored in 1, 2 or 4 slices of at least 16 columns"
    why = _fake_specialisation(problem, config, chip) if config.warp_specialize else None
    if why is not None:
        return why
    smem_bytes = pipeline_smem_bytes((bm + bn) * bk, config.num_stages, bm * bn // config.epilogue_subtiles * size)
    # 1 KB of every CTA is the system's.
    if smem_bytes > chip.smem_per_block_bytes or config.ctas_per_sm * (smem_bytes + 1024) > chip.smem_per_sm_bytes:
        return "too much shared memory"
    return _no_room(problem, config, chip)


def _no_room(problem: ScaledMatmul, config: PersistentConfig, chip: Chip) -> str | None:
    """Why the sums of one tile have no room, or None (see _tiles for the numbers).

    On sm_100 they live in tensor memory (512 columns of 128 rows), and pass through registers at the end, or at each step where they
    are promoted: 128 promoted ones a thread spill 100 bytes with Triton 3.7.1.
    """
    bm, bn, threads = config.block_m, config.block_n, 32 * config.num_warps
    promoted = _tiles.is_promoted(problem, config.promote)
    in_tensor_memory = chip.target >= 100 and bm >= 64 and problem.format != "int8_row"
    if in_tensor_memory:
        # Flattened or specialised loops start the next tile while the last one is stored: two tiles are alive.
        alive = 2 if config.flatten or config.warp_specialize else 1
        if config.ctas_per_sm * alive * bn * cdiv(bm, 128) > 512:
            return "the sums need more than 512 columns of tensor memory"
    elif config.warp_specialize:
        threads *= 2  # Hopper splits the rows over two groups of consumer warps
    most = _tiles.MAX_PROMOTED_SUMS_PER_THREAD if promoted else _tiles.MAX_SUMS_PER_THREAD
    if in_tensor_memory and not promoted and not config.warp_specialize:
        most = 256  # a specialised epilogue of 256 spills 1544 bytes, one without takes 217 to 250 registers
    sums = bm * bn // threads
    if sums > most:
        return "the sums would spill registers"
    # Two sets of sums and about 60 registers more; a specialised CTA has a warp group for its copies besides.
    registers = min(255, (2 if promoted else 1) * sums + 60) * threads
    if config.ctas_per_sm > 1 and config.ctas_per_sm * registers > 65536:
        return "the registers of so many CTAs do not fit one SM"
    return None


def _fake_specialisation(problem: ScaledMatmul, config: PersistentConfig, chip: Chip) -> str | None:
    """Why `warp_specialize` would be ignored or fail to compile (seen with Triton 3.6.0, 3.7.1 and 3.9.0), or None."""
    if config.ctas_per_sm > 1:
        return "a specialised CTA takes the registers of a whole SM"
    if chip.target < 100:
        if config.num_warps != 4 or config.flatten or config.num_stages < 2:
            return "warp specialisation is a silent no-op on sm_90 but with 4 warps, 2 stages and no flatten"
        if config.block_m < 128:
            return "warp specialisation on sm_90 needs 64 rows for each of two consumers"
        if config.epilogue_subtiles > 1 and triton_version() < (3, 7):
            return "Triton 3.6 cannot specialise a sliced epilogue on sm_90"
        return None
    if config.block_m < 64 or problem.format == "int8_row":
        return "warp specialisation on sm_100 needs tcgen05, which needs 64 rows and no integers (Triton 3.7)"
    if not config.flatten and triton_version() < (3, 7):
        return "Triton 3.6 specialises only flattened loops on sm_100"
    return None


def default(problem: ScaledMatmul, chip: Chip) -> PersistentConfig:
    """No specialisation; 64-row tiles for small m, and with block scales, where several CTAs an SM hide the promotion; else 128x256."""
    n, k = next_power_of_2(max(16, problem.n)), next_power_of_2(max(32, problem.k))
    size = SIZE_BYTES[problem.dtype]
    bk, ctas_per_sm, subtiles = min(k, 128), 1, 1
    if problem.m <= 64:
        bm, bn, warps, stages = 64, min(n, 64), 4, 6
    elif problem.format == "fp8_block":
        bm, bn, warps, stages, ctas_per_sm = 64, min(n, 128), 4, 3, 2
    elif _tiles.tiles(problem, 128, 256) >= chip.sm_count and (problem.format != "int8_row" or chip.target < 100):
        bm, bn, warps, stages, subtiles = 128, min(n, 256), 8, 3, size if n >= 256 else 1
    else:
        bm, bn, warps, stages = 128, min(n, 128), 8, 4
    if size == 4 and bm == 128:
        stages = 2
    tiles = _tiles.tiles(problem, bm, bn)
    flatten = tiles > chip.sm_count * ctas_per_sm
    return PersistentConfig(bm, bn, bk, 8 if problem.m > bm else 1, subtiles, 0, ctas_per_sm, warps, stages, False, flatten)


def space(problem: ScaledMatmul, chip: Chip) -> Iterator[PersistentConfig]:
    """All tiles that are not hopeless for the shape, with and without specialisation, flattening and slices."""
    promotions = (0, 128) if problem.format in ("fp8_tensor", "fp8_row") and chip.target == 90 else (0,)
    for bm, bn, bk in product((16, 32, 64, 128, 256), (32, 64, 128, 256), (64, 128, 256)):
        if (bm > 64 and bm >= 2 * problem.m) or (bm < 64 and problem.m >= 4 * bm):
            continue  # half the tile is beyond the edge, or the weights are read from L2 too often
        tiles_m, tiles = cdiv(problem.m, bm), _tiles.tiles(problem, bm, bn)
        for group_m, subtiles, promote, per_sm, warps, stages, specialize, flatten in product(
            (1, 8, 16), (1, 2, 4), promotions, (1, 2, 3), (4, 8), (2, 3, 4, 5, 6, 8), (False, True), (False, True)
        ):
            if group_m > 1 and group_m > tiles_m:
                continue  # the same order as fewer
            if subtiles > 1 and bm * bn < 128 * 128:
                continue  # the staging buffer is small already
            if bm * bn < 512 * warps or stages - 1 > cdiv(problem.k, bk):
                continue  # idle warps, idle stages
            if (per_sm - 1) * chip.sm_count >= tiles:
                continue  # no tile for the last CTA of an SM
            # One tile per CTA leaves nothing to flatten; specialised loops must not be flattened on sm_90, and on sm_100 every
            # Triton compiles the flattened ones.
            if flatten != (chip.target >= 100) if specialize else flatten and tiles <= chip.sm_count * per_sm:
                continue
            yield PersistentConfig(bm, bn, bk, group_m, subtiles, promote, per_sm, warps, stages, specialize, flatten)


@kernel(ScaledMatmul, backend="triton", config=PersistentConfig, space=space, default=default, fits=fits)
def triton_persistent(problem: ScaledMatmul, config: PersistentConfig, chip: Chip) -> Launch:
    """Triton on tensor descriptors, fp8 and int8: block scales promoted by two independent consumers where specialisation is real."""
    m, n, k, size = problem.m, problem.n, problem.k, SIZE_BYTES[problem.dtype]
    ctas = min(chip.sm_count * config.ctas_per_sm, _tiles.tiles(problem, config.block_m, config.block_n))

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        for name, tensor, bytes_each in (("x", x, 1), ("w", w, 1), ("out", out, size)):
            if tensor.stride(1) != 1 or tensor.stride(0) * bytes_each % 16 or tensor.data_ptr() % 16:
                raise UsageError(f"triton_persistent needs {name} with dense rows that start at multiples of 16 bytes")
        ensure_allocator(x.device)
        _persistent[(ctas,)](
            x,
            w,
            out,
            inputs["x_scale"],
            inputs["w_scale"],
            m,
            n,
            k,
            x.stride(0),
            w.stride(0),
            out.stride(0),
            *_tiles.row_strides(problem, inputs),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            CTAS=ctas,
            SUBTILES=config.epilogue_subtiles,
            PROMOTE=config.promote,
            SCALE_BLOCK=_tiles.scale_block(problem),
            WARP_SPECIALIZE=config.warp_specialize,
            FLATTEN=config.flatten,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    return launch
