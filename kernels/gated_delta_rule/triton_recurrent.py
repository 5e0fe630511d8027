"""The gated delta rule token by token in Triton, the state in registers: decoding, and the few tokens of a speculative step."""

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
from klab.kernels.gated_delta_rule.problem import NORM_EPSILON, GatedDeltaRule
from klab.kernels.triton_support import cdiv, next_power_of_2

# Elements of the state that one thread holds. 128 compile to 200 registers of 255.
MAX_STATE_PER_THREAD = 128
# Each token waits for the one before it, about a microsecond: chunks are faster from a few dozen on.
MAX_TOKENS = 64
MAX_GRID_Y = 65535


@dataclass(frozen=True)
class RecurrentConfig(Config):
    """A program holds all key_dim rows of `block_v` columns of one head's state.

    Columns are independent of each other: narrow blocks give more programs, wide ones longer runs of memory.
    """

    block_v: int = 32
    num_warps: int = 1


@triton.jit
def _recur(
    q,
    k,
    v,
    g,
    beta,
    initial_state,
    seq_offsets,
    out,
    final_state,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    g_token,
    beta_token,
    state_sequence,
    state_head,
    state_row,
    scale,
    epsilon,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    QK_NORM: tl.constexpr,
    ONE_EACH: tl.constexpr,
):
    BLOCKS: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    head = tl.program_id(0) // BLOCKS
    sequence = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, BLOCK_K)
    columns = tl.program_id(0) % BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
    is_row = rows < KEY_DIM
    is_column = columns < VALUE_DIM
    inside = is_row[:, None] & is_column[None, :]
    start = initial_state + sequence * state_sequence + head * state_head
    # The state is most of what is read: it is under way before anything waits for the offsets.
    state = tl.load(start + rows[:, None] * state_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if ONE_EACH:
        first = sequence
        end = sequence + 1
    else:
        first = tl.load(seq_offsets + sequence).to(tl.int64)
        end = tl.load(seq_offsets + sequence + 1).to(tl.int64)
    q += head // GROUP * q_head
    k += head // GROUP * k_head
    v += head * v_head
    for t in range(first, end):
        query = tl.load(q + t * q_token + rows, mask=is_row, other=0.0).to(tl.float32)
        key = tl.load(k + t * k_token + rows, mask=is_row, other=0.0).to(tl.float32)
        value = tl.load(v + t * v_token + columns, mask=is_column, other=0.0).to(tl.float32)
        decay = tl.exp(tl.load(g + t * g_token + head))
        rate = tl.load(beta + t * beta_token + head)
        query *= scale
        if QK_NORM:
            query *= tl.rsqrt(tl.sum(query * query) / (scale * scale) + epsilon)
            key *= tl.rsqrt(tl.sum(key * key) + epsilon)
        # Both are read from the state as it was: what the correction adds to the output is (key . query) times it. So nothing that goes
        # over the rows waits for another.
        remembered = tl.sum(state * key[:, None], axis=0)
        read = tl.sum(state * query[:, None], axis=0)
        correction = rate * (value - decay * remembered)
        state = state * decay + key[:, None] * correction[None, :]
        result = decay * read + tl.sum(key * query) * correction
        tl.store(out + (t * HEADS + head) * VALUE_DIM + columns, result.to(out.dtype.element_ty), mask=is_column)
    to = final_state + (sequence * HEADS + head) * (KEY_DIM * VALUE_DIM)
    tl.store(to + rows[:, None] * VALUE_DIM + columns[None, :], state.to(final_state.dtype.element_ty), mask=inside)


def fits(problem: GatedDeltaRule, config: RecurrentConfig, chip: Chip) -> str | None:
    """Blocks are powers of two no wider than the values, and a thread's part of the state fits its registers."""
    block_v, warps = config.block_v, config.num_warps
    if any(value < 1 or value & (value - 1) for value in (block_v, warps)) or block_v < 4 or warps > 16:
        return "block_v (from 4) and num_warps (up to 16) must be powers of two"
    if block_v > max(4, next_power_of_2(problem.value_dim)):
        return "block_v is wider than the values"
    held = next_power_of_2(problem.key_dim) * block_v // (32 * warps)
    if held > MAX_STATE_PER_THREAD:
        return "the state would spill registers"
    if held * SIZE_BYTES[problem.state_dtype] < 16 and warps > 1:
        return "less than 16 bytes of the state for each thread"
    if max(problem.seq_lens) > MAX_TOKENS:
        return f"a sequence of more than {MAX_TOKENS} tokens is faster in chunks"
    if problem.batch > MAX_GRID_Y:
        return f"more than {MAX_GRID_Y} sequences"
    return None


def default(problem: GatedDeltaRule, chip: Chip) -> RecurrentConfig:
    """Columns of 128 bytes and 16 KiB per warp; of 64 bytes where that gives too few programs to fill the chip."""
    rows = next_power_of_2(problem.key_dim)
    block_v = min(32, max(4, next_power_of_2(problem.value_dim)))
    if problem.batch * problem.value_heads * cdiv(problem.value_dim, block_v) < 2 * chip.sm_count:
        block_v = max(4, block_v // 2)
    return RecurrentConfig(block_v, max(1, rows * block_v // (32 * MAX_STATE_PER_THREAD)))


def space(problem: GatedDeltaRule, chip: Chip) -> Iterator[RecurrentConfig]:
    """8 to 128 columns and 1 to 8 warps."""
    for block_v, warps in product((32, 16, 8, 64, 128), (1, 2, 4, 8)):
        yield RecurrentConfig(block_v, warps)


@kernel(GatedDeltaRule, backend="triton", config=RecurrentConfig, space=space, default=default, fits=fits)
def triton_recurrent(problem: GatedDeltaRule, config: RecurrentConfig, chip: Chip) -> Launch:
    """Triton token by token: the state is read once, kept in registers and written once; blocks of its columns run in parallel."""
    p = problem
    grid = (p.value_heads * cdiv(p.value_dim, config.block_v), p.batch)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k, v, g, beta, state = (inputs[name] for name in ("q", "k", "v", "g", "beta", "initial_state"))
        _recur[grid](
            q,
            k,
            v,
            g,
            beta,
            state,
            inputs["seq_offsets"],
            outputs["out"],
            outputs["final_state"],
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            g.stride(0),
            beta.stride(0),
            *state.stride()[:3],
            p.scale,
            NORM_EPSILON,
            HEADS=p.value_heads,
            GROUP=p.value_heads // p.key_heads,
            KEY_DIM=p.key_dim,
            VALUE_DIM=p.value_dim,
            BLOCK_K=next_power_of_2(p.key_dim),
            BLOCK_V=config.block_v,
            QK_NORM=p.qk_norm,
            ONE_EACH=set(p.seq_lens) == {1},
            num_warps=config.num_warps,
        )

    return launch
