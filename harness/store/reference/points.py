"""Points: the rows of published tables as klab's problems with their times, the traps among them marked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from klab.harness.store.reference.families import FAMILIES, PROVENANCE, Family, Unmapped, batched
from klab.harness.store.reference.tables import Table, read_rows, require, system_of, tables, usual_version
from klab.harness.store.reference.traps import (
    FEWER,
    HICCUP,
    LAUNCH_FACTOR,
    LAUNCHES,
    TOO_FAST,
    WARM,
    Limits,
    hiccups,
    launch_floor_us,
    strange,
)
from klab.kernels.contract import Chip, Problem
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.weight_only_moe.problem import WeightOnlyMoe


@dataclass(frozen=True, slots=True)
class Point:
    """One row: microseconds of a launch, published. `note` says in what it is not quite the problem; `flag` why it is not to be used.

    The problem is that of `one` sequence, `times` times; `at` are the table's own columns of it (its family's form and sizes). The roofline
    allows `bound_us`, by "compute" or "memory" (`limit`). `kernel` is the engine's name of its kernel; `engine`, `version`: where it ran.
    """

    one: Problem
    times: int
    at: tuple[Any, ...]
    us: float
    bound_us: float
    limit: str
    kernel: str
    engine: str
    version: str
    device: str
    table: Table
    note: str = ""
    flag: str = ""

    @property
    def problem(self) -> Problem:
        """What was measured. Built when asked for: a batch of 2048 sequences has as many lengths."""
        return batched(self.one, self.times)


@dataclass
class Reading:
    """What reading met. `unmapped`: rows that klab has no problem for, by why; `flagged`: rows not to be used, by (table, why)."""

    unmapped: dict[str, int] = field(default_factory=dict)
    flagged: dict[tuple[str, str], int] = field(default_factory=dict)

    def miss(self, why: str) -> None:
        """Count a row that is no problem of klab's."""
        self.unmapped[why] = self.unmapped.get(why, 0) + 1

    def flag(self, label: str, why: str) -> None:
        """Count a row of a table that is not to be used; one that is (no `why`) is not counted."""
        if why:
            self.flagged[label, why] = self.flagged.get((label, why), 0) + 1


class Judge:
    """Rows of one table, read and judged one by one; what only the whole table tells (its version, its launches) is given."""

    def __init__(self, chip: Chip, family: Family, table: Table, version: str) -> None:
        self._chip, self._family, self._table, self._version = chip, family, table, version
        self._limits: dict[str, Limits] = {}
        self._odd: dict[tuple[str, str], str] = {}
        self.floors: dict[object, float] = {}

    def point(self, row: Mapping[str, Any]) -> Point | Unmapped:
        """What a row (by the names of its columns) is."""
        mapped = self._family.mapped(row)
        if isinstance(mapped, Unmapped):
            return mapped
        one, times = mapped.one, mapped.times
        kind = one.math_dtype
        limits = self._limits.get(kind) or self._limits.setdefault(kind, Limits.of(self._chip, kind))
        us, device, version = 1e3 * (row["latency"] or 0.0), row["device"] or "", row["version"] or ""
        work = (times * one.flops(), times * one.bytes_moved())
        origin = (device, version)
        if origin not in self._odd:
            self._odd[origin] = strange(device, version, self._table.system, self._version)
        flag = self._odd[origin] or limits.impossible(*work, us)
        if not flag and us < LAUNCH_FACTOR * self.floors.get(kind_of(one), 0.0):
            flag = LAUNCHES
        at = tuple(row[name] for name in (*self._family.form, *self._family.sizes))
        source, engine = row["kernel_source"] or "", row["framework"] or ""
        if flag in (TOO_FAST, WARM) and isinstance(one, FusedMoe | WeightOnlyMoe):
            flag = FEWER
        return Point(one, times, at, us, *limits.bound(*work), source, engine, version, device, self._table, mapped.note, flag)

    def judged(self, found: Sequence[Point]) -> list[Point]:
        """The points of a whole table, with what only all of them tell: what its launches hide, and what more of the same outruns."""
        import numpy as np

        self.learn(found)
        at = (*self._family.form, *self._family.sizes).index(self._family.more)
        ids: dict[object, int] = {}
        groups = [ids.setdefault((type(p.one), p.at[:at], p.at[at + 1 :]), len(ids)) for p in found]
        amounts, times = [float(p.at[at]) for p in found], [0.0 if p.flag else p.us for p in found]
        slow = hiccups(np.array(groups, dtype=np.int64), np.array(amounts, dtype=float), np.array(times, dtype=float))
        return [replace(p, flag=HICCUP) if bad else self._hidden(p) for p, bad in zip(found, slow, strict=True)]

    def learn(self, found: Iterable[Point]) -> None:
        """What launches of this table take, of each kind of row apart."""
        kinds: dict[object, list[Point]] = {}
        for point in found if self._family.launch_floor_us is not None else ():
            kinds.setdefault(kind_of(point.one), []).append(point)
        for kind, rows in kinds.items():
            self.floors[kind] = launch_floor_us(
                [row.bound_us for row in rows], [row.us for row in rows], self._family.launch_floor_us or 0.0
            )

    def _hidden(self, point: Point) -> Point:
        floor = self.floors.get(kind_of(point.one), 0.0)
        return replace(point, flag=LAUNCHES) if not point.flag and point.us < LAUNCH_FACTOR * floor else point


def kind_of(one: Problem) -> object:
    """What is measured alike: rows of one operator in one format."""
    return type(one), getattr(one, "format", "")


def points(
    chip: Chip,
    operators: Iterable[str] | None = None,
    *,
    backend: str | Sequence[str] | None = None,
    root: Path | None = None,
    flagged: bool = False,
    reading: Reading | None = None,
) -> Iterator[Point]:
    """The published rows of a chip, table after table; those not to be used only with `flagged`.

    `operators`: klab's names (None: all). `backend`: engines (None: all). UsageError where no tables are, or none of this chip.
    """
    root = require(root)
    system = system_of(chip.name, root)
    wanted = None if operators is None else set(operators)
    engines = [backend] if isinstance(backend, str) else backend
    for family in FAMILIES:
        if wanted is not None and not wanted & set(family.operators):
            continue
        for table in tables(root, system, family.folder, family.file, engines):
            for point in _table_points(chip, family, table, reading):
                if (flagged or not point.flag) and (wanted is None or point.one.operator in wanted):
                    yield point


def _table_points(chip: Chip, family: Family, table: Table, reading: Reading | None) -> list[Point]:
    columns = tuple(dict.fromkeys((*family.form, *family.sizes, *PROVENANCE, "latency")))
    rows = [dict(zip(columns, row, strict=True)) for row in read_rows(table, columns)]
    judge = Judge(chip, family, table, usual_version(table))
    found: list[Point] = []
    for row in rows:
        point = judge.point(row)
        if isinstance(point, Point):
            found.append(point)
        elif reading:
            reading.miss(point.why)
    judged = judge.judged(found)
    if reading:
        for one in judged:
            reading.flag(table.label, one.flag)
    return judged
