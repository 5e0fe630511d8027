"""The two products of triton_fused: gate and up that end in the activation, and down on the rows that they leave."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from klab.kernels.triton_experts import silu_and_mul, to_fp8


@triton.jit
def _place(block_experts, padded, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(block of rows, first column, expert, whether there is such a tile) of this program."""
    tiles_m = tl.load(padded) // BLOCK_M
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0)
    per_group = GROUP_M * tiles_n
    first_m = tile // per_group * GROUP_M
    rows = max(min(tiles_m - first_m, GROUP_M), 1)
    tile_m = first_m + tile % per_group % rows
    column = tile % per_group // rows * BLOCK_N
    real = tile < tiles_m * tiles_n
    return tile_m, column, tl.load(block_experts + tile_m, mask=real, other=0), real


@triton.jit
def gate_up_product(
    x,
    x_scale,
    w,
    w_scale,
    active,
    active_scale,
    slots,
    block_experts,
    padded,
    n,
    k,
    choices,
    stride_x,
    stride_xs,
    stride_we,
    stride_wn,
    stride_wse,
    stride_wsn,
    stride_active,
    stride_as,
    TOP_K: tl.constexpr,
    LOCAL: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):
    """active[slot] = act(x[token] @ w[expert]^T): BLOCK_M slots by BLOCK_N columns, with both halves of the weights."""
    tile_m, column, expert, real = _place(block_experts, padded, n, BLOCK_M, BLOCK_N, GROUP_M)
    if not real:
        return
    UP_ROWS: tl.constexpr = 2 if GATED else 1
    slot = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    choice = tl.load(slots + slot)
    inside_m = choice < choices
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    inside_n = column + offs_n < n
    x_tile = x + (choice // TOP_K)[:, None].to(tl.int64) * stride_x + offs_k[None, :]
    gate_row = expert * (UP_ROWS * n) + column
    gate_tile = w + expert.to(tl.int64) * stride_we + column.to(tl.int64) * stride_wn + offs_n[None, :] * stride_wn + offs_k[:, None]
    up_jump = n.to(tl.int64) * stride_wn
    if TMA:
        # One matrix of all experts' rows: a tile that reaches beyond its part reads the next one's, and stores nothing of it.
        w_tiles = tl.make_tensor_descriptor(w, shape=[LOCAL * UP_ROWS * n, k], strides=[stride_wn, 1], block_shape=[BLOCK_N, BLOCK_K])
    if SCALE_BLOCK > 0:
        xs = x_scale + (choice // TOP_K).to(tl.int64) * stride_xs
        ws = w_scale + expert.to(tl.int64) * stride_wse

    gates = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        inside_k = offs_k < k - start
        a = tl.load(x_tile, mask=inside_m[:, None] if EVEN_K else inside_m[:, None] & inside_k[None, :], other=0.0)
        x_tile += BLOCK_K
        if TMA:
            gate = w_tiles.load([gate_row, start]).T
        elif EVEN_K and EVEN_N:
            gate = tl.load(gate_tile)
        else:
            gate = tl.load(gate_tile, mask=inside_n[None, :] & inside_k[:, None], other=0.0)
        if GATED:
            if TMA:
                up = w_tiles.load([gate_row + n, start]).T
            elif EVEN_K and EVEN_N:
                up = tl.load(gate_tile + up_jump)
            else:
                up = tl.load(gate_tile + up_jump, mask=inside_n[None, :] & inside_k[:, None], other=0.0)
        gate_tile += BLOCK_K
        if SCALE_BLOCK > 0:
            block = start // SCALE_BLOCK
            scale = tl.load(xs + block, mask=inside_m, other=0.0)[:, None]
            if WHOLE_BLOCKS:
                gates += tl.dot(a, gate) * (scale * tl.load(ws + column // SCALE_BLOCK * stride_wsn + block))
                if GATED:
                    ups += tl.dot(a, up) * (scale * tl.load(ws + (n + column) // SCALE_BLOCK * stride_wsn + block))
            else:
                # A block of scales is shared by gate and up, and starts anywhere in a tile.
                gate_scale = tl.load(ws + (column + offs_n) // SCALE_BLOCK * stride_wsn + block, mask=inside_n, other=0.0)
                gates += tl.dot(a, gate) * scale * gate_scale[None, :]
                if GATED:
                    up_scale = tl.load(ws + (n + column + offs_n) // SCALE_BLOCK * stride_wsn + block, mask=inside_n, other=0.0)
                    ups += tl.dot(a, up) * scale * up_scale[None, :]
        else:
            gates = tl.dot(a, gate, gates, input_precision="ieee")
            if GATED:
                ups = tl.dot(a, up, ups, input_precision="ieee")

    values = silu_and_mul(gates, ups, LIMIT) if GATED else tl.maximum(gates, 0.0) * tl.maximum(gates, 0.0)
    # In the order of the slots, so that the rows of a block lie one behind the other for the next product.
    to = active + slot[:, None].to(tl.int64) * stride_active + column + offs_n[None, :]
    store = inside_m[:, None] & inside_n[None, :]
    if SCALE_BLOCK > 0:
        quantised, scale = to_fp8(tl.where(store, values, 0.0))
        tl.store(to, quantised, mask=store)
        tl.store(active_scale + slot.to(tl.int64) * stride_as + column // SCALE_BLOCK, scale, mask=inside_m)
    else:
        tl.store(to, values.to(active.dtype.element_ty), mask=store)


@triton.jit
def down_product(
    active,
    active_scale,
    w,
    w_scale,
    out,
    topk_weights,
    slots,
    block_experts,
    padded,
    n,
    k,
    blocks_m,
    choices,
    stride_active,
    stride_as,
    stride_we,
    stride_wn,
    stride_wse,
    stride_wsn,
    stride_out,
    stride_tw,
    TOP_K: tl.constexpr,
    LOCAL: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
):
    """out[choice] = weight * (active[slot] @ w[expert]^T): BLOCK_M slots by BLOCK_N columns."""
    tile_m, column, expert, real = _place(block_experts, padded, n, BLOCK_M, BLOCK_N, GROUP_M)
    if not real:
        return
    slot = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    inside_n = column + offs_n < n
    a_tile = active + slot[:, None].to(tl.int64) * stride_active + offs_k[None, :]
    w_tile = w + expert.to(tl.int64) * stride_we + column.to(tl.int64) * stride_wn + offs_n[None, :] * stride_wn + offs_k[:, None]
    if TMA:
        a_tiles = tl.make_tensor_descriptor(
            active, shape=[blocks_m * BLOCK_M, k], strides=[stride_active, 1], block_shape=[BLOCK_M, BLOCK_K]
        )
        w_tiles = tl.make_tensor_descriptor(w, shape=[LOCAL * n, k], strides=[stride_wn, 1], block_shape=[BLOCK_N, BLOCK_K])
    if SCALE_BLOCK > 0:
        xs = active_scale + slot.to(tl.int64) * stride_as
        ws = w_scale + expert.to(tl.int64) * stride_wse
        if BLOCK_N <= SCALE_BLOCK:
            ws += column // SCALE_BLOCK * stride_wsn
        else:
            ws += (column + offs_n) // SCALE_BLOCK * stride_wsn

    # Rows of padding hold whatever was there: they spoil no other row, and are not stored.
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        if TMA:
            a = a_tiles.load([tile_m * BLOCK_M, start])
            b = w_tiles.load([expert * n + column, start]).T
        else:
            inside_k = offs_k < k - start
            a = tl.load(a_tile) if EVEN_K else tl.load(a_tile, mask=inside_k[None, :], other=0.0)
            b = tl.load(w_tile) if EVEN_K and EVEN_N else tl.load(w_tile, mask=inside_n[None, :] & inside_k[:, None], other=0.0)
            a_tile += BLOCK_K
            w_tile += BLOCK_K
        if SCALE_BLOCK > 0:
            scale = tl.load(xs + start // SCALE_BLOCK)
            if BLOCK_N <= SCALE_BLOCK:
                sums += tl.dot(a, b) * (scale * tl.load(ws + start // SCALE_BLOCK))[:, None]
            else:
                sums += tl.dot(a, b) * scale[:, None] * tl.load(ws + start // SCALE_BLOCK, mask=inside_n, other=0.0)[None, :]
        else:
            sums = tl.dot(a, b, sums, input_precision="ieee")

    choice = tl.load(slots + slot)
    inside_m = choice < choices
    sums *= tl.load(topk_weights + choice // TOP_K * stride_tw + choice % TOP_K, mask=inside_m, other=0.0)[:, None]
    to = out + choice[:, None].to(tl.int64) * stride_out + column
    if BLOCK_N < 256:
        tl.store(to + offs_n[None, :], sums.to(out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])
    else:
        # In halves: the addresses of all 128 elements of a thread beside its sums spill on sm_100.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        offs_h = tl.arange(0, HALF)[None, :]
        tl.store(to + offs_h, left.to(out.dtype.element_ty), mask=inside_m[:, None] & (column + offs_h < n))
        tl.store(to + HALF + offs_h, right.to(out.dtype.element_ty), mask=inside_m[:, None] & (column + HALF + offs_h < n))
