"""A series over the nights as the page of a night shows it: its values, where an epoch began, and where its level changed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from klab.harness.store.result import Status
from klab.harness.watch.series import Night, Point, Series, Verdict
from klab.harness.watch.wording import commit_of, line
from klab.kernels.contract import Json


class Change(Protocol):
    """What a historian of change points says: the level changed before the `index`-th value, by `ratio` (`low` to `high`)."""

    @property
    def index(self) -> int:
        """The first value of the new level."""

    @property
    def ratio(self) -> float:
        """The new level over the old one."""

    @property
    def low(self) -> float:
        """Its 95% interval."""

    @property
    def high(self) -> float:
        """Its 95% interval."""


# Nights of a level below which its median has no interval worth the name, nor a change from or to it: levels are looked for in four nights
# or more, so one that short may be shorter in truth and have nights of its neighbour in it.
LEAST_FOR_INTERVAL = 6
Level = tuple[int, int, float]
Historian = Callable[[Sequence[float]], Sequence[Change]]


@dataclass(frozen=True)
class Place:
    """One night of a curve: the `night`-th of those told, of the time `at`. Values in the metric's unit.

    value: the median over the processes as measured. judged: what was compared over the nights, `low` and `high` the least and the most of
    the processes; where that is a share of an anchor's time, it is scaled back to the unit by the usual time of the anchor in its epoch.
    `epoch` and `anchor` are what two places must share to be compared. NaN where nothing was measured.
    """

    night: int
    at: str
    commit: str
    call: str
    reason: str
    value: float
    judged: float
    low: float
    high: float
    epoch: str
    anchor: str
    kernel: str
    code: str
    device: str
    looks: int
    tonight: bool = False


@dataclass(frozen=True)
class Step:
    """A change of level: at the first night with the new one. `why` lists what else changed between the two nights.

    low, high: the 95% interval of the ratio. None where a level on either side has fewer than LEAST_FOR_INTERVAL nights: the change may be
    larger in truth. None for a new epoch.
    """

    at: str
    index: int
    ratio: float
    low: float | None
    high: float | None
    commits: tuple[str, str]
    why: tuple[str, ...]
    new_epoch: bool


@dataclass(frozen=True)
class Curve:
    """All of a series. `levels` are (first place, last place, median judged value) of the stretches between the steps."""

    series: Series
    places: tuple[Place, ...]
    steps: tuple[Step, ...]
    levels: tuple[Level, ...]

    @property
    def measured(self) -> list[int]:
        """The places that have a value."""
        return [n for n, place in enumerate(self.places) if math.isfinite(place.judged)]


def curves(nights: Sequence[Night], changes: Historian) -> dict[str, Curve]:
    """The curves of the last of these nights (oldest first), by the identity of their series."""
    if not nights:
        return {}
    found: dict[str, list[tuple[int, Verdict]]] = {one.series.identity: [] for one in nights[-1].verdicts}
    for n, night in enumerate(nights):
        for one in night.verdicts:
            if one.series.identity in found:
                found[one.series.identity].append((n, one))
    return {identity: _curve(told, nights, changes) for identity, told in found.items()}


def _curve(told: Sequence[tuple[int, Verdict]], nights: Sequence[Night], changes: Historian) -> Curve:
    points = [one.point or Point(status="missing") for _, one in told]
    factors = _factors(points)
    places = tuple(
        _place(n, nights, one, point, factors.get((point.epoch, point.anchor), 1.0)) for (n, one), point in zip(told, points, strict=True)
    )
    epochs: dict[str, Json] = {}
    for night in nights:
        epochs |= night.epochs
    steps, levels = _steps(places, epochs, changes)
    return Curve(told[-1][1].series, places, steps, levels)


def _factors(points: Sequence[Point]) -> dict[tuple[str, str], float]:
    """By epoch and anchor: the usual time of the anchor, in the unit of the values."""
    shares: dict[tuple[str, str], list[float]] = {}
    for point in points:
        value, judged = point.value, point.anchored_value
        if value and judged:
            shares.setdefault((point.epoch, point.anchor), []).append(value / judged)
    return {key: statistics.median(found) for key, found in shares.items()}


def _place(n: int, nights: Sequence[Night], one: Verdict, point: Point, factor: float) -> Place:
    night = nights[n]
    measured = point.status == Status.OK and point.value is not None and point.judged_value is not None
    scale = factor if point.anchored else 1.0
    inside = [scale * v for v in point.anchored or point.values if math.isfinite(v)] if measured else [math.nan]
    return Place(
        n, night.at, commit_of(night), one.call, one.reason,
        (point.value or math.nan) if measured else math.nan, statistics.median(inside), min(inside), max(inside),
        point.epoch, point.anchor if point.anchored else "", point.kernel,
        " ".join((point.source_digest, *(f"{k}={v}" for k, v in sorted(point.config.items())))),
        point.device_uuid, point.looks, night is nights[-1],
    )  # fmt: skip


def _steps(places: Sequence[Place], epochs: Mapping[str, Json], changes: Historian) -> tuple[tuple[Step, ...], tuple[Level, ...]]:
    """Change points within each epoch, and every border of two epochs."""
    steps: list[Step] = []
    levels: list[Level] = []
    runs = _runs(places)
    for run in runs:
        values = [places[n].judged for n in run]
        found = {c.index: c for c in changes(values) if 0 < c.index < len(run)}
        borders = [0, *sorted(found), len(run)]
        for first, last in itertools.pairwise(borders):
            levels.append((run[first], run[last - 1], statistics.median(values[first:last])))
        for (first, index), (_, last) in itertools.pairwise(itertools.pairwise(borders)):
            before, after, change = places[run[index - 1]], places[run[index]], found[index]
            why = _differences(before, after, epochs)
            low, high = (change.low, change.high) if min(index - first, last - index) >= LEAST_FOR_INTERVAL else (None, None)
            steps.append(Step(after.at, run[index], change.ratio, low, high, (before.commit, after.commit), why, False))
    for old, new in itertools.pairwise(runs):
        before, after = places[old[-1]], places[new[0]]
        # Ten nights on either side: a level, not a night.
        ratio = statistics.median(places[n].value for n in new[:10]) / statistics.median(places[n].value for n in old[-10:])
        why = _differences(before, after, epochs)
        steps.append(Step(after.at, new[0], ratio, None, None, (before.commit, after.commit), why, True))
    return tuple(sorted(steps, key=lambda step: step.index)), tuple(levels)


def _runs(places: Sequence[Place]) -> list[list[int]]:
    """The places with a positive value, cut where the epoch or the anchor changes."""
    runs: list[list[int]] = []
    for n, place in enumerate(places):
        if not (math.isfinite(place.judged) and place.judged > 0):
            continue
        before = places[runs[-1][-1]] if runs else None
        if before is None or (before.epoch, before.anchor) != (place.epoch, place.anchor):
            runs.append([])
        runs[-1].append(n)
    return runs


def _differences(before: Place, after: Place, epochs: Mapping[str, Json]) -> tuple[str, ...]:
    """What else is not as it was; nothing of it need be the cause."""
    found = []
    if before.epoch != after.epoch:
        found += epoch_changes(epochs.get(before.epoch), epochs.get(after.epoch)) or ["another epoch"]
    if before.anchor != after.anchor:
        found.append(f"anchor {before.anchor or 'none'} to {after.anchor or 'none'}")
    if before.kernel != after.kernel:
        found.append(f"kernel {before.kernel} to {after.kernel}")
    elif before.code != after.code:
        found.append("the kernel's code or configuration")
    if before.device != after.device:
        found.append("the device")
    return tuple(line(one, 200) for one in found)


def epoch_changes(before: Json, after: Json) -> list[str]:
    """`driver 580.65 to 580.95` for every fact in which two epochs differ."""
    old, new = (dict(one) if isinstance(one, Mapping) else {} for one in (before, after))
    differing = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [line(f"{key} {old.get(key, 'unknown')} to {new.get(key, 'unknown')}", 120) for key in differing]
