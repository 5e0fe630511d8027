# Triton's parameters have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""Indexer scores in Triton: keys are the rows and heads the columns of a product, so that the sum over heads stays in a few lanes.

A decode step streams blocks of keys past one token's queries. A prefill keeps a block of keys and streams the queries of many tokens
past it, token by token. Scores of single heads never leave the registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.index_scores.problem import IndexScores
from klab.kernels.triton_support import KIB, cdiv, next_power_of_2


@dataclass(frozen=True)
class ScoresConfig(Config):
    """A program takes blocks of `block_n` keys: one block for `tokens` tokens, or with tokens = 1 `blocks` of them for one token."""

    block_n: int = 128
    tokens: int = 1
    blocks: int = 4
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def _keys_of(k, k_scale, table, block, offs_n, offs_d, kv_len, k_page, k_row, scale_page, PAGE_SIZE: tl.constexpr, SCALED: tl.constexpr):
    """A block of keys [BLOCK_N, HEAD_DIM] with their scales (or 1); zeros behind the end. Without pages, `k` is the sequence's own."""
    key = block * offs_n.shape[0] + offs_n
    is_key = key < kv_len
    if PAGE_SIZE:
        page = tl.load(table + key // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
        rows = page * k_page + key % PAGE_SIZE * k_row
        scales = page * scale_page + key % PAGE_SIZE
    else:
        rows = key.to(tl.int64) * k_row
        scales = key
    keys = tl.load(k + rows[:, None] + offs_d[None, :], mask=is_key[:, None], other=0.0)
    scale = tl.full(offs_n.shape, 1.0, dtype=tl.float32)
    if SCALED:
        scale = tl.load(k_scale + scales, mask=is_key, other=0.0)
    return keys, scale


@triton.jit
def _score(keys, queries, weights):
    """[BLOCK_N] scores of keys [BLOCK_N, HEAD_DIM] for one token's queries [HEADS, HEAD_DIM] and weights [HEADS]."""
    each = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    return tl.sum(tl.maximum(each, 0.0) * weights[None, :], axis=1)


@triton.jit
def _index_scores(
    q,
    k,
    k_scale,
    weights,
    table,
    out,
    q_len,
    kv_len,
    key_programs,
    token_programs,
    blocks,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_page,
    k_row,
    scale_batch,
    scale_page,
    w_batch,
    w_token,
    table_row,
    out_batch,
    out_token,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One token and `blocks` blocks of keys, or TOKENS tokens and one block. Neighbouring programs read the same queries."""
    program = tl.program_id(0)
    sequence = (program // key_programs // token_programs).to(tl.int64)
    first = (program // key_programs % token_programs * TOKENS).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, HEAD_DIM)
    is_head = offs_h < HEADS
    q += sequence * q_batch + offs_h[:, None] * q_head + offs_d[None, :]
    weights += sequence * w_batch + offs_h
    out += sequence * out_batch
    k += sequence * k_batch
    k_scale += sequence * scale_batch
    table += sequence * table_row
    begin = program % key_programs * blocks
    if TOKENS == 1:
        queries = tl.load(q + first * q_token, mask=is_head[:, None], other=0.0)
        weight = tl.load(weights + first * w_token, mask=is_head, other=0.0)
        last = kv_len - q_len + first
        for block in tl.range(begin, tl.minimum(begin + blocks, tl.cdiv(kv_len, BLOCK_N))):
            keys, scale = _keys_of(k, k_scale, table, block, offs_n, offs_d, kv_len, k_page, k_row, scale_page, PAGE_SIZE, SCALED)
            key = block * BLOCK_N + offs_n
            scores = tl.where(key <= last, _score(keys, queries, weight) * scale, float("-inf"))
            tl.store(out + first * out_token + key, scores, mask=key < kv_len)
    else:
        keys, scale = _keys_of(k, k_scale, table, begin, offs_n, offs_d, kv_len, k_page, k_row, scale_page, PAGE_SIZE, SCALED)
        key = begin * BLOCK_N + offs_n
        end = tl.minimum(first + TOKENS, q_len)
        # The first token that sees a key of this block; those before it get -inf, and nothing is multiplied.
        seeing = tl.minimum(tl.maximum(begin * BLOCK_N - (kv_len - q_len), first), end)
        for token in tl.range(first, seeing):
            to = out + token * out_token + key
            tl.store(to, tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32), mask=key < kv_len)
        for token in tl.range(seeing, end):
            queries = tl.load(q + token * q_token, mask=is_head[:, None], other=0.0)
            weight = tl.load(weights + token * w_token, mask=is_head, other=0.0)
            scores = tl.where(key <= kv_len - q_len + token, _score(keys, queries, weight) * scale, float("-inf"))
            tl.store(out + token * out_token + key, scores, mask=key < kv_len)


def smem_bytes(problem: IndexScores, config: ScoresConfig) -> int:
    """Shared memory of one program, an upper bound: the fixed operand and the stages of the streamed one."""
    row = problem.head_dim * SIZE_BYTES[problem.operand_dtype]
    keys, queries = config.block_n * row, max(16, next_power_of_2(problem.heads)) * row
    fixed, streamed = (queries, keys) if config.tokens == 1 else (keys, queries)
    return fixed + config.num_stages * streamed + KIB


def fits(problem: IndexScores, config: ScoresConfig, chip: Chip) -> str | None:
    """Tiles are powers of two within the problem; stages fit shared memory, products fit registers."""
    dims, heads = problem.head_dim, max(16, next_power_of_2(problem.heads))
    if dims & (dims - 1) or not 32 <= dims <= 256 or problem.heads > 128:
        return "head_dim is a power of two from 32 to 256, and there are at most 128 heads"
    if any(value < 1 or value & (value - 1) for value in (config.block_n, config.num_warps)) or config.num_stages < 1:
        return "block_n and num_warps must be powers of two, num_stages at least 1"
    if not 16 <= config.block_n <= max(16, next_power_of_2(problem.kv_len)) or config.num_warps > 16:
        return "block_n is at least 16 and no larger than the context, num_warps at most 16"
    if config.tokens < 1 or config.blocks < 1 or (config.tokens > 1 and config.blocks > 1):
        return "a program takes several tokens or several blocks, not both"
    if config.tokens > problem.q_len or config.blocks > cdiv(problem.kv_len, config.block_n):
        return "more tokens or blocks than there are"
    if smem_bytes(problem, config) > chip.smem_per_block_bytes:
        return "too much shared memory"
    if config.block_n * heads // (32 * config.num_warps) > 128:
        return "the products would spill registers"
    if problem.dtype == "float32" and config.block_n * heads * dims // (32 * config.num_warps) > 8192:
        return "one step would unroll too many multiply-adds"
    return None


def default(problem: IndexScores, chip: Chip) -> ScoresConfig:
    """128 keys by the heads fill a warp group's registers half; a prefill streams 32 tokens past them, a decode 4 blocks past a token."""
    longest = next_power_of_2(problem.kv_len)
    block_n = min(16 if problem.dtype == "float32" else 128, max(16, longest))
    if problem.q_len >= 16:
        return ScoresConfig(block_n, min(32, problem.q_len), 1)
    return ScoresConfig(block_n, 1, min(4, cdiv(problem.kv_len, block_n)))


def space(problem: IndexScores, chip: Chip) -> Iterator[ScoresConfig]:
    """32 to 256 keys, 1 to 128 tokens or 1 to 16 blocks, 4 or 8 warps, 1 to 5 stages."""
    shapes = [(1, blocks) for blocks in (1, 2, 4, 8, 16)] + [(tokens, 1) for tokens in (2, 4, 8, 16, 32, 64, 128)]
    for block_n, (tokens, blocks), warps, stages in product((32, 64, 128, 256), shapes, (4, 8), (1, 2, 3, 4, 5)):
        if stages <= max(tokens, blocks):
            yield ScoresConfig(block_n, tokens, blocks, warps, stages)


@kernel(IndexScores, backend="triton", config=ScoresConfig, space=space, default=default, fits=fits)
def triton_scores(problem: IndexScores, config: ScoresConfig, chip: Chip) -> Launch:
    """Triton indexer: keys by heads on tensor cores, ReLU and weighted sum in registers; streams keys (decode) or queries (prefill)."""
    key_programs = cdiv(cdiv(problem.kv_len, config.block_n), config.blocks)
    token_programs = cdiv(problem.q_len, config.tokens)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, weights, out = inputs["q"], inputs["weights"], outputs["scores"]
        k = inputs["k_cache"] if problem.page_size else inputs["k"]
        scale: torch.Tensor = inputs["k_scale"] if problem.format else weights
        table = inputs["block_table"] if problem.page_size else q
        paged = bool(problem.page_size)
        _index_scores[(problem.batch * token_programs * key_programs,)](
            q,
            k,
            scale,
            weights,
            table,
            out,
            problem.q_len,
            problem.kv_len,
            key_programs,
            token_programs,
            config.blocks,
            *q.stride()[:3],
            0 if paged else k.stride(0),
            k.stride(0) if paged else 0,
            k.stride(1),
            0 if paged else scale.stride(0),
            scale.stride(0) if paged else 0,
            *weights.stride()[:2],
            table.stride(0) if paged else 0,
            *out.stride()[:2],
            HEADS=problem.heads,
            HEAD_DIM=problem.head_dim,
            PAGE_SIZE=problem.page_size,
            SCALED=bool(problem.format),
            BLOCK_N=config.block_n,
            BLOCK_H=max(16, next_power_of_2(problem.heads)),
            TOKENS=config.tokens,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    return launch
