"""What stands for and against each series tonight: its level, its noise, and how far tonight and its last nights are from that level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from klab.harness.watch import levels as lv
from klab.harness.watch.basis import Basis, find_basis, middle, same_source
from klab.harness.watch.rule import Rule
from klab.harness.watch.series import Point, Series

# Of a normal variable, within which 95% lie.
NORMAL_95 = 1.96
# The share of the variance of a night that its processes may at most explain (more of them make that share smaller).
MOST_OF_PROCESSES = 0.75


@dataclass(frozen=True)
class Span:
    """The last `nights` nights together, tonight included: how far above the reference (log), and its standard error.

    limit: beyond it, after all looks, the series has changed. first: beyond it, it is looked at again. cycles: as `excess`, in cycles; None
    where no clock is known.
    """

    nights: int
    excess: float
    error: float
    limit: float
    first: float
    cycles: float | None = None


@dataclass(frozen=True)
class Course:
    """A series as it is judged. `spans` is empty where there are too few nights: `nights` of those that it needs.

    looks: how far above the reference each look of tonight was. before: tonight over the last epoch's level. rows: how far above the
    reference each earlier night was. passing: up to here it may be one of those changes that are gone the next night
    (0: it has a new source). All are logarithms.
    """

    basis: Basis
    nights: int
    spans: tuple[Span, ...] = ()
    looks: tuple[float, ...] = ()
    before: float | None = None
    rows: tuple[float, ...] = ()
    passing: float = 0.0

    @property
    def point(self) -> Point:
        """Tonight's."""
        return self.basis.point

    def elevated(self, above: float) -> int:
        """For how many nights in a row before tonight the series was more than `above` (log) over its reference."""
        return next((n for n, excess in enumerate(reversed(self.rows)) if excess <= above), len(self.rows))


def courses(
    judged: Mapping[str, tuple[Point, Sequence[Point]]], rule: Rule, since: Mapping[str, int], series: Mapping[str, Series]
) -> dict[str, Course]:
    """The course of every series that has a value tonight. All series are worked at once: noise is learnt from peers too."""
    if not judged:
        return {}
    bases = [
        find_basis(point, earlier, rule, since.get(identity), series[identity].metric) for identity, (point, earlier) in judged.items()
    ]
    field = _Field(bases, rule)
    cycles = field.in_cycles()
    return {identity: field.course(row, cycles) for row, identity in enumerate(judged)}


