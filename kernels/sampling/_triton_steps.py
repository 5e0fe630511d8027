"""The steps of sampling in Triton: statistics of chunks, candidates of chunks, the choice among a row's candidates.

A row of the vocabulary is cut into chunks, so that few rows fill the chip. Nothing is sorted. As in FlashInfer's sampling kernels, a
threshold is found by bisection; here on the order of the float32 bit patterns, and only among candidates that a cheap bound leaves: the
k-th largest of the maxima of 128 logits each is no larger than the k-th largest logit.
"""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(2147483647)
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def order_of(x):
    """int32 keys in the order of float32 values; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def weight_of(x, highest, per_unit):
    """2^((x - highest) per_unit): the probability up to a factor; per_unit is log2(e) / temperature."""
    return tl.exp2((x - highest) * per_unit)


@triton.jit
def load_stats(values, row, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, other):
    """The [COLUMNS] values of a row's chunks; `other` behind the last."""
    column = tl.arange(0, COLUMNS)
    return tl.load(values + row * CHUNKS + column, mask=column < CHUNKS, other=other)


@triton.jit
def chunk_stats(
    logits, stride, vocab, per_unit, chunk_max, chunk_sum, chunk_at, group_max,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, GREEDY: tl.constexpr, FILTERED: tl.constexpr,
):  # fmt: skip
    """Of GROUPS * GROUP logits the largest, with where it stands (greedy) or the sum of weights, and the largest of each GROUP."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = chunk * GROUPS * GROUP
    at = first + tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + row * stride + at, mask=at < vocab, other=LOWEST).to(tl.float32)
    largest = tl.max(x, axis=1)
    highest = tl.max(largest, axis=0)
    tl.store(chunk_max + row * CHUNKS + chunk, highest)
    if GREEDY:
        # The padding is -inf too: only a row of nothing else may name it, and then no token is right.
        where = tl.min(tl.min(tl.where((x == highest) & (at < vocab), at, NONE), axis=1), axis=0)
        tl.store(chunk_at + row * CHUNKS + chunk, where)
    else:
        base = tl.where(highest == LOWEST, 0.0, highest)
        total = tl.sum(tl.sum(weight_of(x, base, per_unit), axis=1), axis=0)
        tl.store(chunk_sum + row * CHUNKS + chunk, total)
        if FILTERED:
            tl.store(group_max + row * CHUNKS * GROUPS + chunk * GROUPS + tl.arange(0, GROUPS), largest)


@triton.jit
def merge_greedy(chunk_max, chunk_at, token, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first of the largest logits."""
    row = tl.program_id(0).to(tl.int64)
    largest = load_stats(chunk_max, row, CHUNKS, COLUMNS, LOWEST)
    where = load_stats(chunk_at, row, CHUNKS, COLUMNS, NONE)
    tl.store(token + row, tl.min(tl.where(largest == tl.max(largest, axis=0), where, NONE), axis=0))


