"""Where klab's own kernels stand beside the libraries and the roofline, problem by problem, from recorded rows."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from klab.harness.choose.candidates import Candidate, candidates, why_not
from klab.harness.choose.compare import Ratio, best, ratio
from klab.harness.choose.evidence_repeats import relative_range
from klab.harness.report.limits import Limits, bound
from klab.harness.store.result import Result
from klab.harness.tune.objective import LATENCY, latency

WINS, LOSES, TIES = "faster", "slower", "cannot be told apart"


@dataclass(frozen=True)
class Gap:
    """A problem. own, library: the fastest of each (None: none valid). over: library over own (above 1, klab's own is faster). share:
    (value, low, high) of the roofline's time over the fastest's, by the specification's peaks (modelled bound over measured time).
    """

    problem: str
    operator: str
    own: Result | None
    library: Result | None
    over: Ratio | None
    share: tuple[float, float, float] | None
    bound_us: float | None

    @property
    def fastest(self) -> Result:
        """The fastest of all."""
        both = [row for row in (self.own, self.library) if row is not None]
        return min(both, key=lambda row: row.median_us or math.inf)

    @property
    def verdict(self) -> str:
        """How klab's own stands; "" where there is nothing to compare."""
        if self.over is None:
            return ""
        return WINS if self.over.low > 1.0 else LOSES if self.over.high < 1.0 else TIES


@dataclass(frozen=True)
class Standing:
    """An operator: how many problems of it klab's own wins, loses, or cannot be told apart on; mean: the geometric mean of library over own
    with the bounds of all problems at once (errors are taken as common to them).
    """

    operator: str
    compared: int
    wins: int
    loses: int
    ties: int
    mean: tuple[float, float, float]


def gaps(rows: Iterable[Result], limits: Limits) -> list[Gap]:
    """Of every problem with a valid time, by label. Baselines of the device itself (copies) are no problem of a model and are left out."""
    by_problem: dict[str, list[Result]] = defaultdict(list)
    for row in rows:
        if row.operator != "copy" and why_not(row) is None:
            by_problem[row.problem_key].append(row)
    found = [_gap(group, limits) for group in by_problem.values()]
    return sorted(found, key=lambda one: (one.operator, one.problem))


def _gap(rows: Sequence[Result], limits: Limits) -> Gap:
    field = candidates(rows)
    own, library = (_best([c for c in field if c.row.library is is_library]) for is_library in (False, True))
    over = ratio(library, own) if own and library else None
    head = rows[0]
    made = Gap(head.problem_label, head.operator, own.row if own else None, library.row if library else None, over, None, None)
    limit, time = bound(made.fastest, limits), latency(made.fastest)
    if limit is None or time is None:
        return made
    share = (limit.us / time.median, limit.us / time.high, limit.us / time.low)
    return Gap(made.problem, made.operator, made.own, made.library, over, share, limit.us)


def _best(found: Sequence[Candidate]) -> Candidate | None:
    return best(list(found), LATENCY) if found else None


def standings(found: Iterable[Gap]) -> list[Standing]:
    """By operator, those with a comparison."""
    groups: dict[str, list[Gap]] = defaultdict(list)
    for one in found:
        if one.over is not None:
            groups[one.operator].append(one)
    made = []
    for operator, group in sorted(groups.items()):
        said = Counter(one.verdict for one in group)
        mean = _mean([one.over for one in group if one.over is not None])
        made.append(Standing(operator, len(group), said[WINS], said[LOSES], said[TIES], mean))
    return made


@dataclass(frozen=True)
class Again:
    """A problem that was compared in several runs. ratios: by run, library over own, with its interval."""

    problem: str
    ratios: Mapping[str, Ratio]

    @property
    def spread(self) -> float:
        """(largest - smallest) / median of the ratios."""
        return relative_range([one.ratio for one in self.ratios.values()])

    @property
    def contradicts(self) -> bool:
        """True when one run says faster and another slower."""
        return any(one.low > 1.0 for one in self.ratios.values()) and any(one.high < 1.0 for one in self.ratios.values())

    @property
    def apart(self) -> bool:
        """True when the intervals of two runs have nothing in common: they do not hold what differs between runs."""
        return max(one.low for one in self.ratios.values()) > min(one.high for one in self.ratios.values())


def again(rows: Iterable[Result], limits: Limits) -> list[Again]:
    """The problems whose own kernels were held against a library in two runs and more, each run by its own rows, the widest first."""
    by_run: dict[str, list[Result]] = defaultdict(list)
    for row in rows:
        by_run[row.run_id].append(row)
    found: dict[str, dict[str, Ratio]] = defaultdict(dict)
    for run, group in sorted(by_run.items()):
        for one in gaps(group, limits):
            if one.over is not None:
                found[one.problem][run] = one.over
    made = (Again(problem, ratios) for problem, ratios in found.items() if len(ratios) > 1)
    return sorted(made, key=lambda one: (-one.spread, one.problem))


def _mean(ratios: Sequence[Ratio]) -> tuple[float, float, float]:
    value, low, high = (
        math.exp(math.fsum(math.log(getattr(one, end)) for one in ratios) / len(ratios)) for end in ("ratio", "low", "high")
    )
    return value, low, high
