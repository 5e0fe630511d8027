"""Which earlier nights a series is held against: those of its epoch that share tonight's anchor, on this device where it has enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from klab.harness.store.result import Status
from klab.harness.watch.rule import Rule
from klab.harness.watch.series import Metric, Point

# Series of like duration have like noise (p80 - p20 over the median: 4-8% below 50 us, 2%, 0.5-0.9%, 0.1% above 1 ms; 1,649 public rows).
DURATIONS_US = (50.0, 200.0, 1000.0)
# With so many devices in its nights, the noise of a series holds what devices differ by.
DEVICES_IN_NOISE = 3
# The median of so many nights says what an anchor takes, to half a night's deviation.
FEWEST_ANCHORS = 3
# Nights of different epochs are so far apart that no difference is taken between them (levels.slow_share reaches over 20).
GAP = (math.nan,) * 20


@dataclass(frozen=True)
class Basis:
    """The earlier points that count for a series tonight; all numbers are logarithms.

    level: of the nights that its reference may come from, which are of the points `kept`; `least` of them are needed. noise: of all nights
    that tell its noise, NaN between epochs. before: of the last nights of the epoch before. cycles: of the nights of `level` that have
    them. pooled: the nights of other devices count, as this one has too few; spread: what two devices may differ by, where the noise does
    not hold it yet. process: the variance of one process, and `processes` how many a night usually has. group: who has like noise.
    """

    point: Point
    earlier: Sequence[Point]
    anchored: bool
    pooled: bool
    level: tuple[float, ...]
    kept: tuple[Point, ...]
    noise: tuple[float, ...]
    before: tuple[float, ...]
    cycles: tuple[float, ...]
    least: int
    group: str
    floor: float
    spread: float
    process: float
    processes: int

    @property
    def tonight(self) -> float:
        """The logarithm of tonight's value."""
        return log_of(values_of(self.point, self.anchored))

    @property
    def cycles_tonight(self) -> float:
        """The logarithm of tonight's cycles; NaN without a clock."""
        return log_of(self.point.cycles)

    @property
    def per_look(self) -> list[float]:
        """The logarithm of each look's median tonight."""
        return looks_of(self.point, self.anchored)

    def lowest_looks(self, looks: int) -> list[float]:
        """Of each night of `level` that was looked at so often, the logarithm of its lowest look; NaN for the others."""
        return [min(looks_of(p, self.anchored), default=math.nan) if p.looks >= looks else math.nan for p in self.kept]


def find_basis(point: Point, earlier: Sequence[Point], rule: Rule, since: int | None, metric: str) -> Basis:
    """What tonight's point is held against. `since`: the index of the first earlier point that counts for the level."""
    usable = [p for p in earlier if p.values and p.status == Status.OK]
    start = 0 if since is None else sum(bool(p.values) and p.status == Status.OK for p in earlier[:since])
    least = rule.least_nights if since is None else 1
    level = [p for p in usable[start:] if p.epoch == point.epoch]
    shared = [p for p in level if p.anchor == point.anchor and math.isfinite(log_of(p.anchored))]
    anchored = math.isfinite(log_of(point.anchored)) and len(shared) >= min(least, len(level))
    if anchored:
        level = shared if len(shared) == len(level) else _beside(point.anchor, level)
    same = [p for p in level if p.device_uuid == point.device_uuid]
    pooled = len(same) < min(least, len(level))
    spread = 0.0
    if not pooled:
        level = same
    elif len({p.device_uuid for p in level}) < DEVICES_IN_NOISE:
        spread = rule.device_spread_anchored if anchored else rule.device_spread
    told = [p for p in usable if not anchored or (p.anchored and p.anchor == point.anchor)]
    told = [p for p in told if pooled or p.device_uuid == point.device_uuid or p.epoch != point.epoch]
    noise: list[float] = []
    before: list[float] = []
    scatter: list[float] = []
    last: Point | None = None
    for p in told:
        values = values_of(p, anchored)
        value = log_of(values)
        if not math.isfinite(value):
            continue
        new = last is not None and (p.epoch != last.epoch or (not pooled and p.device_uuid != last.device_uuid))
        noise.extend((*GAP, value) if new else (value,))
        if p.epoch != point.epoch:
            before = [value] if new else [*before, value]
        if math.isfinite(variance := scatter_of(values)):
            scatter.append(variance)
        last = p
    kept = [p for p in level if math.isfinite(log_of(values_of(p, anchored)))]
    cycles = [log_of(p.cycles) for p in kept] if point.cycles and metric == Metric.TIME else []
    bucket = sum((point.value or 0.0) >= limit for limit in DURATIONS_US) if metric == Metric.TIME else 0
    return Basis(
        point=point,
        earlier=earlier,
        anchored=anchored,
        pooled=pooled,
        level=tuple(log_of(values_of(p, anchored)) for p in kept),
        kept=tuple(kept),
        noise=tuple(noise),
        before=tuple(before[-rule.window :]),
        cycles=tuple(c for c in cycles if math.isfinite(c)),
        least=least,
        group=f"{metric} {anchored} {bucket}",
        floor=rule.floor_of(metric),
        spread=spread,
        # Half of the nights scatter less than this; a chi-squared variable has its median below its mean.
        process=middle(scatter) / _MEDIAN_OF_VARIANCE.get(len(kept[-1].values) if kept else 1, 1.0) if scatter else 0.0,
        processes=int(middle([len(values_of(p, anchored)) for p in kept])) if kept else 1,
    )


