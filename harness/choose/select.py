"""The rows of one chip and one device that may be chosen from, per problem, and why others may not."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from klab.harness.choose.candidates import Candidate, candidates, why_not
from klab.harness.choose.settle import Defaults
from klab.harness.choose.wrong import distrust
from klab.harness.store.query import age
from klab.harness.store.result import Result
from klab.harness.tune.objective import Objective
from klab.kernels.errors import UsageError


class Selection:
    """`rows` are those of the chip and the device, oldest first; `notes` say what was set aside. Arguments as of `choose.choose`.

    UsageError when the chip is not given and not plain.
    """

    def __init__(
        self,
        results: Iterable[Result],
        objective: Objective,
        *,
        chip: str | None = None,
        device: str | None = None,
        sources: Mapping[str, str] | None = None,
        defaults: Defaults | None = None,
        current_only: bool = False,
        max_error: float | None = None,
    ) -> None:
        self._max_error = max_error
        rows = sorted(results, key=age)
        self.objective, self._sources, self._current_only = objective, sources, current_only
        self.chip = chip or _only_chip(rows)
        rows = [row for row in rows if row.chip == self.chip]
        self.notes: list[str] = []
        self.device = device or _newest_device(rows, objective)
        # A row without a device never reached one: what failed in screening fails on all.
        elsewhere = [row for row in rows if row.device not in (self.device, "")]
        if self.device and elsewhere:
            others = ", ".join(sorted({row.device for row in elsewhere}))
            self.notes.append(f"{len(elsewhere)} results of other devices of this chip are set aside: {others}")
            rows = [row for row in rows if row.device in (self.device, "")]
        self.rows = rows
        self._by_problem: dict[str, list[Result]] = defaultdict(list)
        for row in rows:
            self._by_problem[row.problem_key].append(row)
            if max_error is not None and row.wide_key:
                self._by_problem[row.wide_key].append(row)
        self._doubt = distrust(rows, defaults)

    def candidates(self, problem_key: str) -> list[Candidate]:
        """The candidates of a problem, none when nothing may be chosen."""
        usable = [row for row in self._by_problem.get(problem_key, []) if self._refusal(row) is None]
        return candidates(usable, self._sources)

    def why_open(self, problem_key: str) -> str:
        """Why a problem has no candidates."""
        rows = self._by_problem.get(problem_key, [])
        if not rows:
            return "never measured on this device"
        reasons = Counter(self._refusal(row) or "" for row in rows)
        most = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        listed = "; ".join(f"{count} x {reason}" for reason, count in most[:3])
        return f"none of {len(rows)} results may be chosen: {listed}{'; ...' if len(most) > 3 else ''}"

    def _refusal(self, row: Result) -> str | None:
        reason = why_not(row, self.objective) or self._doubt(row)
        if reason is None and self._current_only and (self._sources or {}).get(row.kernel, row.source_digest) != row.source_digest:
            reason = "the kernel's code has changed since"
        return reason or too_far(row, self._max_error)


def too_far(row: Result, max_error: float | None) -> str | None:
    """Why a result in a narrower format may not be chosen: further from the unquantised problem than `max_error`, or not known."""
    if max_error is None or not row.wide_key:
        return None
    if row.wide_error is None:
        return "its error against the unquantised problem was not measured"
    return f"an error of {row.wide_error:.2g} against the unquantised problem" if row.wide_error > max_error else None


def _only_chip(rows: list[Result]) -> str:
    chips = sorted({row.chip for row in rows})
    if len(chips) > 1:
        raise UsageError(f"the results are of several chips ({', '.join(chips)}): name one with --chip")
    return chips[0] if chips else ""


def _newest_device(rows: list[Result], objective: Objective) -> str:
    """The device of the newest row that may be chosen (rows are sorted by age), or "" when there is none."""
    return next((row.device for row in reversed(rows) if why_not(row, objective) is None), "")
