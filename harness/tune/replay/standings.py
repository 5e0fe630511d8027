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
    """The runs of one strategy on one space, and that space's yardstick. limit_s: seconds at which times to reach something are cut."""

    runs: Sequence[Run]
    yardstick: Baseline
    limit_s: float

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
    """One strategy on all spaces (in their order)."""

    def __init__(self, name: str, origin: str, groups: Sequence[Group], marks: Sequence[int]) -> None:
        self.name, self.origin, self.groups, self.marks = name, origin, tuple(groups), tuple(marks)

    @property
    def repeats(self) -> int:
        """Runs on the space that has the fewest."""
        return min(len(g.runs) for g in self.groups)

    @property
    def evaluations(self) -> float:
        """Mean number of candidates a run evaluated."""
        return float(np.mean([run.evaluations for g in self.groups for run in g.runs]))

    @property
    def failures(self) -> dict[str, int]:
        """Why runs failed, and how many."""
        said = [run.ended for g in self.groups for run in g.runs if run.ended.startswith(("failed", "stopped after"))]
        return {why: said.count(why) for why in dict.fromkeys(said)}

    @cached_property
    def ratios(self) -> list[Floats]:
        """Per space (runs, marks)."""
        return [g.ratios(self.marks) for g in self.groups]

    @cached_property
    def mean(self) -> Floats:
        """(marks,): geometric mean over spaces of the mean over runs of best / optimum."""
        return _geometric(np.stack([r.mean(axis=0) for r in self.ratios]))

    @cached_property
    def percentile90(self) -> Floats:
        """(marks,): the same of the 90th percentile over runs."""
        return _geometric(np.stack([np.percentile(r, 90, axis=0) for r in self.ratios]))

    @cached_property
    def resampled(self) -> Floats:
        """(RESAMPLES, spaces, marks): means over runs drawn again within each space."""
        return np.stack([_resample(r, f"{self.name} {i}") for i, r in enumerate(self.ratios)], axis=1)

    def reach(self, share: float) -> Reach:
        """How long it takes to within `share` of the optimum."""
        seconds = [g.seconds_within(share) for g in self.groups]
        means = [np.minimum(s, g.limit_s).mean() for s, g in zip(seconds, self.groups, strict=True)]
        within = [s <= g.limit_s for s, g in zip(seconds, self.groups, strict=True)]
        return Reach(float(_geometric(np.array(means)[:, None])[0]), float(np.mean(np.concatenate(within))))

    @cached_property
    def score(self) -> Interval:
        """Mean over spaces of the mean score over runs; spaces with nothing to find are left out."""
        scores = [s for s in (g.scores() for g in self.groups) if np.isfinite(s).all()]
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
            "best_over_optimum": dict(zip(map(str, self.marks), self.mean.tolist(), strict=True)),
            "best_over_optimum_p90": dict(zip(map(str, self.marks), self.percentile90.tolist(), strict=True)),
            **{name: {"restricted_mean_s": r.restricted_mean_s, "reached": r.reached} for name, r in reaches.items()},
            "score": None if np.isnan(self.score.value) else [self.score.value, self.score.low, self.score.high],
        }


@dataclass(frozen=True)
class Duel:
    """One strategy against the best other at one mark.

    ratio: of their geometric means, below 1 where the strategy wins. against_any: the same where the other is chosen again among all
    in every resample, which gives the others the luck of the many.
    """

    mark: int
    other: str
    ratio: Interval
    against_any: Interval


def duels(one: Standing, others: Sequence[Standing]) -> list[Duel]:
    """One per mark; the best other is the one with the least geometric mean at that mark, in these very runs."""
    drawn_one = _geometric(one.resampled, axis=1)
    drawn = np.stack([_geometric(o.resampled, axis=1) for o in others])
    found = []
    for i, mark in enumerate(one.marks):
        best = min(range(len(others)), key=lambda o: others[o].mean[i])
        value = float(one.mean[i] / others[best].mean[i])
        fixed = _interval(value, drawn_one[:, i] / drawn[best, :, i])
        found.append(Duel(mark, others[best].name, fixed, _interval(value, drawn_one[:, i] / drawn[:, :, i].min(axis=0))))
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
    for space in range(len(one.groups)):
        means = np.stack([o.ratios[space].mean(axis=0) for o in others])
        mine = one.ratios[space].mean(axis=0)
        for i, mark in enumerate(one.marks):
            best = int(means[:, i].argmin())
            if mine[i] > means[best, i]:
                drawn = one.resampled[:, space, i] / others[best].resampled[:, space, i]
                found.append(Loss(space, mark, others[best].name, _interval(float(mine[i] / means[best, i]), drawn)))
    return found


def standings(groups: Mapping[tuple[str, str], Sequence[Group]], marks: Sequence[int]) -> list[Standing]:
    """One per (name, origin), the best at the middle mark first."""
    made = [Standing(name, origin, g, marks) for (name, origin), g in groups.items()]
    return sorted(made, key=lambda s: s.mean[len(marks) // 2])


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
