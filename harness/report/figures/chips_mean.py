"""Geometric means of ratios with their intervals, and the sentences made of them. The page's script (derive_geomean.js) computes the same.

Pure; the resampling draws from a generator of 32 bits that both languages have alike, so that a page says one thing before and after a
filter is set and taken back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from klab.harness.report.units import times

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 1000
LEAST_FOR_INTERVAL = 5
# Student's t that 2.5% exceed is this sum over powers of 1 / degrees of freedom (Cornish and Fisher), from 4 on within 0.1%.
STUDENT = (1.959964, 2.372272, 2.822499, 2.555852, 1.589535)
SEED = 20_230
ALL = "all"


@dataclass(frozen=True)
class Mean:
    """The geometric mean of `count` ratios, with its 95% interval where they are enough for one."""

    name: str
    count: int
    ratio: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """`0.563× [0.521, 0.612]`."""
        return (
            times(self.ratio)
            if self.low is None or self.high is None
            else f"{times(self.ratio)} [{times(self.low)[:-1]}, {times(self.high)[:-1]}]"
        )


def mean_of(name: str, ratios: Sequence[float]) -> Mean:
    """Of at least one ratio, all above 0; the interval is a percentile bootstrap over the problems, widened by `widening`."""
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    middle = float(logs.mean())
    if len(logs) < LEAST_FOR_INTERVAL:
        return Mean(name, len(logs), math.exp(middle), None, None)
    picks = (_uniform(RESAMPLES * len(logs)) * len(logs)).astype(np.int64).reshape(RESAMPLES, len(logs))
    means = np.sort(logs[picks].mean(axis=1))
    ends = (float(means[at]) for at in (RESAMPLES // 40, RESAMPLES - 1 - RESAMPLES // 40))
    low, high = (math.exp(middle + widening(len(logs)) * (end - middle)) for end in ends)
    return Mean(name, len(logs), math.exp(middle), low, high)


def widening(count: int) -> float:
    """By how much a percentile bootstrap of `count` values is too narrow: without it, the 95% interval of 5 normal values covers 83%."""
    student = math.fsum(term / (count - 1) ** power for power, term in enumerate(STUDENT))
    return student / STUDENT[0] * math.sqrt(count / (count - 1))


def means(operators: Sequence[str], ratios: Sequence[float]) -> list[Mean]:
    """Of all first, then of each operator, the lowest first; [] of nothing."""
    if not ratios:
        return []
    groups: dict[str, list[float]] = {}
    for operator, ratio in zip(operators, ratios, strict=True):
        groups.setdefault(operator, []).append(ratio)
    return [mean_of(ALL, ratios), *sorted((mean_of(name, own) for name, own in groups.items()), key=lambda one: (one.ratio, one.name))]


def finding(found: Sequence[Mean], ratios: Iterable[float], a: str, b: str, what: str, both: str) -> str:
    """What the means say of `b` against `a`, in two or three sentences. what: "time"; both: "both chips have"."""
    if not found:
        return f"No problem that {both} is left."
    every, *each = found
    if every.count == 1:
        return f"{b} takes {every.text} of {a}'s {what} on the one problem that {both}."
    said = f"{b} takes {every.text} of {a}'s {what}: the geometric mean over {every.count} problems that {both}"
    said += ", too few for an interval." if every.low is None else "."
    if every.low is not None and every.high is not None and every.low <= 1 <= every.high:
        said += " The interval holds 1: taken together, neither is shown to be ahead."
    least, most = each[0], each[-1]
    if times(least.ratio) != times(most.ratio):
        said += f" Lowest in {least.name} ({least.text}, {problems(least.count)}), "
        said += f"highest in {most.name} ({most.text}, {problems(most.count)})."
    worse = sum(ratio > 1 for ratio in ratios)
    return f"{said} {b} takes more on {worse} of {every.count}."


def problems(count: int) -> str:
    """`1 problem`, `12 problems`."""
    return f"{count} problem{'' if count == 1 else 's'}"


def _uniform(count: int) -> NDArray[np.float64]:
    """[count] numbers from 0 up to 1: mulberry32, whose state is a counter."""
    with np.errstate(over="ignore"):
        state = np.uint32(SEED) + np.arange(1, count + 1, dtype=np.uint32) * np.uint32(0x6D2B79F5)
        mixed = (state ^ (state >> np.uint32(15))) * (state | np.uint32(1))
        mixed = (mixed + (mixed ^ (mixed >> np.uint32(7))) * (mixed | np.uint32(61))) ^ mixed
        mixed ^= mixed >> np.uint32(14)
    found: NDArray[np.float64] = mixed.astype(np.float64) / 2.0**32
    return found
