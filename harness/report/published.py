"""Published times of the very problems that a report is about: rows of kind "reference", which never compete with measurements."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from klab.harness.catalog.chips import find_chip
from klab.harness.cost.family import family_of
from klab.harness.plan.rows import Plan
from klab.harness.store.reference.columns import Columns
from klab.harness.store.reference.families import FAMILIES, Family
from klab.harness.store.reference.points import Point
from klab.harness.store.reference.results import result_of
from klab.harness.store.reference.tables import BACKENDS, INSTALL, Table, available, package_version, system_of, tables
from klab.harness.store.result import Result
from klab.kernels.contract import Chip, Problem
from klab.kernels.discover import approximations_of, operators
from klab.kernels.errors import KlabError


@dataclass(frozen=True)
class Published:
    """`rows`: one per problem, engine and table that has it at exactly this size. `lines`: what a reader should know of them."""

    rows: tuple[Result, ...] = ()
    lines: tuple[str, ...] = ()


def published(chips: Sequence[str], plans: Mapping[str, Plan], rows: Iterable[Result] = (), *, root: Path | None = None) -> Published:
    """What the tables hold of the problems of the plans (by chip), and of those of stored rows of the same chip; on each of `chips`.

    root: a folder of tables; default: KLAB_REFERENCE, else those of the installed package. Without tables there are no rows, and a line
    says how to get them. A problem that somebody published at another size alone is left out and counted: nothing is interpolated here.
    UsageError for a named folder that holds no tables.
    """
    folder = available(root)
    if folder is None:
        return Published(lines=(f"No published tables are here, so no chip is held against them: {INSTALL} installs them.",))
    if importlib.util.find_spec("duckdb") is None:
        return Published(lines=("Published tables are here, but not DuckDB, which reads them: pip install duckdb.",))
    wanted = _wanted(plans, rows)
    found: list[Result] = []
    lines: list[str] = []
    package = package_version(folder)
    for name in dict.fromkeys(chips):
        try:
            chip, system = find_chip(name), system_of(name, folder)
        except KlabError:
            continue
        own = _of_chip(chip, system, folder, wanted, package)
        found += own
        known = len({row.problem_key for row in own})
        lines.append(
            f"{chip.name}: {known} of {len(wanted)} problems are published at exactly their size ({package}, {system}); the others have no "
            "published row here."
        )
    return Published(tuple(found), tuple(lines))


def _wanted(plans: Mapping[str, Plan], rows: Iterable[Result]) -> list[Problem]:
    """Every problem once. A chip that was never measured is asked for what the others were: that is what its rows are compared with."""
    found = {p.key: p for plan in plans.values() for wide in plan.problems() for p in (wide, *approximations_of(wide))}
    known = operators()
    for row in rows:
        if row.problem_key not in found and row.operator in known:
            try:
                problem = known[row.operator].from_json(row.problem)
            except (KlabError, KeyError, TypeError, ValueError):
                continue  # of an older klab: nothing of today's can be held against it
            found[problem.key] = problem
    return list(found.values())


def _of_chip(chip: Chip, system: str, root: Path, wanted: Sequence[Problem], package: str) -> list[Result]:
    found = []
    for family in FAMILIES:
        groups: dict[tuple[object, ...], list[Problem]] = {}
        for problem in wanted:
            form = family.form_of(problem) if problem.operator in family.operators else None
            if form is not None:
                groups.setdefault((problem.operator, *sorted(form.items())), []).append(problem)
        for table in tables(root, system, family.folder, family.file, BACKENDS) if groups else ():
            for problems in groups.values():
                found += [result_of(point, chip, package) for point in _exact(chip, family, table, problems)]
    return found


def _exact(chip: Chip, family: Family, table: Table, problems: Sequence[Problem]) -> list[Point]:
    """The rows of one table that are these problems, which differ in size alone (of one size the fastest row)."""
    columns = Columns(chip, family, table, problems[0])
    if not len(columns):
        return []
    own = family_of(type(problems[0]))
    axes = columns.axes(own.sizes)
    found = []
    for problem in problems:
        at = np.flatnonzero((axes == np.array(own.size_of(problem), dtype=float)).all(axis=1))
        points = [point for row in at if (point := columns.point(int(row))) is not None and point.problem == problem]
        found += sorted(points, key=lambda point: point.us)[:1]
    return found
