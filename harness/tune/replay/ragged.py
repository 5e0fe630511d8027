"""Rows of numbers of different lengths, kept as one array: 11,130 candidates of 32 rounds take 2.9 MB instead of 15."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


class Ragged:
    """`ragged[i]` is row i, float64, perhaps empty: a view of `values` from offsets[i] to offsets[i + 1]."""

    def __init__(self, values: NDArray[np.float64], offsets: NDArray[np.int64]) -> None:
        self.values = values
        self.offsets = offsets

    @classmethod
    def of(cls, rows: Iterable[Sequence[float]]) -> Ragged:
        """Copy the rows, in order."""
        parts = [np.asarray(row, dtype=np.float64) for row in rows]
        lengths = [len(part) for part in parts]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        return cls(np.concatenate([np.empty(0), *parts]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.float64]:
        row = range(len(self))[row]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray[np.float64]]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Equal rows; an unknown value (nan) equals another."""
        if not isinstance(other, Ragged):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.values, other.values, equal_nan=True)

    __hash__ = None  # type: ignore[assignment]
