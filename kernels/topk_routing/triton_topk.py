"""The router in one Triton launch: scores, groups, the best experts and their weights, all in registers."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import triton
import triton.language as tl

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.topk_routing.problem import TopkRouting
from klab.kernels.triton_support import cdiv, next_power_of_2


@dataclass(frozen=True)
class TopkConfig(Config):
    """A program of num_warps warps routes `rows` tokens."""

    rows: int = 4
    num_warps: int = 4


@triton.jit
def _best_first(values, index, BIG: tl.constexpr):
    """The largest of values [R, G, S] per row, [R, 1, 1], and the lowest index that has it."""
    best = tl.max(tl.max(values, axis=2, keep_dims=True), axis=1, keep_dims=True)
    at = tl.where(values == best, index, BIG)
    return best, tl.min(tl.min(at, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _route(
    logits,
    bias,
    ids,
    weights,
    tokens,
    scale,
    stride_logits,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
):
    SIZE: tl.constexpr = EXPERTS // GROUPS
    BIG: tl.constexpr = 1 << 30
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.arange(0, GROUPS_PADDED)[None, :, None]
    member = tl.arange(0, SIZE_PADDED)[None, None, :]
    expert = group * SIZE + member
    real = (group < GROUPS) & (member < SIZE)
    inside = row < tokens
    at = row[:, None, None].to(tl.int64) * stride_logits + expert
    logit = tl.load(logits + at, mask=inside[:, None, None] & real, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(0.0 - logit))
    else:
        # A row beyond the last token has no maximum: 0 keeps its exponentials finite.
        most = tl.max(tl.max(logit, axis=2, keep_dims=True), axis=1, keep_dims=True)
        power = tl.exp(logit - tl.where(inside[:, None, None], most, 0.0))
        score = power / tl.maximum(tl.sum(tl.sum(power, axis=2, keep_dims=True), axis=1, keep_dims=True), 1e-30)
    choice = score
    if BIAS:
        choice += tl.load(bias + expert, mask=real, other=0.0)
    choice = tl.where(real, choice, float("-inf"))

    if TOPK_GROUPS < GROUPS:
        value = tl.max(choice, axis=2, keep_dims=True)
        if BIAS:
            first = tl.min(tl.where(choice == value, member, BIG), axis=2, keep_dims=True)
            value += tl.max(tl.where(member == first, float("-inf"), choice), axis=2, keep_dims=True)
        # How many groups are better decides; of equal ones the lower index is.
        kept = tl.zeros((ROWS, GROUPS_PADDED, 1), dtype=tl.int32)
        for _ in tl.static_range(TOPK_GROUPS):
            _best, chosen = _best_first(value, group, BIG)
            kept += (group == chosen).to(tl.int32)
            value = tl.where(group == chosen, float("-inf"), value)
        choice = tl.where(kept > 0, choice, float("-inf"))

    rank = tl.arange(0, TOP_K_PADDED)[None, :]
    found = tl.zeros((ROWS, TOP_K_PADDED), dtype=tl.int32)
    weight = tl.zeros((ROWS, TOP_K_PADDED), dtype=tl.float32)
    for i in tl.static_range(TOP_K):
        _best, chosen = _best_first(choice, expert, BIG)
        mine = expert == chosen
        won = tl.sum(tl.sum(tl.where(mine & real, score, 0.0), axis=2), axis=1)
        found = tl.where(rank == i, tl.reshape(chosen, (ROWS, 1)), found)
        weight = tl.where(rank == i, won[:, None], weight)
        choice = tl.where(mine, float("-inf"), choice)
    if RENORMALIZE:
        weight /= tl.maximum(tl.sum(weight, axis=1, keep_dims=True), 1e-30)
    to = row[:, None] * TOP_K + rank
    store = inside[:, None] & (rank < TOP_K)
    tl.store(ids + to, found, mask=store)
    tl.store(weights + to, weight * scale, mask=store)


def fits(problem: TopkRouting, config: TopkConfig, chip: Chip) -> str | None:
    """A row's scores and choices must stay in registers."""
    rows, warps = config.rows, config.num_warps
    if any(value < 1 or value & (value - 1) for value in (rows, warps)) or warps > 16:
        return "rows and warps must be powers of two, at most 16 warps"
    if rows > 32 or rows > next_power_of_2(problem.tokens):
        return "more rows than tokens, or than 32"
    scores = rows * _padded(problem) // (32 * warps)
    if scores > 16:  # 32 of 256 experts in 8 groups spill 504 bytes
        return "the scores would spill registers"
    return None


def _padded(problem: TopkRouting) -> int:
    return next_power_of_2(problem.groups) * next_power_of_2(problem.group_size)


def default(problem: TopkRouting, chip: Chip) -> TopkConfig:
    """A row per warp, so that no maximum crosses warps; few rows per program while the chip is not full."""
    rows = min(4, next_power_of_2(problem.tokens))
    while rows > 1 and cdiv(problem.tokens, rows) < chip.sm_count:
        rows //= 2
    warps = max(rows, next_power_of_2(cdiv(rows * _padded(problem), 32 * 16)))
    return TopkConfig(rows, min(warps, 16))


def space(problem: TopkRouting, chip: Chip) -> Iterator[TopkConfig]:
    """Every split of rows over warps."""
    for rows, warps in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8)):
        yield TopkConfig(rows, warps)


@kernel(TopkRouting, backend="triton", config=TopkConfig, space=space, default=default, fits=fits)
def triton_topk(problem: TopkRouting, config: TopkConfig, chip: Chip) -> Launch:
    """Triton, one launch: a token's scores stay in registers, top_k rounds of argmax choose."""
    p = problem

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        logits = inputs["logits"]
        _route[(cdiv(p.tokens, config.rows),)](
            logits,
            inputs.get("bias", logits),
            outputs["ids"],
            outputs["weights"],
            p.tokens,
            p.scale,
            logits.stride(0),
            EXPERTS=p.experts,
            TOP_K=p.top_k,
            SIGMOID=p.scoring == "sigmoid",
            BIAS=p.bias,
            GROUPS=p.groups,
            TOPK_GROUPS=p.topk_groups,
            RENORMALIZE=p.renormalize,
            ROWS=config.rows,
            GROUPS_PADDED=next_power_of_2(p.groups),
            SIZE_PADDED=next_power_of_2(p.group_size),
            TOP_K_PADDED=next_power_of_2(p.top_k),
            num_warps=config.num_warps,
        )

    return launch
