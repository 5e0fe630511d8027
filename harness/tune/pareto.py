"""The front between time and energy: what no other configuration beats in the one without losing in the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from klab.harness.plan.trial import Trial
from klab.harness.store.query import age
from klab.harness.store.result import Result, Status
from klab.harness.tune.objective import Interval, energy, latency
from klab.kernels.contract import Json, canonical_json

# Power differs by some 20% among configurations of one kernel, so one that is slower by more than this cannot save energy by it.
SLACK = 0.15
# An energy takes 6 s and more of the device.
METERED = 8

COLUMNS = ("front", "kernel", "config", "median us", "interval us", "energy J", "interval J", "power W", "beaten by")


@dataclass(frozen=True)
class Point:
    """One configuration: microseconds and joules per launch with their intervals; `joules` is None where it was not measured."""

    kernel: str
    config: dict[str, Json]
    time: Interval
    joules: Interval | None
    reason: str = ""

    @property
    def name(self) -> tuple[str, str]:
        """Who it is."""
        return self.kernel, canonical_json(self.config)

    @property
    def label(self) -> str:
        """Kernel and configuration in one line."""
        return " ".join([self.kernel, *(f"{key}={value}" for key, value in self.config.items())])

    def beats(self, other: Point) -> bool:
        """Clearly better (the intervals lie apart) in time or in energy, and by its median no worse in the other."""
        if self.joules is None or other.joules is None:
            return False
        faster, thriftier = self.time.high < other.time.low, self.joules.high < other.joules.low
        no_worse = self.time.median <= other.time.median and self.joules.median <= other.joules.median
        return no_worse and (faster or thriftier)


@dataclass(frozen=True)
class Front:
    """`points` are on the front, fastest first; `beaten` are not, each with one that beats it; `unmetered` have no energy."""

    points: tuple[Point, ...]
    beaten: tuple[tuple[Point, Point], ...]
    unmetered: tuple[Point, ...]

    def to_json(self) -> list[dict[str, Json]]:
        """One object per configuration, for JSON lines."""
        by = {point.name: winner for point, winner in self.beaten}
        rows: list[dict[str, Json]] = []
        for state, points in (("front", self.points), ("beaten", [p for p, _ in self.beaten]), ("no energy", self.unmetered)):
            for point in points:
                joules = point.joules
                rows.append(
                    {
                        "type": "pareto",
                        "state": state,
                        "kernel": point.kernel,
                        "config": point.config,
                        "median_us": point.time.median,
                        "interval_us": [point.time.low, point.time.high],
                        "energy_j": joules and joules.median,
                        "interval_j": [joules.low, joules.high] if joules else None,
                        "beaten_by": by[point.name].label if point.name in by else None,
                        "reason": point.reason,
                    }
                )
        return rows

    def table(self) -> list[tuple[object, ...]]:
        """Rows under COLUMNS, for people."""
        rows: list[tuple[object, ...]] = []
        for row in self.to_json():
            joules, span = row["energy_j"], row["interval_j"]
            rows.append(
                (
                    "*" if row["state"] == "front" else "",
                    row["kernel"].partition("/")[2],
                    " ".join(f"{key}={value}" for key, value in row["config"].items()) or "-",
                    f"{row['median_us']:.5g}",
                    f"{row['interval_us'][0]:.5g}..{row['interval_us'][1]:.5g}",
                    f"{joules:.4g}" if joules is not None else row["reason"] or "not measured",
                    f"{span[0]:.4g}..{span[1]:.4g}" if span else "",
                    f"{joules / row['median_us'] * 1e6:.0f}" if joules is not None else "",
                    row["beaten_by"] or "",
                )
            )
        return rows


def points_of(results: Iterable[Result]) -> list[Point]:
    """One point per configuration of ONE problem from its ok rows: of the newest with an energy, else of the newest with a time.

    A clock or power limit that was set for a row is shown as part of its configuration.
    """
    found: dict[tuple[str, str], Point] = {}
    for row in sorted((r for r in results if r.status is Status.OK), key=age):
        time, joules = latency(row), energy(row)
        if time is None:
            continue
        setting = {name: row.policy[name] for name in ("sm_clock_mhz", "power_limit_w") if row.policy.get(name)}
        point = Point(row.kernel, {**row.config, **setting}, time, joules, "" if joules else row.energy_reason)
        old = found.get(point.name)
        if old is None or joules is not None or old.joules is None:
            found[point.name] = point
    return sorted(found.values(), key=lambda p: (p.time.median, p.name))


def front_of(points: Sequence[Point]) -> Front:
    """Who is on the front. One without energy is neither on it nor beaten: what was not measured is not zero."""
    metered = [point for point in points if point.joules is not None]
    on = [point for point in metered if not any(other.beats(point) for other in metered)]
    beaten = [(point, next(other for other in [*on, *metered] if other.beats(point))) for point in metered if point not in on]
    return Front(
        tuple(sorted(on, key=lambda p: (p.time.median, p.name))),
        tuple(beaten),
        tuple(point for point in points if point.joules is None),
    )


def worth_metering(trials: Sequence[Trial], results: Iterable[Result], *, slack: float = SLACK, limit: int = METERED) -> list[Trial]:
    """The same trials with energy wanted, for those of ONE problem near its time front: at most `slack` slower than the fastest.

    The fastest `limit` of them; the fastest library is among them wherever it is near. Slower ones are not worth 6 s and more of the
    device each.
    """
    found: dict[str, Result] = {}
    for row in results:
        if row.status is Status.OK and latency(row) is not None:
            found[row.key] = row
    times = {trial.key: interval for trial in trials if trial.key in found and (interval := latency(found[trial.key])) is not None}
    best = min(times.values(), key=lambda t: t.median, default=None)
    if best is None:
        return []
    near = [t for t in trials if t.key in times and times[t.key].low <= best.high * (1.0 + slack)]
    near.sort(key=lambda t: (times[t.key].median, t.key))
    library = next((t for t in near if found[t.key].library), None)
    chosen = near[:limit] if library is None or library in near[:limit] else [*near[: limit - 1], library]
    return [trial.with_policy(energy=True) for trial in chosen]
