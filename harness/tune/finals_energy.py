"""The second half of a final by another objective than latency: whose energy is worth measuring, and who wins by the value."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from klab.harness.measure.contest import GROUP_SLOTS
from klab.harness.measure.stats import mean_interval
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result
from klab.harness.tune.finals_rule import ALPHA, CLEAR, Race, Verdict
from klab.harness.tune.objective import J_PER_KWH, US_PER_HOUR, Interval, Objective
from klab.harness.tune.pareto import SLACK

# An energy's interval within one window does not hold what differs from window to window (0.3% and more: heat, clocks, addresses), so the
# windows are the replicates. Of three, Student's t would need a difference of ten times their spread.
WINDOWS = 5
LEAST_WINDOWS = 4
# Of the time of a final that needs energy, so much is for the times; windows take longer.
TIMES_SHARE = 1 / 3

Window = Mapping[str, Interval]
"""Contender -> its value by the objective in one window."""


@dataclass(frozen=True)
class Value:
    """One contender's value over another's, with an interval at the level that was asked for (infinite from too few windows)."""

    ratio: float
    low: float
    high: float

    @property
    def lower(self) -> bool:
        """Clearly: the whole interval lies below 1 by more than what is worth claiming."""
        return self.high < 1.0 - CLEAR


@dataclass(frozen=True)
class ByValue:
    """`winner` is None where nothing has a value. `why` is as in a Verdict; "faster" means lower than the default, "not confirmed" that
    there were too few windows to say (`windows` of the default and another at best).

    `values` are the medians over the windows with their range; `to_default` is over the default's value.
    """

    winner: str | None
    ties: tuple[str, ...]
    why: str
    values: Window
    to_default: Mapping[str, Value]
    windows: int = 0


def near_leader(verdict: Verdict, default: str | None, room: int = GROUP_SLOTS) -> list[str]:
    """The leader, the default, and the nearest of the others that may lie within SLACK of the leader by time: `room` (2 or more) in all."""
    found = {s.name: s.to_leader for s in verdict.standings if s.state in ("winner", "tie", "slower")}
    ratios = {name: (1.0, 1.0) if ratio is None else (ratio.ratio, ratio.low) for name, ratio in found.items()}
    near = sorted((name for name, (_, low) in ratios.items() if low <= 1.0 + SLACK), key=lambda name: ratios[name])
    chosen = near[:room]
    if default in found and default not in chosen:
        chosen = [*near[: room - 1], default]
    return chosen


def window_trials(near: Sequence[str], names: Mapping[str, Trial], seed: int, number: int, rounds: int) -> list[Trial]:
    """One window: each once with energy, with data of its own, in an order that turns round from window to window."""
    changes: dict[str, object] = {"seed": seed + number, "min_rounds": rounds, "max_rounds": rounds, "energy": True}
    return [names[name].with_policy(**changes) for name in (near if number % 2 == 0 else near[::-1])]


def by_value(race: Race, objective: Objective, default: str, windows: Sequence[Mapping[str, Result]], challengers: int) -> ByValue:
    """The default, unless another's value is clearly lower: in an error of 5% over all `challengers`, half of it for the times of the race
    and half for the energies of the windows. Of several the lowest and those that tie with it, from which the race picks.

    windows: per window the rows that came through, by contender; those of contenders that failed do not count.
    """
    alive = [name for name in race.contenders if name not in race.failed and any(name in window for window in windows)]
    values = {name: value for name in alive if (value := _over_windows(objective, [w[name] for w in windows if name in w])) is not None}
    if not values:
        return ByValue(None, (), "nobody", values, {})
    compare = _Comparison(race, objective, windows, ALPHA / max(1, challengers) / 2)
    if default in race.failed:
        leader = min(values, key=lambda name: (values[name].median, name))
        tied = [name for name in values if name == leader or not compare.lower(leader, name)]
        # Without windows enough everybody ties, however high: then the lowest, and not the simplest.
        winner = race.pick(tied) if len(windows) >= LEAST_WINDOWS else leader
        return ByValue(winner, _first(tied, winner), "no default", values, {}, len(windows))
    found = {name: ratio for name in values if name != default and (ratio := compare(name, default)) is not None}
    common = max((compare.windows_of(name, default) for name in found), default=0) if challengers else len(windows)
    lower = [name for name in found if found[name].lower]
    if not lower:
        tied = [name for name in values if name != default and not compare.lower(default, name)]
        why = "tie" if common >= LEAST_WINDOWS else "not confirmed"
        return ByValue(default, (default, *tied), why, values, found, common)
    leader = min(lower, key=lambda name: (found[name].ratio, name))
    tied = [name for name in values if name != default and (name == leader or not compare.lower(leader, name))]
    winner = race.pick([name for name in tied if name in lower])
    return ByValue(winner, _first(tied, winner), "faster", values, found, common)


def _first(tied: Sequence[str], winner: str) -> tuple[str, ...]:
    return tuple(sorted(tied, key=lambda name: name != winner))


def _over_windows(objective: Objective, rows: Sequence[Result]) -> Interval | None:
    found = [interval for row in rows if (interval := objective.interval(row)) is not None]
    if not found:
        return None
    return Interval(statistics.median(i.median for i in found), min(i.low for i in found), max(i.high for i in found))


@dataclass(frozen=True)
class _Comparison:
    """Of two contenders by the objective; each part (time, energy) errs on either side with `alpha` at most."""

    race: Race
    objective: Objective
    windows: Sequence[Mapping[str, Result]]
    alpha: float

    def windows_of(self, a: str, b: str) -> int:
        return len(self._logs(a, b))

    def lower(self, a: str, b: str) -> bool:
        found = self(a, b)
        return found is not None and found.lower

    def __call__(self, a: str, b: str) -> Value | None:
        """a over b; None where they share no window, or (where time counts) no laps."""
        logs = self._logs(a, b)
        if not logs:
            return None
        mean, low, high = mean_interval(logs, alpha=self.alpha)
        if len(logs) < LEAST_WINDOWS:
            low, high = -math.inf, math.inf
        joules = Value(math.exp(mean), math.exp(low), math.exp(min(high, 700.0)))
        if self.objective.name == "energy":
            return joules
        # The race looked before: of its error that much is left, and half of it is for the energies.
        timed = self.race.evidence.compare(a, b, min(self.race.last_alpha / 2, self.alpha))
        if timed is None:
            return None
        if self.objective.name == "energy-delay":
            return Value(joules.ratio * timed.ratio, joules.low * timed.low, joules.high * timed.high)
        share = self._share_of_time(b)
        if share in (0.0, 1.0):  # nothing of an end that may be infinite
            return Value(timed.ratio, timed.low, timed.high) if share else joules
        parts = [(joules.ratio, timed.ratio), (joules.low, timed.low), (joules.high, timed.high)]
        return Value(*(share * time + (1.0 - share) * energy for energy, time in parts))

    def _logs(self, a: str, b: str) -> list[float]:
        """Per window with both the log of their energies' ratio."""
        both = [(w[a].energy_j, w[b].energy_j) for w in self.windows if a in w and b in w]
        return [math.log(x / y) for x, y in both if x and y and x > 0 and y > 0]

    def _share_of_time(self, name: str) -> float:
        """What the time is of the cost of a contender."""
        rows = [window[name] for window in self.windows if name in window]
        times = [row.median_us for row in rows if row.median_us]
        joules = [row.energy_j for row in rows if row.energy_j]
        assert self.objective.usd_per_hour is not None and self.objective.usd_per_kwh is not None
        time = statistics.median(times) * self.objective.usd_per_hour / US_PER_HOUR if times else 0.0
        energy = statistics.median(joules) * self.objective.usd_per_kwh / J_PER_KWH if joules else 0.0
        return time / (time + energy) if time + energy > 0 else 0.0
