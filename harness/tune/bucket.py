"""One configuration for several shapes, or a few for many: serving engines hold a configuration per bucket of shapes, not per shape.

The regret of a configuration on a shape is its value over the best value there, minus 1. A configuration that has no value on a shape (it
failed there, or was not measured) cannot serve that shape, and so no bucket that the shape is in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klab.kernels.errors import UsageError

HOWS = ("geomean", "worst")

Values = Mapping[str, Mapping[str, float]]
"""Shape -> configuration -> value (lower is better). What is missing, not finite or not positive is a failure."""


@dataclass(frozen=True)
class Served:
    """A configuration that serves all shapes of a bucket. `regrets` are in the order of the shapes; `regret` is their geometric mean or
    their worst, as was asked for.
    """

    config: str
    regret: float
    regrets: tuple[float, ...]


@dataclass(frozen=True)
class Bucket:
    """Neighbouring shapes. `ranking` holds every configuration that serves them all, the least regret first; empty when none does.

    `fails` says of the others on which of the shapes they have no value.
    """

    shapes: tuple[str, ...]
    ranking: tuple[Served, ...]
    fails: Mapping[str, tuple[str, ...]]

    @property
    def best(self) -> Served | None:
        """The configuration to take, or None where none serves all the shapes."""
        return self.ranking[0] if self.ranking else None


def best_for_bucket(values: Values, how: str = "geomean") -> Bucket:
    """All shapes of `values` as one bucket. UsageError for an unknown `how`, or without a shape.

    Of equal regrets the one with the lower other measure wins, then the name.
    """
    table = _Table(values, how)
    return table.bucket(0, len(table.shapes))


def buckets(values: Values, count: int, how: str = "geomean") -> list[Bucket]:
    """At most `count` buckets of neighbouring shapes (in the order of `values`) with the least regret in all: the sum of the logarithms
    for "geomean", the worst for "worst". Fewer where more would not lower it.

    Every way to cut is considered (dynamic programming). A shape that nothing serves is in a bucket by itself, beyond `count`.
    """
    if count < 1:
        raise UsageError(f"--buckets {count}: at least one bucket is needed")
    table = _Table(values, how)
    shapes = range(len(table.shapes))
    served = [n for n in shapes if table.servable[n]]
    cuts = _cut(_Table({table.shapes[n]: values[table.shapes[n]] for n in served}, how), count) if served else []
    found = [table.of([served[n] for n in range(first, end)]) for first, end in cuts]
    found += [table.of([n]) for n in shapes if not table.servable[n]]
    return sorted(found, key=lambda bucket: table.shapes.index(bucket.shapes[0]))


def buckets_at(values: Values, starts: Sequence[str], how: str = "geomean") -> list[Bucket]:
    """Buckets with given boundaries: each of `starts` begins one (the first shape always does). UsageError for a start that is no shape."""
    table = _Table(values, how)
    unknown = [start for start in starts if start not in table.shapes]
    if unknown:
        raise UsageError(f"a bucket cannot begin at {unknown[0]}: the shapes are {', '.join(table.shapes)}")
    firsts = sorted({0, *(table.shapes.index(start) for start in starts)})
    return [table.bucket(a, b) for a, b in zip(firsts, [*firsts[1:], len(table.shapes)], strict=True)]


class _Table:
    """The logarithms of the regrets + 1: [shape, configuration], infinite where a configuration has no value."""

    def __init__(self, values: Values, how: str) -> None:
        if how not in HOWS:
            raise UsageError(f"unknown regret {how!r}; known: {', '.join(HOWS)}")
        if not values:
            raise UsageError("no shapes to serve")
        self.how = how
        self.shapes = list(values)
        self.configs = sorted({config for row in values.values() for config in row})
        column = {config: n for n, config in enumerate(self.configs)}
        self.logs: NDArray[np.float64] = np.full((len(self.shapes), len(self.configs)), np.inf)
        for n, row in enumerate(values.values()):
            for config, value in row.items():
                if math.isfinite(value) and value > 0:
                    self.logs[n, column[config]] = math.log(value)
        best = self.logs.min(axis=1, initial=np.inf)
        self.servable = np.isfinite(best)
        self.logs[self.servable] -= best[self.servable, None]

    def bucket(self, first: int, end: int) -> Bucket:
        """Shapes first .. end - 1."""
        return self.of(list(range(first, end)))

    def of(self, rows: Sequence[int]) -> Bucket:
        """These shapes as one bucket."""
        logs = self.logs[list(rows)]
        mean, worst = logs.mean(axis=0), logs.max(axis=0, initial=-np.inf)
        able = [c for c in range(len(self.configs)) if math.isfinite(worst[c])]
        first, second = (mean, worst) if self.how == "geomean" else (worst, mean)
        # Rounded, so that the last bit of a sum does not decide between equals.
        able.sort(key=lambda c: (round(float(first[c]), 12), round(float(second[c]), 12), self.configs[c]))
        ranking = tuple(Served(self.configs[c], math.expm1(first[c]), tuple(math.expm1(x) for x in logs[:, c])) for c in able)
        shapes = tuple(self.shapes[n] for n in rows)
        fails = {
            self.configs[c]: tuple(shape for shape, x in zip(shapes, logs[:, c], strict=True) if not math.isfinite(x))
            for c in range(len(self.configs))
            if not math.isfinite(worst[c])
        }
        return Bucket(shapes, ranking, fails)


def _cut(table: _Table, count: int) -> list[tuple[int, int]]:
    """Where to cut: (first, end) of each bucket, the fewest that reach the least regret in all with `count` at most."""
    shapes = len(table.shapes)
    cost = np.full((shapes, shapes + 1), np.inf)
    for first in range(shapes):
        running = np.zeros(len(table.configs))
        for end in range(first + 1, shapes + 1):
            here = table.logs[end - 1]
            running = running + here if table.how == "geomean" else np.maximum(running, here)
            cost[first, end] = running.min()

    def join(a: float, b: float) -> float:
        return a + b if table.how == "geomean" else max(a, b)

    # least[k][end]: the least regret of the first `end` shapes in k buckets, and where the last of them begins.
    least: list[list[tuple[float, int]]] = [[(0.0 if end == 0 else math.inf, 0) for end in range(shapes + 1)]]
    for _ in range(min(count, shapes)):
        before = least[-1]
        row = [(math.inf, 0)]
        for end in range(1, shapes + 1):
            row.append(min((join(before[first][0], float(cost[first, end])), first) for first in range(end)))
        least.append(row)
    used = min(range(1, len(least)), key=lambda k: (round(least[k][shapes][0], 12), k))
    found, end = [], shapes
    for k in range(used, 0, -1):
        first = least[k][end][1]
        found.append((first, end))
        end = first
    return found[::-1]
