"""The three stages of the chunked gated delta rule in Triton: prepare, scan, output.

With b the decay cumulated from the chunk's beginning (a logarithm), the corrections c of a chunk solve (I + A) c = beta (v - exp(b) k S)
for the state S before it, where A[i, j] = beta[i] exp(b[i] - b[j]) k[i] . k[j] for j < i (the WY form; Yang et al., arXiv 2412.06464).
Every exponent that is taken is of a decay from an earlier to a later token, at most 0, however strong the decay.
"""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prepare(
    q,
    k,
    v,
    g,
    beta,
    chunk_rows,
    corrections,
    keys,
    gates,
    weights,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    g_token,
    beta_token,
    log2_e,
    epsilon,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    QK_NORM: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(chunk_rows + 2 * chunk).to(tl.int64)
    count = tl.load(chunk_rows + 2 * chunk + 1)
    rows = tl.arange(0, CHUNK)
    offs_k = tl.arange(0, KEY_DIM)
    offs_v = tl.arange(0, VALUE_DIM)
    exists = rows < count
    # A token that does not exist corrects nothing (beta 0) and lets nothing decay (g 0).
    total = tl.cumsum(tl.load(g + (first + rows) * g_token + head, mask=exists, other=0.0) * log2_e, axis=0)
    rate = tl.load(beta + (first + rows) * beta_token + head, mask=exists, other=0.0)
    k_tile = tl.load(k + head // GROUP * k_head + (first + rows)[:, None] * k_token + offs_k[None, :], mask=exists[:, None], other=0.0)
    # Keys stay as they are, so that nothing is lost of them: their norms go into the factors beside them.
    if QK_NORM:
        wide = k_tile.to(tl.float32)
        inverse_norm = tl.rsqrt(tl.sum(wide * wide, axis=1) + epsilon)
    else:
        inverse_norm = tl.full((CHUNK,), 1.0, dtype=tl.float32)
    earlier = rows[:, None] > rows[None, :]
    between = tl.exp2(tl.where(earlier, total[:, None] - total[None, :], 0.0))
    alike = tl.dot(k_tile, tl.trans(k_tile), input_precision="ieee") * inverse_norm[:, None] * inverse_norm[None, :]
    at = (chunk * HEADS + head) * CHUNK
    # Before the inverse, which needs the registers.
    if WEIGHTS:
        q_tile = tl.load(q + head // GROUP * q_head + (first + rows)[:, None] * q_token + offs_k[None, :], mask=exists[:, None], other=0.0)
        taken = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * inverse_norm[None, :]
        taken = tl.where(rows[:, None] >= rows[None, :], taken * between, 0.0)
        tl.store(weights + at * CHUNK + rows[:, None] * CHUNK + rows[None, :], taken.to(k_tile.dtype))
    a = tl.where(earlier, alike * between * rate[:, None], 0.0)

    # The inverse of I + A, from blocks of 2 on its diagonal to the whole: two blocks T1 and T2 of a size become one of twice the size,
    # with -T2 A21 T1 below. No power of A appears, which for keys that are alike would grow beyond all precision. Factors in 16 bits add
    # at most a tenth to the error that the result's own rounding makes.
    # `apart` has as its highest bit the size of the blocks on whose border the element lies. A loop that is not unrolled: unrolled it
    # spills, and its steps wait for each other anyway.
    apart = rows[:, None] ^ rows[None, :]
    inverse = tl.where(apart == 0, 1.0, tl.where(apart == 1, -a, 0.0))
    for level in range(1, LEVELS):
        factor = inverse.to(k_tile.dtype)
        part = tl.dot(tl.where(apart >> level == 1, a, 0.0).to(k_tile.dtype), factor, input_precision="ieee")
        inverse -= tl.dot(factor, part.to(k_tile.dtype), input_precision="ieee")

    of_values = (inverse * rate[None, :]).to(k_tile.dtype)
    v_tile = tl.load(v + head * v_head + (first + rows)[:, None] * v_token + offs_v[None, :], mask=exists[:, None], other=0.0)
    solved = tl.dot(of_values, v_tile, input_precision="ieee")
    tl.store(corrections + at * VALUE_DIM + rows[:, None] * VALUE_DIM + offs_v[None, :], solved.to(k_tile.dtype))
    of_keys = (inverse * (rate * inverse_norm * tl.exp2(total))[None, :]).to(k_tile.dtype)
    solved_keys = tl.dot(of_keys, k_tile, input_precision="ieee")
    tl.store(keys + at * KEY_DIM + rows[:, None] * KEY_DIM + offs_k[None, :], solved_keys.to(k_tile.dtype))
    tl.store(gates + 2 * at + rows, total)
    tl.store(gates + 2 * at + CHUNK + rows, inverse_norm)


@triton.jit
def _scale_of(q_tile, scale, epsilon, QK_NORM: tl.constexpr):
    """What each query's results are multiplied by: the scale, and the reciprocal of its norm."""
    wide = q_tile.to(tl.float32)
    if QK_NORM:
        return scale * tl.rsqrt(tl.sum(wide * wide, axis=1) + epsilon)
    return tl.sum(wide * 0.0, axis=1) + scale


@triton.jit
def scan(
    q,
    k,
    initial_state,
    sequences,
    corrections,
    keys,
    gates,
    weights,
    states,
    out,
    final_state,
    q_token,
    q_head,
    k_token,
    k_head,
    state_sequence,
    state_head,
    state_row,
    scale,
    epsilon,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    QK_NORM: tl.constexpr,
    FUSE_OUTPUT: tl.constexpr,
):
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    chunk = tl.load(sequences + 4 * sequence).to(tl.int64)
    chunks = tl.load(sequences + 4 * sequence + 1)
    first = tl.load(sequences + 4 * sequence + 2).to(tl.int64)
    length = tl.load(sequences + 4 * sequence + 3)
    rows = tl.arange(0, CHUNK)
    offs_k = tl.arange(0, KEY_DIM)
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    start = initial_state + sequence * state_sequence + head * state_head
    state = tl.load(start + offs_k[:, None] * state_row + offs_v[None, :]).to(tl.float32)

    k += head // GROUP * k_head + first * k_token
    q += head // GROUP * q_head + first * q_token
    out += (first * HEADS + head) * VALUE_DIM
    at = (chunk * HEADS + head) * CHUNK
    for begin in range(0, chunks * CHUNK, CHUNK):
        exists = begin + rows < length
        k_tile = tl.load(k + rows[:, None] * k_token + offs_k[None, :], mask=exists[:, None], other=0.0)
        key_tile = tl.load(keys + at * KEY_DIM + rows[:, None] * KEY_DIM + offs_k[None, :])
        values = tl.load(corrections + at * VALUE_DIM + rows[:, None] * VALUE_DIM + offs_v[None, :])
        total = tl.load(gates + 2 * at + rows)
        inverse_norm = tl.load(gates + 2 * at + CHUNK + rows)
        whole = tl.load(gates + 2 * at + CHUNK - 1)

        narrow = state.to(k_tile.dtype)
        correction = values.to(tl.float32) - tl.dot(key_tile, narrow, input_precision="ieee")
        if FUSE_OUTPUT:
            q_tile = tl.load(q + rows[:, None] * q_token + offs_k[None, :], mask=exists[:, None], other=0.0)
            taken = tl.load(weights + at * CHUNK + rows[:, None] * CHUNK + rows[None, :])
            read = tl.dot(q_tile, narrow, input_precision="ieee") * tl.exp2(total)[:, None]
            read = tl.dot(taken, correction.to(k_tile.dtype), read, input_precision="ieee")
            read *= _scale_of(q_tile, scale, epsilon, QK_NORM)[:, None]
            to = out + rows[:, None] * (HEADS * VALUE_DIM) + offs_v[None, :]
            tl.store(to, read.to(out.dtype.element_ty), mask=exists[:, None])
            q += CHUNK * q_token
            out += CHUNK * HEADS * VALUE_DIM
        else:
            tl.store(states + (at // CHUNK * KEY_DIM + offs_k[:, None]) * VALUE_DIM + offs_v[None, :], narrow)
            tl.store(corrections + at * VALUE_DIM + rows[:, None] * VALUE_DIM + offs_v[None, :], correction.to(k_tile.dtype))
        decayed = (correction * (tl.exp2(whole - total) * inverse_norm)[:, None]).to(k_tile.dtype)
        state = tl.dot(tl.trans(k_tile), decayed, state * tl.exp2(whole), input_precision="ieee")
        k += CHUNK * k_token
        at += HEADS * CHUNK

    to = final_state + (sequence * HEADS + head) * (KEY_DIM * VALUE_DIM)
    tl.store(to + offs_k[:, None] * VALUE_DIM + offs_v[None, :], state.to(final_state.dtype.element_ty))


@triton.jit
def output(
    q,
    k,
    chunk_rows,
    corrections,
    gates,
    states,
    out,
    q_token,
    q_head,
    k_token,
    k_head,
    scale,
    epsilon,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    QK_NORM: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(chunk_rows + 2 * chunk).to(tl.int64)
    count = tl.load(chunk_rows + 2 * chunk + 1)
    rows = tl.arange(0, CHUNK)
    offs_k = tl.arange(0, KEY_DIM)
    offs_v = tl.arange(0, VALUE_DIM)
    exists = (rows < count)[:, None]
    at = (chunk * HEADS + head) * CHUNK
    q_tile = tl.load(q + head // GROUP * q_head + (first + rows)[:, None] * q_token + offs_k[None, :], mask=exists, other=0.0)
    k_tile = tl.load(k + head // GROUP * k_head + (first + rows)[:, None] * k_token + offs_k[None, :], mask=exists, other=0.0)
    state = tl.load(states + (at // CHUNK * KEY_DIM + offs_k[:, None]) * VALUE_DIM + offs_v[None, :])
    total = tl.load(gates + 2 * at + rows)
    inverse_norm = tl.load(gates + 2 * at + CHUNK + rows)
    seen = rows[:, None] >= rows[None, :]
    taken = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * inverse_norm[None, :]
    taken = tl.where(seen, taken * tl.exp2(tl.where(seen, total[:, None] - total[None, :], 0.0)), 0.0)
    read = tl.dot(q_tile, state, input_precision="ieee") * tl.exp2(total)[:, None]
    correction = tl.load(corrections + at * VALUE_DIM + rows[:, None] * VALUE_DIM + offs_v[None, :])
    read = tl.dot(taken.to(k_tile.dtype), correction, read, input_precision="ieee")
    read *= _scale_of(q_tile, scale, epsilon, QK_NORM)[:, None]
    to = out + ((first + rows)[:, None] * HEADS + head) * VALUE_DIM + offs_v[None, :]
    tl.store(to, read.to(out.dtype.element_ty), mask=exists)
