"""Candidates as points of a unit cube, so that a model can tell near from far."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from klab.harness.tune.space import ABSENT, Space
from klab.kernels.contract import Json

# Distance between two unordered values: sqrt(2) * 0.7071 = 1, as between the ends of an ordered parameter.
_ONE_HOT = 0.7071
# Above this, the logarithm of a parameter and its position say different things, and both become features.
_DIFFERENT = 0.15


class Features:
    """Looks features up value by value, so that a space of a million candidates need not be held as floats.

    A numeric parameter gives its logarithm, its position among the values, and how often 2 divides it (warps, vector widths and banks come
    in powers of two); anything else is one-hot. A parameter of one value gives nothing; one that some candidates lack gives an indicator.
    """

    def __init__(self, space: Space) -> None:
        self._rows = space.rows
        self._tables: list[tuple[int, NDArray[np.float32]]] = []
        for column, values in enumerate(space.values):
            positions = np.unique(space.rows[:, column])
            table = _table(values, lacking=bool(positions[0] == ABSENT), varies=len(positions) > 1)
            if table.shape[1]:
                self._tables.append((column, table))
        self.count = sum(t.shape[1] for _, t in self._tables)

    def of(self, candidates: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float32]:
        """Shape (candidates, features); at least one feature, constant where the space has no choice."""
        rows = self._rows[np.asarray(candidates, dtype=np.int64)]
        if not self._tables:
            return np.zeros((len(rows), 1), dtype=np.float32)
        return np.concatenate([table[rows[:, column]] for column, table in self._tables], axis=1)


def _table(values: Sequence[Json], *, lacking: bool, varies: bool) -> NDArray[np.float32]:
    """Features of each value of a parameter; the last row is that of the absent (position -1)."""
    columns = _columns(values) if len(values) > 1 else []
    columns = [np.append(c, c.mean()) for c in columns]
    if lacking and varies:
        columns.append(np.append(np.zeros(len(values)), 1.0))
    return np.stack(columns, axis=1).astype(np.float32) if columns else np.empty((len(values) + 1, 0), dtype=np.float32)


def _columns(values: Sequence[Json]) -> list[NDArray[np.float64]]:
    count = len(values)
    if count == 2:
        return [np.array([0.0, 1.0])]
    if not all(isinstance(v, int | float) for v in values):
        return [_ONE_HOT * (np.arange(count) == i) for i in range(count)]
    number, position = np.array(values, dtype=np.float64), np.arange(count) / (count - 1)
    columns = []
    if number[0] > 0:
        columns.append(_unit(np.log2(number)))
    if not columns or np.abs(columns[0] - position).max() > _DIFFERENT:
        columns.append(position)
    if count > 4 and all(float(v).is_integer() for v in values):
        twos = np.array([(int(v) & -int(v)).bit_length() for v in values], dtype=np.float64)
        if 1 < len(np.unique(twos)) < count:
            columns.append(_unit(twos))
    return columns


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = (x - x.min()) / (x.max() - x.min())
    return scaled
