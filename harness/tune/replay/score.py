"""How much better than random search: 0 is random search itself, 1 is the optimum at once.

After Willemsen et al., "A methodology for comparing optimization algorithms for auto-tuning" (2024, package autotuning_methodology), which
compares curves of the best so far over simulated time within a window that random search sets. Four things differ:

- Random search here draws from all candidates, the invalid ones too, and pays for them, as every strategy does; it has their budget.
- The window is at least LEAST_EVALUATIONS candidates long: where one candidate in two is near the optimum it would close after a few.
- Before a search has anything better than the space's median time it counts as having the median, so that no curve is infinite.
- The score is a ratio of areas between curves, not a mean of ratios at points of time, whose divisor goes to 0 as random search closes in.
  It is linear in the runs: random search scores 0 on average, exactly, and an interval comes from drawing whole runs again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.replay.simulate import Run, candidate_s, require_valid

CLOSE = 0.95
"""The window ends when random search is expected to be this far on the way from the median to the optimum."""
LEAST_EVALUATIONS = 50
RANDOM_RUNS = 4000
"""Their mean area has an error of 1/9 of that of 50 repeats."""


@dataclass(frozen=True)
class Baseline:
    """What random search does on one space within the window. area_us_s: its expected area under the curve of the best so far."""

    optimum_us: float
    median_us: float
    slowest_us: float
    window_evaluations: int
    window_s: float
    area_us_s: float

    def score(self, run: Run) -> float:
        """nan on a space where the median is the optimum: there is nothing to find."""
        if self.median_us <= self.optimum_us:
            return math.nan
        return (self.area_us_s - self._area(run)) / (self.area_us_s - self.optimum_us * self.window_s)

    def _area(self, run: Run) -> float:
        area, at, value = 0.0, 0.0, self.median_us
        for step in run.steps:
            until = min(step.seconds, self.window_s)
            area += value * (until - at)
            at, value = until, min(step.value_us, self.median_us)
        return area + value * (self.window_s - at)


def baseline(recorded: RecordedSpace, *, most_evaluations: int, by_seconds: bool = False, seed: int = 0) -> Baseline:
    """Random search on this space with `most_evaluations`, the budget of the runs that are to be scored; the window is no longer.

    by_seconds: the runs have a budget of seconds, of which this many evaluations are the mean; some make more.
    """
    require_valid(recorded)
    valid = recorded.time_us[np.isfinite(recorded.time_us)]
    optimum, median = float(valid.min()), float(np.median(valid))
    worth = np.minimum(recorded.time_us, median)
    cost_s = candidate_s(recorded)
    most = min(most_evaluations, len(worth))
    curve = expected_best(worth, most)
    close = np.flatnonzero(curve <= median - CLOSE * (median - optimum))
    evaluations = max(min(LEAST_EVALUATIONS, most), int(close[0]) + 1 if len(close) else most)
    window_s = evaluations * float(cost_s.mean())
    draws = len(worth) if by_seconds else most
    area = _random_area(worth, cost_s, median, window_s, draws, np.random.default_rng(seed))
    return Baseline(optimum, median, float(valid.max()), evaluations, window_s, area)


def expected_best(worth: NDArray[np.float64], evaluations: int) -> NDArray[np.float64]:
    """The expected least of `worth` after 1, 2, ... `evaluations` draws without replacement, exactly."""
    ordered = np.sort(worth)
    gaps, count = np.diff(ordered), len(ordered)
    below = np.arange(1, count)
    # none[i]: the chance that none of the i+1 best is drawn so far.
    none = np.ones(count - 1)
    curve = np.empty(evaluations)
    for n in range(evaluations):
        none *= np.maximum(count - below - n, 0) / (count - n)
        curve[n] = ordered[0] + gaps @ none
    return curve


def _random_area(
    worth: NDArray[np.float64], cost_s: NDArray[np.float64], median: float, window_s: float, draws: int, rng: np.random.Generator
) -> float:
    """Mean over RANDOM_RUNS runs; simulated, because fast candidates are cheap ones too, which no formula on evaluations alone knows."""
    total = 0.0
    for _ in range(RANDOM_RUNS):
        drawn = rng.choice(len(worth), draws, replace=False)
        ends = np.minimum(np.cumsum(cost_s[drawn]), window_s)
        best = np.concatenate(([median], np.minimum.accumulate(worth[drawn])))
        total += float(best @ np.diff(ends, prepend=0.0, append=window_s))
    return total / RANDOM_RUNS