class _Field:
    """All series of a night, one row each."""

    def __init__(self, bases: Sequence[Basis], rule: Rule) -> None:
        self.bases, self.rule = bases, rule
        self.least = np.array([b.least for b in bases])
        self.floor = np.array([b.floor for b in bases])
        noise = lv.align([b.noise for b in bases])
        own, counts = lv.own_noise(noise)
        sigma, known = lv.shrunk_noise(own, counts, [b.group for b in bases], rule.peers)
        self.sigma = np.fmax(sigma, np.array([b.spread for b in bases]))
        self.room = lv.room(known)
        usual = np.array([b.process * lv.median_variance(b.processes) for b in bases])
        self.share = lv.common_share(usual, sigma**2, [b.group for b in bases], MOST_OF_PROCESSES)
        self.slow = {nights: lv.slow_share(noise, own, nights) for nights in {*rule.spans, rule.window}}
        rows = lv.align([b.level for b in bases])
        at = lv.levels(rows, self.sigma, np.fmax(self.floor, rule.multiples * self.sigma), rule.window, self.least, self.slow[rule.window])
        self.reference, self.nights = at.reference, at.nights
        self.error = np.sqrt(at.error**2 + self.slow[rule.window] * self.sigma**2)
        self.excess = self._excess(rows, np.array([b.tonight for b in bases]), at.reference, np.fmax(self.floor, self.sigma))
        self.errors = {nights: self._error(nights) for nights in rule.spans}
        self.final = np.sqrt(self._tonight(all_looks=True) + self.error**2)
        self.limit = np.fmax(self.floor, rule.multiples * self.room * self.final)
        self.passing = self._passing(rows) * self.limit

    def _excess(self, rows: lv.Floats, tonight: lv.Floats, reference: lv.Floats, sigma: lv.Floats) -> dict[int, lv.Floats]:
        """By span, how far the mean of its nights is from the reference. The level must not rest on those very nights alone."""
        cut = (self.rule.multiples * sigma)[:, None]
        counts = np.isfinite(rows).sum(axis=1)
        found = {}
        for nights in self.rule.spans:
            if rows.shape[1] < nights - 1:
                continue
            last = np.column_stack([rows[:, rows.shape[1] - nights + 1 :], tonight]) - reference[:, None]
            # One night far off must not speak for ten.
            mean = np.clip(last, -cut, cut).mean(axis=1) if nights > 1 else last[:, 0]
            found[nights] = np.where(counts - (nights - 1) >= self.least, mean, np.nan)
        return found

    def _passing(self, rows: lv.Floats) -> float:
        """How many times its limit a change must be, to be more than what has come and gone here while no source changed; at least 1."""
        last = np.column_stack([rows, [b.tonight for b in self.bases]])
        lowest = lv.align([b.lowest_looks(self.rule.looks) for b in self.bases])
        sure = lowest > (self.reference + self.rule.confirm * self.limit)[:, None]
        shares = (last - self.reference[:, None]) / self.limit[:, None]
        worst: dict[str, float] = {}
        for row, column in zip(*lv.came_and_went(shares, sure), strict=True):
            kept = self.bases[row].kept
            index = column - rows.shape[1] + len(kept)
            # One night is one, however many series it moved. What a commit brought and another took away is no noise.
            night = kept[index].night or str(column - rows.shape[1])
            if same_source(kept[index], kept[index - 1]):
                worst[night] = max(worst.get(night, 1.0), float(shares[row, column]))
        judged = np.maximum(np.isfinite(rows).sum(axis=1) - self.least, 0)
        largest, excused = sorted(worst.values(), reverse=True), int(self.rule.passing * judged.max())
        return largest[excused] if excused < len(largest) else 1.0

    def _passes(self, row: int) -> float:
        basis = self.bases[row]
        return float(self.passing[row]) if basis.kept and same_source(basis.point, basis.kept[-1]) else 0.0

    def _tonight(self, *, all_looks: bool) -> lv.Floats:
        """The variance of tonight's value: that of an earlier night, but for tonight's number of processes."""
        usual = np.array([lv.median_variance(b.processes) for b in self.bases])
        counts = [len(b.point.values) * (self.rule.looks / b.point.looks if all_looks else 1.0) for b in self.bases]
        now = np.array([lv.median_variance(max(1, round(n))) for n in counts])
        variance: lv.Floats = np.fmin(1.0, 1.0 - self.share * (1.0 - now / usual)) * self.sigma**2
        return variance

    def _error(self, nights: int) -> lv.Floats:
        here = self._tonight(all_looks=False) if nights == 1 else (1.0 / nights + self.slow[nights]) * self.sigma**2
        deviation: lv.Floats = np.sqrt(here + self.error**2)
        return deviation

    def in_cycles(self) -> dict[int, lv.Floats]:
        """By span, how far the cycles are from their own reference; NaN where there are too few nights with a clock."""
        enough = [b.cycles if len(b.cycles) >= self.rule.least_nights else () for b in self.bases]
        rows = lv.align(enough)
        own, _ = lv.own_noise(rows)
        reference = lv.levels(rows, own, np.fmax(self.floor, self.rule.multiples * own), self.rule.window, self.least).reference
        return self._excess(rows, np.array([b.cycles_tonight for b in self.bases]), reference, np.fmax(self.floor, own))

    def course(self, row: int, cycles: Mapping[int, lv.Floats]) -> Course:
        """What the judge needs of one series."""
        basis, rule = self.bases[row], self.rule
        before = basis.tonight - middle(basis.before) if basis.before else None
        spans = []
        for nights, excess in self.excess.items():
            # What devices differ by is the same on every night: more of them do not make it smaller.
            same = 1 if basis.pooled else nights
            deviation = self.final[row] if same == 1 else self.errors[same][row]
            limit = max(basis.floor, rule.multiples * self.room[row] * deviation)
            first = max(basis.floor, rule.first_look * self.room[row] * self.errors[same][row])
            if math.isfinite(excess[row]) and math.isfinite(deviation):
                here = cycles.get(nights)
                in_cycles = float(here[row]) if here is not None and math.isfinite(here[row]) else None
                spans.append(Span(nights, float(excess[row]), float(self.errors[nights][row]), limit, min(first, limit), in_cycles))
        if not spans:
            return Course(basis, len(basis.level), before=before)
        level = float(self.reference[row])
        looks = tuple(v - level for v in basis.per_look)
        return Course(basis, int(self.nights[row]), tuple(spans), looks, before, tuple(v - level for v in basis.level), self._passes(row))
