"""The front between two things that are both to be small: which marks none beats, and the line that joins them. The page's script
(script/derive_front.js) computes the same again from the rows that a filter leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from klab.harness.report.figures.style import INK, digits, hollow, marks, short
from klab.harness.report.units import energy, interval, percent, time

if TYPE_CHECKING:
    import pandas as pd

NAME = "front"
# Sizes: marks that another beats are there to be compared with, not to be chosen.
UNBEATEN, BEATEN = 11, 6


@dataclass(frozen=True)
class Way:
    """Something to be made small: the column of its median, those of its 95% interval ("" where it has none), its name and its unit
    ("us", "J" or "%").
    """

    median: str
    low: str
    high: str
    name: str
    unit: str

    @property
    def columns(self) -> tuple[str, str, str]:
        """Of the median and of its ends."""
        return self.median, self.low, self.high

    def told(self, row: Any) -> str:
        """The number of a row (its columns as attributes), with its interval where it has one."""
        middle, (low, high) = getattr(row, self.median), self.ends(row)
        if self.unit == "%":
            return f"{percent(middle / 100)} {self.name}"
        if low == high == middle:
            return time(middle) if self.unit == "us" else energy(middle)
        return f"{time(middle)} ({interval(low, high)})" if self.unit == "us" else f"{energy(middle)} ({energy(low)} to {energy(high)})"

    def ends(self, row: Any) -> tuple[float, float]:
        """Low and high of a row; the median where an end is not known."""
        middle = float(getattr(row, self.median))
        low, high = (float(getattr(row, name)) if name else middle for name in (self.low, self.high))
        return (low if math.isfinite(low) else middle), (high if math.isfinite(high) else middle)

    def bars(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The intervals of rows as Plotly's error bars."""
        ends = [(float(getattr(row, self.median)), *self.ends(row)) for row in rows]
        up, down = (max(high - middle, 0.0) for middle, _, high in ends), (max(middle - low, 0.0) for middle, low, _ in ends)
        bars = {"array": digits(up), "arrayminus": digits(down)}
        return {"type": "data", "symmetric": False, "thickness": 1.2, "width": 3, **bars}


def over(top: float, bottom: float) -> float:
    """Their ratio at the worst: an interval that reaches 0 bounds nothing."""
    return float(top) / float(bottom) if bottom > 0 else math.inf


TIME = Way("median_us", "low_us", "high_us", "time", "us")


@dataclass(frozen=True)
class Front:
    """Positions in the frame. `line`: by the medians, no mark is better in both; from left to right. `unbeaten`: nothing beats them."""

    line: tuple[int, ...]
    unbeaten: tuple[int, ...]


def front(frame: pd.DataFrame, x: Way, y: Way) -> Front:
    """The front of the measured rows of a frame; a row that lacks either number is neither on it nor beaten.

    One beats another where it is by its median no worse in both, and clearly better (the intervals lie apart) in one: the rule of
    `klab.harness.tune.pareto`. What others published (column `origin`) does not compete.
    """
    across, across_low, across_high = _numbers(frame, x)
    up, up_low, up_high = _numbers(frame, y)
    able = _able(frame, x, y)
    unbeaten = []
    for n in able:
        no_worse = (across[able] <= across[n]) & (up[able] <= up[n])
        clearly = (across_high[able] < across_low[n]) | (up_high[able] < up_low[n])
        if not (no_worse & clearly).any():
            unbeaten.append(n)
    return Front(line(frame, x, y), tuple(unbeaten))


def line(frame: pd.DataFrame, x: Way, y: Way) -> tuple[int, ...]:
    """The line of the front alone."""
    across, up = (frame[way.median].to_numpy(dtype=np.float64) for way in (x, y))
    on: list[int] = []
    for n in sorted(_able(frame, x, y), key=lambda n: (across[n], up[n], n)):
        if not on or up[n] < up[on[-1]]:
            on.append(n)
    return tuple(on)


def _able(frame: pd.DataFrame, x: Way, y: Way) -> list[int]:
    """Positions of measured rows that have both numbers."""
    finite = np.isfinite(frame[[x.median, y.median]].to_numpy(dtype=np.float64)).all(axis=1)
    return [int(n) for n in np.flatnonzero(finite & (frame["origin"] == "measured").to_numpy(dtype=bool))]


def line_trace(frame: pd.DataFrame, found: Front, x: Way, y: Way) -> dict[str, Any]:
    """The line, and what the page's script needs to draw it again."""
    on = frame.iloc[list(found.line)]
    asked = [[way.median, way.low, way.high, way.name, way.unit] for way in (x, y)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "front: nothing measured is better in both",
        "x": digits(on[x.median]),
        "y": digits(on[y.median]),
        "line": {"color": INK, "width": 1.5, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
        "meta": {"front": asked},
    }


def mark_trace(rows: Sequence[Any], found: Front, x: Way, y: Way, name: str, colour: str, symbol: str | list[str]) -> dict[str, Any]:
    """Marks of rows of one origin with their intervals. rows: of `itertuples` of the figure's table, whose index is the position in it."""
    own = all(row.origin == "measured" for row in rows)
    unbeaten = set(found.unbeaten)
    symbols = symbol if isinstance(symbol, str) else list(symbol)
    if not own:
        symbols = hollow(symbols) if isinstance(symbols, str) else [hollow(one) for one in symbols]
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": short(name) if own else f"{short(name)} (published)",
        "x": digits(getattr(row, x.median) for row in rows),
        "y": digits(getattr(row, y.median) for row in rows),
        "customdata": [[short(row.kernel, 80), short(row.problem, 80), short(row.config, 160), x.told(row), y.told(row)] for row in rows],
        "hovertemplate": f"<b>%{{customdata[0]}}</b>{''.join(f'<br>%{{customdata[{n}]}}' for n in range(1, 5))}<extra></extra>",
        "marker": {
            "color": colour,
            "symbol": symbols,
            "size": [UNBEATEN if row.Index in unbeaten else BEATEN for row in rows] if own else BEATEN + 2,
            "opacity": 0.9,
            "line": {"width": 0 if own else 1},
        },
    }
    bars = {f"error_{axis}": way.bars(rows) for axis, way in (("x", x), ("y", y)) if way.low}
    return marks(trace | bars, [row.Index for row in rows])


def _numbers(frame: pd.DataFrame, way: Way) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Median, low and high; an end that was not measured is the median."""
    middle = frame[way.median].to_numpy(dtype=np.float64)
    ends = [frame[name].to_numpy(dtype=np.float64) if name else middle for name in (way.low, way.high)]
    low, high = (np.where(np.isfinite(end), end, middle) for end in ends)
    return middle, low, high
