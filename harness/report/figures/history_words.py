"""What the history of series says, in words: the finding of a map of all, and of one series."""

from __future__ import annotations

import math
from collections.abc import Sequence

from klab.harness.report.curve import LEAST_FOR_INTERVAL, Curve, Step
from klab.harness.report.figures.history_table import (
    LATELY,
    changed_lately,
    last_change,
    level_interval,
    level_now,
    values_of,
)
from klab.harness.report.units import energy, energy_interval, fine_time, interval
from klab.harness.watch.changes import SHORTEST
from klab.harness.watch.series import Call, Metric, Night
from klab.harness.watch.wording import change, headline, line, name_of, plural


def map_finding(nights: Sequence[Night], several: Sequence[Curve]) -> str:
    """What the nights of a chip say together; `several` of the series of the last night are looked at."""
    if not nights:
        return ""
    said = [f'The last of {plural(len(nights), "night")}, {line(nights[-1].at, 40)[:10]}, says "{headline(nights[-1])}".']
    if len(several) < len(nights[-1].verdicts):
        said.append(f"The first {len(several)} of {len(nights[-1].verdicts)} series in the order of their verdicts are looked at.")
    if max((len(curve.measured) for curve in several), default=0) < 2 * SHORTEST:
        return " ".join([*said, f"Changes of level are looked for from {2 * SHORTEST} nights on."])
    fresh = [(step, curve) for curve in several if changed_lately(curve) is not None and (step := last_change(curve))]
    if not fresh:
        return " ".join([*said, f"No change of level that lasts {SHORTEST} nights or more was found in the last {LATELY} nights."])
    step, curve = max(fresh, key=lambda one: abs(math.log(one[0].ratio)))
    said.append(f"{len(fresh)} of {len(several)} series changed their level in the last {LATELY} nights.")
    return " ".join([*said, f"The largest change: {name_of(curve.series)}, {_step(step)}."])


def series_finding(curve: Curve) -> str:
    """The level now, its last change with the interval, what else changed then, and the last verdict."""
    parts = [_level(curve), *_changes(curve)]
    last = curve.places[-1]
    if last.call != Call.OK:
        parts.append(f"The last night says {last.call}: {line(last.reason, 300).rstrip('.')}.")
    else:
        parts.append("The last night says ok.")
    return " ".join(parts)


def _level(curve: Curve) -> str:
    level = level_now(curve)
    if level is None:
        return "No night has a value."
    first, last, value = level
    energetic = curve.series.metric == Metric.ENERGY
    values = values_of(curve, first, last)
    low, high = level_interval(curve, level)
    if len(values) >= LEAST_FOR_INTERVAL:
        inside = f"95% interval {energy_interval(low, high) if energetic else interval(low, high)}"
    else:
        inside = f"fewer than {LEAST_FOR_INTERVAL} nights, so no interval"
    now = "is" if curve.places[-1].tonight and math.isfinite(curve.places[-1].judged) else "was"
    since, until = (line(curve.places[n].at, 40)[:10] for n in (first, last))
    told = energy(value) if energetic else fine_time(value)
    return f"The level {now} {told} ({inside}): the median of {plural(len(values), 'night')} from {since} to {until}."


def _changes(curve: Curve) -> list[str]:
    said = []
    step = last_change(curve)
    if step is not None:
        why = f"; with it changed: {'; '.join(step.why)}" if step.why else ""
        commits = " and ".join(dict.fromkeys(step.commits))
        said.append(f"It last changed by {_step(step)}, between the nights of {commits}{why}.")
        if step.low is None:
            said.append(
                f"One of its levels has fewer than {LEAST_FOR_INTERVAL} nights and may be shorter still (they are looked for in "
                f"{SHORTEST} or more): the change is larger then."
            )
    elif len(curve.measured) >= 2 * SHORTEST:
        said.append(f"No change was found that lasts {SHORTEST} nights or more.")
    borders = [one for one in curve.steps if one.new_epoch]
    if borders:
        moved = borders[-1]
        why = f": {'; '.join(moved.why)}" if moved.why else ""
        said.append(f"A new epoch began on {line(moved.at, 40)[:10]} ({change(moved.ratio) or 'no ratio'}, reported and not judged){why}.")
    return said


def _step(step: Step) -> str:
    known = step.low is not None and step.high is not None
    inside = f"95% interval {change(step.low)} to {change(step.high)}" if known else "too few nights for an interval"
    return f"{change(step.ratio)} ({inside}) on {line(step.at, 40)[:10]}"
