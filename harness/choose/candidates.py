"""Which results may be chosen from, and the candidates they make: a kernel with a configuration, on one problem, in one state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from klab.harness.measure.stats import FLOOR_ROUNDS, spread, throttled
from klab.harness.store.query import age, numerics_verified
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Json, canonical_json
from klab.kernels.errors import UsageError

OBJECTIVES = ("latency", "energy")

# Of two declared states of the cache, cold is what a layer sees whose weights have not been read since the last token.
PREFERRED_L2 = "cold"


@dataclass(frozen=True)
class Interval:
    """A median with its 95% interval, in the unit of the objective."""

    median: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """True when the two cannot be told apart by their intervals."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Candidate:
    """A kernel with a configuration, with all its valid rows of one problem and one state, oldest first."""

    kernel: str
    config: str
    source_digest: str
    rows: tuple[Result, ...]

    @property
    def row(self) -> Result:
        """The row that stands for it: the newest."""
        return self.rows[-1]

    @property
    def metered_row(self) -> Result:
        """The newest row with an energy (it is measured apart, and seldomer), or the newest."""
        return next((row for row in reversed(self.rows) if energy(row) is not None), self.row)

    @property
    def name(self) -> tuple[str, str, str]:
        """What makes it this candidate; the last resort of every order."""
        return self.kernel, self.config, self.source_digest


def why_not(result: Result, objective: str = "latency") -> str | None:
    """Why this row may not be chosen from, or None: only checked, unthrottled measurements of enough rounds may."""
    if result.status is not Status.OK:
        return f"{result.status}: {result.reason}" if result.reason else str(result.status)
    if result.kind != "measured":
        return f"{result.kind}, not measured"
    if not numerics_verified(result):
        return "its output was not checked"
    if throttled(result.marked):
        return "throttled in most of its rounds"
    if latency(result) is None:
        return "no interval of its time"
    rounds = len(counting_rounds(result))
    if rounds < FLOOR_ROUNDS:
        return f"{rounds} counting round{'' if rounds == 1 else 's'}, and {FLOOR_ROUNDS} are the least"
    if objective == "energy" and energy(result) is None:
        return f"no energy: {result.energy_reason or 'it was not measured'}"
    return None


def latency(result: Result) -> Interval | None:
    """Microseconds per launch, as stored; from the samples where the interval was not stored."""
    if result.median_us is not None and result.ci_low_us is not None and result.ci_high_us is not None:
        return Interval(result.median_us, result.ci_low_us, result.ci_high_us)
    samples = counting_rounds(result)
    if len(samples) < FLOOR_ROUNDS:
        return None
    found = spread(samples)
    return Interval(found.median, found.low, found.high)


def energy(result: Result) -> Interval | None:
    """Joules per launch with its interval, or None."""
    if result.energy_j is None or result.energy_ci_low_j is None or result.energy_ci_high_j is None:
        return None
    return Interval(result.energy_j, result.energy_ci_low_j, result.energy_ci_high_j)


def value(result: Result, objective: str) -> Interval:
    """The objective's interval of a row that `why_not` let pass."""
    found = energy(result) if objective == "energy" else latency(result)
    assert found is not None
    return found


def counting_rounds(result: Result) -> list[float]:
    """The samples of the rounds that count, in order."""
    if len(result.marked) != len(result.samples_us):
        return list(result.samples_us)
    return [us for us, mark in zip(result.samples_us, result.marked, strict=True) if not mark]


def check_objective(objective: str) -> None:
    """UsageError for an objective that is not known."""
    if objective not in OBJECTIVES:
        raise UsageError(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")


def state(result: Result) -> tuple[str, int]:
    """What two times must share to be compared: the state of the last-level cache, and the number of CPU threads asked for."""
    threads = result.policy.get("threads", 0)
    return result.l2_state or str(result.policy.get("l2", PREFERRED_L2)), threads if isinstance(threads, int) else 0


def candidates(rows: Iterable[Result], sources: Mapping[str, str] | None = None) -> list[Candidate]:
    """The candidates of one problem from its valid rows: of the state that is cold, has most candidates, and is newest, in that order.

    `sources` maps kernel ids to the digest of their code now. Rows of older code stand only where the kernel has none of its present
    code (or, where that is unknown, of its newest).
    """
    states: dict[tuple[str, int], list[Result]] = defaultdict(list)
    for row in sorted(rows, key=age):
        states[state(row)].append(row)
    if not states:
        return []
    groups = {key: _grouped(group, sources or {}) for key, group in states.items()}

    def rank(key: tuple[str, int]) -> tuple[Json, ...]:
        return key[0] == PREFERRED_L2, len(groups[key]), age(states[key][-1]), key

    return groups[max(groups, key=rank)]


def _grouped(rows: list[Result], sources: Mapping[str, str]) -> list[Candidate]:
    standing: dict[str, str] = {}  # kernel -> the digest of the code whose rows stand
    for row in rows:
        standing[row.kernel] = row.source_digest
    for row in rows:
        if sources.get(row.kernel) == row.source_digest:
            standing[row.kernel] = row.source_digest
    found: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for row in rows:
        if row.source_digest == standing[row.kernel]:
            found[(row.kernel, canonical_json(row.config), row.source_digest)].append(row)
    return sorted((Candidate(*name, rows=tuple(group)) for name, group in found.items()), key=lambda c: c.name)