def _beside(anchor: str, level: Sequence[Point]) -> list[Point]:
    """The nights of this anchor, and those of others as if this one had been beside them; those that have none are left out.

    By what the usual times of the two differ by on that device. Else a change of the anchor would make a standing regression the new level.
    """
    times: dict[tuple[str, str], list[float]] = {}
    for p in level:
        if math.isfinite(time := log_of(p.values) - log_of(p.anchored)):
            times.setdefault((p.device_uuid, p.anchor), []).append(time)
    found = []
    for p in level:
        here, there = times.get((p.device_uuid, anchor), ()), times.get((p.device_uuid, p.anchor), ())
        if not math.isfinite(log_of(p.anchored)):
            continue
        if p.anchor == anchor:
            found.append(p)
        elif min(len(here), len(there)) >= FEWEST_ANCHORS:
            factor = math.exp(middle(there) - middle(here))
            found.append(replace(p, anchored=tuple(v * factor for v in p.anchored), anchor=anchor))
    return found


# Median over mean of the sample variance of so many normal values.
_MEDIAN_OF_VARIANCE = {2: 0.455, 3: 0.693, 4: 0.789, 5: 0.839, 6: 0.870, 7: 0.891, 8: 0.907, 9: 0.918}


def values_of(point: Point, anchored: bool) -> tuple[float, ...]:
    """What is compared over the nights."""
    return point.anchored if anchored else point.values


def same_source(one: Point, other: Point) -> bool:
    """Was the same kernel measured, from the same source, in the same configuration?"""
    return (one.kernel, one.source_digest, dict(one.config)) == (other.kernel, other.source_digest, dict(other.config))


def looks_of(point: Point, anchored: bool) -> list[float]:
    """The logarithm of each look's median. Looks had as many processes each, or nearly (some may have failed)."""
    values = values_of(point, anchored)
    looks = max(1, min(point.looks, len(values)))
    edges = [round(len(values) * n / looks) for n in range(looks + 1)]
    return [log for a, b in pairwise(edges) if math.isfinite(log := log_of(values[a:b]))]


# Looks and simulated nights ask for the same points again and again.
@lru_cache(maxsize=1 << 16)
def log_of(values: tuple[float, ...]) -> float:
    """The logarithm of the median of the positive finite values; NaN without any."""
    kept = [v for v in values if math.isfinite(v) and v > 0]
    return math.log(middle(kept)) if kept else math.nan


@lru_cache(maxsize=1 << 16)
def scatter_of(values: tuple[float, ...]) -> float:
    """The variance of the logarithms; NaN for fewer than two."""
    logs = [math.log(v) for v in values if math.isfinite(v) and v > 0]
    if len(logs) < 2:
        return math.nan
    mean = math.fsum(logs) / len(logs)
    return math.fsum((v - mean) ** 2 for v in logs) / (len(logs) - 1)


def middle(values: Sequence[float]) -> float:
    """The median; NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    half = len(ordered) // 2
    return float(ordered[half]) if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
