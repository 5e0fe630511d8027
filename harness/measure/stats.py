"""Medians, intervals and when to stop. Everything is seeded, so the same samples always give the same interval."""

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
# The rule is looked at every so many rounds: a bootstrap of 8 candidates costs 10 ms, in which a GPU would idle.
LOOK_EVERY = 5
# Up to so many values (they are counted in a byte) medians of resamples are found by counting.
MOST_COUNTED = 255


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and the bootstrap interval of the median, in the unit of the samples."""

    median: float
    q1: float
    q3: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """(high - low) / median."""
        return (self.high - self.low) / self.median if self.median else float("inf")


def spread(samples: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Spread:
    """Describe at least one sample. ValueError when there is none."""
    if not len(samples):
        raise ValueError("no samples")
    values = np.asarray(samples, dtype=np.float64)
    q1, median, q3 = (float(x) for x in np.percentile(values, (25, 50, 75)))
    low, high = median_interval(values, seed=seed, resamples=resamples)
    return Spread(median, q1, q3, low, high)


def median_interval(values: Sequence[float] | NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95% percentile-bootstrap interval of the median."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) > MOST_COUNTED or np.isnan(array).any():
        return _tails(np.median(array[_picks(len(array), seed, resamples)], axis=1))
    # The medians of the same resamples from how often each holds a value: the same to the last bit, in a quarter of the time.
    order = np.argsort(array)
    held = _held(len(array), seed, resamples)[order].cumsum(axis=0, dtype=np.uint8)
    ranked = array[order]
    low, high = (ranked[(held <= below).sum(axis=0)] for below in ((len(array) - 1) // 2, len(array) // 2))
    return _tails((low + high) / 2 if len(array) % 2 == 0 else high)


def _picks(count: int, seed: int, resamples: int) -> NDArray[np.int64]:
    """(resamples, count): which values each resample holds."""
    return np.random.default_rng(seed).integers(0, count, size=(resamples, count))


@lru_cache(maxsize=16)
def _held(count: int, seed: int, resamples: int) -> NDArray[np.uint8]:
    """(count, resamples): how often a resample holds each value."""
    held = np.zeros((count, resamples), dtype=np.uint8)
    np.add.at(held, (_picks(count, seed, resamples), np.arange(resamples)[:, None]), 1)
    return held


def paired_ratio(a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """(median, low, high) of a[i] / b[i], for samples of two kernels taken in the same rounds.

    Pairing cancels what both felt (temperature, clocks, a busy neighbour). The longer list is cut to the shorter; ValueError if empty.
    """
    pairs = min(len(a), len(b))
    if not pairs:
        raise ValueError("no pairs")
    ratios = np.asarray(a[:pairs], dtype=np.float64) / np.asarray(b[:pairs], dtype=np.float64)
    low, high = median_interval(ratios, seed=seed, resamples=resamples)
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

    def enough(self, samples: Sequence[float], marked: Sequence[int], spent_s: float, *, seed: int = 0) -> str:
        """Why to stop ("interval", "rounds", "time"), or "" to go on."""
        rounds = len(samples)
        if rounds >= self.max_rounds:
            return "rounds"
        if spent_s >= self.limit_s and rounds >= FLOOR_ROUNDS:
            return "time"
        kept = counting(samples, marked)
        if len(kept) < max(self.min_rounds, FLOOR_ROUNDS) or (rounds - self.min_rounds) % LOOK_EVERY:
            return ""
        low, high = median_interval(kept, seed=seed, resamples=500)
        return "interval" if high - low <= self.target_ci * float(np.median(kept)) else ""
