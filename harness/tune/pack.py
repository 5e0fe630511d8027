"""One budget over all problems of a model: the next slice goes where it should save most of the model's time per second of the device."""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from klab.harness.plan.rows import Plan

# Candidates of one slice, after which the next is decided: one group of a contest (measure/contest.py).
SLICE = 8
# Share of the gap to the bound that a slice is expected to close before anything was tried, and how fast that belief follows what slices
# really closed: after five that found nothing it is a sixth of what it was.
FIRST_CLOSING = 0.35
LEARNING = 0.3
# So many values and the belief about the gap counts no more than what the best values say (see `reach_us`); the least that say anything.
BELIEF_VALUES, LEAST_VALUES = 7, 5
# A strategy finds in one evaluation what random choice finds in about so many.
GUIDED = 2.0
# Searching goes on for some slices: a kernel that is behind the library by less than those can close is worth tuning still.
HORIZON = 6
# A kernel that has no time yet is taken to be so many times slower than the bound.
SLOW = 4.0
# Where even that would not reach the library, this share of what a slice closes is still hoped for: expectations are often wrong.
SURPRISE = 0.1
# A launch that does nothing takes so long: what the roofline promises below that is not to be had.
LAUNCH_US = {"cuda": 2.0, "cpu": 1.0}


@dataclass
class Prospect:
    """What tuning one problem has given so far and may give yet. Times in microseconds of one launch, infinite where none is known.

    weight: what a microsecond of this problem counts; share of the model's step times per microsecond, or launches. bound_us: what no
    kernel can beat. own_us: the best of the kernels that are tuned. rival_us: the best that is not tuned (a library).
    """

    key: str
    weight: float
    bound_us: float
    own_us: float = math.inf
    rival_us: float = math.inf
    closing: float = FIRST_CLOSING
    slices: int = 0
    spent_s: float = 0.0
    tried: int = 0
    promised_us: float = 0.0
    kept_us: float = 0.0
    exhausted: bool = False
    _lowest: list[float] = field(default_factory=list)

    @property
    def now_us(self) -> float:
        """What the model would pay with what is known."""
        return min(self.own_us, self.rival_us)

    @property
    def gap_us(self) -> float:
        """How far the tuned kernels are above the bound; for one that has no time yet, as far as a slow kernel would be."""
        own = self.own_us if math.isfinite(self.own_us) else SLOW * self.bound_us
        return max(own - self.bound_us, 0.0)

    def note(self, values_us: Iterable[float], spent_s: float) -> None:
        """One slice is over: the times that it found (of what did not fail), and the device's seconds that it took."""
        values = list(values_us)
        gap, before = self.gap_us, self.own_us
        promised = self.reach_us(1)
        self.own_us = min([self.own_us, *values])
        if math.isfinite(before):
            self.promised_us, self.kept_us = self.promised_us + promised, self.kept_us + before - self.own_us
        if math.isfinite(before) and gap > 0:
            self.closing += LEARNING * (min((before - self.own_us) / gap, 1.0) - self.closing)
        self._lowest = sorted([*self._lowest, *values])[:4]
        self.tried += len(values)
        self.slices += 1
        self.spent_s += spent_s

    def reach_us(self, slices: float) -> float:
        """Microseconds that so many more slices are expected to take off `own_us`.

        At first by belief: each closes a share of the gap to the bound, which follows what slices closed lately. The more values there are,
        the more by their lower tail: for independent draws the expected gain of one more is E[x(2) - x(1)] / n, whatever the distribution,
        so candidates that lie close together promise little, however far the bound is.
        """
        believed = self.gap_us * (1.0 - math.pow(1.0 - self.closing, slices))
        if self.tried < LEAST_VALUES:
            return believed
        spacing = statistics.fmean(i * (b - a) for i, (a, b) in enumerate(itertools.pairwise(self._lowest), start=1))
        drawn = GUIDED * SLICE * slices
        shown = spacing * drawn / (self.tried + drawn)
        belief = BELIEF_VALUES / (BELIEF_VALUES + self.tried)
        return min(belief * believed + (1.0 - belief) * shown, self.gap_us)

    def after_us(self, slices: float) -> float:
        """What the model is expected to pay after so many more slices."""
        own = self.own_us if math.isfinite(self.own_us) else SLOW * self.bound_us
        return min(own - self.reach_us(slices), self.rival_us)

    def saving_us(self, ahead: float = 0.0) -> float:
        """Microseconds that the next slice (or the one after `ahead` more) is expected to save: its share of what HORIZON slices would."""
        here = self.after_us(ahead)
        hope = SURPRISE * self.closing * max(here - self.bound_us, 0.0) / (1.0 + ahead)
        soon, later = here - self.after_us(ahead + 1), (here - self.after_us(ahead + HORIZON)) / HORIZON
        return max(soon, later, hope if self.tried < LEAST_VALUES else 0.1 * hope)

    def slice_s(self, usual_s: float) -> float:
        """Seconds that a slice takes, by its own so far and what is usual elsewhere (counted as one slice)."""
        return (self.spent_s + usual_s) / (self.slices + 1)

    def per_second(self, usual_s: float, ahead: float = 0.0) -> float:
        """What a second of the device is expected to save here, in the unit of the weight times microseconds."""
        return 0.0 if self.exhausted else self.weight * self.saving_us(ahead) / max(self.slice_s(usual_s), 1e-9)


