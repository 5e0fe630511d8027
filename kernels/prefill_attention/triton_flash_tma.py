"""Flash attention in Triton with tensor descriptors (TMA) for keys and values, and warp specialisation where it is real."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton compiles the source of its functions and evaluates their annotations: they cannot carry Python types.)

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.prefill_tiles import Tiles, padded, split_dim
from klab.kernels.triton_support import ensure_allocator, pipeline_smem_bytes, row_is_aligned


@dataclass(frozen=True)
class TmaConfig(Config):
    """Rows and keys per step, warps, pipeline stages, and who loads.

    `descriptors`: "host" (encoded at launch, one per tensor, rows of the next sequence are read and masked) or "device" (encoded by
    each program for its own sequence, rows past its end read as zero). `warp_specialize`: warps of their own for loads and products.
    `pack_gqa`: the query heads of one key head share a tile. `heads_fastest`: neighbouring programs differ in head, not in tile.
    """

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 2
    descriptors: str = "host"
    warp_specialize: bool = False
    pack_gqa: bool = False
    heads_fastest: bool = True


@triton.jit
def _attend(
    acc,
    total,
    top,
    q0,
    q1,
    k0_blocks,
    k1_blocks,
    v_blocks,
    row,
    k_column,
    v_column,
    first,
    last,
    position,
    kv_len,
    log2_scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """Fold keys [first, last) into the running output, sum and maximum (logits in units of log2). MASKED: some pairs are hidden."""
    for start in tl.range(first, last, BLOCK_N, warp_specialize=SPECIALIZE):
        k0 = k0_blocks.load([row + start, k_column])
        logits = tl.dot(q0, k0.T)
        if D1 > 0:
            k1 = k1_blocks.load([row + start, k_column + D0])
            logits = tl.dot(q1, k1.T, logits)
        if MASKED:
            key = (start + tl.arange(0, BLOCK_N))[None, :]
            # A query's own position is below kv_len, so the causal bound covers the end of the keys too.
            seen = key <= position[:, None] if CAUSAL else key < kv_len
            if WINDOW > 0:
                seen = seen & (key > position[:, None] - WINDOW)
            logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1) * log2_scale)
        weights = tl.exp2(logits * log2_scale - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        values = v_blocks.load([row + start, v_column])
        acc = tl.dot(weights.to(values.dtype), values, acc)
        top = new_top
    return acc, total, top


@triton.jit
def flash_forward_tma(
    q,
    k0,
    k1,
    v,
    out,
    tiles,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    tile_count,
    log2_scale,
    HOST: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS_PER_TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS_FASTEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    """One block of query rows of one unit (a query head, or with packing the heads of one key head) over all keys it sees.

    HOST: k0, k1 and v are descriptors over [all tokens, all heads x columns]; otherwise they are pointers.
    """
    program = tl.program_id(0)
    if HEADS_FASTEST:
        tile = program // UNITS
        unit = program % UNITS
    else:
        tile = program % tile_count
        unit = program // tile_count
    q_start = tl.load(tiles + tile * 5)
    q_len = tl.load(tiles + tile * 5 + 1)
    kv_start = tl.load(tiles + tile * 5 + 2)
    kv_len = tl.load(tiles + tile * 5 + 3)
    block = tl.load(tiles + tile * 5 + 4)
    prefix = kv_len - q_len

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // ROWS_PER_TOKEN
    head = unit * ROWS_PER_TOKEN + row % ROWS_PER_TOKEN
    inside = (token < q_len)[:, None]
    position = prefix + token
    # Queries are loaded once. Rows of a packed tile are no block of a tensor, so pointers load them, and the output is stored by
    # pointers: a descriptor's store could reach into the next sequence.
    if HOST or ROWS_PER_TOKEN > 1:
        q_row = q + (q_start + token).to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qh
        q0 = tl.load(q_row + tl.arange(0, D0)[None, :], mask=inside, other=0.0)
        q1 = q0
        if D1 > 0:
            d1 = D0 + tl.arange(0, D1)[None, :]
            q1 = tl.load(q_row + d1, mask=inside & (d1 < D), other=0.0)
    else:
        q_head = q + q_start.to(tl.int64) * stride_qt + unit * stride_qh
        q0 = tl.make_tensor_descriptor(q_head, [q_len, D], [stride_qt, 1], [BLOCK_M, D0]).load([block * BLOCK_M, 0])
        q1 = q0
        if D1 > 0:
            q1 = tl.make_tensor_descriptor(q_head, [q_len, D], [stride_qt, 1], [BLOCK_M, D1]).load([block * BLOCK_M, D0])

    kv_head = unit * ROWS_PER_TOKEN // GROUP
    if HOST:
        k0_blocks = k0
        k1_blocks = k1
        v_blocks = v
        first_row = kv_start
        k_column = kv_head * stride_kh
        v_column = kv_head * stride_vh
    else:
        k_head = k0 + kv_start.to(tl.int64) * stride_kt + kv_head * stride_kh
        v_head = v + kv_start.to(tl.int64) * stride_vt + kv_head * stride_vh
        k0_blocks = tl.make_tensor_descriptor(k_head, [kv_len, D], [stride_kt, 1], [BLOCK_N, D0])
        k1_blocks = k0_blocks
        if D1 > 0:
            k1_blocks = tl.make_tensor_descriptor(k_head, [kv_len, D], [stride_kt, 1], [BLOCK_N, D1])
        v_blocks = tl.make_tensor_descriptor(v_head, [kv_len, DV], [stride_vt, 1], [BLOCK_N, DV_PAD])
        first_row = 0
        k_column = 0
        v_column = 0

    # Keys [begin, end) are seen by some row, [full_begin, full_end) by every row: only the rest pays for masks.
    first_position = prefix + block * BLOCK_M // ROWS_PER_TOKEN
    last_position = prefix + tl.minimum(q_len - 1, (block * BLOCK_M + BLOCK_M - 1) // ROWS_PER_TOKEN)
    begin = 0
    full_begin = 0
    end = kv_len
    full_end = kv_len // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(kv_len, last_position + 1)
        full_end = (first_position + 1) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        begin = tl.maximum(0, first_position + 1 - WINDOW) // BLOCK_N * BLOCK_N
        full_begin = (tl.maximum(0, last_position + 1 - WINDOW) + BLOCK_N - 1) // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, DV_PAD], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Finite, below any logit: a row whose window begins after the first block would otherwise take -inf from -inf.
    top = tl.full([BLOCK_M], -1e30, dtype=tl.float32)
    if ONE_LOOP:
        acc, total, top = _attend(
            acc, total, top, q0, q1, k0_blocks, k1_blocks, v_blocks, first_row, k_column, v_column,
            begin, end, position, kv_len, log2_scale,
            True, CAUSAL, WINDOW, BLOCK_N, D0, D1, SPECIALIZE,
        )  # fmt: skip
    else:
        if WINDOW > 0:
            acc, total, top = _attend(
                acc, total, top, q0, q1, k0_blocks, k1_blocks, v_blocks, first_row, k_column, v_column,
                begin, tl.minimum(full_begin, end), position, kv_len, log2_scale,
                True, CAUSAL, WINDOW, BLOCK_N, D0, D1, SPECIALIZE,
            )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, q0, q1, k0_blocks, k1_blocks, v_blocks, first_row, k_column, v_column,
            full_begin, full_end, position, kv_len, log2_scale,
            False, CAUSAL, WINDOW, BLOCK_N, D0, D1, SPECIALIZE,
        )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, q0, q1, k0_blocks, k1_blocks, v_blocks, first_row, k_column, v_column,
            tl.maximum(full_begin, full_end), end, position, kv_len, log2_scale,
            True, CAUSAL, WINDOW, BLOCK_N, D0, D1, SPECIALIZE,
        )  # fmt: skip

    dv = tl.arange(0, DV_PAD)[None, :]
    out_row = out + (q_start + token).to(tl.int64)[:, None] * stride_ot + head[:, None] * stride_oh
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    if DV < DV_PAD:
        tl.store(out_row + dv, result, mask=inside & (dv < DV))
    else:
        tl.store(out_row + dv, result, mask=inside)


def rows_per_token(problem: PrefillAttention, config: TmaConfig) -> int:
    """Query heads that share a tile."""
    return problem.heads // problem.kv_heads if config.pack_gqa else 1


def fits(problem: PrefillAttention, config: TmaConfig, chip: Chip) -> str | None:
    """What descriptors need, what the compiler can really specialise, shared memory and registers."""
    size = SIZE_BYTES[problem.dtype]
    d, dv = sum(split_dim(problem.head_dim)), padded(problem.dim_v)
    if chip.target < 90:
        return "tensor descriptors need Hopper or newer"
    if problem.dtype == "float32":
        return "is for 16-bit types (triton_flash runs float32)"
    if not (row_is_aligned(problem.head_dim, size) and row_is_aligned(problem.dim_v, size)):
        return "descriptors need heads of a multiple of 16 bytes"
    if problem.scale <= 0:
        return "needs a positive scale (the running maximum is scaled after it is taken)"
    if config.pack_gqa and problem.heads == problem.kv_heads:
        return "pack_gqa needs several query heads per key head"
    smem = pipeline_smem_bytes(config.block_n * (d + dv) * size, config.num_stages, config.block_m * d * size)
    if smem > chip.smem_per_block_bytes:
        return f"needs {smem >> 10} KiB of shared memory, the chip has {chip.smem_per_block_bytes >> 10}"
    return None


def space(problem: PrefillAttention, chip: Chip) -> Iterator[TmaConfig]:
    """Tiles from 64x32 to 256x64; the order of programs varies last, since it matters least."""
    tiles = product((2, 3, 4), (4, 8), (32, 64, 128), (64, 128, 256))
    for heads_fastest, pack, specialize, descriptors, (stages, warps, n, m) in product(
        (True, False), (False, True), (False, True), ("host", "device"), list(tiles)
    ):
        yield TmaConfig(m, n, warps, stages, descriptors, specialize, pack, heads_fastest)


def default(problem: PrefillAttention, chip: Chip) -> TmaConfig:
    """128x64 with 8 warps."""
    return TmaConfig(128, 64, 8, 2)


@kernel(PrefillAttention, backend="triton", config=TmaConfig, space=space, default=default, fits=fits)
def triton_flash_tma(problem: PrefillAttention, config: TmaConfig, chip: Chip) -> Launch:
    """Triton flash attention with tensor descriptors (TMA), warp-specialised where the compiler really does it."""
    rows = rows_per_token(problem, config)
    tiles = Tiles(problem, config.block_m, rows)
    units = problem.heads // rows
    d0, d1 = split_dim(problem.head_dim)
    host = config.descriptors == "host"
    # Hopper's specialisation takes one loop per kernel, so every block pays for the mask there.
    one_loop = config.warp_specialize and chip.target == 90
    constants: dict[str, Any] = {
        "HOST": host,
        "SPECIALIZE": config.warp_specialize,
        "ONE_LOOP": one_loop,
        "UNITS": units,
        "ROWS_PER_TOKEN": rows,
        "GROUP": problem.heads // problem.kv_heads,
        "CAUSAL": problem.causal,
        "WINDOW": problem.window,
        "HEADS_FASTEST": config.heads_fastest,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "D": problem.head_dim,
        "D0": d0,
        "D1": d1,
        "DV": problem.dim_v,
        "DV_PAD": padded(problem.dim_v),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k, v, out = inputs["q"], inputs["k"], inputs["v"], outputs["out"]
        k0: Any = k
        k1: Any = k
        values: Any = v
        if host:
            k_shape, v_shape = ([x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]] for x in (k, v))
            k0 = TensorDescriptor(k, k_shape, [k.stride(0), 1], [config.block_n, d0])
            k1 = TensorDescriptor(k, k_shape, [k.stride(0), 1], [config.block_n, d1]) if d1 else k0
            values = TensorDescriptor(v, v_shape, [v.stride(0), 1], [config.block_n, padded(problem.dim_v)])
        else:
            ensure_allocator(q.device)
        flash_forward_tma[(len(tiles) * units,)](
            q, k0, k1, values, out, tiles.on(q.device), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
            len(tiles), problem.scale * math.log2(math.e), **constants,
        )  # fmt: skip

    return launch
