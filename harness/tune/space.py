"""A search space: the candidates of one problem as rows of small integers, whatever kernels they belong to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from klab.harness.plan.trials import safe_unfit
from klab.kernels.contract import Chip, Config, Json, Kernel, Problem, canonical_json
from klab.kernels.errors import UsageError

# The parameter that says which kernel a candidate is of; the others are its configuration's fields.
KERNEL = "kernel"
ABSENT = -1
# A larger space than this is a mistake in a kernel's `space`; 16 bytes a candidate would still fit, but no search would see 0.1% of it.
MOST_CANDIDATES = 4_000_000
# What a position of 16 bits can tell apart.
MOST_VALUES = 32_767
_CHUNK = 8192
_PLAIN = {bool, int, float, str, type(None)}
_MISSING = object()


class Space:
    """Candidates in the order they were enumerated; a candidate is named by its position.

    names: the parameters. values: per parameter its values, numbers ascending, anything else in the order of first appearance.
    rows: int16 (candidates, parameters), positions in `values`, ABSENT where a parameter does not apply to the candidate's kernel.
    """

    def __init__(self, names: Sequence[str], values: Sequence[Sequence[Json]], rows: NDArray[np.int16]) -> None:
        self.names = tuple(names)
        self.values = tuple(tuple(v) for v in values)
        self.rows = rows

    @classmethod
    def of(cls, points: Iterable[Mapping[str, Json]]) -> Space:
        """Read each point once and keep its row alone (2 bytes per parameter). Equal points count once. UsageError when there is none."""
        reader = _Reader()
        names, values, rows = reader.read(points)
        space = cls(names, values, rows)
        first = space._first_of_equals()
        return space if len(first) == len(rows) else cls(names, values, rows[first])

    def __len__(self) -> int:
        return len(self.rows)

    def point(self, candidate: int) -> dict[str, Json]:
        """The candidate's parameters by name, without those that do not apply."""
        row = self.rows[candidate]
        return {name: self.values[c][row[c]] for c, name in enumerate(self.names) if row[c] != ABSENT}

    def find(self, point: Mapping[str, Json]) -> int | None:
        """The candidate with these parameters, or None."""
        row = np.full((1, len(self.names)), ABSENT, dtype=np.int64)
        for name, value in point.items():
            column, positions = self._positions.get(name, (0, {}))
            at = positions.get(identity(value))
            if at is None:
                return None
            row[0, column] = at
        found = int(self.lookup(row)[0])
        return None if found < 0 else found

    def lookup(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Candidates of these rows of value positions, shape (n, parameters) -> (n,); -1 for a row that is no candidate."""
        codes, order = self._codes
        wanted = self._code(rows)
        found = order[np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)]
        # Rows are compared, not only codes: a position beyond a parameter's values has the code of another row.
        return np.where((self.rows[found] == rows).all(axis=1), found, -1)

    def neighbours(self, candidate: int, *, adjacent: bool = False) -> NDArray[np.int64]:
        """The candidates that differ in one parameter; with `adjacent`, by one step of its values."""
        row = self.rows[candidate].astype(np.int64)
        rows = []
        for column, values in enumerate(self.values):
            here = row[column]
            if here == ABSENT:
                continue
            for other in (here - 1, here + 1) if adjacent else range(len(values)):
                if other != here and 0 <= other < len(values):
                    changed = row.copy()
                    changed[column] = other
                    rows.append(changed)
        if not rows:
            return np.empty(0, dtype=np.int64)
        found = self.lookup(np.stack(rows))
        return found[found >= 0]

    @cached_property
    def _positions(self) -> dict[str, tuple[int, dict[Json, int]]]:
        """Per parameter its column, and the position of each of its values by `identity`."""
        return {
            name: (column, {identity(value): at for at, value in enumerate(self.values[column])}) for column, name in enumerate(self.names)
        }

    def _first_of_equals(self) -> NDArray[np.int64]:
        """The first candidate of each distinct row, ascending."""
        codes, order = self._codes
        rows = self.rows[order]
        # The sort is stable: among equal codes the first is the first that was enumerated.
        repeated = np.zeros(len(codes), dtype=bool)
        repeated[1:] = (codes[1:] == codes[:-1]) & (rows[1:] == rows[:-1]).all(axis=1)
        return np.sort(order[~repeated])

    @cached_property
    def _radix(self) -> NDArray[np.uint64]:
        """Weights of a mixed-radix code, modulo 2^64 (odd multipliers, so that the rare space beyond 2^64 still spreads)."""
        weights = np.ones(len(self.names), dtype=np.uint64)
        total, exact = 1, True
        for column, values in enumerate(self.values):
            weights[column] = np.uint64(total % (1 << 64))
            total *= len(values) + 1
            exact = exact and total < 1 << 64
        return weights if exact else np.random.default_rng(0).integers(1, 1 << 63, len(self.names), dtype=np.uint64) | np.uint64(1)

    def _code(self, rows: NDArray[np.integer]) -> NDArray[np.uint64]:
        codes = np.zeros(len(rows), dtype=np.uint64)
        for column, weight in enumerate(self._radix):  # by column: all at once takes 30 bytes per value, 300 MB for a million candidates
            codes += (rows[:, column].astype(np.int64) + 1).astype(np.uint64) * weight
        return codes

    @cached_property
    def _codes(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        codes = self._code(self.rows)
        order = np.argsort(codes, kind="stable")
        return codes[order], order


def kernel_points(kernels: Iterable[Kernel], problem: Problem, chip: Chip) -> Iterator[dict[str, Json]]:
    """The candidates of every kernel that can compete on `problem`, each kernel's default first, as points of a Space."""
    for kernel in kernels:
        if kernel.problem_type.operator != problem.operator or safe_unfit(kernel, problem, chip) is not None:
            continue
        for config in kernel.space(problem, chip):
            yield {KERNEL: kernel.id, **config.to_json_full()}


def config_of(point: Mapping[str, Json], kernels: Mapping[str, Kernel]) -> tuple[Kernel, Config]:
    """The kernel and configuration of a point that `kernel_points` made."""
    kernel = kernels[point[KERNEL]]
    return kernel, kernel.config_type.from_json({name: value for name, value in point.items() if name != KERNEL})


def identity(value: Json) -> Json:
    """What makes two values the same: the type too, because True == 1 == 1.0 in Python. A list is told by its JSON."""
    if type(value) in _PLAIN:
        return type(value), value
    text = canonical_json(value)
    plain = json.loads(text)  # an enum or a NumPy float is the plain value that JSON has for it
    return (type(plain), plain) if type(plain) in _PLAIN else text


class _Codes(dict[Json, int]):
    """The code of each value of one type; a value not yet known gets the next code and joins `found`."""

    def __init__(self, found: list[Json]) -> None:
        self._found = found

    def __missing__(self, value: Json) -> int:
        code = self[value] = len(self._found)
        self._found.append(value)
        return code


class _Column:
    """The values of one parameter in the order of first appearance. Reading goes by whole columns: about 0.1 us per value."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: list[Json] = []
        self._by_type: dict[type, _Codes] = {}
        self._lists: dict[str, int] = {}

    def codes(self, column: Sequence[Json]) -> NDArray[np.int16]:
        """The codes of these values, `_MISSING` as ABSENT. UsageError when the parameter has more values than a row can hold."""
        types = set(map(type, column))
        if len(types) == 1 and types <= _PLAIN:
            (kind,) = types
            codes = list(map(self._by_type.setdefault(kind, _Codes(self.found)).__getitem__, column))
        else:
            codes = [self._code(value) for value in column]
        if len(self.found) > MOST_VALUES:
            raise UsageError(f"the parameter {self.name} has more than {MOST_VALUES:,} values; it is no knob, leave it out of the space")
        return np.array(codes, dtype=np.int16)

    def _code(self, value: Json) -> int:
        if value is _MISSING:
            return ABSENT
        known = identity(value)
        if isinstance(known, tuple):
            kind, plain = known
            return self._by_type.setdefault(kind, _Codes(self.found))[plain]
        if known not in self._lists:
            self._lists[known] = len(self.found)
            self.found.append(json.loads(known))
        return self._lists[known]


class _Reader:
    """Points to rows, a chunk at a time, so that no more than a chunk of points is alive."""

    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}
        self._chunks: list[NDArray[np.int16]] = []
        self._count = 0

    def read(self, points: Iterable[Mapping[str, Json]]) -> tuple[list[str], list[list[Json]], NDArray[np.int16]]:
        """The names, values and rows of a Space, equal points not yet made one."""
        iterator = iter(points)
        # Copied, because a generator may yield one dict again and again.
        while chunk := list(map(dict, itertools.islice(iterator, _CHUNK))):
            self._count += len(chunk)
            if self._count > MOST_CANDIDATES:
                raise UsageError(f"the space has more than {MOST_CANDIDATES:,} candidates; narrow the kernel's space")
            self._chunks.append(self._rows(chunk))
        if not self._count:
            raise UsageError("the space has no valid candidate")
        rows = np.full((self._count, len(self._columns)), ABSENT, dtype=np.int16)
        start = 0
        for chunk_rows in self._chunks:
            rows[start : start + len(chunk_rows), : chunk_rows.shape[1]] = chunk_rows
            start += len(chunk_rows)
        values = []
        for at, column in enumerate(self._columns.values()):
            order = _order(column.found)
            rank = np.empty(len(order) + 1, dtype=np.int16)
            rank[order] = np.arange(len(order))
            rank[ABSENT] = ABSENT  # index -1 is the last: the absent stay absent
            rows[:, at] = rank[rows[:, at]]
            values.append([column.found[i] for i in order])
        return list(self._columns), values, rows

    def _rows(self, chunk: list[dict[str, Json]]) -> NDArray[np.int16]:
        for point in chunk:
            if not point.keys() <= self._columns.keys():
                self._columns |= {name: _Column(name) for name in point if name not in self._columns}
        made = np.empty((len(chunk), len(self._columns)), dtype=np.int16)
        for at, (name, column) in enumerate(self._columns.items()):
            try:
                values = list(map(itemgetter(name), chunk))
            except KeyError:
                values = [point.get(name, _MISSING) for point in chunk]
            made[:, at] = column.codes(values)
        return made


def _order(values: list[Json]) -> list[int]:
    numeric = all(isinstance(v, int | float) for v in values)
    return sorted(range(len(values)), key=lambda i: values[i]) if numeric else list(range(len(values)))
