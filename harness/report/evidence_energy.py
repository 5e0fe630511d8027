"""What klab's own kernels take of energy beside the libraries, problem by problem, from recorded rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from klab.harness.choose.candidates import Candidate, candidates, value, why_not
from klab.harness.choose.compare import Ratio, best, ratio
from klab.harness.store.result import Result
from klab.harness.tune.objective import LATENCY, Objective

ENERGY = Objective("energy")


@dataclass(frozen=True)
class Joules:
    """A problem with metered kernels. own, library: the most frugal of each (None: none metered). over: joules of library over own.
    frugal: the most frugal of all; fastest: the fastest of those that were metered.
    """

    problem: str
    kernels: int
    own: Result | None
    library: Result | None
    over: Ratio | None
    frugal: str
    fastest: str


def joules(rows: Iterable[Result]) -> list[Joules]:
    """Of every problem with two metered candidates or more, the one that takes most joules first."""
    by_problem: dict[str, list[Result]] = defaultdict(list)
    for row in rows:
        if row.operator != "copy" and why_not(row, ENERGY) is None:
            by_problem[row.problem_key].append(row)
    made = [_joules(field) for group in by_problem.values() if len(field := candidates(group)) > 1]
    return sorted(made, key=lambda one: (-max(row.energy_j or 0.0 for row in (one.own, one.library) if row), one.problem))


def _joules(field: Sequence[Candidate]) -> Joules:
    own, library = (_best([c for c in field if c.row.library is is_library]) for is_library in (False, True))
    frugal = min(field, key=lambda c: (value(c.row, ENERGY).median, c.name))
    fastest = best(list(field), LATENCY)
    return Joules(
        field[0].row.problem_label,
        len(field),
        own.row if own else None,
        library.row if library else None,
        ratio(library, own, ENERGY) if own and library else None,
        frugal.row.kernel,
        fastest.row.kernel,
    )


def _best(found: Sequence[Candidate]) -> Candidate | None:
    return min(found, key=lambda c: (value(c.row, ENERGY).median, c.name), default=None)
