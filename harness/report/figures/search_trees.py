"""How much of the variance of a quantity each parameter explains, interactions included: an ensemble of regression trees in numpy.

Extremely randomised trees (Geurts 2006) are grown on bootstrap samples. The credit of a parameter is the decrease of variance at the
splits on it, measured on the configurations that the tree was not grown from (Li 2019: the debiased mean decrease of impurity): without
that, noise credits parameters of many values. An interaction's credit is divided among its parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Whole = NDArray[np.intp]
Ranks = NDArray[np.int32]

# Bootstrap samples, and trees grown from each.
RESAMPLES, TREES = 30, 3
DEPTH = 10
# Configurations that trees are grown from, unless told; of more, a random part.
MOST = 1000
# A node of fewer configurations is not split.
SPLIT_FROM = 4


@dataclass(frozen=True)
class Shares:
    """Per parameter its share of the variance with the 95% interval over the bootstrap samples. `alone`: what its value alone explains.

    unexplained: what the trees could not foretell of configurations that they had not seen, with its interval. configurations: how many
    the shares rest on.
    """

    share: Floats
    low: Floats
    high: Floats
    alone: Floats
    unexplained: tuple[float, float, float]
    configurations: int


def shares(codes: Whole, values: Floats, ordered: Sequence[bool], *, most: int = MOST, seed: int = 0) -> Shares | None:
    """codes: (configurations, parameters), positions of values; values: (configurations,), finite. ordered: whether neighbouring positions
    are near, per parameter. None where nothing varies or there are fewer than eight configurations. The same input gives the same output.
    """
    if len(values) < 8 or codes.shape[1] == 0 or not np.ptp(values) > 0:
        return None
    rng = np.random.default_rng(seed)
    alone = np.array([one_way(codes[:, n], values) for n in range(codes.shape[1])])
    if len(values) > most:
        kept = np.sort(rng.permutation(len(values))[:most])
        codes, values = codes[kept], values[kept]
    if not np.ptp(values) > 0:
        return None
    found = _credits(codes, values - values.mean(), ordered, rng)
    low, high = np.percentile(found, (2.5, 97.5), axis=0)
    rest = 1.0 - found.sum(axis=1)
    ends = np.percentile(rest, (2.5, 97.5))
    return Shares(found.mean(axis=0), low, high, alone, (float(rest.mean()), float(ends[0]), float(ends[1])), len(values))


def one_way(codes: Whole, values: Floats) -> float:
    """The share of the variance that a parameter's value alone explains: epsilon squared of a one-way analysis, which is near 0 for a
    parameter without any effect however many values it has. 0 where it cannot be told.
    """
    counts = np.bincount(codes)
    groups, total = int((counts > 0).sum()), float(((values - values.mean()) ** 2).sum())
    if groups < 2 or groups >= len(values) or not total > 0:
        return 0.0
    means = np.bincount(codes, values) / np.maximum(counts, 1)
    within = float(((values - means[codes]) ** 2).sum())
    between, freedom = total - within, len(values) - groups
    return max(0.0, (between - (groups - 1) * within / freedom) / total)


def _credits(codes: Whole, y: Floats, ordered: Sequence[bool], rng: np.random.Generator) -> Floats:
    """(RESAMPLES, parameters): the credit of each parameter on what each sample left out, as a share of the variance there.

    All trees grow at once, level by level: an entry is one configuration in one tree, and a node a number that its entries share. Those
    that a tree is grown from are kept in the order of their nodes; those it has not seen only follow the splits.
    """
    count, width = codes.shape
    trees = RESAMPLES * TREES
    drawn = np.repeat(rng.multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES), TREES, axis=0).astype(np.float64).ravel()
    # Values without an order are put in another one by each tree, so that a cut can part them in any way.
    ranks = [_ranks(int(codes[:, n].max()) + 1, trees, ordered[n], rng)[:, codes[:, n]].ravel() for n in range(width)]
    target, tree = np.tile(y, trees), np.repeat(np.arange(trees), count)
    seen, unseen = np.flatnonzero(drawn > 0), np.flatnonzero(drawn == 0)
    spread = np.bincount(tree[unseen] // TREES, target[unseen] ** 2, RESAMPLES)
    node, node_unseen = tree[seen], tree[unseen]
    credit = np.zeros((RESAMPLES, width))
    for _ in range(DEPTH):
        if not len(seen):
            break
        w = drawn[seen]
        wt = w * target[seen]
        starts = np.flatnonzero(np.diff(node, prepend=-1))
        nodes = len(starts)
        n, s = np.add.reduceat(w, starts), np.add.reduceat(wt, starts)
        cut, best_gain, feature = np.zeros(nodes), np.full(nodes, 1e-12), np.full(nodes, -1)
        for k in range(width):
            rank = ranks[k][seen]
            low, high = np.minimum.reduceat(rank, starts), np.maximum.reduceat(rank, starts)
            at = np.floor(low + rng.random(nodes) * (high - low))
            right = rank > at[node]
            n_r, s_r = np.add.reduceat(w * right, starts), np.add.reduceat(wt * right, starts)
            n_l, s_l = n - n_r, s - s_r
            with np.errstate(divide="ignore", invalid="ignore"):
                gain = np.where((n_l > 0) & (n_r > 0), s_l**2 / n_l + s_r**2 / n_r - s**2 / n, 0.0)
            better = gain > best_gain * (1 + 1e-9)
            best_gain, cut, feature = np.where(better, gain, best_gain), np.where(better, at, cut), np.where(better, k, feature)
        seen, child = _fallen(ranks, seen, node, feature, cut)
        unseen, child_unseen = _fallen(ranks, unseen, node_unseen, feature, cut)
        w = drawn[seen]
        n_child = np.bincount(child, w, 2 * nodes)
        mean = np.bincount(child, w * target[seen], 2 * nodes) / np.maximum(n_child, 1.0)
        parent = child_unseen // 2
        place = tree[unseen] // TREES * width + feature[parent]
        step = (mean[child_unseen] - (s / n)[parent]) * target[unseen]
        credit += np.bincount(place, step, RESAMPLES * width).reshape(RESAMPLES, width)
        grows = n_child >= SPLIT_FROM
        number = np.cumsum(grows) - 1
        kept, kept_unseen = grows[child], grows[child_unseen]
        order = np.argsort(child[kept], kind="stable")
        seen, node = seen[kept][order], number[child[kept][order]]
        unseen, node_unseen = unseen[kept_unseen], number[child_unseen[kept_unseen]]
    return credit / np.maximum(spread, 1e-300)[:, None]


def _fallen(ranks: Sequence[Ranks], entries: Whole, node: Whole, feature: Whole, cut: Floats) -> tuple[Whole, Whole]:
    """(the entries whose node is split, in their order; the number of the side each is on: twice its node, and one more to the right)."""
    alive = feature[node] >= 0
    entries, node = entries[alive], node[alive]
    chosen, side = feature[node], np.zeros(len(entries), dtype=np.intp)
    for k, rank in enumerate(ranks):
        mine = np.flatnonzero(chosen == k)
        side[mine] = rank[entries[mine]] > cut[node[mine]]
    return entries, 2 * node + side


def _ranks(levels: int, trees: int, ordered: bool, rng: np.random.Generator) -> Ranks:
    """(trees, levels): the place of each value, a random one per tree where values have no order."""
    order = np.tile(np.arange(levels, dtype=np.int32), (trees, 1))
    return order if ordered else rng.permuted(order, axis=1)
