"""What did not work: trials that ended without a verified result, with their reasons, and times that may not be chosen from."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from klab.harness.choose.candidates import why_not
from klab.harness.store.query import age
from klab.harness.store.result import Result, Status
from klab.kernels.contract import canonical_json


@dataclass(frozen=True)
class Failure:
    """Trials of one kernel that ended alike. reason: that of the newest, in one line."""

    kernel: str
    status: str
    screened: bool
    trials: int
    problems: int
    reason: str


@dataclass(frozen=True)
class Failures:
    """trials: kernels with a configuration, on a problem. aside: why timed rows are not chosen from, and how many. wavering: kernels of
    which a trial was found wrong and right by the same code.
    """

    trials: int
    kinds: tuple[Failure, ...]
    aside: tuple[tuple[str, int], ...]
    wavering: tuple[str, ...]

    @property
    def failed(self) -> int:
        """Trials that ended without a verified result."""
        return sum(one.trials for one in self.kinds)


def failures(rows: Iterable[Result]) -> Failures:
    """By the newest row of each trial, so that what works since is no failure. Wrong results first, then what happened most."""
    every = sorted((row for row in rows if row.kind in ("measured", "screened")), key=age)
    newest: dict[tuple[str, str, str], Result] = {}
    ends: dict[tuple[str, ...], set[Status]] = defaultdict(set)
    for row in every:
        trial = row.problem_key, row.kernel, canonical_json(dict(row.config))
        newest[trial] = row
        ends[*trial, row.source_digest].add(row.status)
    groups: dict[tuple[str, str, bool], list[Result]] = defaultdict(list)
    for row in newest.values():
        if row.status is not Status.OK:
            groups[row.kernel, row.status.value, row.kind == "screened"].append(row)
    kinds = [_failure(*kind, group) for kind, group in groups.items()]
    aside = Counter(
        reason for row in every if row.status is Status.OK and row.median_us is not None and (reason := why_not(row)) is not None
    )
    order = sorted(kinds, key=lambda one: (one.status != Status.INCORRECT.value, one.screened, -one.trials, one.kernel, one.status))
    wavering = {kernel for (_, kernel, _, _), found in ends.items() if {Status.OK, Status.INCORRECT} <= found}
    return Failures(len(newest), tuple(order), tuple(sorted(aside.items(), key=lambda item: (-item[1], item[0]))), tuple(sorted(wavering)))


def _failure(kernel: str, status: str, screened: bool, rows: Sequence[Result]) -> Failure:
    reason = " ".join(max(rows, key=age).reason.split())
    return Failure(kernel, status, screened, len(rows), len({row.problem_key for row in rows}), reason or "no reason was recorded")
