"""The evidence of a final: blocks of rounds in which all run in turns, and how two contenders compare over them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from klab.harness.measure.stats import CONFIDENCE, FLOOR_ROUNDS

# From fewer blocks nothing is claimed: they do not show how much a kernel's time differs from block to block (data, addresses, clocks).
LEAST_BLOCKS = 5
# A lag-1 autocorrelation of n independent values errs by about 1 / sqrt(n): so much of that is added before it is believed to be small.
CAUTION = 0.5
MOST_PERSISTENT = 0.95
# Five blocks at their most persistent: with fewer, 10% of difference would not show in them.
LEAST_WORTH = 2.5


@dataclass(frozen=True)
class Rounds:
    """The rounds of one contender in one block, in order; `clocks_mhz` is empty or as long, `marked` likewise (1: does not count)."""

    samples_us: tuple[float, ...]
    clocks_mhz: tuple[float | None, ...] = ()
    marked: tuple[int, ...] = ()


Block = Mapping[str, Rounds]
"""Contender -> its rounds; the n-th round of each was taken in the same lap."""


@dataclass(frozen=True)
class Compared:
    """One contender's time over another's. `low` and `high` bound the ratio at the level that was asked for, `width` is that of the plain
    95% interval relative to the ratio; both infinite where there is too little. `cycles` is the ratio of time x SM clock, None without a
    clock. `replicates` blocks stand behind it, from `rounds` pairs.
    """

    ratio: float
    low: float
    high: float
    width: float
    cycles: float | None
    replicates: int
    rounds: int


@dataclass(frozen=True)
class _Pair:
    """What one block says of two contenders: the median of log(ratio) over its `laps`, and of the ratio in cycles where it is known."""

    laps: int
    median: float
    cycles: float | None


@dataclass
class Evidence:
    """All blocks so far. Comparing the same two again is cheap: what a block says of a pair is computed once."""

    blocks: list[Block] = field(default_factory=list)
    _pairs: dict[tuple[str, str], list[_Pair | None]] = field(default_factory=dict)

    def add(self, block: Block) -> None:
        """One more block."""
        self.blocks.append(block)

    def rounds(self, name: str) -> int:
        """Rounds that a contender has run."""
        return sum(len(block[name].samples_us) for block in self.blocks if name in block)

    def logs(self, a: str, b: str) -> list[float]:
        """Per block with both of them the median of log(a / b)."""
        return [pair.median for pair in self._of(a, b)]

    def compare(self, a: str, b: str, alpha: float) -> Compared | None:
        """a over b with an interval that errs on either side with probability `alpha` at most; None when they share no laps.

        The replicates are the medians of the blocks, each with data, memory and warm-up of its own, and not the rounds: what differs from
        block to block would otherwise pass for a difference of the kernels. Below LEAST_BLOCKS of them the interval is infinite.
        """
        pairs = self._of(a, b)
        if not pairs:
            return None
        values = [pair.median for pair in pairs]
        mean, low, high = persistent_interval(values, alpha=alpha)
        _, plain_low, plain_high = persistent_interval(values, alpha=(1.0 - CONFIDENCE) / 2)
        cycles = [pair.cycles for pair in pairs if pair.cycles is not None]
        return Compared(
            math.exp(mean),
            _exp(low),
            _exp(high),
            _exp(plain_high - mean) - _exp(plain_low - mean),
            math.exp(sum(cycles) / len(cycles)) if cycles else None,
            len(values),
            sum(pair.laps for pair in pairs),
        )

    def _of(self, a: str, b: str) -> list[_Pair]:
        known = self._pairs.setdefault((a, b), [])
        known += [_pair(block, a, b) for block in self.blocks[len(known) :]]
        return [pair for pair in known if pair is not None]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf


def _pair(block: Block, a: str, b: str) -> _Pair | None:
    """None where the block has too few common laps of the two that count."""
    if a not in block or b not in block:
        return None
    x, y = block[a], block[b]
    laps = min(len(x.samples_us), len(y.samples_us))
    times = np.array([x.samples_us[:laps], y.samples_us[:laps]])
    kept = (times > 0).all(axis=0)
    for marked in (x.marked[:laps], y.marked[:laps]):
        if marked:
            kept &= np.array(marked) == 0
    if kept.sum() < FLOOR_ROUNDS:
        return None
    logs = np.log(times[0] / times[1])
    cycles = None
    if len(x.clocks_mhz) >= laps and len(y.clocks_mhz) >= laps:
        clocks = np.array([x.clocks_mhz[:laps], y.clocks_mhz[:laps]], dtype=np.float64)  # None becomes nan
        clocked = kept & (clocks > 0).all(axis=0)
        if clocked.sum() >= FLOOR_ROUNDS:
            cycles = statistics.median((logs[clocked] + np.log(clocks[0, clocked] / clocks[1, clocked])).tolist())
    return _Pair(int(kept.sum()), statistics.median(logs[kept].tolist()), cycles)


def persistent_interval(values: Sequence[float], *, alpha: float) -> tuple[float, float, float]:
    """(mean, low, high) of values in the order they were taken, each of which may resemble the one before (an AR(1) series).

    Student's t with the freedom of as many independent values as they are worth; either end errs with probability `alpha`. Infinite ends
    for fewer than LEAST_BLOCKS values.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < LEAST_BLOCKS:
        return mean, -math.inf, math.inf
    off = np.asarray(values, dtype=np.float64) - mean
    squares = float(off @ off)
    worth = _worth(off, squares)
    # Values that go together also differ less than they would apart: squares / (count - count / worth) is free of that.
    variance = squares / (count - count / worth) / worth
    reach = _student(round(worth - 1.0, 2), alpha) * math.sqrt(variance)
    return mean, mean - reach, mean + reach


def _worth(off: NDArray[np.float64], squares: float) -> float:
    """How many independent values `off` (deviations from their mean, in order) are worth: between LEAST_WORTH and their number.

    By their lag-1 autocorrelation, freed of the bias that few values have (Kendall 1954: -(1 + 4 r) / n), with CAUTION, never below 0.
    """
    count = len(off)
    if squares <= 0.0:
        return float(count)
    found = float(off[1:] @ off[:-1]) / squares
    persistence = (count * found + 1.0) / (count - 4.0) + CAUTION / math.sqrt(count)
    persistence = min(max(persistence, 0.0), MOST_PERSISTENT)
    return max(LEAST_WORTH, count * (1.0 - persistence) / (1.0 + persistence))


@cache
def _student(freedom: float, alpha: float) -> float:
    """What Student's t exceeds with probability `alpha`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1.0 - alpha))
