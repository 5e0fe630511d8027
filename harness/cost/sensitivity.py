"""Sensitivity: a figure made of uncertain ones, its interval, and which of them moves it most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from klab.harness.cost.ranges import Range
from klab.kernels.contract import Json

Inputs = Mapping[str, Range]
"""The figures that a result is a function of, by name."""
Function = Callable[[Mapping[str, float]], float]
"""The result from one value of each input."""


@dataclass(frozen=True)
class Swing:
    """What the result becomes when one input alone goes to its ends."""

    name: str
    given: Range
    at_low: float
    at_high: float

    @property
    def width(self) -> float:
        """How far the result moves."""
        return abs(self.at_high - self.at_low)

    def to_json(self) -> dict[str, Json]:
        """For --json."""
        return {"input": self.name, **self.given.to_json(), "at_low": self.at_low, "at_high": self.at_high}


@dataclass(frozen=True)
class Propagated:
    """A function of uncertain inputs: `likely` takes their errors as independent (root of the sum of the squares of the swings on each
    side), `extreme` has all of them at their worst or best end at once.
    """

    likely: Range
    extreme: Range
    swings: tuple[Swing, ...]


def propagate(function: Function, inputs: Inputs) -> Propagated:
    """`function` at the middle of its inputs, with both intervals and the swings, widest first. It must be monotone in each input."""
    middle = {name: one.mid for name, one in inputs.items()}
    mid = function(middle)
    swings, worst, best = [], dict(middle), dict(middle)
    for name, one in inputs.items():
        if one.low == one.high:
            continue
        ends = {end: function(middle | {name: end}) for end in (one.low, one.high)}
        if ends[one.low] != ends[one.high]:
            swings.append(Swing(name, one, ends[one.low], ends[one.high]))
        best[name], worst[name] = min(ends, key=lambda end: ends[end]), max(ends, key=lambda end: ends[end])
    up = math.hypot(*(max(0.0, s.at_low - mid, s.at_high - mid) for s in swings))
    down = math.hypot(*(max(0.0, mid - s.at_low, mid - s.at_high) for s in swings))
    least, most = min(mid, function(best)), max(mid, function(worst))
    # A convex function's swings can add up to more than it has; the extremes bound the likely.
    likely = Range(max(mid - down, least), mid, min(mid + up, most))
    return Propagated(likely, Range(least, mid, most), tuple(sorted(swings, key=lambda s: -s.width)))
