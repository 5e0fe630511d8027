"""The tables behind the figures of history: a row per series, and of one series a row per night."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from klab.harness.report.curve import LEAST_FOR_INTERVAL, Curve, Level, Place, Step
from klab.harness.report.subject import Occurrence, Story
from klab.harness.watch.series import Metric, Series
from klab.harness.watch.wording import line, name_of

if TYPE_CHECKING:
    import pandas as pd

# Nights back within which a change of level is news.
LATELY = 14


@dataclass(frozen=True)
class Known:
    """What the rest of the page knows of problems by their key: where they occur, and their dtype."""

    occurs: dict[str, tuple[Occurrence, ...]]
    dtypes: dict[str, str]

    @classmethod
    def of(cls, story: Story, frame: pd.DataFrame) -> Self:
        """From the story and the rows of `frames.standing`."""
        return cls(dict(story.occurs), dict(zip(frame["problem_key"], frame["dtype"], strict=True)) if len(frame) else {})

    def dims(self, series: Series) -> dict[str, object]:
        """The columns of a series that do not change from night to night; a phase or a dtype that nobody knows is empty."""
        places = self.occurs.get(series.problem_key, ())
        return {
            "chip": series.chip,
            "model": tuple(dict.fromkeys([place.model for place in places if place.model] or series.models)),
            "phase": tuple(dict.fromkeys(place.phase for place in places)),
            "operator": series.operator,
            "dtype": self.dtypes.get(series.problem_key, ""),
        }


def overview(several: Sequence[Curve], known: Known) -> pd.DataFrame:
    """A row per series, in the order given.

    Columns: chip, model, phase, operator, dtype, kernel (of the last night with a value), series; verdict and reason of the last night;
    level with level_low and level_high (95% interval of the median of its nights; NaN below six of them) in `unit` (us or J),
    level_nights, level_since; of the last change within an epoch: changed_at, change_percent, change_low_percent, change_high_percent
    (95%; NaN where one of its levels has fewer than six nights), between_commits, changed_with; epoch_since: when the epoch of the last
    night began, "" where there is one epoch only.
    """
    import pandas as pd

    rows = []
    for curve in several:
        level, step = level_now(curve), last_change(curve)
        first, last, value = level or (0, 0, math.nan)
        low, high = level_interval(curve, level)
        began = [one.at for one in curve.steps if one.new_epoch]
        rows.append(
            known.dims(curve.series)
            | {
                "kernel": _bare(curve.places[curve.measured[-1]]) if curve.measured else _bare(curve.places[-1]),
                "series": name_of(curve.series),
                "verdict": curve.places[-1].call,
                "reason": line(curve.places[-1].reason, 200),
                "level": value,
                "level_low": low,
                "level_high": high,
                "unit": Metric(curve.series.metric).unit,
                "level_nights": len(values_of(curve, first, last)) if level else 0,
                "level_since": curve.places[first].at if level else "",
                "changed_at": step.at if step else "",
                "change_percent": _percent(step.ratio if step else None),
                "change_low_percent": _percent(step.low if step else None),
                "change_high_percent": _percent(step.high if step else None),
                "between_commits": " to ".join(dict.fromkeys(step.commits)) if step else "",
                "changed_with": "; ".join(step.why) if step else "",
                "epoch_since": began[-1] if began else "",
            }
        )
    return pd.DataFrame(rows)


def nights_of(curve: Curve, known: Known) -> pd.DataFrame:
    """A row per night that tells of the series, oldest first.

    Columns: chip, model, phase, operator, dtype, kernel; night (UTC), commit, verdict, reason (of every verdict but ok); value as measured,
    judged (against the anchor, in the same unit) with the least and the most of the processes, unit (us or J), looks, epoch. NaN: no value.
    """
    import pandas as pd

    steady = known.dims(curve.series)
    unit = Metric(curve.series.metric).unit
    rows = [
        steady
        | {
            "kernel": _bare(place),
            "night": line(place.at, 40),
            "commit": place.commit,
            "verdict": place.call,
            "reason": "" if place.call == "ok" else line(place.reason, 120),
            "value": place.value,
            "judged": place.judged,
            "least": place.low,
            "most": place.high,
            "unit": unit,
            "looks": place.looks,
            "epoch": line(place.epoch, 40),
        }
        for place in curve.places
    ]
    return pd.DataFrame(rows)


def level_now(curve: Curve) -> Level | None:
    """The last of the curve's levels; None where nothing was measured."""
    return max(curve.levels, key=lambda level: level[1], default=None)


def level_interval(curve: Curve, level: Level | None) -> tuple[float, float]:
    """The 95% interval of the median of a level's nights; NaN where they are too few.

    Between two of the nights in order, so far out that the median is beyond them in 5 of 100 cases at most, however nights are
    distributed: a bootstrap of so few nights holds in 85 to 93 of 100.
    """
    values = sorted(values_of(curve, level[0], level[1])) if level else []
    if len(values) < LEAST_FOR_INTERVAL:
        return (math.nan, math.nan)
    beyond = list(itertools.accumulate(2 * math.comb(len(values), n) / 2 ** len(values) for n in range(len(values) // 2)))
    out = bisect.bisect_right(beyond, 0.05) - 1
    return values[out], values[-1 - out]


def values_of(curve: Curve, first: int, last: int) -> list[float]:
    """The judged values from one place to another that are times or energies."""
    judged = [place.judged for place in curve.places[first : last + 1]]
    return [value for value in judged if math.isfinite(value) and value > 0]


def last_change(curve: Curve) -> Step | None:
    """The last change of level within an epoch."""
    return next((step for step in reversed(curve.steps) if not step.new_epoch), None)


def changed_lately(curve: Curve) -> int | None:
    """How many of its nights ago the level changed within an epoch, where that is within LATELY."""
    step = last_change(curve)
    ago = len(curve.places) - step.index if step else LATELY + 1
    return ago if ago <= LATELY else None


def _bare(place: Place) -> str:
    return place.kernel.partition("/")[2] or place.kernel


def _percent(ratio: float | None) -> float:
    return math.nan if ratio is None or not math.isfinite(ratio) else 100 * (ratio - 1)
