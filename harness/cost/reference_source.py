"""Published tables as a Source of estimates: what was measured by somebody else on the same kind of chip, and the sizes between."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from klab.harness.cost.estimate import Estimate, Origin, Source
from klab.harness.cost.family import family_of
from klab.harness.cost.known import Known, Members
from klab.harness.cost.modelled import Modelled
from klab.harness.cost.ranges import Range
from klab.harness.plan.communication import Collective
from klab.harness.store.reference.collectives import Curves, links
from klab.harness.store.reference.columns import Columns
from klab.harness.store.reference.families import FAMILIES, Family
from klab.harness.store.reference.points import Point
from klab.harness.store.reference.tables import BACKENDS, Table, available, package_version, require, system_of, tables
from klab.kernels.contract import Chip, Problem
from klab.kernels.errors import UsageError

# The same library's bf16 GEMM, collected once with TensorRT-LLM and once with vLLM: 90% of the 35,700 shapes on an H200, and as many on a
# B200, lie within 0.87 to 1.11 of each other (aiconfigurator-core 0.12.0); NCCL 2.29.2 within 0.91 to 1.10 of 2.26.2.
AGAIN = (0.87, 1.0, 1.11)


def sources_for(chip: Chip, reference: Path | bool | None, notes: list[str], backend: str | Sequence[str] | None = None) -> list[Source]:
    """The published tables of this chip, [] where there are none. `notes` gets a line of what is used.

    reference: a folder of tables; None: the installed ones, where they are; True: they must be there; False: none. `backend`: engines
    that are asked (None: all, and the fastest kernel counts). UsageError for tables that were asked for and are not there.
    """
    if reference is False:
        return []
    root = require(None if reference is True else reference) if reference else available()
    if root is None:
        return []
    if not reference and importlib.util.find_spec("duckdb") is None:
        notes.append("published tables are here, but not DuckDB, which reads them: pip install duckdb")
        return []
    try:
        system = system_of(chip.name, root)
    except UsageError:
        if reference:
            raise
        return []
    engines = BACKENDS if backend is None else (backend,) if isinstance(backend, str) else tuple(backend)
    notes.append(f"published tables of {system} by {', '.join(engines)} ({package_version(root)}): what klab has not measured itself")
    return [Published(chip, root, engines)]


class Published:
    """A Source: the tables of one chip, read where a problem asks for them. Of several engines the fastest answers.

    The answer is of origin reference, its interval at least as wide as tables of the same thing differ.
    """

    def __init__(self, chip: Chip, root: Path, engines: Sequence[str] = BACKENDS) -> None:
        self.chip, self.root, self.engines = chip, root, tuple(engines)
        self._system = system_of(chip.name, root)
        self._modelled = Modelled(chip)
        self._members: dict[tuple[object, ...], Members | None] = {}
        self._curves: Curves | None = None

    def launch(self, problem: Problem) -> Estimate | None:
        """At or between published sizes, by the engine that is the fastest at its worst; None where no table holds the like."""
        found = [answer for members in self._of(problem) if (answer := members.launch(problem))]
        return min(found, key=lambda answer: answer.us.high, default=None)

    def why_not(self, problem: Problem) -> str:
        """Why `launch` gave None for a problem, in a few words."""
        reasons = dict.fromkeys(members.why_not(problem) for members in self._of(problem))
        return f"published: {'; '.join(reasons)}" if reasons else f"no published table is of such {problem.operator}"

    def collective(self, one: Collective) -> Estimate | None:
        """At or between published sizes of the same group, by the fastest kernel; None for groups and sizes that nobody measured."""
        if self._curves is None:
            self._curves = Curves(links(self.chip, backend=self.engines, root=self.root))
        found = self._curves.fastest(one)
        if found is None:
            return None
        us, near = found
        at = "at this size" if near.one == one else f"from {near.one.message_bytes} B on"
        return Estimate(_again(us), Origin.REFERENCE, f"published: {near.kernel} ({near.engine} {near.version}) on {near.device}, {at}")

    def _of(self, problem: Problem) -> list[Members]:
        """What tables hold of problems like this one, each table by itself."""
        own = family_of(type(problem))
        found = []
        for family in FAMILIES:
            form = family.form_of(problem) if problem.operator in family.operators else None
            for engine in self.engines if form is not None else ():
                key = (family.name, engine, problem.operator, *sorted((form or {}).items()), own.kin_of(problem))
                if key not in self._members:
                    table = next(tables(self.root, self._system, family.folder, family.file, [engine]), None)
                    self._members[key] = self._read(family, table, problem) if table else None
                found.append(self._members[key])
        return [members for members in found if members]

    def _read(self, family: Family, table: Table, like: Problem) -> Members | None:
        columns = Columns(self.chip, family, table, like)
        own = family_of(type(like))
        kin = own.kin_of(like)

        def fact(row: int) -> Known | None:
            point = columns.point(row)
            return known_of(point) if point and type(point.one) is type(like) and own.kin_of(point.one) == kin else None

        return Members(columns.axes(own.sizes), fact, own, self._modelled) if len(columns) else None


def known_of(point: Point) -> Known:
    """A published row as a fact, as uncertain as collections of the same thing differ."""
    words = f"published: {point.engine} {point.version} on {point.device}" + (f" ({point.note})" if point.note else "")
    return Known(point.problem, _again(point.us), Origin.REFERENCE, None, point.kernel, {}, words)


def _again(us: float) -> Range:
    return Range(*(share * us for share in AGAIN))
