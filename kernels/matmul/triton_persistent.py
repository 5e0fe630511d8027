"""A persistent matmul on tensor descriptors (TMA): one CTA per SM walks the tiles, with or without warp specialisation."""

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
from klab.kernels.matmul.problem import Matmul
from klab.kernels.triton_support import cdiv, ensure_allocator, next_power_of_2, pipeline_smem_bytes, row_is_aligned, triton_version


@dataclass(frozen=True)
class PersistentConfig(Config):
    """A CTA computes tiles of block_m x block_n, block_k at a time, and stores each in `epilogue_subtiles` slices of its columns."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group_m: int = 8
    epilogue_subtiles: int = 1
    num_warps: int = 8
    num_stages: int = 3
    warp_specialize: bool = False
    flatten: bool = True


@triton.jit
def _persistent(
    x,
    w,
    out,
    m,
    n,
    k,
    stride_x,
    stride_w,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    CTAS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SUBTILES: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    BLOCK_OUT: tl.constexpr = BLOCK_N // SUBTILES
    x_tiles = tl.make_tensor_descriptor(x, shape=[m, k], strides=[stride_x, 1], block_shape=[BLOCK_M, BLOCK_K])
    if TRANSPOSED:
        w_tiles = tl.make_tensor_descriptor(w, shape=[n, k], strides=[stride_w, 1], block_shape=[BLOCK_N, BLOCK_K])
    else:
        w_tiles = tl.make_tensor_descriptor(w, shape=[k, n], strides=[stride_w, 1], block_shape=[BLOCK_K, BLOCK_N])
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
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # Beyond an edge a descriptor reads zeros and writes nothing.
        for step in range(steps):
            a = x_tiles.load([row, step * BLOCK_K])
            b = w_tiles.load([column, step * BLOCK_K]).T if TRANSPOSED else w_tiles.load([step * BLOCK_K, column])
            sums = tl.dot(a, b, sums, input_precision="ieee")
        if SUBTILES == 1:
            out_tiles.store([row, column], sums.to(out.dtype.element_ty))
        else:
            # The staging buffer of a slice is a fraction of the tile's, which leaves shared memory for another stage.
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


def fits(problem: Matmul, config: PersistentConfig, chip: Chip) -> str | None:
    """Rows must be aligned for TMA; stages, sums and tensor memory must fit; warp specialisation must be real on this chip."""
    bm, bn, bk, warps, size = config.block_m, config.block_n, config.block_k, config.num_warps, SIZE_BYTES[problem.dtype]
    if chip.target < 90:
        return "tensor descriptors need Hopper or newer"
    if problem.dtype == "float32":
        # Without TF32 there is no tensor core to feed: Triton does not pipeline such loads, and 64x64 tiles spill 300 bytes.
        return "is for 16-bit dtypes: float32 leaves the tensor cores and the pipeline unused"
    if not (row_is_aligned(problem.k, size) and row_is_aligned(problem.n, size)):
        return "tensor descriptors need k and n in multiples of 16 bytes"
    if any(value < 1 or value & (value - 1) for value in (bm, bn, bk, warps)) or min(bm, bn, bk) < 16 or max(bm, bn, bk) > 256:
        return "tiles must be powers of two from 16 to 256"
    if min(config.group_m, config.num_stages) < 1:
        return "group_m and num_stages must be at least 1"
    if config.epilogue_subtiles not in (1, 2, 4) or bn // config.epilogue_subtiles < 16:
        return "the epilogue is stored in 1, 2 or 4 slices of at least 16 columns"
    # Rows beyond the edge are not read, so a tile of 64 rows (what wgmma and tcgen05 need) costs no bandwidth at m = 1.
    for block, length, name in ((bm, max(problem.m, 64), "m"), (bn, max(problem.n, 16), "n"), (bk, max(problem.k, 16), "k")):
        if block > next_power_of_2(length):
            return f"block_{name} is larger than {name}"
    if warps > 16 or (bm // 16) * (bn // 8) < warps:
        return "too many warps for the tile"
    why = _fake_specialisation(config, chip) if config.warp_specialize else None
    if why is not None:
        return why
    epilogue = bm * bn // config.epilogue_subtiles * size
    if pipeline_smem_bytes((bm + bn) * bk * size, config.num_stages, epilogue) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return _no_room(config, chip)


def _no_room(config: PersistentConfig, chip: Chip) -> str | None:
    """Why the sums of one tile have no room, or None.

    Compiled with Triton 3.6 to 3.9: on sm_90, 128 sums per thread make 155 registers and 256 spill 640 bytes; on sm_100 they live in
    tensor memory (512 columns of 128 rows), and only pass through registers at the end: 256 make 217.
    """
    bm, bn, threads = config.block_m, config.block_n, 32 * config.num_warps
    in_tensor_memory = chip.target >= 100 and bm >= 64
    if in_tensor_memory:
        # Flattened or specialised loops start the next tile while the last one is stored: two tiles are alive.
        alive = 2 if config.flatten or config.warp_specialize else 1
        if alive * bn * cdiv(bm, 128) > 512:
            return "the sums need more than 512 columns of tensor memory"
    elif config.warp_specialize:
        threads *= 2  # Hopper splits the rows over two groups of consumer warps
    return "the sums would spill registers" if bm * bn // threads > (256 if in_tensor_memory else 128) else None


def _fake_specialisation(config: PersistentConfig, chip: Chip) -> str | None:
    """Why `warp_specialize` would be ignored or fail to compile (seen with Triton 3.6.0, 3.7.1 and 3.9.0), or None."""
    if chip.target < 100:
        if config.num_warps != 4 or config.flatten or config.num_stages < 2:
            return "warp specialisation is a silent no-op on sm_90 but with 4 warps, 2 stages and no flatten"
        if config.block_m < 128:
            return "warp specialisation on sm_90 needs 64 rows for each of two consumers"
        if config.epilogue_subtiles > 1 and triton_version() < (3, 7):
            return "Triton 3.6 cannot specialise a sliced epilogue on sm_90"
        return None
    if config.block_m < 64:
        return "warp specialisation on sm_100 needs tcgen05, which needs 64 rows"
    if not config.flatten and triton_version() < (3, 7):
        return "Triton 3.6 specialises only flattened loops on sm_100"
    return None


def default(problem: Matmul, chip: Chip) -> PersistentConfig:
    """No specialisation; 64-row tiles with long steps for small m, 128x256 where there are enough of them for the chip."""
    m, n, k = (next_power_of_2(length) for length in (problem.m, max(16, problem.n), max(16, problem.k)))
    if m <= 64:
        bm, bn, bk, warps, stages = 64, min(n, 64), min(k, 128), 4, 4
    elif cdiv(problem.m, 128) * cdiv(problem.n, 256) >= chip.sm_count:
        bm, bn, bk, warps, stages = 128, min(n, 256), min(k, 64), 8, 3
    else:
        bm, bn, bk, warps, stages = 128, min(n, 128), min(k, 64), 8, 4
    tiles_m, tiles_n = cdiv(problem.m, bm), cdiv(problem.n, bn)
    return PersistentConfig(bm, bn, bk, 8 if tiles_m > 1 else 1, 1, warps, stages, False, tiles_m * tiles_n > chip.sm_count)


def space(problem: Matmul, chip: Chip) -> Iterator[PersistentConfig]:
    """All tiles that are not hopeless for the shape, with and without specialisation, flattening and slices."""
    for bm, bn, bk in product((16, 32, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128, 256)):
        if (bm > 64 and bm >= 2 * problem.m) or (bm < 64 and problem.m >= 4 * bm):
            continue  # half the tile is beyond the edge, or the weights are read from L2 too often
        tiles_m, tiles = cdiv(problem.m, bm), cdiv(problem.m, bm) * cdiv(problem.n, bn)
        for group_m, subtiles, warps, stages, specialize, flatten in product(
            (1, 8, 16), (1, 2, 4), (4, 8), (2, 3, 4, 5, 6, 8), (False, True), (False, True)
        ):
            if group_m > 1 and group_m > tiles_m:
                continue  # the same order as fewer
            if subtiles > 1 and bm * bn < 128 * 128:
                continue  # the staging buffer is small already
            if bm * bn < 512 * warps or stages - 1 > cdiv(problem.k, bk):
                continue  # idle warps, idle stages
            # One tile per CTA leaves nothing to flatten; specialised loops must not be flattened on sm_90, and on sm_100 every
            # Triton compiles the flattened ones.
            if flatten != (chip.target >= 100) if specialize else flatten and tiles <= chip.sm_count:
                continue
            yield PersistentConfig(bm, bn, bk, group_m, subtiles, warps, stages, specialize, flatten)


@kernel(Matmul, backend="triton", config=PersistentConfig, space=space, default=default, fits=fits)
def triton_persistent(problem: Matmul, config: PersistentConfig, chip: Chip) -> Launch:
    """Triton on tensor descriptors: persistent CTAs, sliced epilogue, warp specialisation where the compiler really does it."""
    m, n, k, size = problem.m, problem.n, problem.k, SIZE_BYTES[problem.dtype]
    ctas = min(chip.sm_count, cdiv(m, config.block_m) * cdiv(n, config.block_n))

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        for name, tensor in (("x", x), ("w", w), ("out", out)):
            if tensor.stride(1) != 1 or tensor.stride(0) * size % 16 or tensor.data_ptr() % 16:
                raise UsageError(f"triton_persistent needs {name} with dense rows that start at multiples of 16 bytes")
        ensure_allocator(x.device)
        _persistent[(ctas,)](
            x,
            w,
            out,
            m,
            n,
            k,
            x.stride(0),
            w.stride(0),
            out.stride(0),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            CTAS=ctas,
            TRANSPOSED=problem.layout == "nt",
            SUBTILES=config.epilogue_subtiles,
            WARP_SPECIALIZE=config.warp_specialize,
            FLATTEN=config.flatten,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    return launch
