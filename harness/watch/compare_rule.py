"""Same, faster, slower, or cannot tell: what pairs of fresh processes say of B against A. Pure: numbers in, answers out.

One replicate is one pair of fresh processes (data, memory and warm-up of their own): within it the two sides take turns, A B B A, and what
it says is the median over those quads of log(B / A). Student's t over the replicates gives the interval. All intervals of one comparison
hold together with 95%: each of K questions has an error of 5% / K, and spends part of it at every look (docs/compare.md has the rates).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from klab.harness.measure.stats import mean_interval

# Equivalence needs a margin: 1%, a third of the smallest slow-down that the night watch must find (3%), and the least by which windows in
# sequence of the same code differ (1-3%: helion pull request 3523).
MARGIN = 0.01
ALPHA = 0.05
# Pairs of processes after which the evidence is looked at, each about 1.4 times the last: looking more often costs certainty.
LOOKS = (5, 7, 10, 14, 20, 28, 40)
# Quads of one replicate that count, at the least, and its laps: 16 laps are 8 quads, of which three may be disturbed.
LEAST_QUADS = 3
LAPS = 16


class Answer(StrEnum):
    """What is said of B against A. Broken: it fails on B and did not on A. Not compared: there is nothing to compare, `reason` says why."""

    SAME = "same"
    FASTER = "faster"
    SLOWER = "slower"
    CANNOT_TELL = "cannot tell"
    BROKEN = "broken"
    NOT_COMPARED = "not compared"

    @property
    def fails(self) -> bool:
        """Is B worse, for certain?"""
        return self in (Answer.SLOWER, Answer.BROKEN)


@dataclass(frozen=True)
class Found:
    """An answer with its evidence. `ratio` is B's time over A's (above 1: B is slower), [low, high] its interval.

    `cycles` is the same ratio of time x SM clock, None without a clock. `replicates` are pairs of processes, or the runs of either side.
    """

    answer: Answer
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    replicates: int = 0
    cycles: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Rounds:
    """One side's rounds of one replicate, in order. `clocks_mhz` is empty or as long; `marked` likewise (1: does not count)."""

    us: tuple[float, ...]
    clocks_mhz: tuple[float | None, ...] = ()
    marked: tuple[int, ...] = ()


def replicate(a: Rounds, b: Rounds) -> tuple[float, float | None] | None:
    """(log ratio B / A, the same in cycles or None) of one pair of processes; None with fewer than LEAST_QUADS quads that count.

    Laps 0 and 1 ran A B, B A, and so on: in the sums over such a quad a steady drift meets both sides alike.
    """
    times: list[float] = []
    cycles: list[float] = []
    for first in range(0, min(len(a.us), len(b.us)) - 1, 2):
        laps = (first, first + 1)
        if any(side.marked[i] for side in (a, b) if side.marked for i in laps):
            continue
        if min(side.us[i] for side in (a, b) for i in laps) <= 0:
            continue
        times.append(math.log(sum(b.us[i] for i in laps) / sum(a.us[i] for i in laps)))
        ticks = [[side.us[i] * (side.clocks_mhz[i] or 0.0) for i in laps] if side.clocks_mhz else [] for side in (a, b)]
        if all(ticks) and min(map(min, ticks)) > 0:
            cycles.append(math.log(sum(ticks[1]) / sum(ticks[0])))
    if len(times) < LEAST_QUADS:
        return None
    return statistics.median(times), statistics.median(cycles) if len(cycles) >= LEAST_QUADS else None


def spent(look: int, questions: int, *, last: bool) -> float:
    """The error of either end of one question's interval at look 0, 1, ...: half of the share, a quarter, ...; what is left at the last.

    The sum over all looks and questions and both ends is ALPHA at most, wherever it stops.
    """
    share = ALPHA / 2 / max(1, questions)
    return share * 0.5 ** (look if last else look + 1)


def judge(logs: Sequence[float], cycles: Sequence[float | None], *, alpha: float, margin: float = MARGIN) -> Found:
    """The answer from the replicates so far.

    Same: the whole interval lies within the margin. Slower or faster: the interval excludes 1, its middle lies beyond the margin, and the
    sign in cycles agrees where the clock is known. Everything else cannot be told (yet).
    """
    if not logs:
        return Found(Answer.CANNOT_TELL, reason="nothing was measured")
    mean, low, high = mean_interval(logs, alpha=alpha)
    known = [value for value in cycles if value is not None]
    in_cycles = math.fsum(known) / len(known) if known else None
    answer, reason = classify(mean, low, high, in_cycles, margin)
    ratio, bottom, top = math.exp(mean), math.exp(low), math.exp(high) if high < 700 else math.inf
    return Found(answer, ratio, bottom, top, len(logs), None if in_cycles is None else math.exp(in_cycles), reason)