@triton.jit
def pick_from_chunk(
    logits, stride, vocab, per_unit, chunk_max, chunk_sum, draw, token, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Without filters: the chunk in which the draw falls, then the token within it."""
    row = tl.program_id(0).to(tl.int64)
    largest = load_stats(chunk_max, row, CHUNKS, COLUMNS, LOWEST)
    highest = tl.max(largest, axis=0)
    sums = load_stats(chunk_sum, row, CHUNKS, COLUMNS, 0.0) * weight_of(largest, highest, per_unit)
    column = tl.arange(0, COLUMNS)
    target = tl.load(draw + row) * tl.sum(sums, axis=0)
    # Rounding may leave the target at the end of all: then the last chunk, or token, that has any weight.
    found = tl.min(tl.where((tl.cumsum(sums, axis=0) > target) & (sums > 0), column, NONE), axis=0)
    chunk = tl.minimum(found, tl.max(tl.where(sums > 0, column, 0), axis=0))
    before = tl.sum(tl.where(column < chunk, sums, 0.0), axis=0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + at, mask=at < vocab, other=LOWEST).to(tl.float32)
    weight = weight_of(x, highest, per_unit)
    here = tl.min(tl.where((before + tl.cumsum(weight, axis=0) > target) & (weight > 0), at, NONE), axis=0)
    tl.store(token + row, tl.minimum(here, tl.max(tl.where(weight > 0, at, 0), axis=0)))


@triton.jit
def _bound(
    group_max, row, highest, total, per_unit, top_p, least_share,
    TOP_K: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """A logit that is no larger than the smallest one kept."""
    column = tl.arange(0, COLUMNS)
    largest = tl.load(group_max + row * COUNT + column, mask=column < COUNT, other=LOWEST)
    share = tl.where(largest == LOWEST, 0.0, 1.0)
    if TOP_K:
        goal = TOP_K * 1.0
        bound = LOWEST
    else:
        share = share * weight_of(largest, highest, per_unit)
        # 1e-4 for the rounding of either sum.
        goal = top_p * total * 1.0001
        # Tokens of less than (1 - top_p) / vocab each hold less than 1 - top_p together.
        bound = highest + tl.log2(least_share * total) / per_unit - 0.001
    low, high = tl.min(tl.where(largest == LOWEST, highest, largest), axis=0), highest
    if tl.sum(share, axis=0) >= goal:
        for _ in range(STEPS):
            middle = 0.5 * (low + high)
            enough = tl.sum(tl.where(largest >= middle, share, 0.0), axis=0) >= goal
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        bound = tl.maximum(bound, low)
    return bound


@triton.jit
def chunk_candidates(
    logits, stride, vocab, per_unit, top_p, least_share, chunk_max, chunk_sum, group_max, values, places, counts,
    TOP_K: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, GROUP_COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The logits of a chunk that may be kept, with their tokens, in order, at the front of the chunk's own stretch."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    largest = load_stats(chunk_max, row, CHUNKS, COLUMNS, LOWEST)
    highest = tl.max(largest, axis=0)
    total = tl.sum(load_stats(chunk_sum, row, CHUNKS, COLUMNS, 0.0) * weight_of(largest, highest, per_unit), axis=0)
    bound = _bound(group_max, row, highest, total, per_unit, top_p, least_share, TOP_K, CHUNKS * GROUPS, GROUP_COLUMNS, STEPS)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row * stride + at, mask=at < vocab, other=LOWEST).to(tl.float32)
    may_stay = (x >= bound) & (x > LOWEST)
    behind = tl.cumsum(may_stay.to(tl.int32), axis=0)
    to = (row * CHUNKS + chunk) * CHUNK + behind - 1
    tl.store(values + to, x, mask=may_stay)
    tl.store(places + to, at, mask=may_stay)
    tl.store(counts + row * CHUNKS + chunk, tl.sum(may_stay.to(tl.int32), axis=0))


@triton.jit
def _window(values, counts, row, first, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Candidates first .. first + WIDTH - 1 of every chunk, [COLUMNS, WIDTH] values; -inf where there is none. And where they lie."""
    count = load_stats(counts, row, CHUNKS, COLUMNS, 0)[:, None]
    within = first + tl.arange(0, WIDTH)[None, :]
    at = (row * CHUNKS + tl.arange(0, COLUMNS)[:, None]) * CHUNK + within
    return tl.load(values + at, mask=within < count, other=LOWEST), at, within < count


@triton.jit
def _middle(low, high):
    """Between two keys, nearer to the upper one: their difference may exceed 31 bits."""
    return (low.to(tl.int64) + (high.to(tl.int64) - low.to(tl.int64) + 1) // 2).to(tl.int32)


@triton.jit
def _kept_in_registers(x, valid, highest, total, per_unit, top_p, TOP_K: tl.constexpr, NUCLEUS: tl.constexpr):
    """Weights of candidates [COLUMNS, WIDTH]; 0 for what is dropped. `total`: the weight of the whole row, candidates and others."""
    key = order_of(x)
    weight = weight_of(x, highest, per_unit)
    top = order_of(highest)
    low = tl.min(tl.min(tl.where(valid, key, NONE), axis=1), axis=0)
    if TOP_K:
        high = top
        while low < high:
            middle = _middle(low, high)
            enough = tl.sum(tl.sum((key >= middle).to(tl.int32), axis=1), axis=0) >= TOP_K
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
    weight = tl.where(key >= low, weight, 0.0)
    if NUCLEUS:
        goal = top_p * (tl.sum(tl.sum(weight, axis=1), axis=0) if TOP_K else total)
        high = top
        while low < high:
            middle = _middle(low, high)
            enough = tl.sum(tl.sum(tl.where(key >= middle, weight, 0.0), axis=1), axis=0) >= goal
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        weight = tl.where(key >= low, weight, 0.0)
    return weight


@triton.jit
def _counted(values, counts, row, most, least, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """How many candidates have a key of at least `least`."""
    counted = tl.zeros((COLUMNS, WIDTH), dtype=tl.int32)
    for first in range(0, most, WIDTH):
        x, _, valid = _window(values, counts, row, first, CHUNKS, COLUMNS, CHUNK, WIDTH)
        counted += ((order_of(x) >= least) & valid).to(tl.int32)
    return tl.sum(tl.sum(counted, axis=1), axis=0)


@triton.jit
def _weighed(
    values, counts, row, most, least, highest, per_unit,
    CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """By chunk, the weight of the candidates whose key is at least `least`."""
    sums = tl.zeros((COLUMNS, WIDTH), dtype=tl.float32)
    for first in range(0, most, WIDTH):
        x, _, valid = _window(values, counts, row, first, CHUNKS, COLUMNS, CHUNK, WIDTH)
        sums += tl.where((order_of(x) >= least) & valid, weight_of(x, highest, per_unit), 0.0)
    return tl.sum(sums, axis=1)


@triton.jit
def _choose_from_memory(
    values, places, counts, row, most, highest, total, per_unit, top_p, uniform,
    TOP_K: tl.constexpr, NUCLEUS: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The token, with every step reading the candidates again: for rows so flat that registers do not hold them."""
    top = order_of(highest)
    low = -2139095041  # the key of the lowest finite number
    if TOP_K:
        high = top
        while low < high:
            middle = _middle(low, high)
            enough = _counted(values, counts, row, most, middle, CHUNKS, COLUMNS, CHUNK, WIDTH) >= TOP_K
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
    if NUCLEUS:
        if TOP_K:
            total = tl.sum(_weighed(values, counts, row, most, low, highest, per_unit, CHUNKS, COLUMNS, CHUNK, WIDTH), axis=0)
        goal = top_p * total
        high = top
        while low < high:
            middle = _middle(low, high)
            above = _weighed(values, counts, row, most, middle, highest, per_unit, CHUNKS, COLUMNS, CHUNK, WIDTH)
            enough = tl.sum(above, axis=0) >= goal
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
    sums = _weighed(values, counts, row, most, low, highest, per_unit, CHUNKS, COLUMNS, CHUNK, WIDTH)
    column = tl.arange(0, COLUMNS)
    target = uniform * tl.sum(sums, axis=0)
    found = tl.min(tl.where((tl.cumsum(sums, axis=0) > target) & (sums > 0), column, NONE), axis=0)
    chunk = tl.minimum(found, tl.max(tl.where(sums > 0, column, 0), axis=0))
    running = tl.sum(tl.where(column < chunk, sums, 0.0), axis=0)
    count = tl.load(counts + row * CHUNKS + chunk)
    within = tl.arange(0, COLUMNS * WIDTH)
    chosen = tl.full((COLUMNS * WIDTH,), NONE, dtype=tl.int32)
    last = tl.zeros((COLUMNS * WIDTH,), dtype=tl.int32)
    for first in range(0, count, COLUMNS * WIDTH):
        inside = first + within < count
        at = (row * CHUNKS + chunk) * CHUNK + first + within
        x = tl.load(values + at, mask=inside, other=LOWEST)
        place = tl.load(places + at, mask=inside, other=0)
        weight = tl.where((order_of(x) >= low) & inside, weight_of(x, highest, per_unit), 0.0)
        beyond = running + tl.cumsum(weight, axis=0) > target
        chosen = tl.minimum(chosen, tl.where(beyond & (weight > 0), place, NONE))
        last = tl.maximum(last, tl.where(weight > 0, place, 0))
        running += tl.sum(weight, axis=0)
    return tl.minimum(tl.min(chosen, axis=0), tl.max(last, axis=0))


@triton.jit
def choose(
    values, places, counts, chunk_max, chunk_sum, per_unit, top_p, draw, token,
    TOP_K: tl.constexpr, NUCLEUS: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program per row: thresholds by bisection, then the token. Candidates stay in registers if no chunk has more than WIDTH."""
    row = tl.program_id(0).to(tl.int64)
    largest = load_stats(chunk_max, row, CHUNKS, COLUMNS, LOWEST)
    highest = tl.max(largest, axis=0)
    total = tl.sum(load_stats(chunk_sum, row, CHUNKS, COLUMNS, 0.0) * weight_of(largest, highest, per_unit), axis=0)
    most = tl.max(load_stats(counts, row, CHUNKS, COLUMNS, 0), axis=0)
    uniform = tl.load(draw + row)
    if most <= WIDTH:
        x, at, valid = _window(values, counts, row, 0, CHUNKS, COLUMNS, CHUNK, WIDTH)
        weight = _kept_in_registers(x, valid, highest, total, per_unit, top_p, TOP_K, NUCLEUS)
        place = tl.load(places + at, mask=valid, other=0)
        sums = tl.sum(weight, axis=1)
        before = tl.cumsum(sums, axis=0) - sums
        running = before[:, None] + tl.cumsum(weight, axis=1)
        target = uniform * tl.sum(sums, axis=0)
        found = tl.min(tl.min(tl.where((running > target) & (weight > 0), place, NONE), axis=1), axis=0)
        last = tl.max(tl.max(tl.where(weight > 0, place, 0), axis=1), axis=0)
        tl.store(token + row, tl.minimum(found, last))
    else:
        chosen = _choose_from_memory(
            values, places, counts, row, most, highest, total, per_unit, top_p, uniform, TOP_K, NUCLEUS, CHUNKS, COLUMNS, CHUNK, WIDTH
        )  # fmt: skip
        tl.store(token + row, chosen)
