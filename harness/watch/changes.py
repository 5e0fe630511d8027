"""Change points: a historian for the report, not a gate. It looks at a whole series afterwards and says where its level changed.

Levels are fitted to the logarithms by least squares, with a price for each further level (optimal partitioning). The `ruptures` package
does that too; what a series of nights needs besides (noise from the series itself, spikes, gaps, an interval for each change) would have to
be written around it, and is most of the work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from klab.harness.watch import levels as lv
from klab.kernels.contract import Record

Floats = NDArray[np.float64]

# A level lasts for so many nights at least: what is shorter is a spike.
SHORTEST = 4
# What a level must save, in variances of one night: 2 ln(n) for the place it may be at, and so much for chance. Found by simulation: of 200
# quiet series of 60 nights, 2% or fewer are given a change.
CHANCE = 10.0
# Values further from the median of their neighbours than so many deviations are cut off there.
SPIKE = 3.0
NEIGHBOURS = 7
# Noise is at least this share of a value: a clock's last digit is no change of level.
LEAST_NOISE = 1e-4
# A change below half a percent is nothing to write history about.
LEAST_CHANGE = 0.005
# Of a normal variable, within which 95% lie.
NORMAL_95 = 1.96
# More values than this are judged by the last of them: the work grows with the square.
MOST_VALUES = 1000


@dataclass(frozen=True)
class Change(Record):
    """The level changed before the value at `index`: from `before` to `after` (in the unit of the values), `ratio` = after / before.

    `low` and `high` are its 95% interval.
    """

    index: int
    before: float
    after: float
    ratio: float
    low: float
    high: float


def change_points(values: Sequence[float], *, least: float = LEAST_CHANGE) -> list[Change]:
    """Where the level of a series changed, oldest first; nothing below `least` (a share). Values that are no times count as gaps."""
    array = np.array([v if v is not None and math.isfinite(v) and v > 0 else np.nan for v in values], dtype=np.float64)
    places = np.flatnonzero(np.isfinite(array))[-MOST_VALUES:]
    if len(places) < 2 * SHORTEST:
        return []
    logs = np.log(array[places])
    sigma = max(float(lv.own_noise(logs[None, :])[0][0]), LEAST_NOISE)
    smooth = _without_spikes(logs, sigma)
    starts = _partition(smooth, (2.0 * math.log(len(smooth)) + CHANCE) * sigma**2)
    starts = _worth_telling(smooth, starts, least)
    edges = [0, *starts, len(smooth)]
    found = []
    for n, start in enumerate(starts):
        old, new = smooth[edges[n] : start], smooth[start : edges[n + 2]]
        step = float(new.mean() - old.mean())
        reach = NORMAL_95 * sigma * math.sqrt(1.0 / len(old) + 1.0 / len(new))
        before, after = math.exp(old.mean()), math.exp(new.mean())
        found.append(Change(int(places[start]), before, after, math.exp(step), math.exp(step - reach), math.exp(step + reach)))
    return found


def _without_spikes(logs: Floats, sigma: float) -> Floats:
    """Each value at most `SPIKE` deviations from the median of its neighbours."""
    half = NEIGHBOURS // 2
    wide = np.pad(logs, half, mode="reflect")
    middle = np.median(np.lib.stride_tricks.sliding_window_view(wide, NEIGHBOURS), axis=1)
    return np.clip(logs, middle - SPIKE * sigma, middle + SPIKE * sigma)


def _partition(values: Floats, price: float) -> list[int]:
    """The starts of all levels but the first: least squares within levels, and `price` for each level."""
    count = len(values)
    sums = np.concatenate([[0.0], np.cumsum(values - values.mean())])
    squares = np.concatenate([[0.0], np.cumsum((values - values.mean()) ** 2)])
    best = np.full(count + 1, np.inf)
    best[0] = -price
    cut = np.zeros(count + 1, dtype=np.int64)
    for end in range(SHORTEST, count + 1):
        begin = np.arange(0, end - SHORTEST + 1)
        inside = squares[end] - squares[begin] - (sums[end] - sums[begin]) ** 2 / (end - begin)
        total = best[begin] + inside + price
        cut[end] = begin[int(np.argmin(total))]
        best[end] = total[cut[end]]
    starts = []
    end = count
    while end > 0:
        end = int(cut[end])
        starts.append(end)
    return [start for start in reversed(starts) if start > 0]


def _worth_telling(values: Floats, starts: list[int], least: float) -> list[int]:
    """Levels joined, the nearest first, until all neighbours differ by at least `least`."""
    starts = list(starts)
    while starts:
        edges = [0, *starts, len(values)]
        means = [float(values[a:b].mean()) for a, b in pairwise(edges)]
        steps = [abs(b - a) for a, b in pairwise(means)]
        smallest = int(np.argmin(steps))
        if steps[smallest] >= math.log1p(least):
            break
        del starts[smallest]
    return starts
