"""Questions to the store that need the standard library alone; `load` and `compact`, which need more, are here by name too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import total_ordering
from pathlib import Path

from klab.harness.store.compact import Compaction, compact
from klab.harness.store.frame import load
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result, Status

__all__ = [
    "Compaction",
    "Numerics",
    "age",
    "compact",
    "done_keys",
    "latest",
    "load",
    "numerics",
    "numerics_verified",
    "standing_incorrect",
    "verified_kernels",
]

_EPOCH_START = datetime(1970, 1, 1, tzinfo=UTC)


@total_ordering
class _Content:
    """What tells two rows of one run and second apart. Its text is made only where they are compared: that of 100 rounds takes 40 us."""

    __slots__ = ("_row",)

    def __init__(self, row: Result) -> None:
        self._row = row

    def __str__(self) -> str:
        return f"{self._row.status} {self._row.median_us} {self._row.samples_us} {self._row.reason}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Content) and (self._row is other._row or str(self) == str(other))

    def __lt__(self, other: _Content) -> bool:
        return self._row is not other._row and str(self) < str(other)

    __hash__ = None  # type: ignore[assignment]


def age(result: Result) -> tuple[datetime, str, _Content]:
    """What rows are ordered by, oldest first: when they were recorded, then the run, then the content, to leave nothing to chance."""
    try:
        at = datetime.fromisoformat(result.recorded_at)
    except ValueError:
        at = _EPOCH_START
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return at, result.run_id, _Content(result)


def done_keys(results: Iterable[Result], epoch: str) -> set[str]:
    """Keys of the trials that need no second measurement: status ok in this epoch (the same driver, toolchain and device)."""
    return {r.key for r in results if r.status is Status.OK and r.epoch == epoch}


def latest(results: Iterable[Result]) -> list[Result]:
    """What stands, per trial: its newest ok row, and its newest row that failed if that is newer still.

    So a failure tonight hides no result of yesterday, and is not hidden by it. Rows of another kind (screened, say) stand on their own.
    Sorted by operator, problem, kernel and age.
    """
    fine: dict[tuple[str, str], Result] = {}
    failed: dict[tuple[str, str], Result] = {}
    for result in results:
        rows = fine if result.status is Status.OK else failed
        trial = (result.key, result.kind)
        if trial not in rows or age(rows[trial]) < age(result):
            rows[trial] = result
    newer = [r for trial, r in failed.items() if trial not in fine or age(fine[trial]) < age(r)]
    return sorted([*fine.values(), *newer], key=lambda r: (r.operator, r.problem_label, r.kernel, r.key, age(r)))


def numerics_verified(result: Result) -> bool:
    """True when this row proves that the kernel computed the right thing on the chip itself (throttling costs time, not correctness)."""
    return (
        result.status in (Status.OK, Status.THROTTLED)
        and result.kind == "measured"
        and result.checks > 0
        and result.error is not None
        and result.tolerance is not None
        and result.error <= result.tolerance
    )


def standing_incorrect(results: Iterable[Result]) -> list[Result]:
    """Per trial its newest INCORRECT row, unless a newer row shows the trial to be right: no crash or time-out since takes it back.

    Sorted by age.
    """
    newest: dict[str, Result] = {}
    for result in results:
        tells = result.status is Status.INCORRECT or numerics_verified(result)
        if tells and (result.key not in newest or age(newest[result.key]) < age(result)):
            newest[result.key] = result
    return sorted((row for row in newest.values() if row.status is Status.INCORRECT), key=age)


@dataclass(frozen=True)
class Numerics:
    """Which code is right on which chip. `verified`: (kernel id, source digest, chip) with a checked result and no wrong one that stands;
    `wrong`: how many wrong ones stand.
    """

    verified: frozenset[tuple[str, str, str]] = frozenset()
    wrong: Mapping[tuple[str, str, str], int] = field(default_factory=dict)


def numerics(paths: Path | str | Iterable[Path | str], report: ReadReport | None = None) -> Numerics:
    """What the recorded results show of the kernels' correctness."""
    right: set[tuple[str, str, str]] = set()

    def judged() -> Iterator[Result]:
        for row in iter_results(paths, report):
            if numerics_verified(row):
                right.add(_code(row))
            yield row

    wrong = Counter(map(_code, standing_incorrect(judged())))
    return Numerics(frozenset(right - wrong.keys()), wrong)


def _code(row: Result) -> tuple[str, str, str]:
    return row.kernel, row.source_digest, row.chip


def verified_kernels(paths: Path | str | Iterable[Path | str], report: ReadReport | None = None) -> set[tuple[str, str, str]]:
    """(kernel id, source digest, chip) of every kernel that a recorded result shows to be right on such a device, and none wrong."""
    return set(numerics(paths, report).verified)
