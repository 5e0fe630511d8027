"""Which results may be chosen from, and the candidates they make: a kernel with a configuration, on one problem, in one state."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from klab.harness.measure.stats import FLOOR_ROUNDS, throttled
from klab.harness.store.query import age, numerics_verified
from klab.harness.store.result import Result, Status
from klab.harness.tune.objective import LATENCY, Interval, Objective, counting_rounds, energy, latency
from klab.kernels.contract import Json, canonical_json

# Of two declared states of the cache, cold is what a layer sees whose weights have not been read since the last token.
PREFERRED_L2 = "cold"


@dataclass(frozen=True)
class Candidate:
    """A kernel with a configuration, with all its valid rows of one problem and one state, oldest first."""

    kernel: str
    config: str
    source_digest: str
    rows: tuple[Result, ...]
    problem_key: str = ""

    @property
    def row(self) -> Result:
        """The row that stands for it: the newest."""
        return self.rows[-1]

    @property
    def metered_row(self) -> Result:
        """The newest row with an energy (it is measured apart, and seldomer), or the newest."""
        return next((row for row in reversed(self.rows) if energy(row) is not None), self.row)

    @property
    def name(self) -> tuple[str, str, str, str]:
        """What makes it this candidate; the last resort of every order."""
        return self.kernel, self.config, self.source_digest, self.problem_key


def why_not(result: Result, objective: Objective = LATENCY) -> str | None:
    """Why this row may not be chosen from, or None: only checked, unthrottled measurements of enough rounds may."""
    if result.status is not Status.OK:
        return f"{result.status}: {result.reason}" if result.reason else str(result.status)
    if result.kind != "measured":
        return f"{result.kind}, not measured"
    if not numerics_verified(result):
        return "its output was not checked"
    if throttled(result.marked):
        return "throttled in most of its rounds"
    time = latency(result)
    if time is None or not all(math.isfinite(us) and us > 0 for us in (time.median, time.low, time.high)):
        return "no interval of its time"
    rounds = len(counting_rounds(result))
    if rounds < FLOOR_ROUNDS:
        return f"{rounds} counting round{'' if rounds == 1 else 's'}, and {FLOOR_ROUNDS} are the least"
    if objective.needs_energy and energy(result) is None:
        return f"no energy: {result.energy_reason or 'it was not measured'}"
    return None


def value(result: Result, objective: Objective) -> Interval:
    """The objective's interval of a row that `why_not` let pass."""
    found = objective.interval(result)
    assert found is not None
    return found


def state(result: Result) -> tuple[bool, str, int, str]:
    """What two times must share to be compared: the clock and power limit that were set for them (first: whether the device was left as it
    is), the state of the last-level cache, and the number of CPU threads asked for.
    """
    threads = result.policy.get("threads", 0)
    setting = canonical_json([result.policy.get(name, 0) for name in ("sm_clock_mhz", "power_limit_w")])
    l2 = result.l2_state or str(result.policy.get("l2", PREFERRED_L2))
    return setting == "[0,0]", l2, threads if isinstance(threads, int) else 0, setting


def candidates(rows: Iterable[Result], sources: Mapping[str, str] | None = None) -> list[Candidate]:
    """The candidates of one problem (and of what approximates it, where such rows are given) from its valid rows: of the state with the
    device as it is, that is cold, has most candidates, and is newest, in that order.

    `sources` maps kernel ids to the digest of their code now. Rows of older code stand only where the kernel has none of its present
    code (or, where that is unknown, of its newest).
    """
    states: dict[tuple[bool, str, int, str], list[Result]] = defaultdict(list)
    for row in sorted(rows, key=age):
        states[state(row)].append(row)
    if not states:
        return []
    groups = {key: _grouped(group, sources or {}) for key, group in states.items()}

    def rank(key: tuple[bool, str, int, str]) -> tuple[Json, ...]:
        return key[0], key[1] == PREFERRED_L2, len(groups[key]), age(states[key][-1]), key

    return groups[max(groups, key=rank)]


def _grouped(rows: list[Result], sources: Mapping[str, str]) -> list[Candidate]:
    standing: dict[str, str] = {}  # kernel -> the digest of the code whose rows stand
    for row in rows:
        standing[row.kernel] = row.source_digest
    for row in rows:
        if sources.get(row.kernel) == row.source_digest:
            standing[row.kernel] = row.source_digest
    found: dict[tuple[str, str, str, str], list[Result]] = defaultdict(list)
    for row in rows:
        if row.source_digest == standing[row.kernel]:
            found[(row.kernel, canonical_json(row.config), row.source_digest, row.problem_key)].append(row)
    made = (Candidate(kernel, config, code, tuple(group), key) for (kernel, config, code, key), group in found.items())
    return sorted(made, key=lambda c: c.name)