def usual_slice_s(prospects: Iterable[Prospect]) -> float:
    """Seconds of a slice over all problems so far; 1 where there was none yet."""
    found = list(prospects)
    slices, spent = sum(p.slices for p in found), sum(p.spent_s for p in found)
    return spent / slices if slices and spent > 0 else 1.0


def ranking(prospects: Sequence[Prospect]) -> list[Prospect]:
    """Whom the next second of the device helps most first; the exhausted are left out."""
    usual = usual_slice_s(prospects)
    return sorted((p for p in prospects if not p.exhausted), key=lambda p: (-p.per_second(usual), p.slices, p.key))


def choose_next(prospects: Sequence[Prospect], ready: Collection[str] | None = None, *, patience: float = 0.25) -> Prospect | None:
    """The best of those that are ready (by key; None: all are), unless it is worth less than `patience` of one worth waiting for.

    None when nobody is left, or when it is better to wait.
    """
    ranked = ranking(prospects)
    if not ranked:
        return None
    if ready is None or ranked[0].key in ready:
        return ranked[0]
    usual = usual_slice_s(prospects)
    first = next((p for p in ranked if p.key in ready), None)
    return first if first and first.per_second(usual) >= patience * ranked[0].per_second(usual) else None


def outlook(prospects: Sequence[Prospect], seconds: float) -> dict[str, float]:
    """Microseconds per launch that so many more seconds of the device would save on each problem: `reach_us`, no measurement.

    Scaled by what became of its promises so far, over all problems. Nothing is promised where nothing was measured.
    """
    promised = sum(p.weight * p.promised_us for p in prospects)
    honest = min(sum(p.weight * p.kept_us for p in prospects) / promised, 1.0) if promised > 0 else 1.0
    usual = usual_slice_s(prospects)
    ahead = dict.fromkeys((p.key for p in prospects), 0)
    open_ = [p for p in prospects if not p.exhausted and math.isfinite(p.own_us)]
    queue = [(-p.per_second(usual), p.key, p) for p in open_]
    heapq.heapify(queue)
    left = seconds
    while queue and left > 0:
        value, key, prospect = heapq.heappop(queue)
        if value >= 0:
            break
        left -= prospect.slice_s(usual)
        ahead[key] += 1
        heapq.heappush(queue, (-prospect.per_second(usual, ahead[key]), key, prospect))
    return {p.key: honest * max(p.after_us(0) - p.after_us(ahead[p.key]), 0.0) if ahead[p.key] else 0.0 for p in prospects}


def weights(plan: Plan, times_us: Mapping[str, float], phase: str | None = None) -> dict[str, float]:
    """What a microsecond of each problem counts: launches per step over the step's time, added over the steps; every step counts alike.

    A step's time is that of its rows with a problem, each at the time known of it (by key), or at its bound. `phase`: only its steps.
    """
    found: dict[str, float] = {}
    for name, batch in plan.steps:
        rows = [(row.problem.key, row.count, row.bound_us) for row in plan.step(name, batch) if row.problem]
        total = sum(count * times_us.get(key, bound_us) for key, count, bound_us in rows)
        if phase is not None and name != phase:
            continue
        for key, count, _ in rows:
            found[key] = found.get(key, 0.0) + count / total
    return found


def step_times(plan: Plan, times_us: Mapping[str, float]) -> dict[tuple[str, int], float]:
    """Microseconds of each step's rows that have a problem, as far as the times (by key) tell them all; infinite where one lacks."""
    return {
        (name, batch): sum(row.count * times_us.get(row.problem.key, math.inf) for row in plan.step(name, batch) if row.problem)
        for name, batch in plan.steps
    }
