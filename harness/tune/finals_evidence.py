"""The evidence of a final: blocks of rounds in which all run in turns, and how two contenders compare over them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from klab.harness.measure.stats import CONFIDENCE, FLOOR_ROUNDS, mean_interval

# So many blocks make their medians the replicates; of fewer, each is cut into pieces of two or three laps (one each way through the field).
LEAST_BLOCKS = 4
PIECE = 2
# Fewer blocks do not show how much a kernel's time differs from block to block (data, addresses, clocks): 0.3% is common, so an interval
# from them is wider by this over the root of their number at either end.
UNSEEN = 0.005


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
    clock. `replicates` independent values stand behind it, from `rounds` pairs.
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
    """What one block says of two contenders: the logarithms of the ratios lap by lap, and of the ratio in cycles where it is known."""

    logs: NDArray[np.float64]
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
        block to block would otherwise pass for a difference of the kernels.
        """
        pairs = self._of(a, b)
        if not pairs:
            return None
        if len(pairs) >= LEAST_BLOCKS:
            values = [pair.median for pair in pairs]
        else:
            values = [statistics.median(piece.tolist()) for pair in pairs for piece in _pieces(pair.logs)]
        mean, low, high = mean_interval(values, alpha=alpha)
        if len(pairs) < LEAST_BLOCKS:
            low, high = low - UNSEEN / len(pairs) ** 0.5, high + UNSEEN / len(pairs) ** 0.5
        _, plain_low, plain_high = mean_interval(values, alpha=(1.0 - CONFIDENCE) / 2)
        cycles = [pair.cycles for pair in pairs if pair.cycles is not None]
        return Compared(
            math.exp(mean),
            _exp(low),
            _exp(high),
            _exp(plain_high - mean) - _exp(plain_low - mean),
            math.exp(sum(cycles) / len(cycles)) if cycles else None,
            len(values),
            sum(len(pair.logs) for pair in pairs),
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
    return _Pair(logs[kept], statistics.median(logs[kept].tolist()), cycles)


def _pieces(logs: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    return list(np.array_split(logs, max(1, len(logs) // PIECE)))
