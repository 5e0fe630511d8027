"""What runs say: figures per strategy over all spaces, and one strategy against the best of others, with bootstrap intervals."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from klab.harness.tune.replay.score import Baseline
from klab.harness.tune.replay.simulate import Run
from klab.kernels.contract import Json

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
WITHIN = (0.05, 0.01)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval over repeats."""

    value: float
    low: float
    high: float

    @property
    def excludes_one(self) -> bool:
        """True when a ratio is surely not equality."""
        return self.low > 1 or self.high < 1


@dataclass(frozen=True)
class Group:
    """The runs of one strategy on one space, and that space's yardstick. limit_s: seconds at which times to reach something are cut.

    space: its name.
    """

    runs: Sequence[Run]
    yardstick: Baseline
    limit_s: float
    space: str = ""

    @property
    def could_not_run(self) -> str:
        """Why no run evaluated anything, which says nothing of how the strategy searches; "" where one did."""
        if any(run.evaluations for run in self.runs):
            return ""
        said = next((run.ended for run in self.runs if run.ended), "")
        return said.removeprefix("failed: ").strip() or "it evaluated nothing"

    def ratios(self, marks: Sequence[int]) -> Floats:
        """(runs, marks): best / optimum; a run that has nothing valid yet counts as having the slowest valid candidate."""
        best = np.array([[run.best_us(mark) for mark in marks] for run in self.runs])
        found: Floats = np.minimum(best, self.yardstick.slowest_us) / self.yardstick.optimum_us
        return found

    def seconds_within(self, share: float) -> Floats:
        """(runs,): simulated seconds to within `share` of the optimum, infinite where never reached."""
        return np.array([run.seconds_within((1 + share) * self.yardstick.optimum_us) for run in self.runs])

    def scores(self) -> Floats:
        """(runs,)."""
        return np.array([self.yardstick.score(run) for run in self.runs])


@dataclass(frozen=True)
class Reach:
    """Simulated seconds to within some share of the optimum: the geometric mean over spaces of each space's restricted mean.

    In a restricted mean a run that had not arrived at the space's limit counts as arriving there. reached: the share of runs that did.
    """

    restricted_mean_s: float
    reached: float


class Standing:
    """One strategy on all spaces (in their order). Its figures leave out the spaces that it could not run on; nan where it ran on none."""

    def __init__(self, name: str, origin: str, groups: Sequence[Group], marks: Sequence[int]) -> None:
        self.name, self.origin, self.groups, self.marks = name, origin, tuple(groups), tuple(marks)
        self.ran = [i for i, g in enumerate(self.groups) if not g.could_not_run]

    @property
    def could_not_run(self) -> dict[str, str]:
        """Names of the spaces on which it evaluated nothing, and why."""
        return {g.space: g.could_not_run for g in self.groups if g.could_not_run}

    @property
    def _ran(self) -> list[Group]:
        return [self.groups[i] for i in self.ran]

    @property
    def repeats(self) -> int:
        """Runs on the space that has the fewest."""
        return min(len(g.runs) for g in self.groups)

    @property
    def evaluations(self) -> float:
        """Mean number of candidates a run evaluated."""
        return float(np.mean([run.evaluations for g in self._ran for run in g.runs])) if self.ran else 0.0

    @property
    def failures(self) -> dict[str, int]:
        """Why runs failed, and how many."""
        said = [run.ended for g in self._ran for run in g.runs if run.ended.startswith(("failed", "stopped after"))]
        return {why: said.count(why) for why in dict.fromkeys(said)}

    @cached_property
    def ratios(self) -> list[Floats]:
        """Per space (runs, marks); nan where it could not run."""
        return [np.full((len(g.runs), len(self.marks)), np.nan) if g.could_not_run else g.ratios(self.marks) for g in self.groups]

    @cached_property
    def mean(self) -> Floats:
        """(marks,): geometric mean over spaces of the mean over runs of best / optimum."""
        return self._over_spaces([r.mean(axis=0) for r in self.ratios])

    @cached_property
    def percentile90(self) -> Floats:
        """(marks,): the same of the 90th percentile over runs."""
        return self._over_spaces([np.percentile(r, 90, axis=0) for r in self.ratios])

    def _over_spaces(self, figures: Sequence[Floats]) -> Floats:
        return _geometric(np.stack([figures[i] for i in self.ran])) if self.ran else np.full(len(self.marks), np.nan)

    @cached_property
    def resampled(self) -> Floats:
        """(RESAMPLES, spaces, marks): means over runs drawn again within each space."""
        return np.stack([_resample(r, f"{self.name} {i}") for i, r in enumerate(self.ratios)], axis=1)

    def reach(self, share: float) -> Reach:
        """How long it takes to within `share` of the optimum."""
        if not self.ran:
            return Reach(np.nan, 0.0)
        seconds = [g.seconds_within(share) for g in self._ran]
        means = [np.minimum(s, g.limit_s).mean() for s, g in zip(seconds, self._ran, strict=True)]
        within = [s <= g.limit_s for s, g in zip(seconds, self._ran, strict=True)]
        return Reach(float(_geometric(np.array(means)[:, None])[0]), float(np.mean(np.concatenate(within))))

    @cached_property
    def score(self) -> Interval:
        """Mean over spaces of the mean score over runs; spaces with nothing to find are left out."""
        scores = [s for s in (g.scores() for g in self._ran) if np.isfinite(s).all()]
        if not scores:
            return Interval(np.nan, np.nan, np.nan)
        drawn = np.mean([_resample(s[:, None], f"{self.name} score {i}")[:, 0] for i, s in enumerate(scores)], axis=0)
        return _interval(float(np.mean([s.mean() for s in scores])), drawn)

    def to_json(self) -> dict[str, Json]:
        """Its row of the table."""
        reaches = {f"within_{share:.0%}": self.reach(share) for share in WITHIN}
        return {
            "strategy": self.name,
            "origin": self.origin,
            "runs": self.repeats,
            "evaluations": self.evaluations,
            "best_over_optimum": dict(zip(map(str, self.marks), map(_known, self.mean), strict=True)),
            "best_over_optimum_p90": dict(zip(map(str, self.marks), map(_known, self.percentile90), strict=True)),
            **{name: {"restricted_mean_s": _known(r.restricted_mean_s), "reached": r.reached} for name, r in reaches.items()},
            "could_not_run": self.could_not_run,
            "score": None if np.isnan(self.score.value) else [self.score.value, self.score.low, self.score.high],
        }


