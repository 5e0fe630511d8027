"""Flash attention in Triton with tensor descriptors (TMA) for keys and values, and warp specialisation where it is real."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# (Triton compiles the source of its functions and evaluates their annotations: they cannot carry Python types.)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.errors import UsageError
from klab.kernels.prefill_attention._triton_softmax import (
    LOG2_E,
    feature_constants,
    first_sums,
    keys_seen,
    scales_of,
    soften,
    store_rows,
    work_of,
)
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.prefill_tiles import Tiles, padded, split_dim
from klab.kernels.triton_support import ensure_allocator, pipeline_smem_bytes, row_is_aligned

TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class TmaConfig(Config):
    """Rows and keys per step, warps, pipeline stages, and how programs map to work.

    `warp_specialize`: warps of their own for loads (and on Blackwell for the products). `pack_gqa`: the query heads of one key head
    share a tile (rows are token x head). `heads_fastest`: neighbouring programs differ in head (they share keys), not in tile.
    """

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 2
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
    table,
    first_row,
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
    SOFTCAP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Fold keys [first, last) into the running output, sum and maximum (logits in units of log2). MASKED: some pairs are hidden.

    SHARED: rows behind the sequence's end, which the descriptors reach, are not zero.
    """
    for start in tl.range(first, last, BLOCK_N, warp_specialize=SPECIALIZE):
        row = first_row + start if PAGE == 0 else tl.load(table + start // PAGE) * PAGE + start % PAGE
        k0 = k0_blocks.load([row, k_column]).to(q0.dtype)
        logits = tl.dot(q0, k0.T)
        if D1 > 0:
            k1 = k1_blocks.load([row, k_column + D0]).to(q0.dtype)
            logits = tl.dot(q1, k1.T, logits)
        weights, decay, total, top = soften(
            logits, total, top, start, position, kv_len, log2_scale, MASKED, CAUSAL, WINDOW, SOFTCAP, BLOCK_N
        )
        acc = acc * decay[:, None]
        values = v_blocks.load([row, v_column]).to(q0.dtype)
        if MASKED and SHARED:
            # Their weight is 0, but 0 times an infinity of the next sequence, or of a slot that was never written, would be NaN here.
            values = tl.where((start + tl.arange(0, BLOCK_N) < kv_len)[:, None], values, 0.0)
        acc = tl.dot(weights.to(q0.dtype), values, acc)
    return acc, total, top


@triton.jit
def flash_forward_tma(
    q,
    k0,
    k1,
    v,
    out,
    tiles,
    table,
    sinks,
    k_scale,
    v_scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_table,
    tile_count,
    log2_scale,
    SPECIALIZE: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    SHARED: tl.constexpr,
    UNITS: tl.constexpr,
    ROWS_PER_TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    NARROW: tl.constexpr,
    PAGE: tl.constexpr,
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

    k0, k1 and v are descriptors over [all tokens or slots, all heads x columns] made on the host: a block may hold rows of the next
    sequence, which the mask hides. Hopper's specialisation takes neither these nor a second loop nor queries loaded by pointers: with
    ONE_LOOP k0, k1 and v are pointers, each program makes descriptors of its own sequence (rows past its end read as zero), and every
    block pays for the mask.
    """
    unit, q_start, q_len, kv_start, kv_len, block, sequence = work_of(tiles, tile_count, UNITS, HEADS_FASTEST)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // ROWS_PER_TOKEN
    head = unit * ROWS_PER_TOKEN + row % ROWS_PER_TOKEN
    inside = (token < q_len)[:, None]
    position = kv_len - q_len + token
    kv_head = unit * ROWS_PER_TOKEN // GROUP
    if ONE_LOOP:
        q_head = q + q_start.to(tl.int64) * stride_qt + unit * stride_qh
        k_head = k0 + kv_start.to(tl.int64) * stride_kt + kv_head * stride_kh
        v_head = v + kv_start.to(tl.int64) * stride_vt + kv_head * stride_vh
        q0 = tl.make_tensor_descriptor(q_head, [q_len, D], [stride_qt, 1], [BLOCK_M, D0]).load([block * BLOCK_M, 0])
        k0_blocks = tl.make_tensor_descriptor(k_head, [kv_len, D], [stride_kt, 1], [BLOCK_N, D0])
        q1 = q0
        k1_blocks = k0_blocks
        if D1 > 0:
            q1 = tl.make_tensor_descriptor(q_head, [q_len, D], [stride_qt, 1], [BLOCK_M, D1]).load([block * BLOCK_M, D0])
            k1_blocks = tl.make_tensor_descriptor(k_head, [kv_len, D], [stride_kt, 1], [BLOCK_N, D1])
        v_blocks = tl.make_tensor_descriptor(v_head, [kv_len, DV], [stride_vt, 1], [BLOCK_N, DV_PAD])
        first_row = 0
        k_column = 0
        v_column = 0
    else:
        # Pointers for the queries, which are loaded once: packed rows are no block of a tensor.
        q_row = q + (q_start + token).to(tl.int64)[:, None] * stride_qt + head[:, None] * stride_qh
        q0 = tl.load(q_row + tl.arange(0, D0)[None, :], mask=inside, other=0.0)
        q1 = q0
        if D1 > 0:
            d1 = D0 + tl.arange(0, D1)[None, :]
            q1 = tl.load(q_row + d1, mask=inside & (d1 < D), other=0.0)
        k0_blocks = k0
        k1_blocks = k1
        v_blocks = v
        first_row = kv_start
        k_column = kv_head * stride_kh
        v_column = kv_head * stride_vh
    if PAGE > 0:
        table += sequence * stride_table

    log2_scale, value_scale = scales_of(k_scale, v_scale, kv_head, log2_scale, NARROW)
    begin, full_begin, full_end, end = keys_seen(q_len, kv_len, block, ROWS_PER_TOKEN, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, DV_PAD], dtype=tl.float32)
    top, total = first_sums(sinks, head, SINKS, BLOCK_M)
    if ONE_LOOP:
        acc, total, top = _attend(
            acc, total, top, q0, q1, k0_blocks, k1_blocks, v_blocks, table, first_row, k_column, v_column,
            begin, end, position, kv_len, log2_scale,
            True, CAUSAL, WINDOW, SOFTCAP, PAGE, BLOCK_N, D0, D1, SPECIALIZE, SHARED,
        )  # fmt: skip
    else:
        if WINDOW > 0:
            acc, total, top = _attend(
                acc, total, top, q0, q1, k0_blocks, k1_blocks, v_blocks, table, first_row, k_column, v_column,
                begin, tl.minimum(full_begin, end), position, kv_len, log2_scale,
                True, CAUSAL, WINDOW, SOFTCAP, PAGE, BLOCK_N, D0, D1, SPECIALIZE, SHARED,
            )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, q0, q1, k0_blocks, k1_blocks, v_blocks, table, first_row, k_column, v_column,
            full_begin, full_end, position, kv_len, log2_scale,
            False, CAUSAL, WINDOW, SOFTCAP, PAGE, BLOCK_N, D0, D1, SPECIALIZE, SHARED,
        )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, q0, q1, k0_blocks, k1_blocks, v_blocks, table, first_row, k_column, v_column,
            tl.maximum(full_begin, full_end), end, position, kv_len, log2_scale,
            True, CAUSAL, WINDOW, SOFTCAP, PAGE, BLOCK_N, D0, D1, SPECIALIZE, SHARED,
        )  # fmt: skip
    store_rows(out, acc, total, value_scale, q_start, token, head, inside, stride_ot, stride_oh, DV, DV_PAD)


def rows_per_token(problem: PrefillAttention, config: TmaConfig) -> int:
    """Query heads that share a tile."""
    return problem.heads // problem.kv_heads if config.pack_gqa else 1


def fits(problem: PrefillAttention, config: TmaConfig, chip: Chip) -> str | None:
    """What descriptors need, what the compiler really specialises, shared and tensor memory, registers (measured with Triton 3.7.1)."""
    size = SIZE_BYTES[problem.dtype]
    if chip.target < 90:
        return "tensor descriptors need Hopper or newer"
    if problem.dtype == "float32":
        return "is for 16-bit types (triton_flash runs float32)"
    kv_size = SIZE_BYTES[problem.kv_dtype or problem.dtype]
    if not all(row_is_aligned(dim, kv_size) and row_is_aligned(dim, size) for dim in (problem.head_dim, problem.dim_v)):
        return "descriptors need heads of a multiple of 16 bytes"
    if problem.page_size % config.block_n:
        return f"a block of {config.block_n} keys must lie in one page, not {problem.page_size}"
    if sum(split_dim(problem.head_dim)) != problem.head_dim or padded(problem.dim_v) != problem.dim_v:
        return "columns padded to a power of two would be another head's"
    if problem.scale <= 0:
        return "needs a positive scale (the running maximum is scaled after it is taken)"
    if config.pack_gqa and problem.heads == problem.kv_heads:
        return "pack_gqa needs several query heads per key head"
    if config.block_m < 16 * config.num_warps:
        return "a warp holds at least 16 rows, else every maximum goes through shared memory"
    if config.warp_specialize and chip.target >= 100 and len(problem.q_lens) > 1:
        return "the values of a neighbouring sequence must be masked, which the compiler does not specialise"
    if config.warp_specialize and (problem.page_size or problem.kv_dtype):
        return "neither a page's number nor narrow keys pass through the compiler's specialisation"
    hopper_split = config.warp_specialize and chip.target == 90
    if hopper_split and (config.num_warps != 4 or config.pack_gqa):
        return "on Hopper only 4 warps and unpacked rows are specialised (8 warps: silently not; packed: the compiler fails)"
    return _too_large(problem, config, chip, hopper_split)


def _too_large(problem: PrefillAttention, config: TmaConfig, chip: Chip, hopper_split: bool) -> str | None:
    """What a tile asks of shared memory, registers and tensor memory, if it is more than there is."""
    size = SIZE_BYTES[problem.dtype]
    (d0, d1), dv = split_dim(problem.head_dim), padded(problem.dim_v)
    # The specialised epilogue on Hopper converts 64 rows of the output through shared memory.
    epilogue = max(16 << 10, 64 * dv * size) if hopper_split else 0
    stage, queries = config.block_n * (d0 + d1 + dv) * size, config.block_m * (d0 + d1) * size
    smem = pipeline_smem_bytes(stage, config.num_stages, queries + epilogue)
    if smem > chip.smem_per_block_bytes:
        return f"needs {smem >> 10} KiB of shared memory, the chip has {chip.smem_per_block_bytes >> 10}"
    # Hopper's specialisation gives each 64 rows a group of 4 warps, two at most.
    warps = min(8, config.block_m // 16) if hopper_split else config.num_warps
    # Per thread: output and logits in float32, weights in half of that. 256 spilled nothing at 256x128 with 8 warps, 304 to 320
    # from 464 to 1,280 B.
    registers = config.block_m * (dv + 1.5 * config.block_n) / (32 * warps)
    if registers > 256:
        return f"needs about {registers:.0f} registers a thread for its tile alone"
    if chip.target >= 100:
        # The warps that rescale the output have 168 registers (4 warps) or 96 (8). With 64 of them for the output the kernel spills
        # at most 16 B; with 128, 488 B of 168 registers but 576 B and more of 96; with 256, more than 1,300 B.
        if config.warp_specialize and config.block_m * dv / (32 * warps) > (128 if warps == 4 else 64):
            return "the warps that rescale the output would spill"
        # Output, logits (twice when specialised, once more when the head dimension is split), weights in half.
        copies = 1.5 + config.warp_specialize + (d1 > 0)
        columns = max(1, config.block_m // 128) * (dv + copies * config.block_n)
        if columns > TENSOR_MEMORY_COLUMNS:
            return f"needs {columns:.0f} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}"
    return None


def space(problem: PrefillAttention, chip: Chip) -> Iterator[TmaConfig]:
    """Tiles from 64x32 to 256x128; the order of programs varies last, since it matters least."""
    tiles = list(product((2, 3, 4), (4, 8), (32, 64, 128), (64, 128, 256)))
    for heads_fastest, pack, specialize, (stages, warps, n, m) in product((True, False), (False, True), (False, True), tiles):
        yield TmaConfig(m, n, warps, stages, specialize, pack, heads_fastest)


@kernel(PrefillAttention, backend="triton", config=TmaConfig, space=space, fits=fits)
def triton_flash_tma(problem: PrefillAttention, config: TmaConfig, chip: Chip) -> Launch:
    """Triton flash attention with tensor descriptors (TMA), warp-specialised where the compiler really does it."""
    rows = problem.heads // problem.kv_heads if config.pack_gqa else 1
    tiles = Tiles(problem, config.block_m, rows)
    units = problem.heads // rows
    d0, d1 = split_dim(problem.head_dim)
    dv = padded(problem.dim_v)
    one_loop = config.warp_specialize and chip.target == 90
    constants: dict[str, Any] = feature_constants(problem) | {
        "SPECIALIZE": config.warp_specialize,
        "SHARED": not one_loop and (len(problem.q_lens) > 1 or problem.page_size > 0),
        "ONE_LOOP": one_loop,
        "UNITS": units,
        "ROWS_PER_TOKEN": rows,
        "HEADS_FASTEST": config.heads_fastest,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "D0": d0,
        "D1": d1,
        "DV_PAD": dv,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

    def blocks(x: torch.Tensor, width: int) -> TensorDescriptor:
        """Blocks of block_n tokens x `width` columns over all heads of [tokens, heads, dim], whatever its row stride."""
        shape = [x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]]
        return TensorDescriptor(x, shape, [x.stride(0), 1], [config.block_n, width])

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, out = inputs["q"], outputs["out"]
        # Pages lie one behind another: a cache is one long tensor of slots.
        k, v = (inputs[f"{name}_cache"].flatten(0, 1) if problem.page_size else inputs[name] for name in "kv")
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.stride(2) != 1 or any(stride * x.element_size() % 16 for stride in x.stride()[:2]) or x.data_ptr() % 16:
                raise UsageError(f"triton_flash_tma needs rows of {name} that are dense and 16-byte aligned (strides {x.stride()})")
        keys_and_values: tuple[Any, ...] = (k, k, v)
        if one_loop:
            ensure_allocator(q.device)
        else:
            keys_and_values = (blocks(k, d0), blocks(k, d1 or d0), blocks(v, dv))
        # What the code of this problem does not read is any pointer.
        table, sinks, k_scale, v_scale = (inputs.get(name, q) for name in ("block_table", "sinks", "k_scale", "v_scale"))
        flash_forward_tma[(len(tiles) * units,)](
            q, *keys_and_values, out, tiles.on(q.device), table, sinks, k_scale, v_scale, *q.stride()[:2], *k.stride()[:2],
            *v.stride()[:2], *out.stride()[:2], table.stride(0), len(tiles), problem.scale * LOG2_E, **constants,
        )  # fmt: skip

    return launch
