"""From the rows of a night to the point of a series."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from klab.harness.measure.anchor import anchored
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status
from klab.harness.watch.looks import FAILED, SKIPPED
from klab.harness.watch.looks import failed as has_failed
from klab.harness.watch.series import Metric, Point

# The device of a point whose processes ran on several, none of which has most of them.
SEVERAL = "several"

Taken = Sequence[Sequence[Result]]
"""The rows of a trial: one list per look, in the order of the processes."""


@dataclass(frozen=True)
class Found:
    """A point, or why there is none. `once`: a failure that was not met again; `notes`: what befell contestants that hold no role.

    `refused`: measured, but its energy cannot be told. `cut`: the time was up before there were enough processes.
    """

    point: Point | None
    reason: str = ""
    once: str = ""
    notes: tuple[str, ...] = ()
    refused: bool = False
    cut: bool = False


@dataclass(frozen=True)
class _Holder:
    """One contestant tonight. `status` is ok where there are values to compare, and `rows` are then those with a value, by look."""

    trial: Trial
    status: Status
    reason: str
    rows: tuple[tuple[Result, ...], ...]
    metric: str
    failures: int = 0

    @property
    def all_rows(self) -> list[Result]:
        """Of every look."""
        return [row for look in self.rows for row in look]

    @property
    def value(self) -> float:
        """The median over its processes; infinite without any."""
        found = [v for row in self.all_rows if (v := value_of(row, self.metric)) is not None]
        return statistics.median(found) if found else math.inf


def value_of(row: Result, metric: str) -> float | None:
    """A row's value in a metric: microseconds or joules per launch."""
    return row.energy_j if metric == Metric.ENERGY else row.median_us


def find_point(rows: Sequence[tuple[Trial, Taken]], metric: str, anchor: str, *, processes: int, last_kernel: str = "") -> Found:
    """The point of a series from the rows of those who may hold its role.

    The lowest median holds it; but where the kernel that held it last night failed, that failure is the point. `processes`: how many a
    look should have; a first look with less than half of them gives no point, a later one that lacks more than one is left out.
    Where the rows are of several devices, those of the one with most of them count; all of them where none has.
    """
    holders = [_holder(trial, taken, metric, processes) for trial, taken in rows if any(taken)]
    if not holders:
        return Found(None)
    fine = sorted((h for h in holders if h.status is Status.OK and h.rows), key=lambda h: (h.value, h.trial.kernel))
    failed = [h for h in holders if h.status in FAILED and not h.reason.startswith(SKIPPED)]
    looks = max(sum(bool(look) for look in taken) for _, taken in rows)
    fallen = next((h for h in failed if h.trial.kernel == last_kernel or not fine), None)
    if fallen is not None:
        return Found(_point(fallen.all_rows[-1], fallen.status, fallen.reason, looks))
    notes = tuple(f"{h.trial.kernel} on {h.trial.problem.label()}: {h.status.value}: {h.reason}" for h in failed)
    if not fine:
        if skipped := next((h.reason for h in holders if h.reason.startswith(SKIPPED)), ""):
            return Found(None, skipped, notes=notes)
        worst = next((h for h in holders if h.status is not Status.OK), holders[0])
        last = next(row for _, taken in rows for look in taken for row in look)
        point = _point(last, worst.status, worst.reason, looks)
        return Found(point, worst.reason, notes=notes, refused=metric == Metric.ENERGY and worst.status is Status.OK)
    best = fine[0]
    if 2 * len(best.rows[0]) < processes:
        return Found(None, f"measured in {len(best.rows[0])} of {processes} processes when the time was up", notes=notes, cut=True)
    return Found(_measured(best, anchor), once=best.reason if best.failures else "", notes=notes)


def _holder(trial: Trial, taken: Taken, metric: str, processes: int) -> _Holder:
    rows = [row for look in taken for row in look]
    failed = [row for row in rows if has_failed(row)]
    good = [row for row in rows if row.status is Status.OK and value_of(row, metric) is not None]
    count = Counter(row.device_uuid for row in good)
    here = max(count, key=lambda uuid: count[uuid], default="")
    mixed = 2 * count[here] <= len(good)
    looks = [tuple(row for row in look if row in good and (mixed or row.device_uuid == here)) for look in taken]
    # Whole looks; the first also where the time was up, but not where a failure cut it short.
    kept = tuple(look for n, look in enumerate(looks) if look and (len(look) >= processes - 1 or (not n and not failed)))
    wrong = next((row for row in failed if row.status is Status.INCORRECT), None)
    if wrong is not None or (failed and (len(failed) > 1 or not kept)):
        row = wrong or failed[-1]
        times = f"in {len(failed)} of {len(rows)} processes: " if len(rows) > 1 else ""
        return _Holder(trial, row.status, f"{times}{row.reason}", ((row,),), metric, len(failed))
    if kept:
        once = f"{failed[0].status.value} in 1 of {len(rows)} processes and not again: {failed[0].reason}" if failed else ""
        return _Holder(trial, Status.OK, once, kept, metric, len(failed))
    last = rows[-1]
    if last.status is Status.OK:
        why = (last.energy_reason or "no energy was told") if metric == Metric.ENERGY else "too few rounds for a time"
        return _Holder(trial, Status.OK, why, (), metric)
    return _Holder(trial, last.status, last.reason, (), metric)


def _measured(holder: _Holder, anchor: str) -> Point:
    """A row without the anchor is left out where others have it, so that entry i of every list is of the same process."""
    rows, timed = holder.all_rows, holder.metric == Metric.TIME
    ratios = [_median(anchored(row, anchor)) if anchor and timed else None for row in rows]
    if 2 * sum(ratio is not None for ratio in ratios) > len(rows):
        rows = [row for row, ratio in zip(rows, ratios, strict=True) if ratio is not None]
    else:
        ratios = []
    cycles = [cycles_of(row) for row in rows] if timed else [None]
    return dataclasses.replace(
        _point(rows[-1], Status.OK, holder.reason, len(holder.rows)),
        values=tuple(v for row in rows if (v := value_of(row, holder.metric)) is not None),
        anchored=tuple(ratio for ratio in ratios if ratio is not None),
        cycles=() if None in cycles else tuple(c for c in cycles if c is not None),
        anchor=anchor if ratios else "",
        device_uuid=rows[-1].device_uuid if len({row.device_uuid for row in rows}) == 1 else SEVERAL,
    )


def _point(row: Result, status: Status, reason: str, looks: int) -> Point:
    """A point without values: what a row says of who was measured where."""
    return Point(
        status=status.value,
        reason=reason,
        looks=looks,
        kernel=row.kernel,
        config=dict(row.config),
        source_digest=row.source_digest,
        device_uuid=row.device_uuid,
        epoch=row.epoch,
        error=row.error if row.error is not None and math.isfinite(row.error) else None,
    )


def cycles_of(row: Result) -> float | None:
    """The median over the counting rounds of time times SM clock (microseconds x MHz); None where a clock was not read."""
    pairs = [(us, mhz) for us, mhz, mark in zip(row.samples_us, row.clocks_mhz, row.marked, strict=False) if not mark]
    found = [us * mhz for us, mhz in pairs if mhz]
    return _median(found) if found and 2 * len(found) > len(pairs) else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