@dataclass(frozen=True)
class Duel:
    """One strategy against the best other at one mark.

    ratio: of their geometric means over the `spaces` that both ran on, below 1 where the strategy wins. against_any: the same where the
    other is chosen again among all in every resample, which gives the others the luck of the many.
    """

    mark: int
    other: str
    ratio: Interval
    against_any: Interval
    spaces: int


def duels(one: Standing, others: Sequence[Standing]) -> list[Duel]:
    """One per mark; the best other is the one with the least geometric mean at that mark, in these very runs.

    One that could not run on some space is held against `one` on the others alone; none is left without a space in common.
    """
    shared = [(o, both) for o in others if (both := [i for i in o.ran if i in one.ran])]
    if not shared:
        return []
    mean_one = np.stack([r.mean(axis=0) for r in one.ratios])
    value = np.stack([_geometric(mean_one[both] / np.stack([o.ratios[i].mean(axis=0) for i in both])) for o, both in shared])
    drawn = np.stack([_geometric(one.resampled[:, both] / o.resampled[:, both], axis=1) for o, both in shared])
    found = []
    for i, mark in enumerate(one.marks):
        best = int(value[:, i].argmax())
        at, (other, both) = float(value[best, i]), shared[best]
        fixed, any_ = _interval(at, drawn[best, :, i]), _interval(at, drawn[:, :, i].max(axis=0))
        found.append(Duel(mark, other.name, fixed, any_, len(both)))
    return found


@dataclass(frozen=True)
class Loss:
    """A space and mark where the best other there is ahead. ratio: of mean best / optimum, above 1."""

    space: int
    mark: int
    other: str
    ratio: Interval


def losses(one: Standing, others: Sequence[Standing]) -> list[Loss]:
    """Every space and mark where some other has the lower mean; the other named is the best there."""
    found = []
    for space in one.ran:
        running = [o for o in others if space in o.ran]
        if not running:
            continue
        means = np.stack([o.ratios[space].mean(axis=0) for o in running])
        mine = one.ratios[space].mean(axis=0)
        for i, mark in enumerate(one.marks):
            best = int(means[:, i].argmin())
            if mine[i] > means[best, i]:
                drawn = one.resampled[:, space, i] / running[best].resampled[:, space, i]
                found.append(Loss(space, mark, running[best].name, _interval(float(mine[i] / means[best, i]), drawn)))
    return found


def standings(groups: Mapping[tuple[str, str], Sequence[Group]], marks: Sequence[int]) -> list[Standing]:
    """One per (name, origin), the best at the middle mark first; after those that ran everywhere the others, whose means are of less."""
    made = [Standing(name, origin, g, marks) for (name, origin), g in groups.items()]
    return sorted(made, key=lambda s: (len(s.groups) - len(s.ran), s.mean[len(marks) // 2] if s.ran else 0.0))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _geometric(values: Floats, axis: int = 0) -> Floats:
    found: Floats = np.exp(np.log(values).mean(axis=axis))
    return found


def _resample(values: Floats, name: str) -> Floats:
    """(runs, k) -> (RESAMPLES, k) means of as many runs drawn with replacement; the same for the same name."""
    runs = len(values)
    counts = np.random.default_rng(zlib.crc32(name.encode())).multinomial(runs, np.full(runs, 1 / runs), RESAMPLES)
    found: Floats = counts @ values / runs
    return found


def _interval(value: float, drawn: Floats) -> Interval:
    low, high = np.percentile(drawn, INTERVAL)
    return Interval(value, float(low), float(high))
