"""A search space: the candidates of one problem as rows of small integers, whatever kernels they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from klab.harness.plan.trials import safe_unfit
from klab.kernels.contract import Chip, Config, Json, Kernel, Problem
from klab.kernels.errors import UsageError

# The parameter that says which kernel a candidate is of; the others are its configuration's fields.
KERNEL = "kernel"
ABSENT = -1
# A larger space than this is a mistake in a kernel's `space`; 16 bytes a candidate would still fit, but no search would see 0.1% of it.
MOST_CANDIDATES = 4_000_000
_CHUNK = 8192


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
        seen: dict[str, dict[Json, int]] = {}
        chunks: list[NDArray[np.int16]] = []
        pending: list[dict[str, int]] = []
        count = 0
        for point in points:
            row = {}
            for name, value in point.items():
                known = seen.setdefault(name, {})
                # True == 1 and 1.0 == 1 in Python; a parameter's values are told apart by type as well.
                row[name] = known.setdefault((type(value).__name__, _hashable(value)), len(known))
            pending.append(row)
            count += 1
            if count > MOST_CANDIDATES:
                raise UsageError(f"the space has more than {MOST_CANDIDATES:,} candidates; narrow the kernel's space")
            if len(pending) == _CHUNK:
                chunks.append(_matrix(pending, list(seen)))
                pending.clear()
        chunks.append(_matrix(pending, list(seen)))
        if not count:
            raise UsageError("the space has no valid candidate")
        names = list(seen)
        rows = np.full((count, len(names)), ABSENT, dtype=np.int16)
        start = 0
        for chunk in chunks:
            rows[start : start + len(chunk), : chunk.shape[1]] = chunk
            start += len(chunk)
        values = []
        for column, name in enumerate(names):
            found = [_thawed(value) for _, value in seen[name]]
            order = _order(found)
            rank = np.empty(len(order) + 1, dtype=np.int16)
            rank[order] = np.arange(len(order))
            rank[-1] = ABSENT  # index -1 is the last: the absent stay absent
            rows[:, column] = rank[rows[:, column]]
            values.append([found[i] for i in order])
        _, first = np.unique(rows, axis=0, return_index=True)
        return cls(names, values, rows if len(first) == count else rows[np.sort(first)])

    def __len__(self) -> int:
        return len(self.rows)

    def point(self, candidate: int) -> dict[str, Json]:
        """The candidate's parameters by name, without those that do not apply."""
        row = self.rows[candidate]
        return {name: self.values[c][row[c]] for c, name in enumerate(self.names) if row[c] != ABSENT}

    def find(self, point: Mapping[str, Json]) -> int | None:
        """The candidate with these parameters, or None."""
        row = np.full(len(self.names), ABSENT, dtype=np.int64)
        for name, value in point.items():
            if name not in self.names:
                return None
            column = self.names.index(name)
            where = [i for i, v in enumerate(self.values[column]) if type(v) is type(value) and v == value]
            if not where:
                return None
            row[column] = where[0]
        found = self.lookup(row[None, :])[0]
        return None if found < 0 else int(found)

    def lookup(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Candidates of these rows of value positions, shape (n, parameters) -> (n,); -1 for a row that is no candidate."""
        codes, order = self._codes
        wanted = self._code(rows)
        at = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
        return np.where(codes[at] == wanted, order[at], -1)

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
        codes: NDArray[np.uint64] = ((rows.astype(np.int64) + 1).astype(np.uint64) * self._radix).sum(axis=1, dtype=np.uint64)
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


def _matrix(rows: list[dict[str, int]], names: list[str]) -> NDArray[np.int16]:
    made = np.full((len(rows), len(names)), ABSENT, dtype=np.int16)
    column = {name: i for i, name in enumerate(names)}
    for i, row in enumerate(rows):
        for name, value in row.items():
            made[i, column[name]] = value
    return made


def _order(values: list[Json]) -> list[int]:
    numeric = all(isinstance(v, int | float) for v in values)
    return sorted(range(len(values)), key=lambda i: values[i]) if numeric else list(range(len(values)))


def _hashable(value: Json) -> Json:
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value


def _thawed(value: Json) -> Json:
    return [_thawed(v) for v in value] if isinstance(value, tuple) else value
