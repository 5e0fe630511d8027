"""Between measured sizes: radial basis functions on the nearest of them, and how far off those predict one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]
    Rows = NDArray[np.intp]

# Neighbours that decide: on NVIDIA's tables 24 and 64 predict no better than 16, and a k x k system is solved for each answer.
NEIGHBOURS = 16
# They are spread around the place: of the nearest CANDIDATES, none closer to a nearer one than SPREAD of its own distance. A table with
# rows at 256, 257, 512, 513, ... tokens and few weight sizes would else show nothing but tokens.
CANDIDATES, SPREAD = 96, 0.2
# A series: this many sizes and more that differ from what is asked on at most so many axes. Sizes this close (powers of two) are the same.
LEAST_SERIES, MOST_OFF, SAME = 4, 3, 1e-9
# Measurements of neighbours scatter by a percent or two: an exact fit would carry that into the answer (held-out GEMM rows: 0 and 0.02
# are alike, 0.1 doubles the error).
SMOOTHING = 0.02
# Share of the leave-one-out errors that the interval holds, and the distance (powers of two) below which errors grow no smaller. With
# these, some 90% of what was held out of NVIDIA's tables lies in its interval (tests and docs/interpolation.md).
HELD, NEAR = 0.95, 0.3
# One point predicts no other: what it says a little way off is this uncertain (a guess).
ALONE = 0.2


@dataclass(frozen=True)
class Between:
    """A value between known ones: `error` is of the same unit (half the width of its interval)."""

    value: float
    error: float


class Sizes:
    """Known sizes, asked for those near another one. `sizes` [points, axes], none below 0; inside in powers of two."""

    def __init__(self, sizes: Numbers) -> None:
        import numpy as np

        self.logs = logs_of(sizes)
        self._axes = [np.ascontiguousarray(column) for column in self.logs.T]
        self._low, self._high = self.logs.min(axis=0), self.logs.max(axis=0)

    def outside(self, logs: Numbers) -> float:
        """How many powers of two a size lies beyond the known ones, in its worst axis; 0 within."""
        import numpy as np

        return float(np.max(np.maximum(self._low - logs, logs - self._high), initial=0.0))

    def inward(self, logs: Numbers) -> Numbers:
        """The same size, moved to the edge of what is known where it lies beyond."""
        import numpy as np

        return np.clip(logs, self._low, self._high)

    def nearest(self, logs: Numbers, among: Rows | None = None) -> tuple[Rows, Numbers]:
        """(up to CANDIDATES known sizes, their distances), the nearest first. No tree: 1e5 sizes take 2 ms, scipy's import 0.4 s."""
        import numpy as np

        squares = np.zeros(len(self.logs) if among is None else len(among))
        for axis, log in enumerate(logs):
            gaps = (self._axes[axis] if among is None else self._axes[axis][among]) - log
            squares += gaps * gaps
        found = np.argpartition(squares, CANDIDATES)[:CANDIDATES] if len(squares) > CANDIDATES else np.arange(len(squares))
        found = found[np.lexsort((found, squares[found]))]
        return found if among is None else among[found], np.sqrt(squares[found])

    def series(self, logs: Numbers) -> Rows | None:
        """The sizes that differ from this one on as few axes as can be, and enclose it there; None where there are none, or too few.

        In a table of several models, the other batches of the same weights say more of a batch between than all other weights.
        """
        import numpy as np

        equal = [np.abs(column - log) < SAME for column, log in zip(self._axes, logs, strict=True)]
        off = [axis for axis, same in enumerate(equal) if not same.any()]
        for axes in (off, *([*off, axis] for axis in range(len(equal)) if axis not in off)):
            if not 1 <= len(axes) <= min(MOST_OFF, len(equal) - 1):
                continue
            alike = np.ones(len(self.logs), dtype=bool)
            for axis, same in enumerate(equal):
                if axis not in axes:
                    alike &= same
            rows: Rows = np.flatnonzero(alike)
            columns = [self._axes[axis][rows] - logs[axis] for axis in axes]
            if len(rows) >= LEAST_SERIES and all(column.min() <= SAME and column.max() >= -SAME for column in columns):
                return rows
        return None


def spread(points: Numbers, distances: Numbers, usable: Callable[[int], bool] = lambda at: True) -> list[int]:
    """Up to NEIGHBOURS usable ones of points that are given nearest first, so that they are around the place they are near to."""
    import numpy as np

    gaps = np.zeros((len(points), len(points)))
    for column in points.T:
        gaps += (column[:, None] - column[None, :]) ** 2
    apart = gaps >= (SPREAD * distances) ** 2
    left, chosen = np.ones(len(points), dtype=bool), []
    for at in range(len(points)):
        if left[at] and usable(at):
            chosen.append(at)
            if len(chosen) == NEIGHBOURS:
                break
            left &= apart[at]
    return chosen


def logs_of(sizes: Numbers) -> Numbers:
    """Powers of two; a size of 0 (no cached keys, say) counts as half of one."""
    import numpy as np

    logs: Numbers = np.log2(np.maximum(sizes, 0.5))
    return logs


def between(points: Numbers, values: Numbers, at: Numbers) -> Between:
    """The value at `at` by radial basis functions (linear kernel, constant term) through `values` [count] at `points` [count, axes].

    The error: each point is predicted by the others (Rippa's closed form of leave-one-out), its error taken per distance to its nearest
    neighbour; 90% of those, the near ones counting more, at the distance of `at` from its nearest.
    """
    import numpy as np

    count = len(values)
    if count == 1:
        return Between(float(values[0]), ALONE)
    middle = values.mean()
    gaps = np.linalg.norm(points[:, None, :] - points[None, :, :], axis=2)
    distances = np.linalg.norm(points - at, axis=1)
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = -gaps
    system[range(count), range(count)] = -SMOOTHING
    system[:count, count] = system[count, :count] = 1.0
    inverse = np.linalg.inv(system)
    weights = inverse @ np.append(values - middle, 0.0)
    value = float(np.append(-distances, 1.0) @ weights + middle)
    np.fill_diagonal(gaps, np.inf)
    left_out = np.abs(weights[:count] / np.diagonal(inverse)[:count]) / (gaps.min(axis=0) + NEAR)
    order = np.argsort(left_out)
    share = np.cumsum(1.0 / (distances[order] + NEAR))
    held = left_out[order][int(np.searchsorted(share, HELD * share[-1]))]
    return Between(value, float(held * (distances.min() + NEAR)))
