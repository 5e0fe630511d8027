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

    All trees grow at once, level by level: an entry is one configuration in one tree, and a node a number that its entries share.
    """
    count, width = codes.shape
    trees = RESAMPLES * TREES
    drawn = rng.multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES)
    weight = np.repeat(drawn, TREES, axis=0).astype(np.float64).ravel()
    # Values without an order are put in another one by each tree, so that a cut can part them in any way.
    ranks = [_ranks(int(codes[:, n].max()) + 1, trees, ordered[n], rng)[:, codes[:, n]].ravel() for n in range(width)]
    target, tree = np.tile(y, trees), np.repeat(np.arange(trees), count)
    sample = tree // TREES
    node, entries = tree.copy(), np.arange(trees * count)
    left_out = weight == 0
    credit = np.zeros((RESAMPLES, width))
    for _ in range(DEPTH):
        w, t = weight[entries], target[entries]
        nodes = int(node.max()) + 1 if len(node) else 0
        n, s = np.bincount(node, w, nodes), np.bincount(node, w * t, nodes)
        cut, best_gain = np.zeros(nodes), np.full(nodes, 1e-12)
        feature = np.full(nodes, -1)
        for k in range(width):
            rank = ranks[k][entries]
            at = _cuts(rank, node, w, nodes, rng)
            right = rank > at[node]
            w_right = w * right
            n_r, s_r = np.bincount(node, w_right, nodes), np.bincount(node, w_right * t, nodes)
            n_l, s_l = n - n_r, s - s_r
            with np.errstate(divide="ignore", invalid="ignore"):
                gain = np.where((n_l > 0) & (n_r > 0), s_l**2 / n_l + s_r**2 / n_r - s**2 / n, 0.0)
            better = gain > best_gain * (1 + 1e-9)
            best_gain, cut, feature = np.where(better, gain, best_gain), np.where(better, at, cut), np.where(better, k, feature)
        feature[n < SPLIT_FROM] = -1
        alive = feature[node] >= 0
        if not alive.any():
            break
        entries, node, w, t = entries[alive], node[alive], w[alive], t[alive]
        chosen = feature[node]
        right = np.zeros(len(entries), dtype=bool)
        for k in range(width):
            mine = chosen == k
            right[mine] = ranks[k][entries[mine]] > cut[node[mine]]
        child = 2 * node + right
        mean = _means(child, w, t, 2 * nodes)
        step = mean[child] - _means(node, w, t, nodes)[node]
        out = left_out[entries]
        place = sample[entries[out]] * width + chosen[out]
        credit += np.bincount(place, step[out] * t[out], RESAMPLES * width).reshape(RESAMPLES, width)
        _, node = np.unique(child, return_inverse=True)
    spread = np.bincount(sample[left_out], target[left_out] ** 2, RESAMPLES)
    return credit / np.maximum(spread, 1e-300)[:, None]


def _ranks(levels: int, trees: int, ordered: bool, rng: np.random.Generator) -> Floats:
    """(trees, levels): the place of each value, a random one per tree where values have no order."""
    order = np.tile(np.arange(levels, dtype=np.float64), (trees, 1))
    return order if ordered else rng.permuted(order, axis=1)


def _cuts(rank: Floats, node: Whole, weight: Floats, nodes: int, rng: np.random.Generator) -> Floats:
    """(nodes,): for each a random place between the least and the greatest rank that was drawn into it."""
    drawn = weight > 0
    low, high = np.full(nodes, np.inf), np.full(nodes, -np.inf)
    np.minimum.at(low, node[drawn], rank[drawn])
    np.maximum.at(high, node[drawn], rank[drawn])
    wide = np.where(high > low, high - low, 0.0)
    return np.where(wide > 0, np.floor(low + rng.random(nodes) * wide), 0.0)


def _means(node: Whole, weight: Floats, values: Floats, nodes: int) -> Floats:
    n = np.bincount(node, weight, nodes)
    return np.bincount(node, weight * values, nodes) / np.maximum(n, 1.0)
