"""Medians, intervals and when to stop. The same samples always give the same interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

# NVML clock-event reasons. HwSlowdown, HwThermalSlowdown and HwPowerBrakeSlowdown: the hardware halves clocks, the round does not count.
HARDWARE_THROTTLE = 0x8 | 0x40 | 0x80
# The software power cap is the normal state of a large matmul on a 700 W board: such rounds are kept, and labelled by their mask.
POWER_CAP = 0x4

CONFIDENCE = 0.95
RESAMPLES = 2000
# The smallest number of rounds from which an interval is given. The range of 5 draws covers the median with 1 - 2/2^5 = 93.8%.
FLOOR_ROUNDS = 5
# A run in which so large a share of the rounds was marked says nothing about the kernel.
THROTTLED_SHARE = 0.9
# The rule is looked at every so many rounds: who looks after each one stops more often by luck.
LOOK_EVERY = 5


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and the 95% interval of the median, in the unit of the samples."""

    median: float
    q1: float
    q3: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """(high - low) / median."""
        return (self.high - self.low) / self.median if self.median else float("inf")


def spread(samples: Sequence[float]) -> Spread:
    """Describe at least one sample. ValueError when there is none."""
    if not len(samples):
        raise ValueError("no samples")
    values = np.asarray(samples, dtype=np.float64)
    q1, median, q3 = (float(x) for x in np.percentile(values, (25, 50, 75)))
    low, high = median_interval(values)
    return Spread(median, q1, q3, low, high)


def median_interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """95% interval of the median, whatever the distribution: between two order statistics, interpolated (Hettmansperger, Sheather 1986).

    The range for fewer than six values; of five it covers the median with 93.8%. NaN where a value is. ValueError when there is none.
    """
    if not len(values):
        raise ValueError("no values")
    ranked = np.sort(np.asarray(values, dtype=np.float64))
    if np.isnan(ranked[-1]):  # sorted to the end
        return math.nan, math.nan
    below, share = _ranks(len(ranked))
    outer, inner = ranked[[below, -1 - below]], ranked[[below + 1, -2 - below]] if share else 0.0
    low, high = (1.0 - share) * outer + share * inner
    return float(low), float(high)


@lru_cache(maxsize=1024)
def _ranks(count: int) -> tuple[int, float]:
    """How many of `count` values lie outside at either end, and by which share of the way to the next value the interval reaches inward."""
    error, whole = 1.0 - CONFIDENCE, math.lgamma(count + 1) - count * math.log(2.0)
    # Sixteen deviations below the middle nothing is lost: counts of thousands need not begin at the end.
    first = max(0, int(count / 2 - 8.0 * math.sqrt(count)))
    fine = coarse = 0.0
    for rank in range(first, count):
        # With which probability the median lies beyond the value that has `rank` smaller ones, at either end.
        fine, coarse = coarse, coarse + 2.0 * math.exp(whole - math.lgamma(rank + 1) - math.lgamma(count - rank + 1))
        if coarse > error:
            break
    if rank == 0:
        return 0, 0.0
    part = (error - fine) / (coarse - fine)
    return rank - 1, (count - rank) * part / (rank + (count - 2 * rank) * part)


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of a[i] / b[i], for samples of two kernels taken in the same rounds.

    Pairing cancels what both felt (temperature, clocks, a busy neighbour). The longer list is cut to the shorter; ValueError if empty.
    """
    pairs = min(len(a), len(b))
    if not pairs:
        raise ValueError("no pairs")
    ratios = np.asarray(a[:pairs], dtype=np.float64) / np.asarray(b[:pairs], dtype=np.float64)
    low, high = median_interval(ratios)
    return float(np.median(ratios)), low, high


def block_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, block: int = 5, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """(value, low, high) of sum(numerators) / sum(denominators), resampling blocks of neighbours.

    For energy per launch: the edges of the counter are known to within one poll, so what one interval gains its neighbour loses.
    Blocks keep that pair together. ValueError with fewer than two blocks.
    """
    blocks = len(numerators) // block
    if blocks < 2:
        raise ValueError(f"{len(numerators)} intervals make fewer than two blocks of {block}")
    top = np.add.reduceat(np.asarray(numerators, dtype=np.float64), np.arange(blocks) * block)
    bottom = np.add.reduceat(np.asarray(denominators, dtype=np.float64), np.arange(blocks) * block)
    picks = np.random.default_rng(seed).integers(0, blocks, size=(resamples, blocks))
    low, high = _tails(top[picks].sum(axis=1) / bottom[picks].sum(axis=1))
    return float(top.sum() / bottom.sum()), low, high


def mean_interval(values: Sequence[float], *, alpha: float) -> tuple[float, float, float]:
    """(mean, low, high) by Student's t: either end errs with probability `alpha`. Infinite ends for fewer than three values.

    For few independent replicates, where a percentile bootstrap is too narrow (of 5 normal values its 95% interval covers 83%).
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 3:
        return mean, -math.inf, math.inf
    reach = _student(count - 1, alpha) * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean, mean - reach, mean + reach


@cache
def _student(freedom: int, alpha: float) -> float:
    """What Student's t exceeds with probability `alpha`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1.0 - alpha))


def _tails(values: NDArray[np.float64]) -> tuple[float, float]:
    tail = 50.0 * (1.0 - CONFIDENCE)
    low, high = np.percentile(values, (tail, 100.0 - tail))
    return float(low), float(high)


def is_marked(reasons: int | None) -> bool:
    """True when the hardware slowed itself down for heat or for its power supply."""
    return bool(reasons is not None and reasons & HARDWARE_THROTTLE)


def counting(samples: Sequence[float], marked: Sequence[int]) -> list[float]:
    """The samples of the rounds that count."""
    return [value for value, mark in zip(samples, marked, strict=True) if not mark]


def throttled(marked: Sequence[int]) -> bool:
    """True when the hardware throttled in so many rounds that the rest is not to be trusted."""
    return bool(marked) and (len(marked) - sum(marked) < FLOOR_ROUNDS or sum(marked) >= THROTTLED_SHARE * len(marked)) and sum(marked) > 0


@dataclass(frozen=True)
class StoppingRule:
    """When a trial has enough rounds: its interval is narrow, or its rounds or its time are used up.

    `target_ci` bounds the whole width of the interval relative to the median.
    """

    target_ci: float
    min_rounds: int
    max_rounds: int
    limit_s: float

    def enough(self, samples: Sequence[float], marked: Sequence[int], spent_s: float) -> str:
        """Why to stop ("interval", "rounds", "time"), or "" to go on."""
        rounds = len(samples)
        if rounds >= self.max_rounds:
            return "rounds"
        if spent_s >= self.limit_s and rounds >= FLOOR_ROUNDS:
            return "time"
        kept = counting(samples, marked)
        if len(kept) < max(self.min_rounds, FLOOR_ROUNDS) or (rounds - self.min_rounds) % LOOK_EVERY:
            return ""
        low, high = median_interval(kept)
        return "interval" if high - low <= self.target_ci * float(np.median(kept)) else ""