def classify(middle: float, low: float, high: float, cycles: float | None, margin: float) -> tuple[Answer, str]:
    """(answer, reason where it cannot be told) of an interval of log ratios."""
    reach = math.log1p(margin)
    if -reach <= low and high <= reach:
        return Answer.SAME, ""
    for answer, sign, near in ((Answer.SLOWER, 1.0, low), (Answer.FASTER, -1.0, -high)):
        if near > 0 and sign * middle > reach:
            if cycles is not None and sign * cycles <= 0:
                return Answer.CANNOT_TELL, f"{answer} by time, but not in cycles: the clock differed"
            return answer, ""
    if low > 0 or high < 0:
        return Answer.CANNOT_TELL, f"not the same, but by about the margin of {margin:.1%}"
    return Answer.CANNOT_TELL, "the interval is too wide" if math.isfinite(high) else "too few pairs of processes"


@dataclass
class Question:
    """One pair under way. `open` until it has an answer; the interval is that of the look at which it got it."""

    margin: float = MARGIN
    logs: list[float] = field(default_factory=list)
    cycles: list[float | None] = field(default_factory=list)
    empty: int = 0
    found: Found | None = None
    looked: int = 0

    @property
    def open(self) -> bool:
        """Is more wanted?"""
        return self.found is None

    def add(self, told: tuple[float, float | None] | None) -> None:
        """What a pair of processes said; None where its rounds did not count."""
        if told is None:
            self.empty += 1
            return
        self.logs.append(told[0])
        self.cycles.append(told[1])

    def look(self, questions: int, *, last: bool = False, looks: Sequence[int] = LOOKS) -> Found:
        """Judge, and close where it is clear or where it is the `last` look."""
        last = last or self.looked + 1 >= len(looks)
        found = self.judged(spent(self.looked, questions, last=last))
        if last or found.answer is not Answer.CANNOT_TELL:
            self.found = found
        self.looked += 1
        return found

    def judged(self, alpha: float) -> Found:
        """What the evidence says now."""
        return judge(self.logs, self.cycles, alpha=alpha, margin=self.margin)

    def due(self, looks: Sequence[int] = LOOKS) -> bool:
        """Is it time to look?"""
        return self.open and self.looked < len(looks) and len(self.logs) + self.empty >= looks[self.looked]


@dataclass
class Halfway(Question):
    """On which side of `threshold` (a log ratio) it lies, for bisecting: slower or the same; faster or the same where that is negative."""

    threshold: float = 0.0

    def judged(self, alpha: float) -> Found:
        """Beyond the threshold, before it, or neither for certain."""
        found = judge(self.logs, self.cycles, alpha=alpha, margin=self.margin)
        if found.low is None or found.high is None or found.low <= 0:
            return replace(found, answer=Answer.CANNOT_TELL)
        low, high = sorted((math.log(found.low) / self.threshold, math.log(found.high) / self.threshold))
        beyond = Answer.SLOWER if self.threshold > 0 else Answer.FASTER
        answer = beyond if low > 1.0 else Answer.SAME if high < 1.0 else Answer.CANNOT_TELL
        return replace(found, answer=answer, reason="" if answer is not Answer.CANNOT_TELL else "between good and bad, or too noisy")


def together(per_pass: Sequence[Sequence[float]], *, questions: int, margin: float = MARGIN) -> Found:
    """The geometric mean over all pairs: one replicate per pass, the mean of its pairs' log ratios. Passes must have the same pairs."""
    return judge([statistics.fmean(logs) for logs in per_pass if logs], [], alpha=spent(0, questions, last=True), margin=margin)


def overall(found: Sequence[Found], mean: Found) -> tuple[Answer, str]:
    """One answer for all, and why: worse anywhere is worse; then what the geometric mean says; any doubt that is left is said."""
    compared = [f for f in found if f.answer is not Answer.NOT_COMPARED]
    counts = {answer: sum(f.answer is answer for f in compared) for answer in Answer}
    if not compared:
        return Answer.NOT_COMPARED, "nothing could be compared"
    if counts[Answer.BROKEN]:
        return Answer.BROKEN, f"{counts[Answer.BROKEN]} of {len(compared)} fail on B and not on A"
    if counts[Answer.SLOWER] or mean.answer is Answer.SLOWER:
        where = f"{counts[Answer.SLOWER]} of {len(compared)} are slower" if counts[Answer.SLOWER] else "the geometric mean is"
        return Answer.SLOWER, where
    if counts[Answer.CANNOT_TELL]:
        doubt = f"{counts[Answer.CANNOT_TELL]} of {len(compared)} cannot be told"
        return (Answer.FASTER if mean.answer is Answer.FASTER else Answer.CANNOT_TELL), doubt
    if counts[Answer.FASTER]:
        return Answer.FASTER, f"{counts[Answer.FASTER]} of {len(compared)} are faster, none is slower"
    return mean.answer if mean.answer is not Answer.CANNOT_TELL else Answer.SAME, f"all {len(compared)} are the same within the margin"
