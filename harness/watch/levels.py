"""The level that a series has held, the noise of its nights, and how far its last nights are from that level. Arrays, no verdicts.

All values are natural logarithms; a matrix has one row per series and one column per night, right-aligned, NaN where there was no night.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

# Of a normal variable: standard deviation over median absolute deviation.
MAD_TO_SD = 1.4826
# Differences are cut off at so many deviations, and what that takes from a normal variable's spread.
CLIP, CLIP_TO_SD = 2.0, 1.0425
# Nights that are so far apart have nothing in common.
FAR, LONGEST_SPAN = 8, 10
# Variance of the median of many values, over that of their mean.
MEDIAN_VARIANCE = np.pi / 2
# Windows whose median is within so many of its deviations of the best one belong to the same level.
SAME_LEVEL = 2.5
# A clearly better level is one from the night on that so many of the last short window's nights are beyond the limit.
SHORT, SHORT_OF = 5, 4
# Nights by which the room of a young series grows: found with the simulator (docs/night.md), so that its first weeks alarm no more often.
YOUNG = 2.0
# A series' noise is at least this share of what its own nights say. Its standard error after 30 nights is 15%.
OWN = 0.85
# Below so many series of like duration their median noise says little.
LEAST_PEERS = 5


@dataclass(frozen=True)
class Levels:
    """Per series: the reference level (log), its standard error, and the nights that it rests on; NaN and 0 where there are too few."""

    reference: Floats
    error: Floats
    nights: Counts


def align(rows: Sequence[Sequence[float]]) -> Floats:
    """Rows of unequal length as one right-aligned matrix."""
    width = max((len(row) for row in rows), default=0)
    matrix = np.full((len(rows), max(width, 1)), np.nan)
    for index, row in enumerate(rows):
        if len(row):
            matrix[index, -len(row) :] = row
    return matrix


def own_noise(matrix: Floats) -> tuple[Floats, Counts]:
    """Per series: the standard deviation from night to night, and the differences it rests on (NaN and 0 with fewer than 3).

    From the differences of nights that follow one another, which steps and drifts hardly touch; those beyond 2 deviations (spikes) are cut
    off. Where nights in a row are alike in most series, all are raised by what nights that are far apart differ by more.
    """
    counts = np.isfinite(matrix[:, 1:] - matrix[:, :-1]).sum(axis=1)
    sigma = _lagged(matrix, 1)
    if len(matrix) >= LEAST_PEERS and matrix.shape[1] > 2 * FAR:
        shares = (_lagged(matrix, FAR) / np.where(sigma > 0, sigma, np.nan)) ** 2
        shares = shares[np.isfinite(shares)]
        if len(shares) >= LEAST_PEERS:
            sigma = sigma * np.sqrt(max(1.0, float(np.median(shares))))
    return np.where(counts >= 3, sigma, np.nan), counts


def _lagged(matrix: Floats, lag: int) -> Floats:
    if matrix.shape[1] <= lag:
        return np.full(len(matrix), np.nan)
    apart = np.abs(matrix[:, lag:] - matrix[:, :-lag])
    # As a scale the median wastes two thirds of the nights, so it only says where to cut: the root mean square of the rest wastes a fifth.
    rough: Floats = nan_median(apart) * MAD_TO_SD
    clipped = np.minimum(apart, (CLIP * rough)[:, None])
    number = np.isfinite(apart).sum(axis=1)
    mean: Floats = np.nan_to_num(clipped**2).sum(axis=1) / np.maximum(number, 1)
    return np.where(number > 0, np.sqrt(mean / 2.0) * CLIP_TO_SD, np.nan)


def shrunk_noise(own: Floats, counts: Counts, groups: Sequence[object], peers: int) -> tuple[Floats, Counts]:
    """Noise from a series' own nights and from its peers, which count as `peers` nights; and the nights it rests on.

    A series that is noisier than its peers keeps most of that, however many they are.

    `groups` says who is whose peer. NaN where neither the series nor enough peers have a noise.
    """
    sigma, nights = own.copy(), counts.copy()
    labels = np.array([str(g) for g in groups])
    for group in np.unique(labels):
        here = labels == group
        known = here & np.isfinite(own)
        if known.sum() < LEAST_PEERS:
            continue
        peer = float(np.median(own[known]))
        weight = np.where(np.isfinite(own), counts, 0)
        mixed = np.sqrt((weight * np.nan_to_num(own) ** 2 + peers * peer**2) / np.maximum(weight + peers, 1))
        sigma[here] = np.fmax(mixed, OWN * own)[here]
        nights[here] += peers
    return sigma, nights


def common_share(part: Floats, whole: Floats, groups: Sequence[object], most: float) -> Floats:
    """The median over a group of part / whole, at most `most`, for each of its members; 0 in groups of too few."""
    share = np.zeros(len(part))
    labels = np.array([str(g) for g in groups])
    ratio = np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), np.nan)
    for group in np.unique(labels):
        here = (labels == group) & np.isfinite(ratio)
        if here.sum() >= LEAST_PEERS:
            share[labels == group] = min(most, float(np.median(ratio[here])))
    return share


def levels(matrix: Floats, sigma: Floats, limit: Floats, window: int, least: Counts, slow: float = 0.0) -> Levels:
    """The best level that each series has held for `window` nights; of all its nights while there are fewer, but at least `least`.

    Overlapping windows slide over the nights. The lowest median of a window would be low by chance too, so the reference is the mean of all
    windows that cannot be told from the lowest. A level that is better by more than `limit` needs 4 of 5 nights alone. `slow`: the share of
    a night's variance that a window does not average out (`slow_share`).
    """
    counts = np.isfinite(matrix).sum(axis=1)
    enough = (counts >= least) & (counts > 0)
    reference = np.where(enough, nan_median(matrix), np.nan)
    nights = np.where(enough, counts, 0)
    error = np.sqrt(MEDIAN_VARIANCE / np.maximum(counts, 1)) * sigma
    if matrix.shape[1] > window:
        medians = np.median(sliding_window_view(matrix, window, axis=1), axis=2)
        lowest = _nan_min(medians)
        scatter = np.sqrt(MEDIAN_VARIANCE / window + slow) * sigma
        same = medians <= (lowest + SAME_LEVEL * np.nan_to_num(scatter))[:, None]
        number = same.sum(axis=1)
        whole = number > 0
        mean = np.where(same, np.nan_to_num(medians), 0.0).sum(axis=1) / np.maximum(number, 1)
        reference = np.where(whole, mean, reference)
        nights = np.where(whole, number + window - 1, nights)
        error = np.where(whole, np.sqrt(MEDIAN_VARIANCE / np.maximum(nights, 1)) * sigma, error)
    return _better(matrix, Levels(reference, error, nights), sigma, limit)


def _better(matrix: Floats, found: Levels, sigma: Floats, limit: Floats) -> Levels:
    if matrix.shape[1] <= SHORT:
        return found
    windows = np.sort(sliding_window_view(matrix, SHORT, axis=1), axis=2)
    middle = windows[:, :, SHORT // 2]
    held = windows[:, :, SHORT_OF - 1] < (found.reference - limit)[:, None]
    held &= np.isfinite(windows[:, :, -1])
    best = np.where(held, middle, np.inf).min(axis=1)
    better = np.isfinite(best)
    return Levels(
        np.where(better, best, found.reference),
        np.where(better, np.sqrt(median_variance(SHORT)) * sigma, found.error),
        np.where(better, SHORT, found.nights),
    )


def room(known: Counts) -> Floats:
    """By how much to widen what is measured in deviations, where these are known from so many nights.

    As with Student's t, whose tails at 4 deviations need a third more at 10 degrees of freedom.
    """
    return 1.0 + YOUNG / np.maximum(known, 1)


def came_and_went(shares: Floats, sure: NDArray[np.bool_]) -> tuple[Counts, Counts]:
    """Rows and columns of the nights beyond the limit with neighbours that were not half as far.

    shares: how far each night was above the reference, over the limit; the last column is tonight. sure: of which earlier nights all looks
    agreed.
    """
    here, beside = shares[:, 1:-1], np.fmax(shares[:, :-2], shares[:, 2:])
    rows, columns = np.nonzero(sure[:, 1:] & (here > 1.0) & (beside < here / 2))
    return rows, columns + 1


def slow_share(matrix: Floats, own: Floats, nights: int) -> float:
    """The share of the variance of one night that does not average out over so many: what is alike on nights in a row, by all series.

    From the distance of medians of so many nights that are as far apart again; of fewer nights where there are not enough (they share
    more). 0 where too few series have nights at all.
    """
    if nights == 1 or len(matrix) < LEAST_PEERS:
        return 0.0
    nights = min(nights, LONGEST_SPAN, (matrix.shape[1] - 1) // 3)
    while nights > 1:
        medians = np.median(sliding_window_view(matrix, nights, axis=1), axis=2)
        shares = (_lagged(medians, 2 * nights) / np.where(own > 0, own, np.nan)) ** 2
        shares = shares[np.isfinite(shares)]
        if len(shares) >= LEAST_PEERS:
            return max(0.0, float(np.median(shares)) - median_variance(nights))
        nights //= 2
    return 0.0


@cache
def median_variance(count: int) -> float:
    """Variance of the median of `count` normal values, over that of one."""
    # By numerical integration of the middle order statistic; beyond 25 the limit is good to 1%.
    if count == 1:
        return 1.0
    if count > 25:
        return float(MEDIAN_VARIANCE / count)
    draws = np.random.default_rng(count).normal(size=(20_000, count))
    return float(np.median(draws, axis=1).var())


def nan_median(matrix: Floats) -> Floats:
    """Median of each row's numbers; NaN for a row without any (numpy's own warns, and is slow)."""
    ordered = np.sort(matrix, axis=1)
    counts = np.isfinite(matrix).sum(axis=1)
    rows = np.arange(len(matrix))
    low, high = np.maximum((counts - 1) // 2, 0), np.minimum(counts // 2, matrix.shape[1] - 1)
    middle: Floats = (ordered[rows, low] + ordered[rows, high]) / 2
    return np.where(counts > 0, middle, np.nan)


def _nan_min(matrix: Floats) -> Floats:
    lowest = np.where(np.isfinite(matrix), matrix, np.inf).min(axis=1)
    return np.where(np.isfinite(lowest), lowest, np.nan)
